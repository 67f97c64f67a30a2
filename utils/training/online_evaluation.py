"""Small evaluations while training: EMA samples through the code of sample_ddp.py, measured by the
code of evaluate_fid.py. The number of images is part of each name: `FD-1k[...]`, `FID-1k`."""

from collections.abc import Callable

import numpy as np
import torch

from models.checks.errors import UserError, short
from utils.config.schema import Config
from utils.data.base import Source
from utils.distributed import Ranks, default_device
from utils.evaluation.evaluate import check_network, check_possible, evaluate
from utils.evaluation.images.image_sets import SourceImages
from utils.evaluation.images.naming import spec_of_data
from utils.evaluation.images.npz_images import ArrayImages
from utils.evaluation.metrics import METRICS, select_metrics
from utils.evaluation.networks import load_features, load_network
from utils.evaluation.options import Options, parse_features
from utils.evaluation.reference import Reference
from utils.evaluation.report import scalars
from utils.precision import effective_precision
from utils.process.ending import say
from utils.sampling.images import draw_images
from utils.sampling.settings import SamplingSettings
from utils.training.networks import Networks


class OnlineEvaluation:
    """Evaluates every `eval.every` steps. The feature network is loaded once, at the start, so that
    missing weights end the run before it has begun."""

    def __init__(self, config: Config, source: Source):
        self.config, self.source, e = config, source, config.eval
        self.ranks = Ranks() if e.every else None
        device = self.ranks.device if self.ranks else default_device()
        self.options = Options(features=e.features, metrics=tuple(e.metrics), weights=e.weights)
        self.settings = SamplingSettings(
            seed=config.run.seed,
            solver=e.solver,
            steps=e.steps,
            cfg_scale=e.cfg_scale,
            path=config.loss.diffusion.path,
            precision=effective_precision(config.run.precision, device),
            batch_size=e.batch_size,
        )
        self.net = load_network(self.options, self.ranks) if self.ranks else None

    def measure(self, nets: Networks, check: Callable[[], None] = lambda: None) -> dict[str, float]:
        """{"eval/FD-1k[...]": value, ...}, the same on every rank. `check` is called after each
        batch, equally often on every rank, and may raise to end the evaluation.

        One that fails (files that have gone, no memory, samples that are not finite) is left out
        with a line, and the run goes on: {}. Of several ranks, only one may have failed, and the
        others wait for it; so there the error ends the run.
        """
        try:
            return self._measure(nets, check)
        except (UserError, OSError, torch.OutOfMemoryError) as error:
            if self.ranks is None or self.ranks.world > 1:
                raise
            say(f"warning: this evaluation is left out, and the run goes on: {short(error)}")
            return {}

    def _measure(self, nets: Networks, check: Callable[[], None]) -> dict[str, float]:
        reference = reference_of(self.config, self.source)
        record = evaluate(
            self.sample(nets, check), reference, self.options, net=self.net, ranks=self.ranks,
            progress=lambda what: lambda *done: check(),
        )  # fmt: skip
        return {f"eval/{name}": value for name, value in scalars(record).items()}

    def sample(self, nets: Networks, check: Callable[[], None] = lambda: None) -> torch.Tensor:
        """(N, 3, H, W) uint8: all images on every rank, in the order of their indices. `check` as
        in `measure`."""
        assert self.ranks is not None, "eval.every=0"
        e, ranks, size = self.config.eval, self.ranks, self.config.data.resolution
        images = torch.empty(e.num, 3, size, size, dtype=torch.uint8)
        for all_ranks in images_of_rounds(e.num, ranks.world * e.batch_size):
            # every image is made by one rank and is zero on the others
            made = torch.zeros(len(all_ranks), 3, size, size, dtype=torch.uint8)
            own = slice(ranks.rank * e.batch_size, (ranks.rank + 1) * e.batch_size)
            if block := all_ranks[own]:
                made[own] = draw_images(self.settings, nets.ema, nets.vae, block, ranks.device)
            images[all_ranks.start : all_ranks.stop] = ranks.sum(made.to(ranks.device)).cpu()
            check()
        return images


def images_of_rounds(num: int, most: int) -> list[range]:
    """What all ranks make at a time: a sum of the memory of one round at a time suffices."""
    return [range(start, min(start + most, num)) for start in range(0, num, most)]


def reference_of(config: Config, source: Source) -> str | SourceImages:
    """`eval.reference`, or the training images."""
    return config.eval.reference or SourceImages(source, spec_of_data(config.data))


def check_evaluation(config: Config, source: Source | None) -> None:
    """`UserError` unless the evaluations of a run are possible: feature network and reference are
    here, and go with the metrics, the number of images and their size; without evaluations, that
    the names of metrics and features are known. `source` None: the training images are not known.
    """
    e, side = config.eval, config.data.resolution
    options = Options(features=e.features, metrics=tuple(e.metrics), weights=e.weights)
    try:
        select_metrics(METRICS, options.metrics)
        parse_features(e.features)
        if not e.every:
            return
        net = load_features(e.features, weights=e.weights)
        check_network(net, (side, side))
        # as many images as there will be, without their memory
        black = np.broadcast_to(np.uint8(0), (e.num, side, side, 3))
        images = ArrayImages(black, "eval.num", "samples")
        if e.reference or source:
            reference = reference_of(config, source) if source else e.reference
            check_possible(images, Reference(reference, side), options.metrics, net)
    except UserError as error:
        otherwise = "; eval.every=0 leaves evaluation out" if e.every else ""
        raise UserError(
            f"{error} (in training these are eval.num, eval.features, eval.weights, eval.metrics "
            f"and eval.reference{otherwise})"
        ) from None
