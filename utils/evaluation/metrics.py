"""Every metric is one row of a table: what it needs, what it is called, and how it is computed.

`METRICS` of samples, most of them against a reference; `VAE_METRICS` of a VAE's reconstructions. To
add a metric, write its function and its row in this file; everything else follows from the row.
This file imports no torch at its top, because --help lists the names.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

import numpy as np

from models.checks.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from utils.evaluation.formulas.pictures import LatentStatistics
    from utils.evaluation.networks import FeatureNet

# samples in published tables
PAPER_SIZE = 50_000
# the Inception Score is a mean over splits: ADM's have 5,000 images in file order
IS_SPLIT = 5000
# seed of the random order in which the Inception Score is computed a second time
IS_SHUFFLE_SEED = 2020
# relative difference between the two orders from which on there is a warning
IS_ORDER_TOLERANCE = 0.02
# precision and recall: ADM takes the 3rd nearest neighbour, the point itself not counted
PR_NEIGHBOUR = 3
# KID is a mean over random subsets of each set; the seed is that of torch-fidelity
KID_SUBSETS, KID_SIZE, KID_SEED = 100, 1000, 2020
# how a standard error is found
JACKKNIFE = "jackknife over 13 interleaved groups of the samples, the reference fixed"
BINOMIAL = "binomial: a share of independent points"


@dataclass
class Pair:
    """What a metric is computed from: statistics of one feature, which `net` computed, of the
    samples and of the reference. `reference` is None, and so are the rows of either, unless the
    metric asks for them (`Metric.needs_reference`, `reference_rows`, `sample_rows`)."""

    reference: Any
    samples: Any
    net: FeatureNet
    pr_mode: str

    def rows(self) -> tuple[Tensor, Tensor]:
        """Features of the reference (M, D) and of the samples (N, D), float32, on the device."""
        import torch

        both = self.reference.rows, self.samples.rows
        of_reference, of_samples = (torch.from_numpy(r).to(self.net.device) for r in both)
        return of_reference, of_samples

    @cached_property
    def precision_recall(self) -> tuple[float, float]:
        """Precision and recall, which are one computation."""
        from utils.evaluation.formulas.manifolds import precision_recall

        return precision_recall(*self.rows(), k=PR_NEIGHBOUR, mode=self.pr_mode)

    @cached_property
    def kid(self) -> tuple[np.ndarray, np.ndarray]:
        """KID of each subset, and without each group of a jackknife."""
        from utils.evaluation.formulas.scores import kid_of_subsets

        reference, samples = self.rows()
        subsets, size = kid_subsets(len(reference), len(samples))
        return kid_of_subsets(samples, reference, subsets=subsets, size=size, seed=KID_SEED)


@dataclass
class Result:
    """A number, what the record says with it (`protocol`: settings of the computation), and
    warnings, each the rest of a sentence that begins with the metric's name."""

    value: float
    details: dict = field(default_factory=dict)
    protocol: dict = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Metric:
    """One metric of samples: a row of `METRICS`."""

    # as in --metrics
    name: str
    compute: Callable[[Pair], Result]
    # network family: names in the record with the family's published weights, for 50,000 images,
    # and for another number N, to which "@N" is appended
    published: Mapping[str, tuple[str, str]]
    # its name with any other network, to which "[network]" is appended
    other: str
    # which output of the feature network it is computed from: "pool" or "spatial"
    feature: str = "pool"
    # network families for which it is defined; () = all
    families: tuple[str, ...] = ()
    needs_reference: bool = True
    # whether it needs the feature of every image, not only mean and covariance. ADM's reference
    # file has 10,000 images for this, though its mean and covariance are of the whole training set.
    reference_rows: bool = False
    sample_rows: bool = False
    # smallest number of images of each set
    least_images: int = 2
    # which way is better, and whether its expectation is the same for any number of samples
    higher_is_better: bool = False
    unbiased: bool = False
    # its standard error, see formulas/uncertainty.py: from `sample_rows`, or without them from the
    # groups of the samples' statistics; None = there is none
    error: Callable[[Pair], float] | None = None
    # how that is found, for the record
    error_by: str = JACKKNIFE
    # whether it is computed when no metrics are named
    by_default: bool = True


def by_name(*rows):
    """A table: its rows by their names, in their order."""
    return {row.name: row for row in rows}


def select_metrics(table: Mapping, asked: tuple[str, ...] | None) -> list:
    """Rows of a table, in its order: those asked for by name, or the default ones for None.
    `UserError` for an unknown name."""
    for name in asked or ():
        if name not in table:
            raise UserError(f"--metrics {name!r}: expected some of {','.join(table)}")
    return [row for name, row in table.items() if (name in asked if asked else row.by_default)]


def frechet(pair: Pair) -> Result:
    """Frechet distance between Gaussians fitted to the features of both sets."""
    from utils.evaluation.formulas.frechet import frechet_between

    reference, samples = pair.reference, pair.samples
    value, dim = frechet_between(reference, samples), len(samples.mean)
    result = Result(value, {"n": samples.n, "n_reference": reference.n, "dimension": dim})
    result.details["rank_deficient"] = reference.rank_deficient or samples.rank_deficient
    if result.details["rank_deficient"]:
        smallest = min(s.n for s in (reference, samples) if s.n is not None)
        result.warnings.append(f"is rank-deficient: {smallest} images for {dim} dimensions; "
                               "compare only with numbers from as many images")  # fmt: skip
    if (floor := reference.floor) is not None:
        times = value / floor if floor > 0 else None
        result.details |= {"floor": floor, "times_floor": times, "floor_images": reference.n // 2}
    return result


def inception_score(pair: Pair) -> Result:
    """Inception Score in file order, as ADM computes it; beside it the score in random order."""
    from utils.evaluation.formulas import scores

    assert pair.net.fc_weight is not None  # of Inception, the only family with this metric
    rows, weight = pair.samples.rows, pair.net.fc_weight.float().cpu()
    order = np.random.Generator(np.random.PCG64(IS_SHUFFLE_SEED)).permutation(len(rows))
    value, std = scores.inception_score(rows, weight, split_size=IS_SPLIT)
    shuffled, _ = scores.inception_score(rows, weight, order, split_size=IS_SPLIT)
    protocol = {"inception_score": {"split_size": IS_SPLIT, "order": "file", "bias": False}}
    result = Result(value, {"std": std, "shuffled": shuffled}, protocol)
    if abs(value / shuffled - 1) > IS_ORDER_TOLERANCE:
        result.warnings.append(
            f"is {value:.2f} in file order but {shuffled:.2f} shuffled: the samples are sorted (by "
            "class?); papers with random labels correspond to the shuffled value")  # fmt: skip
    return result


def frechet_error(pair: Pair) -> float:
    from utils.evaluation.formulas import uncertainty

    return uncertainty.frechet_error(pair.reference, pair.samples)


def inception_score_error(pair: Pair) -> float:
    from utils.evaluation.formulas import scores, uncertainty

    assert pair.net.fc_weight is not None
    rows, weight = pair.samples.rows, pair.net.fc_weight.float().cpu()
    without = scores.inception_score_without(rows, weight, split_size=IS_SPLIT)
    return uncertainty.jackknife(without)


def kid_subsets(n_reference: int, n: int) -> tuple[int, int]:
    """Number and size of the subsets of KID; of sets that are smaller than the subsets, all images
    are taken, once."""
    size = min(KID_SIZE, n_reference, n)
    return (1 if size == max(n_reference, n) else KID_SUBSETS), size


def kid(pair: Pair) -> Result:
    """Kernel Inception Distance: unbiased, and so comparable between numbers of images."""
    n_reference, n = len(pair.reference.rows), len(pair.samples.rows)
    (subsets, size), (values, _) = kid_subsets(n_reference, n), pair.kid
    protocol = {"subsets": subsets, "subset_size": size, "seed": KID_SEED, "degree": 3,
                "n_reference": n_reference, "n": n}  # fmt: skip
    result = Result(float(values.mean()), {"std": float(values.std())}, {"kid": protocol})
    if size < KID_SIZE:
        result.warnings.append(f"is of subsets of {size} images, published ones of {KID_SIZE}")
    return result


def kid_error(pair: Pair) -> float:
    from utils.evaluation.formulas import uncertainty

    return uncertainty.jackknife(pair.kid[1])


def precision(pair: Pair) -> Result:
    """Share of the samples that lie in the manifold of the reference."""
    return _with_protocol(pair, pair.precision_recall[0])


def recall(pair: Pair) -> Result:
    """Share of the reference that lies in the manifold of the samples."""
    return _with_protocol(pair, pair.precision_recall[1])


def precision_error(pair: Pair) -> float:
    from utils.evaluation.formulas import uncertainty

    return uncertainty.share_error(pair.precision_recall[0], len(pair.samples.rows))


def recall_error(pair: Pair) -> float:
    from utils.evaluation.formulas import uncertainty

    # the manifold is as uncertain as the samples are few
    n = min(len(pair.samples.rows), len(pair.reference.rows))
    return uncertainty.share_error(pair.precision_recall[1], n)


def _with_protocol(pair: Pair, share: float) -> Result:
    protocol = {"k": PR_NEIGHBOUR, "mode": pair.pr_mode,
                "n_reference": len(pair.reference.rows), "n": len(pair.samples.rows)}  # fmt: skip
    return Result(share, protocol={"precision_recall": protocol})


METRICS: dict[str, Metric] = by_name(
    Metric("fid", frechet, other="FD", error=frechet_error,
           published={"inception": ("gFID-50K", "FID"), "dinov2": ("FD-DINOv2-50K", "FD-DINOv2")}),
    Metric("sfid", frechet, {"inception": ("sFID-50K", "sFID")}, other="sFD",
           feature="spatial", families=("inception",), error=frechet_error),
    Metric("is", inception_score, {"inception": ("IS-50K", "IS")}, other="IS",
           families=("inception",), needs_reference=False, sample_rows=True,
           error=inception_score_error, higher_is_better=True),
    Metric("precision", precision, {"inception": ("precision", "precision")}, other="precision",
           reference_rows=True, sample_rows=True, least_images=PR_NEIGHBOUR + 1,
           error=precision_error, error_by=BINOMIAL, higher_is_better=True, unbiased=True),
    Metric("recall", recall, {"inception": ("recall", "recall")}, other="recall",
           reference_rows=True, sample_rows=True, least_images=PR_NEIGHBOUR + 1,
           error=recall_error, error_by=BINOMIAL, higher_is_better=True),
    Metric("kid", kid, {"inception": ("KID-50K", "KID")}, other="KD", reference_rows=True,
           sample_rows=True, error=kid_error, unbiased=True, by_default=False),
)  # fmt: skip


@dataclass
class Pictures:
    """A batch of images and their reconstructions, each (n, 3, H, W): as uint8, and as float in
    [-1, 1], clamped. `lpips` is the network of LPIPS, or None."""

    original_u8: Tensor
    reconstruction_u8: Tensor
    original: Tensor
    reconstruction: Tensor
    lpips: nn.Module | None


@dataclass(frozen=True)
class VaeMetric:
    """One metric of reconstructions: a row of `VAE_METRICS`, computed by exactly one of `features`,
    `pictures` and `latents`."""

    # as in --metrics
    name: str
    # what is measured and how, for the record
    protocol: str
    # the key under which the record's "protocol" says it; "" = the metric's name
    protocol_name: str = ""
    # compares features of the images (reference) and of their reconstructions (samples)
    features: Metric | None = None
    # value of each image of a batch => (n,); the record has the mean over all images
    pictures: Callable[[Pictures], Tensor] | None = None
    # named values of the latents of all images
    latents: Callable[[LatentStatistics], dict] | None = None
    # whether the LPIPS network has to be loaded
    needs_lpips: bool = False
    # smallest number of images, and smallest side in pixels
    least_images: int = 1
    least_side: int = 1
    # whether it is computed when no metrics are named
    by_default: bool = True


def psnr_or_ssim(name: str, pictures: Pictures) -> Tensor:
    """The formula of that name for each image: PSNR in dB, SSIM up to 1."""
    from utils.evaluation.formulas import pictures as formulas

    formula = {"psnr": formulas.psnr, "ssim": formulas.ssim}[name]
    return formula(pictures.original_u8, pictures.reconstruction_u8)


def lpips(pictures: Pictures) -> Tensor:
    """LPIPS of each image, from 0."""
    assert pictures.lpips is not None  # `VaeMetric.needs_lpips`
    return pictures.lpips(pictures.reconstruction, pictures.original).double().flatten()


RFID = {"inception": ("rFID-50K", "rFID"), "dinov2": ("rFD-DINOv2-50K", "rFD-DINOv2")}
VAE_METRICS: dict[str, VaeMetric] = by_name(
    VaeMetric("rfid", "features of the same images before and after, both as uint8, Inception's by "
              "TF1 bilinear as RAE has them (pytorch-fid's half-pixel bilinear: another number)",
              protocol_name="frechet", features=Metric("rfid", frechet, RFID, other="rFD"),
              least_images=2),
    VaeMetric("psnr", "dB per image on uint8, mse floored at 1e-10 of [0, 1], mean over images, as "
              "RAE has it (torchmetrics' default averages the mse first: lower)",
              pictures=partial(psnr_or_ssim, "psnr")),
    VaeMetric("ssim", "uint8 RGB, 11x11 Gaussian window of sigma 1.5, only where it lies inside, "
              "mean over images, as scikit-image's Gaussian one (torchmetrics' and LightningDiT's "
              "differ by up to 0.006)", pictures=partial(psnr_or_ssim, "ssim"), least_side=11),
    VaeMetric("lpips", "lpips package, net=vgg, version 0.1, inputs in [-1, 1], clamped",
              pictures=lpips, needs_lpips=True, by_default=False, least_side=16),
    VaeMetric("latents", "un-normalised posterior; spatial variance of a map, and total variation "
              "= sum of absolute differences of neighbours in a map, both averaged over maps",
              latents=lambda statistics: statistics.result()),
)  # fmt: skip
