"""Small evaluations while training: EMA samples through the code of sample_ddp.py, measured by the
code of evaluate_fid.py. The number of images is part of each name: `FD-1k[...]`, `FID-1k`."""

import torch
from accelerate import Accelerator

from models.errors import UserError
from utils.build import Nets
from utils.config import Config
from utils.evaluation import Options, choose_metrics, evaluate
from utils.feature_stats import Ranks
from utils.generate import Sampling, draw_images
from utils.reference import Reference
from utils.report import scalars


class OnlineEvaluation:
    """Every `eval.every` steps; the feature network is loaded once, at the start, so that missing
    weights end the run before it has begun."""

    def __init__(self, config: Config, accelerator: Accelerator):
        self.config, self.accelerator, e = config, accelerator, config.eval
        self.options = Options(features=e.features, metrics=tuple(e.metrics), weights=e.weights)
        self.ranks = self.net = None
        if e.every:
            self._prepare()
        self.sampling = Sampling(
            seed=config.run.seed,
            solver=e.solver,
            steps=e.steps,
            cfg_scale=e.cfg_scale,
            path=config.loss.diffusion.path,
            precision=config.run.precision,
        )

    def _prepare(self) -> None:
        """Load the feature network and try the settings on the reference."""
        self.ranks = Ranks()
        try:
            self.net = self.options.load(self.ranks)
            target = Reference(self._reference(), self.config.data.resolution)
            choose_metrics(self.options.metrics, self.net.family, target)
        except UserError as error:
            raise UserError(
                f"{error} (in training these are eval.features, eval.weights, eval.metrics and "
                "eval.reference; eval.every=0 leaves evaluation out)"
            ) from None

    def is_due(self, step: int) -> bool:
        return self.config.eval.every > 0 and step % self.config.eval.every == 0

    def measure(self, nets: Nets) -> dict[str, float]:
        """{"eval/FD-1k[...]": value, ...}, the same on every rank."""
        record = evaluate(
            self._samples(nets), self._reference(), self.options, net=self.net, ranks=self.ranks
        )
        return {f"eval/{name}": value for name, value in scalars(record).items()}

    def _samples(self, nets: Nets) -> torch.Tensor:
        """(N, 3, H, W) uint8: all images on every rank, in the order of their indices."""
        e, a = self.config.eval, self.accelerator
        size = self.config.data.resolution
        images = torch.zeros(e.num, 3, size, size, dtype=torch.uint8)
        starts = range(0, e.num, e.batch_size)
        for start in starts[a.process_index :: a.num_processes]:
            block = range(start, min(start + e.batch_size, e.num))
            images[start : block.stop] = draw_images(
                self.sampling, nets.ema, nets.vae, block, a.device
            )
        # every image was made by one rank and is zero on the others
        return a.reduce(images.to(a.device), "sum").cpu()

    def _reference(self) -> str:
        """`eval.reference`, or the training images."""
        d = self.config.data
        if self.config.eval.reference:
            return self.config.eval.reference
        place = d.split if d.source == "digits" else d.path
        return f"{d.source}:{place}@{d.resolution}"
