"""What a number is called, what is said with it, and how it is printed.

`FID` names only the distance in the checked published Inception. With any other network it is
`FD[network]`, shown as a multiple of its floor: the distance between two halves of the reference.
"""

import platform
from importlib.metadata import version

from utils.evaluation.image_sets import ImageSet, sampling_settings
from utils.evaluation.metrics import PAPER_SIZE, Metric, Result
from utils.evaluation.networks import FeatureNet

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
    balanced = settings.get("class_balanced")
    features = net and {"label": net.label, "published_weights": net.published,
                        "device": str(net.device), **net.facts}  # fmt: skip
    samples = {
        "name": images.name, "kind": images.kind, "n": len(images), "size": list(images.size),
        "content_sha256": content, "uint8_rule": settings.get("uint8"),
        "label_sampling": None if balanced is None else ("random", "balanced")[bool(balanced)],
        "record": beside,
    }  # fmt: skip
    return {
        "metrics": {}, "details": {}, "comparable_to_papers": False, "not_comparable_because": [],
        "warnings": [], "n": len(images), "samples": samples, "reference": None,
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


def assess_comparability(record: dict, net: FeatureNet | None, published_reference: bool) -> None:
    """Say whether the numbers may stand in a table with published ones, and if not, why.
    `published_reference`: the reference statistics were read from a file, or none are published."""
    reasons = record["not_comparable_because"]
    if net and not net.published:
        reasons.append(f"{net.label} is not a network of published metrics with checked weights")
    if record["n"] != PAPER_SIZE:
        reasons.append(f"{record['n']} images, not {PAPER_SIZE}")
    if net and net.published and net.family == "inception" and not published_reference:
        reasons.append("the reference statistics are not those of a published file")
    record["comparable_to_papers"] = not reasons


def format_table(record: dict) -> str:
    """The record as a table to print: a line per number, then what has to be known with them."""
    rows = [(name, *_cells(value, record["details"].get(name, {})))
            for name, value in record["metrics"].items()]  # fmt: skip
    width = max(len(row[0]) for row in rows)
    lines = [*_head_lines(record), "-" * 80]
    lines += [f"{name:<{width}}  {value:>14}  {remark}".rstrip() for name, value, remark in rows]
    lines.append("-" * 80)
    if not record["comparable_to_papers"]:
        lines.append(f"not comparable to papers: {'; '.join(record['not_comparable_because'])}")
    return "\n".join(lines + [f"warning: {text}" for text in record["warnings"]])


def _head_lines(record: dict) -> list[str]:
    """Samples, how they were made, reference and features."""
    samples, reference, features = record["samples"], record["reference"], record["features"]
    size = "x".join(map(str, samples["size"]))
    lines = [f"samples    {samples['name']}  n={samples['n']}  {size}"]
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


def _cells(value, detail: dict) -> tuple[str, str]:
    """A number as it is printed, and the remark after it."""
    if isinstance(value, list):
        return "", " ".join(f"{v:.4g}" for v in value)
    if detail.get("times_floor") is not None:
        remark = f"{value:.4f}, floor {detail['floor']:.4f}: two halves of the reference"
        return f"{detail['times_floor']:.2f} x floor", f"({remark}, {detail['floor_images']} each)"
    remarks = [f"{key} {detail[key]:.4f}" for key in ("std", "shuffled") if key in detail]
    return f"{value:.4f}", f"({', '.join(remarks)})" if remarks else ""
