"""Which numbers may stand beside published ones, and for each other one the reasons why not.

A record is judged by what it says: the hash of the reference file, the network, the number of
images, the protocol of each metric. What cannot be known is a reason, too.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping

from models.lpips import VGG
from utils.evaluation.metrics import (
    IS_ORDER_TOLERANCE,
    METRICS,
    PAPER_SIZE,
    PR_NEIGHBOUR,
    VAE_METRICS,
    Metric,
)
from utils.evaluation.options import PR_MODES, sampling_settings
from utils.evaluation.references.known import KNOWN

PR_REFERENCES = 10_000  # images of ADM's file, with which precision and recall are published
DINOV2_REALS = 50_000  # real images drawn from the training set for FD-DINOv2 in dgm-eval
# the validation set of ImageNet, as its files are called
VALIDATION_NAME = re.compile(r"ILSVRC2012_val_(\d{8})\.\w+")
VALIDATION = "named as the 50,000 images of ImageNet's validation set; their content is not checked"
VALIDATION_SIDE = 256  # pixels at which autoencoders of ImageNet are compared

Reasons = Callable[[dict, str], Iterable[str]]


def assess(record: dict, names: Mapping[str, str]) -> None:
    """Enter into a finished record whether its numbers are comparable with published ones.

    names: of each metric as the record calls it, the name of its row in `METRICS` or `VAE_METRICS`;
    metrics without one, as statistics of latents, have no published counterpart and are not judged.
    "comparability" gets the reasons against each metric, [] for a comparable one;
    "comparable_to_papers" is whether there are none at all.
    """
    found = {}
    for name, row in names.items():
        own_images = _of_vae_images if row in VAE_METRICS else _of_samples
        reasons = [*_of_images(record), *own_images(record)]
        # what is compared of a feature network, if the metric needs one
        if metric := METRICS.get(row) or VAE_METRICS[row].features:
            reasons += _of_network(record, metric)
        reasons += OF_METRIC.get(_protocol(record, row), _unpublished)(record, name)
        found[name] = list(dict.fromkeys(reasons))
    record["comparability"] = found
    record["not_comparable_because"] = _summary(found)
    record["comparable_to_papers"] = bool(found) and not any(found.values())


def _summary(found: Mapping[str, list[str]]) -> list[str]:
    """Every reason once; one that does not hold for all metrics names those that it is about."""
    of: dict[str, list[str]] = {}
    for name, reasons in found.items():
        for reason in reasons:
            of.setdefault(reason, []).append(name)
    return [reason if len(names) == len(found) else f"{', '.join(names)}: {reason}"
            for reason, names in of.items()]  # fmt: skip


def _protocol(record: dict, row: str) -> str:
    """The key of `OF_METRIC`: the metric's row; DINOv2 has a protocol of its own."""
    label = (record["features"] or {}).get("label")
    return f"{row} of dinov2" if label == "dinov2" and row in ("fid", "rfid") else row


# --------------------------------------------------------------------------------------
# Reasons that are about the images and the network.


def _of_images(record: dict) -> Iterator[str]:
    if record["n"] != PAPER_SIZE:
        yield f"{record['n']} images, not {PAPER_SIZE}"
    if copies := record["samples"].get("copies"):
        yield f"{copies} of the images are copies of others among them"


def _of_samples(record: dict) -> Iterator[str]:
    samples, reference = record["samples"], record["reference"] or {}
    settings = sampling_settings(samples["record"])
    if samples.get("copies", 0) is None:
        yield ("whether some images are copies of others was not seen: of a folder it takes is, "
               "precision or recall among --metrics")  # fmt: skip
    if samples.get("kind") == "source":
        yield "the samples were read as training data, which may crop and convert them"
    if samples.get("lossy"):
        yield "the samples are stored with loss (JPEG or WebP)"
    if isinstance(chosen := settings.get("classes"), list) and chosen:
        yield f"the samples are of {len(chosen)} chosen classes"
    says = {"px": (settings.get("resolution"), samples["size"][0]),
            "images": (settings.get("num_samples"), record["n"])}  # fmt: skip
    for what, (said, found) in says.items():
        if said not in (None, found):
            yield f"the record beside the samples says {said} {what}, they have {found}"
    if reference.get("content_sha256") == samples["content_sha256"]:
        yield "samples and reference are the same images"


def _of_vae_images(record: dict) -> Iterator[str]:
    if record["protocol"].get("images") != VALIDATION:
        yield ("the images are not known to be ImageNet's validation set: expected its 50,000 "
               "files under their own names")  # fmt: skip
    if record["samples"]["size"] != [VALIDATION_SIDE] * 2:
        h, w = record["samples"]["size"]
        yield f"images of {h}x{w} pixels, published ones are of {VALIDATION_SIDE}"


def is_validation_set(keys: Iterable[str]) -> bool:
    """Whether these are the names of all 50,000 images of ImageNet's validation set, each once, in
    whatever folders and formats."""
    found = [VALIDATION_NAME.fullmatch(key.rpartition("/")[2]) for key in keys]
    numbers = sorted(int(match[1]) if match else 0 for match in found)
    return numbers == list(range(1, PAPER_SIZE + 1))


def _of_network(record: dict, metric: Metric) -> Iterator[str]:
    features = record["features"] or {}
    label = features.get("label")
    if not features.get("published_weights"):
        yield f"{label} is not a network of published metrics with checked weights"
    elif label not in metric.published:
        yield f"no {metric.name} of {label} features is published"


# --------------------------------------------------------------------------------------
# Reasons that are about the protocol of one metric.


def _reference(record: dict, name: str) -> Iterator[str]:
    """Published tables of samples have one reference at a resolution: ADM's file."""
    reference, (h, w) = record["reference"] or {}, record["samples"]["size"]
    known = KNOWN.get(reference.get("file_sha256", ""))
    if "file_sha256" not in reference:
        yield ("the reference statistics are not those of a published file, they were computed "
               "here from images")  # fmt: skip
    elif known is None:
        none = "" if h == 256 else f" (none is known of {h} px)"
        yield (f"the sha256 of the reference, {reference['file_sha256'][:8]}..., is that of no "
               f"published file known here{none}")  # fmt: skip
    elif not known.of_adm_suite:
        yield (f"the reference is {known.name}, made by {known.made_by}: compare only with numbers "
               "against the same file")  # fmt: skip
    elif (h, w) != (known.resolution, known.resolution):
        yield f"images of {h}x{w} pixels, the reference is of {known.resolution}"


def _manifolds(record: dict, name: str) -> Iterator[str]:
    yield from _reference(record, name)
    used = record["protocol"].get("precision_recall", {})
    published = {"k": PR_NEIGHBOUR, "mode": PR_MODES[0], "n_reference": PR_REFERENCES}
    words = {"k": "{}th neighbour", "mode": "distances {}", "n_reference": "{} reference images"}
    for key, wanted in published.items():
        if used.get(key) != wanted:
            yield f"{words[key].format(used.get(key))}, not {wanted}"


def _kid(record: dict, name: str) -> Iterator[str]:
    yield "papers draw the real subsets of KID from sets of their own, there is no common one"


def _order(record: dict, name: str) -> Iterator[str]:
    shuffled = record["details"].get(name, {}).get("shuffled")
    if shuffled and abs(record["metrics"][name] / shuffled - 1) > IS_ORDER_TOLERANCE:
        yield "computed in file order of sorted samples, published ones have labels at random"


def _dinov2(record: dict, name: str) -> Iterator[str]:
    n = record["details"].get(name, {}).get("n_reference")
    resized = (record["reference"] or {}).get("resized_by", "PIL bicubic")
    if n != DINOV2_REALS:
        count = "an unknown number" if n is None else n
        yield f"a reference of {count} images, dgm-eval takes {DINOV2_REALS} of the training set"
    if not resized.startswith("PIL"):
        yield f"the reference images were resized by {resized}, the samples by PIL bicubic"
    yield "which real images published numbers were measured against is not known here"


def _ssim(record: dict, name: str) -> Iterator[str]:
    yield ("papers take torchmetrics' or LightningDiT's SSIM, which differ from the definition of "
           "2004 here by up to 0.006")  # fmt: skip


def _lpips(record: dict, name: str) -> Iterator[str]:
    sha256 = record["protocol"].get("lpips_weights_sha256") or "unknown"
    if not sha256.startswith(VGG.sha256):
        yield f"weights of VGG-16 whose sha256 ({sha256[:8]}) is not that of torchvision's"


def _unpublished(record: dict, name: str) -> Iterator[str]:
    yield f"no published protocol of {name} is followed here"


def _none(record: dict, name: str) -> Iterator[str]:
    yield from ()


OF_METRIC: dict[str, Reasons] = {
    "fid": _reference, "sfid": _reference, "fid of dinov2": _dinov2, "is": _order,
    "precision": _manifolds, "recall": _manifolds, "kid": _kid,
    "rfid": _none, "psnr": _none, "ssim": _ssim, "lpips": _lpips,
}  # fmt: skip
