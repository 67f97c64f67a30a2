"""Checks of a run before it starts, for scripts/doctor.py: the machine, weights, the run's folder.

A check is given a `Case` and yields findings; a `UserError` counts as a failed one. Nothing is
loaded, downloaded or written.
"""

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from omegaconf import OmegaConf
from safetensors import safe_open

from loss.reconstruction import wanted_vgg
from models.encoders import wanted_encoder
from models.errors import UserError
from models.vae import WEIGHTS, wanted_vae
from models.vae_keys import require_match
from models.wanted import Wanted
from utils import environment
from utils.build import Nets, count
from utils.checkpoint import STATE, Checkpoints, choose_start
from utils.config import Config, flat, per_rank_batch
from utils.data import PREFETCH, Source
from utils.features import require_weights
from utils.memory import GIB, cached_rows, checkpoint_bytes
from utils.reference import Reference
from utils.resumable import free_disk

BIG = 10**8  # parameters; more do not train on a CPU
FREE_TO_CHANGE = ("run.steps", "run.out", "run.resume", "run.init_from")  # when a run goes on


class Finding(NamedTuple):
    """What one check says; `name` if it is not the check's own."""

    status: str  # ok, warn, FAIL
    text: str
    name: str = ""


def ok(text: str, name: str = "") -> Finding:
    return Finding("ok", text, name)


def warn(text: str, name: str = "") -> Finding:
    return Finding("warn", text, name)


def fail(text: str, name: str = "") -> Finding:
    return Finding("FAIL", text, name)


@dataclass
class Case:
    """The run in question, and what earlier checks found out."""

    config: Config
    ranks: int
    gpu_memory: int | None  # bytes of one GPU; None = unknown
    published: bool = False  # one of the paper's runs
    source: Source | None = None
    nets: Nets | None = None  # on the meta device
    start: Path | None = None  # checkpoint that the weights come from
    rank_batch: int | None = None  # images of one rank in a step; None = the batch does not split


# --------------------------------------------------------------------------------------
# The machine.


def check_packages(case: Case) -> Iterator[Finding]:
    old = environment.outdated_packages()
    if old:
        advice = "run pip install -r requirements.txt"
        yield warn(f"the tests passed with {', '.join(old)}: {advice}")
    names = ("torch", "torchvision", "diffusers", "timm", "accelerate", *case.config.run.trackers)
    yield ok(", ".join(f"{name} {environment.installed(name)}" for name in names))


def check_device(case: Case) -> Iterator[Finding]:
    """GPUs for the ranks, and the precision they know."""
    gpus, c = environment.gpu_names(), case.config
    if not gpus:
        big = case.nets and count(case.nets.sit) > BIG
        text = f"no GPU here: training would run on {environment.cpu_cores()} CPU cores"
        yield warn(f"{text}, too slow for this SiT") if big else ok(text)
        return
    if c.run.precision == "bf16" and environment.lacks_bf16():
        yield warn(f"{gpus[0]} has no bf16: set run.precision=fp16")
    if case.ranks > len(gpus):
        yield warn(
            f"{case.ranks} ranks for the {len(gpus)} GPU(s) of this machine: right only if there "
            "are more machines"
        )
    yield ok(f"{len(gpus)} x {gpus[0]}")


def check_workers(case: Case) -> Iterator[Finding]:
    """Cores and shared memory for the loader processes of this machine's ranks."""
    c = case.config
    ranks = min(case.ranks, len(environment.gpu_names()) or case.ranks)
    workers, cores = ranks * c.data.workers, environment.cpu_cores()
    if not workers:
        yield ok("images are read in the training process (data.workers=0)")
        return
    batch = example_bytes(case) * max(1, c.run.batch_size // case.ranks)
    need, free = workers * PREFETCH * batch, environment.free_shared_memory()
    text = f"{ranks} rank(s) x data.workers={c.data.workers}, {in_words(need)} of batches ahead"
    if free is not None and need > free:
        fits = int(free // (ranks * PREFETCH * batch))
        yield fail(
            f"{text}, but {in_words(free)} are free in /dev/shm: enlarge it (docker run "
            f"--shm-size=...), or set data.workers={fits}"
        )
    elif workers > cores:
        yield warn(f"{text}, on {cores} CPU cores: set data.workers={max(1, cores // ranks)}")
    else:
        yield ok(f"{text}; {cores} CPU cores, {in_words(environment.free_ram())} RAM free")


def example_bytes(case: Case) -> int:
    """Of one example as a loader hands it over: the image, or what is cached in its place too."""
    c = case.config
    cached = cached_rows(case.nets, c, 1) if case.nets else []
    return 3 * c.data.resolution**2 + sum(rows.nbytes for rows in cached)


def in_words(size: float) -> str:
    """Bytes, to two digits or better."""
    if size < GIB:
        return f"{size / 2**20:,.0f} MiB"
    return f"{size / GIB:,.0f} GiB" if size >= 10 * GIB else f"{size / GIB:.1f} GiB"


# --------------------------------------------------------------------------------------
# Weights.


def check_weights(case: Case) -> Iterator[Finding]:
    """Every file that the run will read is here, or can be downloaded."""
    for name, find in wanted_files(case):
        try:
            yield place_of(find(), name)
        except UserError as error:
            yield fail(str(error), name)
    yield from check_unlearned_disc(case)


def check_unlearned_disc(case: Case) -> Iterator[Finding]:
    """A random discriminator would teach a pretrained VAE from the first step on."""
    c = case.config
    late = c.disc.weights or c.disc.alone_steps or c.loss.reg.gan_start
    if c.uses_disc and c.vae.weights and not late and not brings_disc(case.start):
        yield warn(
            "it is random, and a pretrained VAE learns from it at once: set disc.weights=FILE, or "
            "let it learn first by disc.alone_steps or loss.reg.gan_start, a few thousand steps",
            "disc",
        )


def wanted_files(case: Case) -> Iterator[tuple[str, Callable[[], Wanted | None]]]:
    """(name, what looks for it) of each weight file; `utils.build.build_nets` reads the same."""
    c, start = case.config, case.start
    vae = (str(start / "vae"),) if start else (c.vae.name, c.vae.weights)
    yield "vae", lambda: wanted_vae(*vae)
    files = c.encoder.weights or [None] * len(c.encoder.names)
    for pair in zip(c.encoder.names, files) if c.uses_encoder and not c.encoder.cached else ():
        yield "encoder", lambda pair=pair: wanted_encoder(*pair)
    if c.vae.train and c.loss.reg.lpips:
        yield "lpips", lambda: wanted_vgg(c.loss.reg.lpips_weights)
    if c.uses_disc and not brings_disc(start):
        yield "disc", lambda: wanted_disc(c.disc.weights)
    if c.eval.every:
        yield "eval", lambda: wanted_by_eval(c)


def brings_disc(start: Path | None) -> bool:
    return start is not None and (start / "discriminator.safetensors").is_file()


def wanted_disc(weights: str | None) -> Wanted | None:
    if weights and not Path(weights).is_file():
        raise UserError(f"disc.weights={weights}: no such file")
    return Wanted(weights, Path(weights)) if weights else None


def wanted_by_eval(c: Config) -> Wanted:
    """Feature network and reference of the evaluations in training, which download nothing."""
    try:
        require_weights(c.eval.features, c.eval.weights)
        if c.eval.reference:
            Reference(c.eval.reference, c.data.resolution)
    except UserError as error:
        raise UserError(
            f"{error} (here these are eval.features, eval.weights, eval.reference; eval.every=0 "
            "leaves evaluation out)"
        ) from None
    against = c.eval.reference or "the training images"
    return Wanted("", Path(f"{c.eval.features} against {against}"))


def place_of(wanted: Wanted | None, name: str) -> Finding:
    """Where a weight file is, or whether it can be had."""
    if wanted is None:
        return ok("random at the start", name)
    if wanted.path:
        return ok(str(wanted.path), name)
    reason = environment.why_unreachable(wanted.url)
    if reason is None:
        return ok(f"{wanted.what} will be downloaded at the start", name)
    return fail(f"{wanted.what} is not on this machine, and {reason}: {wanted.remedy}", name)


# --------------------------------------------------------------------------------------
# The run's folder.


def check_resume(case: Case) -> Iterator[Finding]:
    """What the run starts from, and whether its weights fit."""
    c, passed_over = case.config, []
    found, fault = choose_start(
        c.run.resume, Checkpoints(c.run_dir), passed_over.append, read_all=False
    )
    yield from map(warn, passed_over)
    if fault:
        raise UserError(fault)
    case.start = found or (Path(c.run.init_from) if c.run.init_from else None)
    if case.start and case.nets:
        require_fit(case.nets, case.start)
    if found:
        yield from going_on(c, found)
    else:
        origin = f" with the weights of {case.start}" if case.start else ""
        yield ok(f"a new run in {c.run_dir}{origin}")


def require_fit(nets: Nets, start: Path) -> None:
    """`UserError` unless SiT and VAE of a checkpoint have the shapes of this config."""
    for name, net in (("sit", nets.sit), ("vae", nets.vae.net)):
        path = start / name / WEIGHTS
        if not path.is_file():
            raise UserError(f"{path} not found: {start} is no whole checkpoint; name another")
        try:
            require_match(net.state_dict(), _shapes(path), path, "this config")
        except UserError as error:
            raise UserError(f"{error}; correct the config, or choose another run.name") from None


def _shapes(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a safetensors file on the meta device: its header alone is read."""
    with safe_open(path, "pt") as file:
        names = list(file.keys())
        return {n: torch.empty(file.get_slice(n).get_shape(), device="meta") for n in names}


def going_on(c: Config, found: Path) -> Iterator[Finding]:
    step = json.loads((found / STATE).read_text())["step"]
    if step >= c.run.steps:
        yield warn(
            f"all {c.run.steps:,} steps are done ({found}): raise run.steps to go on, or choose "
            "another run.name"
        )
    else:
        yield ok(f"goes on from {found}, step {step:,} of {c.run.steps:,}")
    changed = changed_settings(c)
    if changed:
        shown = ", ".join(changed[:4]) + (", ..." if len(changed) > 4 else "")
        yield warn(f"this run began with {shown}: if that is not meant, choose another run.name")


def changed_settings(c: Config) -> list[str]:
    """`key=old (now new)`, of what the run folder's config.yaml has otherwise."""
    path = c.run_dir / "config.yaml"
    old = flat(OmegaConf.to_container(OmegaConf.load(path))) if path.is_file() else {}
    new = flat(asdict(c))
    keys = [k for k in old if k in new and k not in FREE_TO_CHANGE and old[k] != new[k]]
    return [f"{k}={old[k]} (now {new[k]})" for k in keys]


def check_disk(case: Case) -> Iterator[Finding]:
    """Room for the checkpoints that the run will keep, one being written included."""
    run, out = case.config.run, case.config.run_dir
    place, free = free_disk(out)
    if not os.access(place, os.W_OK):
        yield fail(f"no right to write in {place}: choose another run.out")
    if case.nets is None:
        yield warn(f"{in_words(free)} free in {place}; what is needed is unknown, see tokens")
        return
    each, kept = checkpoint_bytes(case.nets, case.config), kept_checkpoints(case.config)
    here = sum(f.stat().st_size for f in out.glob("checkpoints/*/**/*") if f.is_file())
    need = max(0, each * (kept + 1) - here)
    text = f"{kept} + 1 checkpoints of {in_words(each)}"
    text += f", {in_words(here)} of them there already" if here else ""
    if need > free:
        yield fail(
            f"{text}; {in_words(free)} free in {place}: lower run.keep_last={run.keep_last}, set "
            f"run.milestone_every=0 (now {run.milestone_every}), or choose another run.out"
        )
    else:
        yield ok(f"{text}; {in_words(free)} free in {place}")


def kept_checkpoints(c: Config) -> int:
    """How many remain at the end: the last ones and the milestones."""
    run = c.run
    saved = sorted({*range(run.save_every, run.steps + 1, run.save_every), run.steps})
    marked = [s for s in saved if run.milestone_every and s % run.milestone_every == 0]
    return len({*saved[-run.keep_last :], *marked})


def check_batch(case: Case) -> Iterator[Finding]:
    """The global batch splits, and is the published one where a published run is repeated."""
    run, ranks = case.config.run, case.ranks
    case.rank_batch = per_rank_batch(case.config, ranks)
    micro = case.rank_batch // run.accumulation
    text = f"{run.batch_size} = {micro} x {ranks} rank(s) x {run.accumulation} micro-batch(es)"
    if case.source:
        epochs = run.steps * run.batch_size / len(case.source)
        text += f"; {run.steps:,} steps are {epochs:,.1f} epochs"
    if case.published and run.batch_size != 256:
        yield warn(f"{text}; the published learning rates belong to run.batch_size=256")
    else:
        yield ok(text)
