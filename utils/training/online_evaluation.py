"""Small evaluations while training: EMA samples through the code of sample_ddp.py, measured by the
code of evaluate_fid.py. The number of images is part of each name: `FD-1k[...]`, `FID-1k`."""

import torch

from models.errors import UserError
from utils.config.schema import Config
from utils.data.base import Source
from utils.distributed import Ranks
from utils.evaluation.evaluate import choose_metrics, evaluate
from utils.evaluation.image_sets import SourceImages
from utils.evaluation.networks import load_network
from utils.evaluation.options import Options
from utils.evaluation.reference import Reference
from utils.evaluation.report import scalars
from utils.sampling.images import draw_images
from utils.sampling.settings import SamplingSettings
from utils.training.networks import Networks


class OnlineEvaluation:
    """Evaluates every `eval.every` steps. The feature network is loaded once, at the start, so that
    missing weights end the run before it has begun."""

    def __init__(self, config: Config, source: Source):
        self.config, self.source, e = config, source, config.eval
        self.options = Options(features=e.features, metrics=tuple(e.metrics), weights=e.weights)
        self.settings = SamplingSettings(
            seed=config.run.seed,
            solver=e.solver,
            steps=e.steps,
            cfg_scale=e.cfg_scale,
            path=config.loss.diffusion.path,
            precision=config.run.precision,
            batch_size=e.batch_size,
        )
        self.ranks = self.net = None
        if e.every:
            self._prepare()

    def _prepare(self) -> None:
        """Load the feature network and try the settings on the reference."""
        self.ranks = Ranks()
        try:
            self.net = load_network(self.options, self.ranks)
            target = Reference(self.reference, self.config.data.resolution)
            choose_metrics(self.options.metrics, self.net.family, target)
        except UserError as error:
            raise UserError(
                f"{error} (in training these are eval.features, eval.weights, eval.metrics and "
                "eval.reference; eval.every=0 leaves evaluation out)"
            ) from None

    def is_due(self, step: int) -> bool:
        """Every `eval.every` steps; 0 = never."""
        return self.config.eval.every > 0 and step % self.config.eval.every == 0

    def measure(self, nets: Networks) -> dict[str, float]:
        """{"eval/FD-1k[...]": value, ...}, the same on every rank."""
        record = evaluate(
            self.sample(nets), self.reference, self.options, net=self.net, ranks=self.ranks
        )
        return {f"eval/{name}": value for name, value in scalars(record).items()}

    def sample(self, nets: Networks) -> torch.Tensor:
        """(N, 3, H, W) uint8: all images on every rank, in the order of their indices."""
        e, ranks, size = self.config.eval, self.ranks, self.config.data.resolution
        images = torch.zeros(e.num, 3, size, size, dtype=torch.uint8)
        starts = range(0, e.num, e.batch_size)
        for start in starts[ranks.rank :: ranks.world]:
            block = range(start, min(start + e.batch_size, e.num))
            images[block.start : block.stop] = draw_images(
                self.settings, nets.ema, nets.vae, block, ranks.device
            )
        # every image was made by one rank and is zero on the others
        return ranks.sum(images.to(ranks.device)).cpu()

    @property
    def reference(self) -> str | SourceImages:
        """`eval.reference`, or the training images."""
        d = self.config.data
        name = ":".join(filter(None, (d.source, d.path or d.split)))
        return self.config.eval.reference or SourceImages(self.source, f"{name}@{d.resolution}")
