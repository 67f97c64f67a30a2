"""The same samples from several checkpoints: the picture of `visualize_latents.py progress`."""

from dataclasses import replace
from pathlib import Path

from models.errors import UserError
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
    require_checkpoint,
    settings_for,
)
from utils.sampling.settings import SamplingSettings


def progress_rows(
    folders: list[Path], runs: list[Path], settings: SamplingSettings, num: int
) -> tuple[list[Row], list[str]]:
    """A row for each checkpoint, images 0 ... num - 1 of sample_ddp.py: `folders` in their order,
    then all whole ones of each of `runs`. And the headings of the columns, the labels. Raises
    `UserError` for checkpoints that cannot be sampled from, or that know different classes."""
    found = list(folders)
    for run in runs:
        whole = Checkpoints(run).whole()
        if not whole:
            raise UserError(f"--run {run}: no whole checkpoint in {run / 'checkpoints'}")
        found += whole
    if not found:
        raise UserError("name checkpoints like exps/NAME/checkpoints/0400000, or --run exps/NAME")
    device = default_device()
    settings = settings_for(device, settings)
    checkpoints = [open_checkpoint(folder, guided(folder, settings)) for folder in found]
    num_classes = {c.num_classes for c in checkpoints}
    if len(num_classes) > 1:
        words = ", ".join(map(str, sorted(num_classes)))
        raise UserError(f"these checkpoints know {words} classes: labels cannot be shared")
    check_balance(settings, num, *num_classes)
    several = len({name_of(c.folder)[0] for c in checkpoints}) > 1
    rows = []
    for c in checkpoints:
        nets = load_networks(c.folder, c.settings, device)
        images = draw_images(c.settings, *nets, range(num), device)
        rows.append(Row(*titles(c.folder, several), images))
        print(f"sampled {c.folder}")
    y = draw_labels(settings, range(num), *num_classes)
    return rows, [f"class {label}" for label in y.tolist()]


def guided(folder: Path, settings: SamplingSettings) -> SamplingSettings:
    """The settings, without guidance if the SiT of a checkpoint has no null label."""
    require_checkpoint(folder)
    if settings.cfg_scale == 1 or read_sit_config(folder / SIT_EMA)["class_dropout_prob"]:
        return settings
    print(f"{folder}: its SiT has no null label, so its samples are drawn without guidance")
    return replace(settings, cfg_scale=1.0)


def titles(checkpoint: Path, several: bool) -> tuple[str, list[str]]:
    """Title and notes of its row: the step, with the run's name if there are several."""
    name, *step = name_of(checkpoint)
    known = (read_record(checkpoint / STATE) or {}).get("step")
    step = known if known is not None else int(step[0]) if step else None
    if step is None:
        return name, []
    return (name, [f"step {step:,}"]) if several else (f"step {step:,}", [])
