"""What a number is called, what is said beside it, and how it is printed.

`FID` names only the distance in the checked published Inception; any other network's is
`FD[network]`, shown as a multiple of the floor (the distance between two halves of the reference).
"""

import platform
from importlib.metadata import version

from utils.feature_stats import Statistics
from utils.features import FeatureNet
from utils.image_sets import ImageSet, sampling_settings

PAPER_SIZE = 50_000
PUBLISHED_NAMES = {
    "inception": {"fid": "FID", "sfid": "sFID", "rfid": "rFID", "is": "IS"},
    "dinov2": {"fid": "FD-DINOv2", "rfid": "rFD-DINOv2"},
}
OTHER_NAMES = {"fid": "FD", "sfid": "sFD", "rfid": "rFD", "is": "IS"}
PACKAGES = ("torch", "numpy", "torch-fidelity", "timm")


def metric_name(metric: str, net: FeatureNet, n: int) -> str:
    """`gFID-50K`, `sFID@1000`, `FD-DINOv2@1000`, `FD[timm:...]`, `precision[...]`, ..."""
    known = PUBLISHED_NAMES.get(net.family, {}) if net.published else {}
    if metric in known:
        name = known[metric]
        return f"{'g' * (name == 'FID')}{name}-50K" if n == PAPER_SIZE else f"{name}@{n}"
    if net.published and net.family == "inception":
        return metric if n == PAPER_SIZE else f"{metric}@{n}"
    return f"{OTHER_NAMES.get(metric, metric)}[{net.label}]"


def scalars(record: dict) -> dict[str, float]:
    """Flat numbers for a log, with the number of images in the name: `FD-1k[timm:...]`, `FID-1k`;
    a floor's multiple goes under `.../floor`."""
    n = record["n"]
    count = f"{n // 1000}k" if n % 1000 == 0 else str(n)
    flat = {}
    for name, value in record["metrics"].items():
        if isinstance(value, list):
            continue
        head, bracket, label = name.replace(f"@{n}", "").removesuffix("-50K").partition("[")
        flat[f"{head}-{count}{bracket}{label}"] = value
        if record["details"].get(name, {}).get("times_floor") is not None:
            flat[f"{head}-{count}{bracket}{label}/floor"] = record["details"][name]["times_floor"]
    return flat


def new_record(net: FeatureNet | None, images: ImageSet, content: str, beside: dict | None) -> dict:
    """A record without numbers yet: what was measured, and with what. `beside`: see `sidecar`."""
    settings = sampling_settings(beside)
    balanced = settings.get("class_balanced")
    return {
        "metrics": {},
        "details": {},
        "comparable_to_papers": False,
        "not_comparable_because": [],
        "warnings": [],
        "n": len(images),
        "samples": {
            "name": images.name,
            "kind": images.kind,
            "n": len(images),
            "size": list(images.size),
            "content_sha256": content,
            "uint8_rule": settings.get("uint8"),
            "label_sampling": None if balanced is None else ("random", "balanced")[bool(balanced)],
            "record": beside,
        },
        "reference": None,
        "features": network_facts(net),
        "protocol": {},
        "versions": {"python": platform.python_version(), **{p: version(p) for p in PACKAGES}},
    }


def network_facts(net: FeatureNet | None) -> dict | None:
    if net is None:
        return None
    return {"label": net.label, "published_weights": net.published,
            "device": str(net.device), **net.facts}  # fmt: skip


def add_distance(
    record: dict, name: str, value: float, known: Statistics, found: Statistics
) -> None:
    """Enter a Frechet distance with its sizes, its rank, and its floor where that was measured."""
    detail = {"n": found.n, "n_reference": known.n, "dimension": len(found.mean)}
    detail["rank_deficient"] = known.rank_deficient or found.rank_deficient
    if detail["rank_deficient"]:
        smallest = min(s.n for s in (known, found) if s.n is not None)
        record["warnings"].append(
            f"{name} is rank-deficient: {smallest} images for {len(found.mean)} dimensions; "
            f"compare only with numbers from as many images"
        )
    if known.floor is not None:
        times = value / known.floor if known.floor > 0 else None
        detail |= {"floor": known.floor, "times_floor": times, "floor_images": known.n // 2}
    record["metrics"][name], record["details"][name] = value, detail


def judge(record: dict, net: FeatureNet | None, from_file: bool) -> None:
    """Say whether the numbers may stand in a table beside published ones, and if not, why."""
    reasons = record["not_comparable_because"]
    if net is not None and not net.published:
        reasons.append(f"{net.label} is not a network of published metrics with checked weights")
    if record["n"] != PAPER_SIZE:
        reasons.append(f"{record['n']} images, not {PAPER_SIZE}")
    if net is not None and net.published and net.family == "inception" and not from_file:
        reasons.append("the reference statistics are not those of a published file")
    record["comparable_to_papers"] = not reasons


def format_table(record: dict) -> str:
    """The record for people: a line per number, then what has to be known with it."""
    rows = [(name, *_cells(value, record["details"].get(name, {})))
            for name, value in record["metrics"].items()]  # fmt: skip
    width = max(len(row[0]) for row in rows)
    lines = [*_head(record), "-" * 80]
    lines += [f"{name:<{width}}  {value:>14}  {remark}".rstrip() for name, value, remark in rows]
    lines.append("-" * 80)
    if not record["comparable_to_papers"]:
        lines.append(f"not comparable to papers: {'; '.join(record['not_comparable_because'])}")
    return "\n".join(lines + [f"warning: {text}" for text in record["warnings"]])


def _head(record: dict) -> list[str]:
    samples, reference, features = record["samples"], record["reference"], record["features"]
    lines = [f"samples    {samples['name']}  n={samples['n']}  {_size(samples['size'])}"]
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


def _size(size: list[int]) -> str:
    return "x".join(map(str, size))


def _cells(value, detail: dict) -> tuple[str, str]:
    """The number as shown, and the remark behind it."""
    if isinstance(value, list):
        return "", " ".join(f"{v:.4g}" for v in value)
    if detail.get("times_floor") is not None:
        remark = f"{value:.4f}, floor {detail['floor']:.4f}: two halves of the reference"
        return f"{detail['times_floor']:.2f} x floor", f"({remark}, {detail['floor_images']} each)"
    remarks = [f"{key} {detail[key]:.4f}" for key in ("std", "shuffled") if key in detail]
    return f"{value:.4f}", f"({', '.join(remarks)})" if remarks else ""
