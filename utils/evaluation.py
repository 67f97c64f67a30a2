"""Samples against a reference: one code path for evaluate_fid.py and for evaluation in training."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch

from models.errors import UserError
from utils.feature_stats import Ranks, Statistics, collect, frechet
from utils.features import FeatureNet, exact_float32, load_features
from utils.image_sets import ImageSet, open_images, sampling_settings, sidecar
from utils.metrics import IS_SPLIT, PR_NEIGHBOUR, inception_score, precision_recall
from utils.npz_images import npz_members
from utils.reference import ADM_KEYS, Reference
from utils.report import add_distance, judge, metric_name, new_record

METRICS = ("fid", "sfid", "is", "precision", "recall")
PR_MODES = ("adm_fp16", "fp32")
DEFAULT_CACHE = "~/.cache/repa_e/statistics"
SHUFFLE_SEED = 2020  # of the Inception Score in random order
ORDER_TOLERANCE = 0.02  # relative difference of IS in file order and shuffled that is reported


@dataclass(frozen=True)
class Options:
    """How to evaluate; the defaults are those of paper tables.

    `metrics` None: all that are defined for the features and the reference; one that is named but
    not defined is an error. `cache`: folder of reference statistics, None = keep none.
    """

    features: str = "inception"
    metrics: tuple[str, ...] | None = None
    weights: str | None = None
    weights_sha256: str | None = None
    download: bool = False
    batch_size: int = 64
    pr_mode: str = "adm_fp16"
    cache: str | Path | None = DEFAULT_CACHE

    def load(self, ranks: Ranks) -> FeatureNet:
        """The feature network on this rank's device; rank 0 alone downloads."""
        load = partial(
            load_features, self.features, weights=self.weights, weights_sha256=self.weights_sha256
        )
        if self.download:
            ranks.on_main(lambda: load(download=True).label)
        return load(device=ranks.device)


def evaluate(
    samples,
    reference,
    options: Options | None = None,
    *,
    net: FeatureNet | None = None,
    ranks: Ranks | None = None,
    progress: Callable[[str], Callable[[int], None]] | None = None,
) -> dict:
    """Measure `samples` against `reference` => a JSON-able record (utils.report), on every rank.

    Both may be anything `open_images` takes, also images in memory: a uint8 tensor (N, 3, H, W) or
    array (N, H, W, 3); the reference also ADM's .npz, or None for the Inception Score alone. Every
    rank calls it with the same arguments; `Ranks(distributed=False)` lets one rank work alone.
    `net` replaces loading `options.features`; `progress(what)` gives a callback of images done.
    """
    options, ranks = options or Options(), ranks or Ranks(device=net.device if net else None)
    refuse_swapped(samples, reference)
    images = open_images(samples)
    target = None if reference is None else Reference(reference, images.size[0])
    _check_sizes(images, target)
    net = net or options.load(ranks)
    names, skipped = choose_metrics(options.metrics, net.family, target)
    manifold = not {"precision", "recall"}.isdisjoint(names)
    _check_counts(images, target, manifold)
    keys = [key for key, name in (("pool", "fid"), ("spatial", "sfid")) if name in names]
    keys = keys if "pool" in keys or not (manifold or "is" in names) else ["pool", *keys]
    shared = {"batch_size": options.batch_size}
    known = {}
    if set(names) != {"is"}:
        known = target.statistics(
            net, keys, ranks, need_rows=manifold, cache=options.cache, **shared,
            progress=progress and progress("reference"),
        )  # fmt: skip
    found = collect(
        images, net, keys, ranks, keep_rows=manifold or "is" in names, **shared,
        progress=progress and progress("samples"),
    )  # fmt: skip
    record = new_record(net, images, ranks.on_main(images.fingerprint), sidecar(samples))
    record["reference"] = target.facts if target else None
    record["warnings"] += skipped + _remarks(images, record)
    fill = partial(_fill, record, names, known, found, net, options)
    return ranks.on_main(fill)


def refuse_swapped(samples, reference) -> None:
    """`UserError` where the files themselves show that the two arguments are exchanged."""
    paths = [isinstance(s, str | Path) and Path(s).is_file() for s in (samples, reference)]
    remedy = "it looks as if --samples and --reference are swapped"
    if (
        paths[0]
        and Path(samples).suffix == ".npz"
        and npz_members(Path(samples)) >= {"mu", "sigma"}
    ):
        raise UserError(f"{samples} holds statistics of a reference (mu, sigma): {remedy}")
    if not all(paths):
        return
    sampled = [bool(sampling_settings(sidecar(s))) for s in (samples, reference)]
    if sampled == [False, True]:
        raise UserError(
            f"{reference} has a sampling record beside it, {samples} has none: {remedy}"
        )


def _check_sizes(images: ImageSet, target: Reference | None) -> None:
    if target is None or target.images is None or tuple(images.size) == tuple(target.images.size):
        return
    (h, w), (rh, rw) = images.size, target.images.size
    raise UserError(f"{images.name} has {h}x{w} images, {target.name} {rh}x{rw}: expected the same "
                    "size; nothing is resized here, sample or pack at one resolution")  # fmt: skip


def _check_counts(images: ImageSet, target: Reference | None, manifold: bool) -> None:
    sets = [images]
    if target is not None and target.images is not None:
        sets.append(target.images)
    least = PR_NEIGHBOUR + 1 if manifold else 2
    for each in sets:
        if len(each) < least:
            what = f"precision/recall (k = {PR_NEIGHBOUR})" if manifold else "a distance"
            raise UserError(f"{each.name} has {len(each)} image(s), {what} needs at least {least}; "
                            "give more images")  # fmt: skip


def choose_metrics(
    asked: tuple[str, ...] | None, family: str, target: Reference | None
) -> tuple[list[str], list[str]]:
    """Metrics to compute and, when none were asked for by name, a line for each one left out."""
    names, lines = [], []
    for name in asked or METRICS:
        why = _undefined(name, family, target)
        if why is None:
            names.append(name)
        elif asked:
            raise UserError(f"--metrics {name}: {why}; leave it out")
        elif family == "inception":
            lines.append(f"{name} left out: {why}")
    if not names:
        raise UserError(f"nothing to compute: {'; '.join(lines) or 'a reference is needed'}")
    return names, lines


def _undefined(name: str, family: str, target: Reference | None) -> str | None:
    """Why a metric cannot be computed, or None if it can."""
    if name not in METRICS:
        return f"unknown, expected some of {','.join(METRICS)}"
    if name in ("sfid", "is") and family != "inception":
        return f"defined for Inception features only, not for {family}"
    if name == "is":
        return None
    if target is None:
        return "needs a --reference"
    if name in ("precision", "recall") and target.images is None:
        return f"{target.name} holds no images (arr_0)"
    if name == "sfid" and not target.has("spatial"):
        return f"{target.name} holds neither {' and '.join(ADM_KEYS['spatial'])} nor images"
    return None


def _remarks(images: ImageSet, record: dict) -> list[str]:
    """What the reader should know about the samples."""
    remarks = []
    if getattr(images, "lossy", False):
        remarks.append(f"{images.name} holds lossily compressed images: they move the distances")
    if images.kind.startswith("npz") and record["samples"]["uint8_rule"] is None:
        remarks.append("no record beside the samples: uint8 rule and label sampling are unknown")
    reference = record["reference"] or {}
    if reference.get("content_sha256") == record["samples"]["content_sha256"]:
        remarks.append("samples and reference are the same images")
    return remarks


def _fill(record, names, known, found, net: FeatureNet, options: Options) -> dict:
    """Rank 0: the numbers, from the statistics of both sets."""
    n = record["n"]
    for metric, key in (("fid", "pool"), ("sfid", "spatial")):
        if metric in names:
            name = metric_name(metric, net, n)
            add_distance(record, name, frechet(known[key], found[key]), known[key], found[key])
    if "is" in names:
        _add_inception_score(record, metric_name("is", net, n), found["pool"], net)
    if not {"precision", "recall"}.isdisjoint(names):
        rows = [torch.from_numpy(s["pool"].rows).to(net.device) for s in (known, found)]
        with exact_float32():
            values = precision_recall(*rows, mode=options.pr_mode)
        for metric, value in zip(("precision", "recall"), values):
            if metric in names:
                record["metrics"][metric_name(metric, net, n)] = value
        record["protocol"]["precision_recall"] = {
            "k": PR_NEIGHBOUR, "mode": options.pr_mode, "n_reference": len(rows[0]), "n": n,
        }  # fmt: skip
    judge(record, net, from_file="statistics_sha256" in (record["reference"] or {}))
    return record


def _add_inception_score(record: dict, name: str, pool: Statistics, net: FeatureNet) -> None:
    """IS in file order, as ADM computes it, beside IS in random order."""
    order = np.random.Generator(np.random.PCG64(SHUFFLE_SEED)).permutation(len(pool.rows))
    weight = net.fc_weight.float().cpu()
    value, std = inception_score(pool.rows, weight)
    shuffled, _ = inception_score(pool.rows, weight, order)
    record["metrics"][name] = value
    record["details"][name] = {"std": std, "shuffled": shuffled}
    record["protocol"]["inception_score"] = {"split_size": IS_SPLIT, "order": "file", "bias": False}
    if abs(value / shuffled - 1) > ORDER_TOLERANCE:
        record["warnings"].append(
            f"{name} is {value:.2f} in file order but {shuffled:.2f} shuffled: the samples are "
            "sorted (by class?); papers with random labels correspond to the shuffled value"
        )
