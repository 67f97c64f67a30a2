"""What a number is called, what is said with it, and how it is printed.

`FID` names only the distance in the checked published Inception. With any other network it is
`FD[network]`, shown as a multiple of its floor: the distance between two halves of the reference.
"""

import math
import platform
from importlib.metadata import version

from models.autoencoders.families import VAES
from utils.evaluation.images.image_sets import ImageSet
from utils.evaluation.metrics import PAPER_SIZE, Metric, Result
from utils.evaluation.networks import FeatureNet
from utils.evaluation.options import sampling_settings

CHANNELS = 6  # in a line of the table
PACKAGES = ("torch", "numpy", "torch-fidelity", "timm")


def metric_name(metric: Metric, net: FeatureNet, n: int) -> str:
    """`gFID-50K`, `sFID@1000`, `FD-DINOv2@1000`, `FD[timm:...]`, `precision[...]`, ..."""
    if net.published and net.family in metric.published:
        in_papers, otherwise = metric.published[net.family]
        return in_papers if n == PAPER_SIZE else f"{otherwise}@{n}"
    return f"{metric.other}[{net.label}]"


def scalars(record: dict) -> dict[str, float]:
    """Flat numbers for a log, with the number of images in the name: `FD-1k[timm:...]`, `FID-1k`.
    A distance divided by its floor is logged as `.../floor`."""
    n = record["n"]
    count = f"{n // 1000}k" if n % 1000 == 0 else str(n)
    flat = {}
    for name, value in record["metrics"].items():
        head, bracket, label = name.replace(f"@{n}", "").removesuffix("-50K").partition("[")
        key = f"{head}-{count}{bracket}{label}"
        if not isinstance(value, list):
            flat[key] = value
        if (times := record["details"].get(name, {}).get("times_floor")) is not None:
            flat[f"{key}/floor"] = times
    return flat


def new_record(net: FeatureNet | None, images: ImageSet, content: str, beside: dict | None) -> dict:
    """A record without numbers yet: what was measured, and with what. `content`: fingerprint of the
    images; `beside`: what `record_beside` found."""
    settings = sampling_settings(beside)
    balanced, chosen = settings.get("class_balanced"), settings.get("classes")
    labels = None if balanced is None else ("random", "balanced")[bool(balanced)]
    labels = f"balanced over {len(chosen)} classes" if chosen else labels
    features = net and {"label": net.label, "published_weights": net.published,
                        "device": str(net.device), **net.facts}  # fmt: skip
    samples = {
        "name": images.name, "kind": images.kind, "n": len(images), "size": list(images.size),
        "content_sha256": content, "uint8_rule": settings.get("uint8"),
        "label_sampling": labels, "lossy": images.lossy,
        "record": beside,
    }  # fmt: skip
    return {
        "metrics": {}, "details": {},
        "comparable_to_papers": False, "not_comparable_because": [], "comparability": {},
        "warnings": [*images.notes], "n": len(images), "samples": samples, "reference": None,
        "features": features, "protocol": {},
        "versions": {"python": platform.python_version(), **{p: version(p) for p in PACKAGES}},
    }  # fmt: skip


def add_result(record: dict, metric: Metric, result: Result, net: FeatureNet) -> None:
    """Enter one metric into the record."""
    name = metric_name(metric, net, record["n"])
    record["metrics"][name] = result.value
    if result.details:
        record["details"][name] = result.details
    record["protocol"] |= result.protocol
    record["warnings"] += [f"{name} {warning}" for warning in result.warnings]


def format_table(record: dict) -> str:
    """The record as a table to print: a line per number, then what has to be known with them."""
    rows = [(name if first else "", *cells) for name, value in record["metrics"].items()
            for first, cells in _cells(value, record["details"].get(name, {}))]  # fmt: skip
    width = max(len(row[0]) for row in rows)
    lines = [*_head_lines(record), "-" * 80]
    lines += [f"{name:<{width}}  {value:>14}  {remark}".rstrip() for name, value, remark in rows]
    lines.append("-" * 80)
    if not record["comparable_to_papers"]:
        lines.append(f"not comparable to papers: {'; '.join(record['not_comparable_because'])}")
    return "\n".join(lines + [f"warning: {text}" for text in record["warnings"]])


def _head_lines(record: dict) -> list[str]:
    """Samples and how they were made, or the VAE and its images; reference and features."""
    samples, reference, features = record["samples"], record["reference"], record["features"]
    size, vae = "x".join(map(str, samples["size"])), record.get("vae")
    lines = [f"{'images' if vae else 'samples':<9}  {samples['name']}  n={samples['n']}  {size}"]
    if vae:
        lines.append(f"vae        {_name_of_vae(**vae)}")
        lines.append(f"latents    {record['protocol']['posterior']} of the posterior")
    settings = sampling_settings(samples["record"])
    if settings:
        names = ("solver", "steps", "cfg_scale", "uint8")
        facts = [f"{name} {settings[name]}" for name in names if name in settings]
        lines.append(f"sampled    {', '.join(facts)}, labels {samples['label_sampling']}")
    if reference:
        count = f"  n={reference['n']}" if "n" in reference else ""
        lines.append(f"reference  {reference['name']}{count}")
    if features:
        lines.append(f"features   {features['label']}")
    return lines


def _name_of_vae(spec: str, weights: str | None) -> str:
    """What was asked for, and where its weights come from if that is not `spec` itself."""
    if weights == "hub":
        return spec if spec not in VAES or VAES[spec].repo else f"{spec}, random weights"
    return f"{spec}, {f'weights {weights}' if weights else 'random weights'}"


def _cells(value, detail: dict) -> list[tuple[bool, tuple[str, str]]]:
    """The lines of a metric: whether it is the first one, a number as it is printed, and the remark
    after it. Values of channels stand in lines of `CHANNELS`."""
    if isinstance(value, list):
        some = [value[i : i + CHANNELS] for i in range(0, len(value), CHANNELS)]
        ends = [min(i + CHANNELS, len(value)) - 1 for i in range(0, len(value), CHANNELS)]
        heads = [f"channel {i * CHANNELS}-{end}" for i, end in enumerate(ends)]
        rows = ["".join(f"{fixed(v):>9}" for v in part) for part in some]
        return [(i == 0, cells) for i, cells in enumerate(zip(heads, rows))]
    number, _, error = with_error(value, detail.get("standard_error")).partition(" ")
    if detail.get("times_floor") is not None:
        halves = f"two halves of the reference, {detail['floor_images']} each"
        remark = f"({number} {error}".rstrip() + f", floor {fixed(detail['floor'])}: {halves})"
        return [(True, (f"{fixed(detail['times_floor'], 2)} x floor", remark))]
    remarks = [f"{key} {fixed(detail[key])}" for key in ("std", "shuffled") if key in detail]
    remark = error + (f"  ({', '.join(remarks)})" if remarks else "")
    return [(True, (number, remark.strip()))]


def with_error(value: float, error: float | None) -> str:
    """`3.941 ± 0.021`, with the digits that the standard error leaves; `3.9412` without one."""
    if not error:
        return fixed(value)
    digits = max(0, 1 - math.floor(math.log10(error)))
    return f"{fixed(value, digits)} ± {fixed(error, digits)}"


def fixed(value: float, digits: int = 4) -> str:
    """A number with so many digits behind the point, and no "-0.0000"."""
    return f"{round(value, digits) + 0.0:.{digits}f}"
