"""Samples against a reference: one code path for evaluate_fid.py and for evaluation in training."""

from collections.abc import Callable, Collection
from pathlib import Path

import torch

from models.checks.errors import UserError, short
from utils.distributed import Ranks
from utils.evaluation.comparable import assess
from utils.evaluation.formulas.frechet import Statistics
from utils.evaluation.formulas.uncertainty import GROUPS
from utils.evaluation.images.beside import check_content, record_beside
from utils.evaluation.images.image_sets import ImageSet, open_images
from utils.evaluation.images.npz_images import npz_members
from utils.evaluation.metrics import METRICS, Metric, Pair, select_metrics
from utils.evaluation.networks import FeatureNet, load_network
from utils.evaluation.options import Options
from utils.evaluation.reference import Reference
from utils.evaluation.report import add_result, metric_name, new_record
from utils.evaluation.statistics import Progress, collect
from utils.precision import exact_float32


def evaluate(
    samples, reference, options: Options | None = None, *, net: FeatureNet | None = None,
    ranks: Ranks | None = None, progress: Callable[[str], Progress] | None = None,
) -> dict:  # fmt: skip
    """Measure `samples` against `reference` => a JSON-able record (utils.evaluation.report).

    Both may be anything `open_images` takes, also images in memory: a uint8 tensor (N, 3, H, W) or
    array (N, H, W, 3). The reference may also be ADM's .npz, a `Reference` that is open already, or
    None for metrics that need none.
    Every rank makes the call with the same arguments and gets the record; with
    `Ranks(distributed=False)` a rank works alone. `net` replaces loading `options.features`;
    `progress(what)` returns a callback that takes the number of images done, and of all images.
    Raises `UserError`.
    """
    options, ranks = options or Options(), ranks or Ranks(device=net.device if net else None)
    refuse_swapped(samples, reference)
    images = open_images(samples)
    target = reference
    if not (reference is None or isinstance(reference, Reference)):
        target = Reference(reference, images.size[0])
    _check_sizes(images, target)
    if net is None:
        net = load_network(options, ranks)
        check_network(net, images.size)
    metrics, left_out = check_possible(images, target, options.metrics, net)
    errors = options.uncertainty and len(images) >= 2 * GROUPS
    if options.uncertainty and not errors:
        left_out.append(f"standard errors left out: they need at least {2 * GROUPS} images")

    compared = [metric for metric in metrics if metric.needs_reference]
    of_reference = {}
    if compared:
        assert target is not None  # `check_possible` refuses these metrics without one
        of_reference = target.statistics(
            net, dict.fromkeys(metric.feature for metric in compared), ranks, options,
            rows_of={metric.feature for metric in compared if metric.reference_rows},
            progress=progress and progress("reference"),
        )  # fmt: skip
    of_samples = collect(
        images, net, dict.fromkeys(metric.feature for metric in metrics), ranks,
        batch_size=options.batch_size, workers=options.workers,
        rows_of={metric.feature for metric in metrics if metric.sample_rows},
        groups={m.feature: GROUPS for m in metrics if errors and m.error and not m.sample_rows},
        progress=progress and progress("samples"),
    )  # fmt: skip

    content = ranks.on_main(images.fingerprint)
    beside, note = check_content(images.record, content, images.name)
    record = new_record(net, images, content, beside)
    record["warnings"] += [note] if note else []
    record["reference"] = dict(target.facts) if target else None
    record["warnings"] += left_out + _remarks(images, record)
    record["warnings"] += target.notes(net.family) if target else []

    def complete() -> dict:
        pairs = {name: Pair(of_reference.get(name), each, net, options.pr_mode)
                 for name, each in of_samples.items()}  # fmt: skip
        with exact_float32():
            for metric in metrics:
                pair = pairs[metric.feature]
                result = metric.compute(pair)
                if errors and metric.error:
                    result.details |= {"standard_error": metric.error(pair),
                                       "uncertainty": metric.error_by}  # fmt: skip
                add_result(record, metric, result, net)
        record["samples"]["copies"] = _count_copies(images, of_samples.values())
        assess(record, {metric_name(m, net, record["n"]): m.name for m in metrics})
        return record

    return ranks.on_main(complete)


def check_possible(
    images: ImageSet, target: Reference | None, asked: tuple[str, ...] | None, net: FeatureNet
) -> tuple[list[Metric], list[str]]:
    """What `choose_metrics` gives; `UserError` unless these metrics can be computed of these images
    with this network and reference. No image is read."""
    metrics, left_out = check_sets(images, target, asked, net.family)
    if target:
        target.check_file(net, {metric.feature for metric in metrics if metric.needs_reference})
    return metrics, left_out


def check_sets(
    images: ImageSet, target: Reference | None, asked: tuple[str, ...] | None, family: str
) -> tuple[list[Metric], list[str]]:
    """`check_possible` without the network, of which only the family is known."""
    _check_sizes(images, target)
    metrics, left_out = choose_metrics(asked, family, target)
    _check_counts(metrics, images, target)
    return metrics, left_out


def check_network(net: FeatureNet, size: tuple[int, int]) -> None:
    """`UserError` unless the network takes images of this size (H, W); it is tried on one."""
    height, width = size
    try:
        net(torch.zeros(1, 3, height, width, dtype=torch.uint8))
    except (RuntimeError, ValueError, AssertionError) as error:
        raise UserError(f"{net.label} takes no images of {height}x{width} px ({short(error, 100)})"
                        ": choose other features") from None  # fmt: skip


def choose_metrics(
    asked: tuple[str, ...] | None, family: str, target: Reference | None
) -> tuple[list[Metric], list[str]]:
    """Rows of `METRICS` to compute, in its order, and a line for each default one left out.
    `asked`: names, or None for the default metrics. Raises `UserError` for a name that is unknown
    or not defined for this network family and reference."""
    unknown = [name for name in asked or () if name not in METRICS]
    if unknown:
        raise UserError(f"--metrics {unknown[0]}: unknown, expected some of {','.join(METRICS)}")
    chosen, left_out = [], []
    for metric in select_metrics(METRICS, asked):
        problem = _undefined(metric, family, target)
        if problem is None:
            chosen.append(metric)
        elif asked:
            raise UserError(f"--metrics {metric.name}: {problem}; leave it out")
        elif family == "inception":
            left_out.append(f"{metric.name} left out: {problem}")
    if not chosen:
        raise UserError(f"nothing to compute: {'; '.join(left_out) or 'a reference is needed'}")
    return chosen, left_out


def _undefined(metric: Metric, family: str, target: Reference | None) -> str | None:
    """Why a metric cannot be computed, or None if it can."""
    if metric.families and family not in metric.families:
        families = " or ".join(each.capitalize() for each in metric.families)
        return f"defined for {families} features only, not for {family}"
    if not metric.needs_reference:
        return None
    if target is None:
        return "needs a --reference"
    return target.missing(family, metric.feature, rows=metric.reference_rows)


def refuse_swapped(samples, reference) -> None:
    """`UserError` where the files themselves show that the two arguments are exchanged."""
    paths = [isinstance(s, str | Path) and Path(s).is_file() for s in (samples, reference)]
    remedy = "it looks as if --samples and --reference are swapped"
    samples_npz = paths[0] and Path(samples).suffix == ".npz"
    if samples_npz and npz_members(Path(samples)) >= {"mu", "sigma"}:
        raise UserError(f"{samples} holds statistics of a reference (mu, sigma): {remedy}")
    if all(paths):
        sampled = [record_beside(s)[0] is not None for s in (samples, reference)]
        if sampled == [False, True]:
            raise UserError(f"{reference} has a sampling record beside it, {samples} has none: "
                            f"{remedy}")  # fmt: skip


def _check_sizes(images: ImageSet, target: Reference | None) -> None:
    """`UserError` unless samples and reference images have one size."""
    if target is None or target.images is None or tuple(images.size) == tuple(target.images.size):
        return
    (h, w), (rh, rw) = images.size, target.images.size
    raise UserError(f"{images.name} has {h}x{w} images, {target.name} {rh}x{rw}: expected the same "
                    "size; nothing is resized here, sample or pack at one resolution")  # fmt: skip


def _check_counts(metrics: list[Metric], images: ImageSet, target: Reference | None) -> None:
    """`UserError` if one of the sets has too few images for one of the metrics."""
    for metric in metrics:
        reference = target.images if target and metric.needs_reference else None
        for each in (images, reference):
            if each is not None and len(each) < metric.least_images:
                raise UserError(f"{each.name} has {len(each)} image(s), {metric.name} needs at "
                                f"least {metric.least_images}; give more images")  # fmt: skip


def _count_copies(images: ImageSet, statistics: Collection[Statistics]) -> int | None:
    """How many images equal an earlier one, by their hashes or else by their features; None if
    neither was kept. For the main process."""
    rows = images.hashes if images.hashed else next(
        (each.rows for each in statistics if each.rows is not None), None
    )  # fmt: skip
    return None if rows is None else len(rows) - len({hash(row.tobytes()) for row in rows})


def _remarks(images: ImageSet, record: dict) -> list[str]:
    """What the reader should know about the samples."""
    remarks = []
    if images.lossy:
        remarks.append(f"{images.name} holds lossily compressed images: they move the distances")
    if images.kind.startswith("npz") and record["samples"]["uint8_rule"] is None:
        remarks.append("the samples have no record: uint8 rule and label sampling are unknown")
    reference = record["reference"] or {}
    if reference.get("content_sha256") == record["samples"]["content_sha256"]:
        remarks.append("samples and reference are the same images")
    return remarks
