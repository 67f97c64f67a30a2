"""The end of the quickstart: score the generated digits, draw grids and curves, sum up."""

import time
from collections import Counter
from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor

from models.checks.errors import UserError, short
from utils.cli import check_output
from utils.files import read_json, write_atomically, write_json
from utils.paper import classifier
from utils.pictures.grid import Row, draw_rows, save_figure, save_picture
from utils.process import written
from utils.training.tracking import read_metrics

REAL, GENERATED = 3, 10  # digits of each class in the grid
ENLARGED = 96  # pixels: side of a digit in the grid
# Digits that people take for each other, too, in handwriting of 8 pixels.
LOOK_ALIKE = ({1, 7}, {1, 8}, {3, 5}, {3, 8}, {3, 9}, {4, 9}, {5, 8}, {5, 9}, {7, 9}, {8, 9})
MOST_CONFUSIONS = 5  # in the summary
PICTURES = ("digits.png", "confusion.png", "curves.png", "reconstructions.png")
CURVES = {  # title => patterns of names in metrics.jsonl
    "VAE: reconstruction (L1)": ["loss/vae/pixel"],
    "VAE: perceptual distance": ["loss/vae/perceptual"],
    "alignment (-1 is perfect)": ["loss/vae/align", "loss/sit/align"],
    "SiT: velocity error": ["loss/sit/diffusion"],
    "discriminator": ["loss/disc/*"],
}


def report(run: Path) -> dict:
    """Write `PICTURES` and summary.json into the folder of a finished run; returns the summary.
    `UserError` if the folder does not hold all of it, or other files of these names."""
    for name in PICTURES:
        check_output("--run", run / name, written.PICTURE)
    check_output("--run", run / "summary.json", written.SUMMARY)
    check_output("--run", run / "report.html", written.PAGE)
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
    draw_digits(x_u8, y, run / "digits.png")
    confusion = count_pairs(y, judge.predict(x_u8))
    plot_confusion(confusion, run / "confusion.png")
    rows = [row for row in read_metrics(run / "metrics.jsonl") if "images_per_second" in row]
    plot_curves(rows, run / "curves.png")
    newest = sorted((run / "samples").glob("*-reconstructions.png"))[-1]
    write_atomically(run / "reconstructions.png", newest.read_bytes())
    summary = {
        "label_accuracy": float(np.trace(confusion) / confusion.sum()),
        "accuracy_of_classes": (confusion.diagonal() / confusion.sum(axis=1)).tolist(),
        "errors": int(confusion.sum() - np.trace(confusion)),
        "errors_between_look_alikes": sum(
            int(confusion[a, b]) for a, b in off_diagonal(confusion) if {a, b} in LOOK_ALIKE
        ),
        "most_frequent_confusions": frequent_confusions(confusion),
        "confusion_matrix": confusion.tolist(),  # [meant][read as]
        "classifier_accuracy": facts["accuracy"],
        "seconds": time.time() - int((run / "started").read_text()),
        "images_per_second": float(np.median([r["images_per_second"] for r in rows])),
        "steps": rows[-1]["step"],
        "evaluation": read_json(run / "evaluation.json", "evaluate again")["metrics"],
    }
    summary = rounded(summary)
    write_json(run / "summary.json", summary)
    return summary


def rounded(value: Any) -> Any:
    """Every float in nested dicts and lists, to four digits."""
    if isinstance(value, dict):
        return {name: rounded(each) for name, each in value.items()}
    if isinstance(value, list):
        return [rounded(each) for each in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value


def draw_digits(x_u8: Tensor, y: Tensor, path: Path) -> None:
    """Of each class a few real digits and the first generated ones, not chosen; drawn larger, and
    smoothly, as the digits themselves are enlarged from 8 pixels."""
    real_x, real_y = classifier.read_all("digits", None, x_u8.shape[-1], "train")
    gap = torch.full((1, *x_u8.shape[1:]), 255, dtype=torch.uint8)
    rows = []
    for label in range(int(y.max()) + 1):
        real, generated = real_x[real_y == label][:REAL], x_u8[y == label][:GENERATED]
        panels = F.interpolate(torch.cat([real, gap, generated]), ENLARGED, mode="bicubic")
        rows.append(Row(str(label), [], panels))
    headings = ["real"] * REAL + [""] + ["generated"] * GENERATED
    save_picture(path, draw_rows(rows, headings))


def count_pairs(meant: Tensor, read: Tensor) -> np.ndarray:
    """Confusion matrix (classes, classes): how many images of each row's class are read as each
    column's."""
    classes = int(max(meant.max(), read.max())) + 1
    pairs = torch.bincount(meant * classes + read, minlength=classes**2)
    return pairs.view(classes, classes).numpy()


def off_diagonal(confusion: np.ndarray) -> list[tuple[int, int]]:
    """(meant, read as) of the errors that occur, the most frequent first."""
    errors = Counter({(a, b): n for (a, b), n in np.ndenumerate(confusion) if a != b and n})
    return [(int(a), int(b)) for (a, b), _ in errors.most_common()]


def frequent_confusions(confusion: np.ndarray) -> list[dict[str, int]]:
    """The commonest errors."""
    found = off_diagonal(confusion)[:MOST_CONFUSIONS]
    return [{"meant": a, "read_as": b, "images": int(confusion[a, b])} for a, b in found]


def plot_confusion(confusion: np.ndarray, path: Path) -> None:
    """The confusion matrix with its numbers; the shade of a row is a share of its images."""
    share = confusion / confusion.sum(axis=1, keepdims=True).clip(min=1)
    figure = Figure(figsize=(6, 6), layout="constrained")
    axis = figure.subplots()
    axis.imshow(share, cmap="Blues", vmin=0, vmax=1)
    for (a, b), n in np.ndenumerate(confusion):
        if n:
            color = "white" if share[a, b] > 0.5 else "black"
            axis.text(b, a, str(n), ha="center", va="center", color=color)
    ticks = range(len(confusion))
    axis.set(xticks=ticks, yticks=ticks, xlabel="read by the judge as", ylabel="meant as")
    axis.set_title(f"{confusion.sum():,} generated digits")
    save_figure(figure, path, dpi=100)


def plot_curves(rows: Sequence[dict], path: Path) -> None:
    """Every loss that the run has, over steps."""
    found = {title: matching_names(rows, patterns) for title, patterns in CURVES.items()}
    panels = {title: names for title, names in found.items() if names}
    figure = Figure(figsize=(4 * len(panels), 3), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axis, (title, names) in zip(axes, panels.items()):
        for name in names:
            axis.plot(*zip(*[(row["step"], row[name]) for row in rows if name in row]), label=name)
        axis.set(title=title, xlabel="step")
        axis.legend()
    save_figure(figure, path, dpi=100)


def matching_names(rows: Sequence[dict], patterns: Sequence[str]) -> list[str]:
    """Names in the rows that fit one of the patterns, in the order in which they appear."""
    names = dict.fromkeys(name for row in rows for name in row)
    return [name for name in names if any(fnmatch(name, pattern) for pattern in patterns)]


def summary_text(run: Path, summary: dict) -> str:
    """What the quickstart prints at its end."""
    total = sum(map(sum, summary["confusion_matrix"]))
    worst = min(summary["accuracy_of_classes"])
    confusions = summary["most_frequent_confusions"]
    pairs = [f"{c['meant']} as {c['read_as']} ({c['images']})" for c in confusions]
    errors, alike = summary["errors"], summary["errors_between_look_alikes"]
    return f"""
{summary["label_accuracy"]:.1%} of {total:,} generated digits are what they were meant to be, and
{worst:.1%} of the worst class, says a classifier that gets {summary["classifier_accuracy"]:.1%} of
unseen real digits right.
Most often read wrongly: {", ".join(pairs) or "none"}; {alike} of {errors} errors
are between digits that people take for each other as well.
Training: {summary["steps"]} steps, {summary["images_per_second"]:.0f} images/s. All together:
{summary["seconds"]:.0f} s.

  {run}/report.html           the run as a page
  {run}/digits.png            real and generated digits, one row for each class
  {run}/confusion.png         which digits the classifier takes for which
  {run}/reconstructions.png   real digits, and what the VAE makes of them
  {run}/curves.png            losses
  {run}/summary.json          these figures
  {run}/checkpoints/          the networks: SiT.from_pretrained, AutoencoderKL.from_pretrained

On 8 GPUs, with ImageNet prepared as the README says:
  accelerate launch --num_processes 8 train_repae.py \\
      --config configs/imagenet256/repae-sdvae-xl2.yaml"""
