"""Results on the screen, and as JSON for `--compare` and for other programs."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from utils.benchmark.compare import FORMAT, shown
from utils.files import write_json

UNITS = {
    "peak_memory_gib": "peak memory",
    "peak_memory_reserved_gib": "taken by the allocator",
}
# of the phases in a prediction: title and format
COLUMNS = {
    "ms_per_image": ("ms/img", ".3f"),
    "ms_per_image_fused": ("fused", ".3f"),
    "share": ("share", ".1%"),
    "gflop_per_image_half": ("GF half", ",.1f"),
    "gflop_per_image_float32": ("GF fp32", ",.1f"),
    "mb_per_image": ("MB/img", ",.1f"),
    "layout_copy_mb_per_image": ("copies", ",.1f"),
    "kernels": ("kernels", ",d"),
    "host_syncs": ("waits", ",d"),
}


def write(path: Path, result: dict[str, Any]) -> None:
    """The result as a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, {"format": FORMAT} | result)


def lines(result: dict[str, Any]) -> Iterator[str]:
    """A measured result in words."""
    ranks = result["ranks"]
    yield f"{result['mode']} on {result['device']}, {ranks} rank(s)"
    rate = f"{shown(result['images_per_second'])} images/s"
    if ranks > 1:
        rate += f" a rank, {shown(result['images_per_second_all_ranks'])} in all"
    yield rate
    for name, what in (("step_ms", "step"), ("batch_ms", "batch")):
        if times := result.get(name):
            around = f"80 % between {shown(times['low'])} and {shown(times['high'])}"
            left_out = f"{result['warmup_steps']} before left out"
            yield (
                f"{what}: median {shown(times['median'])} ms of {result['steps']}, {around}; "
                f"{left_out}"
            )
    memory = [f"{what} {shown(result[k])} GiB" for k, what in UNITS.items() if k in result]
    if memory:
        yield ", ".join(memory)
    if "processor_seconds_per_image" in result:
        yield f"{shown(1000 * result['processor_seconds_per_image'])} processor ms an image"
    yield from arithmetic(result)
    yield from phase_table(result.get("phases", {}))


def arithmetic(result: dict[str, Any]) -> Iterator[str]:
    if "gflop_per_image" not in result:
        return
    peaks = ", ".join(f"{name} {shown(rate)}" for name, rate in result["matmul_tflops"].items())
    yield (
        f"{shown(result['gflop_per_image'])} GFLOP an image: "
        f"{shown(result['achieved_tflops'])} TFLOP/s a rank, "
        f"{result['share_of_matmul_peak']:.1%} of what matrix products in {result['precision']} "
        f"reach here ({peaks} TFLOP/s)"
    )


def phase_table(phases: dict[str, dict[str, float]]) -> Iterator[str]:
    if phases:
        yield f"{'phase':<24}{'ms a step':>12}{'ms an image':>14}{'share':>9}"
    for name, values in phases.items():
        ms, image, share = (values[key] for key in ("ms", "ms_per_image", "share"))
        yield f"{name:<24}{ms:>12.2f}{image:>14.3f}{share:>9.1%}"


def prediction_lines(result: dict[str, Any]) -> Iterator[str]:
    """A prediction (utils/cost/prediction.py) in words."""
    r = {name: shown(value) for name, value in result.items() if isinstance(value, int | float)}
    yield (
        f"predicted for {r['ranks']} x {result['device']}, {r['images_per_rank']} images each in "
        f"{r['micro_batches']} micro-batch(es); nothing was measured on a GPU"
    )
    yield (
        f"{r['images_per_second']} images/s a GPU, {r['images_per_second_fused']} if compiled "
        f"code fuses all it can; {r['images_per_second_all_ranks']} and "
        f"{r['images_per_second_fused_all_ranks']} in all"
    )
    yield (
        f"memory {r['peak_memory_gib']} of {r['device_memory_gib']} GiB, "
        f"{r['memory_reserve_gib']} of it set aside: {'fits' if result['fits'] else 'too much'}"
    )
    yield (
        f"{r['gflop_per_image']} GFLOP and {r['mb_per_image']} MB an image, "
        f"{result['layout_copy_share']:.1%} of the bytes copied for another layout"
    )
    yield f"{r['kernels_per_step']} kernels and {r['host_syncs_per_step']} waits of the host a step"
    yield (
        f"{r['hours']} hours for {r['steps']} steps, {r['gpu_hours']} GPU-hours; "
        f"{r['days_to_80_epochs']} days to 80 epochs of ImageNet"
    )
    yield f"{'phase':<22}" + "".join(f"{name:>10}" for name, _ in COLUMNS.values())
    for name, values in result["phases"].items():
        yield f"{name:<22}" + "".join(
            f"{values[key]:>10{how}}" for key, (_, how) in COLUMNS.items()
        )
