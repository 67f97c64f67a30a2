"""The end of the quickstart: score the generated digits, draw grid and curves, sum up."""

import time
from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
import torch
from matplotlib.figure import Figure

from models.errors import UserError
from models.weights import short
from utils.data.images import save_grid
from utils.files import read_json, write_atomically, write_json
from utils.paper import classifier
from utils.pictures.grid import save_figure
from utils.training.tracking import read_metrics

COLUMNS = 10  # of the grid: ten digits of each class
CURVES = {  # title => patterns of names in metrics.jsonl
    "VAE: reconstruction (L1)": ["loss/vae/pixel"],
    "alignment (-1 is perfect)": ["loss/vae/align", "loss/sit/align"],
    "SiT: velocity error": ["loss/sit/diffusion"],
    "discriminator": ["loss/disc/*"],
}


def report(run: Path) -> dict:
    """Write digits.png, curves.png, reconstructions.png and summary.json into the folder of a
    finished run; returns the summary. `UserError` if the folder does not hold all of it."""
    try:
        return _report(run)
    except UserError:
        raise
    # whatever is missing in the folder, or damaged
    except (OSError, ValueError, LookupError, TypeError, EOFError, BadZipFile) as error:
        raise UserError(
            f"{run} is not the folder of a finished quickstart ({short(error)}): run "
            "scripts/quickstart.sh"
        ) from None


def _report(run: Path) -> dict:
    x_u8 = torch.from_numpy(np.load(run / "samples.npz")["arr_0"]).permute(0, 3, 1, 2)
    y = torch.from_numpy(np.load(run / "samples.labels.npy"))
    judge, facts = classifier.load(run / "judge.safetensors")
    # a row for each class: its first images, not chosen
    digits = [x_u8[y == label][:COLUMNS] for label in range(int(y.max()) + 1)]
    save_grid(run / "digits.png", torch.cat(digits), COLUMNS, scale=4)
    rows = [row for row in read_metrics(run / "metrics.jsonl") if "images_per_second" in row]
    plot_curves(rows, run / "curves.png")
    newest = sorted((run / "samples").glob("*-reconstructions.png"))[-1]
    write_atomically(run / "reconstructions.png", newest.read_bytes())
    summary = {
        "label_accuracy": judge.accuracy(x_u8, y),
        "classifier_accuracy": facts["accuracy"],
        "seconds": time.time() - int((run / "started").read_text()),
        "images_per_second": float(np.median([r["images_per_second"] for r in rows])),
        "steps": rows[-1]["step"],
        "evaluation": read_json(run / "evaluation.json", "evaluate again")["metrics"],
    }
    write_json(run / "summary.json", summary)
    return summary


def plot_curves(rows: Sequence[dict], path: Path) -> None:
    """Every loss over steps."""
    figure = Figure(figsize=(4 * len(CURVES), 3), layout="constrained")
    axes = figure.subplots(1, len(CURVES))
    for axis, (title, patterns) in zip(axes, CURVES.items()):
        for name in matching_names(rows, patterns):
            axis.plot(*zip(*[(row["step"], row[name]) for row in rows if name in row]), label=name)
        axis.set(title=title, xlabel="step")
        if axis.lines:
            axis.legend()
    save_figure(figure, path, dpi=100)


def matching_names(rows: Sequence[dict], patterns: Sequence[str]) -> list[str]:
    """Names in the rows that fit one of the patterns, in the order in which they appear."""
    names = dict.fromkeys(name for row in rows for name in row)
    return [name for name in names if any(fnmatch(name, pattern) for pattern in patterns)]


def summary_text(run: Path, summary: dict) -> str:
    """What the quickstart prints at its end."""
    return f"""
{summary["label_accuracy"]:.1%} of 1,000 generated digits are what they were meant to be, says a
classifier that gets {summary["classifier_accuracy"]:.1%} of unseen real digits right.
Training: {summary["steps"]} steps, {summary["images_per_second"]:.0f} images/s. All together:
{summary["seconds"]:.0f} s.

  {run}/digits.png            generated digits, one row for each class
  {run}/reconstructions.png   real digits, and what the VAE makes of them
  {run}/curves.png            losses
  {run}/summary.json          these figures
  {run}/checkpoints/          the networks: SiT.from_pretrained, AutoencoderKL.from_pretrained

On 8 GPUs, with ImageNet prepared as the README says:
  accelerate launch --num_processes 8 train_repae.py \\
      --config configs/imagenet256/repae-sdvae-xl2.yaml"""
