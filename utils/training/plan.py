"""Whether a run can do what its settings ask for, before anything is loaded, measured or written.

`check_run` is the one validation of settings, data and checkpoints: training begins with it,
--dry-run prints what it found, and the doctor makes the same checks one by one.
"""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import psutil
import torch

from models.autoencoders.stored import read_vae
from models.checks.errors import UserError
from models.encoders import load_encoder
from models.lpips import load_lpips
from models.sit import read_sit_config
from models.vae import build_vae, load_vae, vae_from_config, vae_weight_file
from models.weights.configs import CONFIG, read_config
from models.weights.loading import require_match
from utils.checkpoint import (
    SIT,
    Checkpoints,
)
from utils.cli import check_output_folder
from utils.config.load import CONFIG_FILE, recorded_config, to_yaml
from utils.config.reading import read_yaml
from utils.config.resuming import change_line, require_resumable
from utils.config.schema import Config, all_settings, per_rank_batch
from utils.data.base import Source, cautions, content_of
from utils.data.latents import CachedSource, LatentCache
from utils.data.registry import source_class
from utils.data.training import join_cache, open_training_data
from utils.distributed import Ranks, default_device, launched_ranks
from utils.files import format_bytes
from utils.precision import emulation_note
from utils.run_lock import check_unlocked
from utils.sealed import STATE, read_state_json
from utils.showing.summary import describe_run, print_block
from utils.training.networks import (
    Networks,
    build_disc,
    load_perceptual,
    skeleton,
    uses_disc_weights,
    vae_spec,
)
from utils.training.nonfinite import LeftOutSteps, ema_warning
from utils.training.online_evaluation import check_evaluation
from utils.training.starting.fitting import require_fit, require_same_vae, require_whole
from utils.training.starting.inheritance import Inheritance, inherit

# what a run writes from its start: in a folder that is no run, they are somebody else's
WRITTEN = (CONFIG_FILE, "metrics.jsonl", "sessions.jsonl", "latent_stats.json", "samples")
LPIPS_LEAST = 16  # pixels: the four poolings of VGG-16 halve an image to one pixel


@dataclass
class Start:
    """What a run begins with. `checkpoint`: the one it goes on from, after `step` steps; None, 0 =
    a new run. `origin`: the one whose weights it takes: `checkpoint`, or run.init_from, or None."""

    checkpoint: Path | None
    step: int
    origin: Path | None


@dataclass
class Plan:
    """What a run will be. `source` and `training_set` are None only in a dry run without the data.

    source        the images
    training_set  the images with their cached latents, if there are any
    start         what the run begins with
    nets          the networks without numbers, on the meta device
    inherited     what they take over with run.init_from
    rank_batch    images of one rank in one step
    notes         what a user should know: no mistakes
    """

    source: Source | None
    training_set: Source | None
    start: Start
    nets: Networks
    inherited: Inheritance | None
    rank_batch: int
    notes: list[str]


def check_run(c: Config, ranks: int, *, assume_data: bool = False, read_all: bool = True) -> Plan:
    """What the run on `ranks` ranks will be; a `UserError` for whatever would stop it later.

    Reads file headers, and no network but the VAE of cached latents; writes nothing. At the end all
    images are hashed, so that other ones in their place are noticed. `assume_data`: this is left
    out, and data and cached latents that are not on this machine may be missing (wrong ones may
    not). Without `read_all`, the bytes of checkpoints are not compared with their hashes.
    """
    check_run_folder(c)
    LeftOutSteps(c)  # its record can be read
    rank_batch = per_rank_batch(c, ranks)
    source, training_set, notes = find_data(c, assume_data)
    start = starting_point(c, read_all=read_all)
    notes += changes_since(c, start, source)
    nets, inherited = check_networks(c, source, start, read_all)
    notes += inherited.notes if inherited else []
    for _, check in weight_checks(c, start.origin):
        check()
    if isinstance(training_set, CachedSource):
        check_cached_vae(c, training_set.cache, start.origin)
    check_pictures(c)
    check_evaluation(c, source)
    notes += [f"{name} is given, and this run does not read it" for name in unread_files(c)]
    if source and not assume_data:
        look_at_content(source, training_set)
        notes += [line for line in changes_since(c, start, source) if line not in notes]
    return Plan(source, training_set, start, nets, inherited, rank_batch, notes)


def open_checked(c: Config) -> tuple[Source, Source]:
    """`source` and `training_set` of a run's `Plan`, on every rank. The main process makes the
    checks; its `UserError` ends all ranks. It says what the run will be, and what is to be known
    of it."""
    ranks, plans = Ranks(), []
    # of a run that is still being trained, another rank may have found a newer checkpoint
    c.run.init_from, c.vae.name = ranks.on_main(lambda: (c.run.init_from, c.vae.name))
    ranks.on_main(lambda: plans.append(check_run(c, ranks.world)))
    source = plans[0].source if plans else open_training_data(c)
    training_set = plans[0].training_set if plans else join_cache(c, source)
    assert source is not None and training_set is not None
    for plan in plans:
        say_plan(describe_run(c, plan, ranks.world), plan)
    return source, training_set


# --------------------------------------------------------------------------------------
# The checks, each of which raises `UserError`.


def check_run_folder(c: Config) -> None:
    """The run's folder can be made outside the data, or is there and can be written to, and holds
    nothing of another program that the run would write over."""
    run, what = c.run_dir, f"run.out={c.run.out} run.name={c.run.name}:"
    check_output_folder(what, run, () if run.exists() else (c.data.path, c.data.latents))
    if run.exists() and not run.is_dir():
        raise UserError(f"{what} {run} is no folder: choose another run.name, or remove it")
    if not _is_run(run) and (found := [n for n in WRITTEN if os.path.lexists(run / n)]):
        text = f"{what} {run} holds {found[0]}, and is no run of this program"
        raise UserError(f"{text}: choose another run.name")


def _is_run(folder: Path) -> bool:
    """Whether a folder has a checkpoint, or the config.yaml with which every run begins."""
    if any((folder / "checkpoints").glob(f"[0-9]*/{STATE}")):
        return True
    try:
        sections = {key.value for key, _ in read_yaml(folder / CONFIG_FILE).value}
    except UserError:
        return False
    return sections >= {"run", "data"}


def find_data(c: Config, assume: bool) -> tuple[Source | None, Source | None, list[str]]:
    """The images, the same with their cached latents, and what is to be known of them. With
    `assume`, None for what is not on this machine."""
    cls, d = source_class(c.data.source, c.data.split), c.data
    if assume and cls.needs_path and d.path and not os.path.lexists(d.path):
        return None, None, [f"no data at data.path={d.path}: their number and classes are unknown"]
    source = open_data(c)
    if assume and d.latents and not os.path.lexists(d.latents):
        return source, None, [*cautions(source), f"no cached latents at data.latents={d.latents}"]
    training_set = join_cache(c, source)
    training_set.try_some()
    return source, training_set, cautions(source)


def look_at_content(source: Source, training_set: Source | None) -> None:
    """Hash what the data hold, for `changes_since` and for checkpoints; cached latents must be of
    the same images."""
    source.content = content_of(source)
    if isinstance(training_set, CachedSource):
        training_set.check_content(source.content["images_sha256"])


def open_data(c: Config) -> Source:
    """The images, enough of them for a batch."""
    source = open_training_data(c)
    if len(source) < c.run.batch_size:
        raise UserError(
            f"the data has {len(source):,} images, fewer than run.batch_size={c.run.batch_size}: "
            "lower it, or give more images"
        )
    return source


def check_networks(
    c: Config, source: Source | None, start: Start, read_all: bool = True
) -> tuple[Networks, Inheritance | None]:
    """The shapes of the networks meet each other, the data, and the checkpoint that the run begins
    with; the networks without numbers, and what they take over with `run.init_from`. `read_all` as
    for `check_run`."""
    if c.loss.reg.lpips and c.vae.train and c.data.resolution < LPIPS_LEAST:
        raise UserError(
            f"data.resolution={c.data.resolution} is too small for LPIPS, which takes images of "
            f"{LPIPS_LEAST} px or more: raise it, or set loss.reg.lpips=0"
        )
    origin, classes = start.origin, source.num_classes if source else c.data.num_classes
    if origin and not start.checkpoint:
        require_whole(origin, read_all)
        require_same_vae(c, origin)
    if origin and not classes:  # without the data, those that it has
        classes = read_sit_config(origin / SIT)["num_classes"]
    nets = skeleton(c, classes or 1000, start.checkpoint)
    if start.checkpoint:
        require_fit(start.checkpoint, nets.sit, nets.vae, nets.disc)
    elif origin:
        names = source.classes if source else None
        return nets, inherit(c, origin, nets.sit, nets.disc, names)
    return nets, None


def weight_checks(c: Config, origin: Path | None) -> Iterator[tuple[str, Callable[[], object]]]:
    """(name of the network, a call that raises `UserError`) for each file that the settings name:
    it is there and fits. Those that will be downloaded are not looked at."""
    if origin is None:
        yield "vae", partial(check_vae_file, c)
    files = c.encoder.weights if c.uses_encoder and not c.encoder.cached else []
    for name, file in zip(c.encoder.names, files):
        if file not in (None, "random"):
            yield "encoder", partial(load_encoder, name, file, c.data.resolution, c.encoder_grid)
    if c.loss.reg.lpips and c.vae.train and c.loss.reg.lpips_weights:
        yield "lpips", partial(load_lpips, c.loss.reg.lpips_weights)
    if c.vae.train and c.loss.reg.perceptual and "@" in (c.loss.reg.perceptual_net or ""):
        yield "perceptual", partial(load_perceptual, c)
    if c.uses_disc and uses_disc_weights(c, origin):
        yield "disc", partial(build_disc, c, c.disc.weights)


def unread_files(c: Config) -> list[str]:
    """Settings that name a file for something that this run leaves out."""
    reg = c.loss.reg
    read = {
        "encoder.weights": c.uses_encoder and not c.encoder.cached,
        "loss.reg.perceptual_net": "@" not in str(reg.perceptual_net)
        or (reg.perceptual > 0 and c.vae.train),
        "loss.reg.lpips_weights": c.loss.reg.lpips > 0 and c.vae.train,
        "disc.weights": c.uses_disc,
        "eval.weights": c.eval.every > 0,
        "eval.reference": c.eval.every > 0,
    }
    given = {name: value for name, _, value in all_settings(c)}
    return [name for name, is_read in read.items() if given[name] and not is_read]


def check_vae_file(c: Config) -> None:
    """The file of the initial VAE, if the settings name one, fits its architecture."""
    file = vae_weight_file(c.vae.name, c.vae.weights)
    if file is None or file.path is None:
        return
    path = file.fetch(download=False)
    state, _ = read_vae(path, tell=lambda _: None)  # not the numbers, which stay in the file
    with torch.device("meta"):
        if file.companions:  # a folder, with an architecture of its own
            vae = vae_from_config(read_config(path.with_name(CONFIG)), path.parent)
        else:
            vae = build_vae(c.vae.name)
    require_match(vae.net.state_dict(), state, path, "the VAE")


def check_cached_vae(c: Config, cache: LatentCache, origin: Path | None) -> None:
    """The cached latents are those of the VAE, unless its weights are not on this machine yet."""
    spec, weights = vae_spec(c, origin)
    file = vae_weight_file(spec, weights)
    if file and file.find():
        cache.check_vae(load_vae(spec, weights), spec)


def check_pictures(c: Config) -> None:
    """Previews and evaluations fit into the memory of this machine."""
    memory, side = psutil.virtual_memory().total, c.data.resolution
    for name, section in (("preview", c.preview), ("eval", c.eval)):
        size = section.num * 3 * side * side
        if section.every and size > memory:
            raise UserError(
                f"{name}.num={section.num} images of {side} px take {format_bytes(size)}, this "
                f"machine has {format_bytes(memory)}: lower {name}.num, or set {name}.every=0"
            )


def starting_point(
    c: Config, report: Callable[[str], None] = print, read_all: bool = True
) -> Start:
    """What the run begins with; `report` gets a line for each checkpoint that is passed over.
    Without `read_all`, the bytes of checkpoints are not looked at."""
    found = Checkpoints(c.run_dir).choose_start(c.run.resume, report, read_all)
    if found is None:
        return Start(None, 0, Path(c.run.init_from) if c.run.init_from else None)
    return Start(found, read_state_json(found).step or 0, found)


def changes_since(c: Config, start: Start, source: Source | None) -> list[str]:
    """A line for each setting that a run that goes on has changed; `UserError` for one that it must
    not change, and for other classes, images or labels than those it has learned from. Images are
    compared if `source.content` is known."""
    if start.checkpoint is None:
        return []
    saved = recorded_config(start.checkpoint, c)
    if saved is None:
        return [f"{start.checkpoint} has no record of its settings: nothing is compared"]
    left_out = {*saved.run.skip_steps, *LeftOutSteps(c).steps_of_rollbacks}
    if late := {step for step in c.run.skip_steps if step < start.step} - left_out:
        raise UserError(
            f"run.skip_steps names step {min(late)}, which {start.checkpoint} has trained already: "
            "name later ones, or go on from an earlier checkpoint by run.resume and a new run.name"
        )
    learned = read_state_json(start.checkpoint)
    classes, content = (list(source.classes), source.content) if source else (None, None)
    changes = require_resumable(saved, c, learned.classes, classes, learned.content, content)
    lines = [f"changed since it was saved: {change_line(n, *pair)}" for n, pair in changes.items()]
    if content and not learned.content:
        lines.append(f"{start.checkpoint} has no hash of its images: they are not compared")
    return lines


# --------------------------------------------------------------------------------------
# What --dry-run prints.


def print_plan(c: Config) -> None:
    """The resolved config and what follows from it. Needs neither weights nor data; whatever is
    wrong is a `UserError`, as in the run itself."""
    ranks = launched_ranks()
    plan = check_run(c, ranks, assume_data=True)
    check_unlocked(c.run_dir)  # the run itself takes the lock
    print(to_yaml(c))
    predicted = "predicted by scripts/benchmark.py --predict h100 with the same arguments"
    say_plan(describe_run(c, plan, ranks) | {"time, memory": predicted}, plan)
    if note := emulation_note(c.run.precision, default_device()):
        print(f"note: run.precision={c.run.precision}: {note}")
    if warning := ema_warning(c):
        print(f"warning: {warning[1]}")


def say_plan(facts: dict[str, str], plan: Plan) -> None:
    """What the run will be, what it takes over from another one, and what is to be known of it."""
    print_block(facts)
    for line in plan.inherited.lines if plan.inherited else []:
        print(line)
    for note in plan.notes:
        print(f"note: {note}")
