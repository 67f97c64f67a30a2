"""The end of the quickstart: score the generated digits, draw grids and curves, write the summary.

python scripts/quickstart_report.py --run exps/quickstart
"""

import json
import sys
import time
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from scripts import train_classifier
from utils import cli
from utils.checkpoint import write_atomically
from utils.images import save_grid
from utils.tracking import read_metrics

COLUMNS = 10  # of the grid: ten digits of each class
CURVES = {
    "VAE: reconstruction (L1)": ["loss/vae/pixel"],
    "alignment (-1 is perfect)": ["loss/vae/align", "loss/sit/align"],
    "SiT: velocity error": ["loss/sit/diffusion"],
    "discriminator: hinge": ["loss/disc/hinge"],
}


def main() -> None:
    parser = cli.Parser(description=__doc__.split("\n")[0])
    parser.add_argument("--run", type=Path, required=True, help="folder of the run")
    run = parser.parse_args().run
    x_u8, y = read_samples(run / "samples.npz")
    judge, facts = train_classifier.load(run / "judge.safetensors")
    accuracy = (judge.predict(x_u8) == y).float().mean().item()
    draw_grid(x_u8, y, run / "digits.png")
    rows = [row for row in read_metrics(run / "metrics.jsonl") if "images_per_second" in row]
    draw_curves(rows, run / "curves.png")
    newest = sorted((run / "samples").glob("*-reconstructions.png"))[-1]
    (run / "reconstructions.png").write_bytes(newest.read_bytes())
    summary = {
        "label_accuracy": accuracy,
        "classifier_accuracy": facts["accuracy"],
        "seconds": time.time() - int((run / "started").read_text()),
        "images_per_second": float(np.median([r["images_per_second"] for r in rows])),
        "steps": rows[-1]["step"],
        "evaluation": json.loads((run / "evaluation.json").read_text())["metrics"],
    }
    write_atomically(run / "summary.json", json.dumps(summary, indent=1) + "\n")
    print_summary(run, summary)


def read_samples(path: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Images (N, 3, H, W) uint8 and their intended labels (N,)."""
    images = torch.from_numpy(np.load(path)["arr_0"]).permute(0, 3, 1, 2)
    return images, torch.from_numpy(np.load(path.with_suffix(".labels.npy")))


def draw_grid(x_u8: torch.Tensor, y: torch.Tensor, path: Path) -> None:
    """A row for each class: its first images, as they came."""
    rows = [x_u8[y == label][:COLUMNS] for label in range(int(y.max()) + 1)]
    save_grid(path, torch.cat(rows), COLUMNS, scale=4)


def draw_curves(rows: list[dict], path: Path) -> None:
    """Every loss over steps."""
    figure, axes = plt.subplots(1, len(CURVES), figsize=(4 * len(CURVES), 3), layout="constrained")
    for axis, (title, names) in zip(axes, CURVES.items()):
        for name in names:
            axis.plot(*zip(*[(row["step"], row[name]) for row in rows if name in row]), label=name)
        axis.set(title=title, xlabel="step")
        axis.legend()
    figure.savefig(path, dpi=100)


def print_summary(run: Path, summary: dict) -> None:
    print(f"""
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
      --config configs/imagenet256/repae-sdvae-xl2.yaml""")


if __name__ == "__main__":
    cli.run(main)
