"""The same samples from several checkpoints: the picture of `visualize_latents.py progress`."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from models.checks.errors import UserError
from models.sit import read_sit_config
from utils.checkpoint import SIT_EMA, STATE, Checkpoints
from utils.distributed import default_device
from utils.files import read_record
from utils.pictures.grid import Row, name_of
from utils.sampling.images import draw_images, draw_labels
from utils.sampling.load import (
    check_balance,
    load_networks,
    open_checkpoint,
    settings_for,
)
from utils.sampling.locate import locate_checkpoint, require_checkpoint
from utils.sampling.settings import SamplingSettings


def progress_rows(
    given: list[Path],
    runs: list[Path],
    settings: SamplingSettings,
    num: int,
    classes: Sequence[str] = (),
) -> tuple[list[Row], list[str]]:
    """A row for each checkpoint, images 0 ... num - 1 of sample_ddp.py: those of `given`, which
    `locate_checkpoint` finds, then all whole ones of each of `runs`. And the headings of the
    columns, the classes; `classes` are those of --classes. Raises `UserError` for checkpoints that
    cannot be sampled from, or that know different classes."""
    found = [locate_checkpoint(each) for each in given]
    # what a download is called here is no name
    shown = {f: f if f.is_relative_to(each) else each for f, each in zip(found, given)}
    for run in runs:
        whole = Checkpoints(run).whole()
        if not whole:
            raise UserError(f"--run {run}: no whole checkpoint in {run / 'checkpoints'}")
        found += whole
    if not found:
        raise UserError("name checkpoints like exps/NAME/checkpoints/0400000, or --run exps/NAME")
    device = default_device()
    settings = settings_for(device, settings)
    checkpoints = [open_checkpoint(f, guided(f, settings), classes) for f in found]
    num_classes = {c.num_classes for c in checkpoints}
    if len(num_classes) > 1:
        words = ", ".join(map(str, sorted(num_classes)))
        raise UserError(f"these checkpoints know {words} classes: labels cannot be shared")
    check_balance(settings, num, *num_classes)
    several = len({name_of(shown.get(c.folder, c.folder))[0] for c in checkpoints}) > 1
    rows = []
    for c in checkpoints:
        nets = load_networks(c.folder, c.settings, device)
        images = draw_images(c.settings, *nets, range(num), device)
        rows.append(Row(*titles(c.folder, several, shown.get(c.folder)), images))
        print(f"sampled {c.folder}")
    first = checkpoints[0]
    return rows, first.titles(draw_labels(first.settings, range(num), first.num_classes))


def guided(folder: Path, settings: SamplingSettings) -> SamplingSettings:
    """The settings, without guidance if the SiT of a checkpoint has no null label."""
    require_checkpoint(folder)
    if settings.cfg_scale == 1 or read_sit_config(folder / SIT_EMA)["class_dropout_prob"]:
        return settings
    print(f"{folder}: its SiT has no null label, so its samples are drawn without guidance")
    return replace(settings, cfg_scale=1.0)


def titles(checkpoint: Path, several: bool, shown: Path | None = None) -> tuple[str, list[str]]:
    """Title and notes of its row: the step, with the run's name if there are several. `shown`: the
    path that names it, if it is another."""
    name, *step = name_of(shown or checkpoint)
    known = (read_record(checkpoint / STATE) or {}).get("step")
    step = known if known is not None else int(step[0]) if step else None
    if step is None:
        return name, []
    return (name, [f"step {step:,}"]) if several else (f"step {step:,}", [])
