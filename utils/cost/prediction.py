"""Time, memory and waits of a run's step, predicted for a device that need not be here.

Every figure is a prediction from counted operations; nothing was measured on a GPU.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from utils.config.schema import Config, per_rank_batch
from utils.cost.counter import OUTSIDE, Counted
from utils.cost.devices import Device, find_device
from utils.cost.fake_run import FakeRun
from utils.cost.memory import GIB, RESERVE, waiting_bytes
from utils.cost.operations import Operation
from utils.cost.roofline import Rates, seconds
from utils.training.networks import Networks, skeleton
from utils.training.phases import PHASES

IMAGES_OF_80_EPOCHS = 80 * 1_281_167  # of ImageNet-1k


@dataclass
class Totals:
    """Sums over the operations of one phase and one step; times in seconds."""

    eager: float = 0.0
    fused: float = 0.0
    ideal: float = 0.0
    fused_ideal: float = 0.0
    flops_half: float = 0.0
    flops_float32: float = 0.0
    bytes: float = 0.0
    layout_copy_bytes: float = 0.0
    cast_bytes: float = 0.0
    casts: float = 0.0
    kernels: float = 0.0
    host_syncs: float = 0.0

    def plus(self, other: "Totals", times: float = 1.0) -> "Totals":
        pairs = zip(vars(self).values(), vars(other).values())
        return Totals(*(own + times * more for own, more in pairs))


def total_of(operations: list[Operation], device: Device, tf32: bool) -> Totals:
    sustained, ideal = (Rates.of(device, tf32, ideal) for ideal in (False, True))
    return Totals(
        eager=seconds(operations, sustained),
        fused=seconds(operations, sustained, fused=True),
        ideal=seconds(operations, ideal),
        fused_ideal=seconds(operations, ideal, fused=True),
        flops_half=sum(op.flops for op in operations if op.half),
        flops_float32=sum(op.flops for op in operations if not op.half),
        bytes=sum(op.bytes for op in operations),
        layout_copy_bytes=sum(op.copies for op in operations),
        cast_bytes=sum(op.casts for op in operations),
        casts=sum(op.casts > 0 for op in operations),
        kernels=sum(op.kernels for op in operations),
        host_syncs=sum(op.waits for op in operations),
    )


def by_phase(counted: list[Counted], device: Device, tf32: bool) -> dict[str, Totals]:
    """Totals of each phase, in the order of a step; what belongs to none comes last."""
    found: dict[str, list[Operation]] = defaultdict(list)
    for each in counted:
        found[each.phase].append(each.op)
    return {n: total_of(found[n], device, tf32) for n in (*PHASES, OUTSIDE) if n in found}


@dataclass
class Step:
    """One step of one rank: totals by phase, and the bytes of its largest moment, without
    `RESERVE`."""

    phases: dict[str, Totals]
    peak: int

    @property
    def total(self) -> Totals:
        found = Totals()
        for each in self.phases.values():
            found = found.plus(each)
        return found

    def seconds(self, compiled: bool) -> float:
        return self.total.fused if compiled else self.total.eager


def count_step(
    run: FakeRun, train_step: Callable, rank_batch: int, accumulation: int, device: Device
) -> Step:
    """A step of `rank_batch` images in `accumulation` micro-batches. More than two of these are not
    run: each after the second does what the second did."""
    micro, tf32 = rank_batch // accumulation, run.config.run.tf32
    counter = run.step(train_step, micro)
    phases = by_phase(counter.counted, device, tf32)
    peak = sum(run.resident.values()) + max(counter.curve)
    if accumulation > 1:
        two = by_phase(run.step(train_step, 2 * micro, 2).counted, device, tf32)
        phases = {
            name: one.plus(two[name].plus(one, -1), accumulation - 1)
            for name, one in phases.items()
        }
        peak += waiting_bytes(run.nets, run.config) * (rank_batch - micro)
    return Step(phases, peak)


def predict(
    config: Config,
    device: str = "h100",
    ranks: int = 1,
    train_step: Callable | None = None,
    steps: int | None = None,
    nets: Networks | None = None,
) -> dict[str, Any]:
    """The prediction for a run on `ranks` GPUs, as scripts/benchmark.py --predict writes it.

    train_step: that of train_repae.py. steps: default: those of the run. nets: those of
    `skeleton(config, ...)`, which are used up; default: for ImageNet's 1,000 classes, or those that
    the config names.
    """
    assert train_step, "the step that is to be counted"
    sheet = find_device(device)
    nets = nets or skeleton(config, config.data.num_classes or 1000)
    run, rank_batch = FakeRun(config, nets, ranks), per_rank_batch(config, ranks)
    step = count_step(run, train_step, rank_batch, config.run.accumulation, sheet)
    return describe(config, sheet, ranks, step, run.resident, steps or config.run.steps)


def describe(
    c: Config, device: Device, ranks: int, step: Step, resident: dict[str, int], steps: int
) -> dict[str, Any]:
    """A counted step as the fields of the JSON file. Times are of the eager step unless a name says
    otherwise; `hours` are those of the step as the config runs it, compiled or not."""
    images, total = per_rank_batch(c, ranks), step.total
    rate, fused = images / total.eager, images / total.fused
    hours = steps * step.seconds(c.run.compile) / 3600
    days = IMAGES_OF_80_EPOCHS / (ranks * (fused if c.run.compile else rate)) / 86400
    return {
        "mode": "prediction",
        "device": device.name,
        "predicted": True,
        "ranks": ranks,
        "images_per_rank": images,
        "micro_batches": c.run.accumulation,
        # of one GPU
        "images_per_second": rate,
        "images_per_second_fused": fused,
        "images_per_second_ideal": images / total.ideal,
        "images_per_second_fused_ideal": images / total.fused_ideal,
        "images_per_second_all_ranks": ranks * rate,
        "images_per_second_fused_all_ranks": ranks * fused,
        "step_ms": {"median": 1e3 * total.eager, "fused": 1e3 * total.fused},
        # with what is set aside for CUDA, NCCL and the allocator
        "peak_memory_gib": (step.peak + RESERVE) / GIB,
        "memory_reserve_gib": RESERVE / GIB,
        "resident_gib": {name: size / GIB for name, size in resident.items()},
        "device_memory_gib": device.memory / GIB,
        "fits": step.peak + RESERVE <= device.memory,
        "gflop_per_image": (total.flops_half + total.flops_float32) / images / 1e9,
        "gflop_per_image_half": total.flops_half / images / 1e9,
        "gflop_per_image_float32": total.flops_float32 / images / 1e9,
        "float32_matmuls": "tf32" if c.run.tf32 else "fp32",
        "mb_per_image": total.bytes / images / 1e6,
        "layout_copy_mb_per_image": total.layout_copy_bytes / images / 1e6,
        "layout_copy_share": total.layout_copy_bytes / total.bytes,
        "dtype_casts_per_step": round(total.casts),
        "dtype_cast_mb_per_image": total.cast_bytes / images / 1e6,
        "kernels_per_step": round(total.kernels),
        "host_syncs_per_step": round(total.host_syncs),
        "phases": dict(describe_phases(step, images)),
        "steps": steps,
        "compiled": c.run.compile,
        "hours": hours,
        "gpu_hours": ranks * hours,
        "days_to_80_epochs": days,
    }


def describe_phases(step: Step, images: int) -> Iterator[tuple[str, dict[str, float]]]:
    whole = step.total.eager
    for name, t in step.phases.items():
        yield (
            name,
            {
                "ms": 1e3 * t.eager,
                "ms_per_image": 1e3 * t.eager / images,
                "ms_per_image_fused": 1e3 * t.fused / images,
                "ms_per_image_ideal": 1e3 * t.ideal / images,
                "share": t.eager / whole,
                "gflop_per_image_half": t.flops_half / images / 1e9,
                "gflop_per_image_float32": t.flops_float32 / images / 1e9,
                "mb_per_image": t.bytes / images / 1e6,
                "layout_copy_mb_per_image": t.layout_copy_bytes / images / 1e6,
                "dtype_cast_mb_per_image": t.cast_bytes / images / 1e6,
                "kernels": round(t.kernels),
                "host_syncs": round(t.host_syncs),
            },
        )
