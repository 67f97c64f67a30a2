"""The phenomenon of the paper on a CPU: five ways to train on digits, from one starting VAE.

    python scripts/reproduce_tables.py digits        # everything; run again: goes on where it was

Trains an encoder to align with, a judge to measure with and a starting VAE, then each arm of `ARMS`
with each seed; measures every checkpoint; writes table and plot. All arms of a seed see the same
images, times and noises, and start from the same VAE.
"""

import argparse
import json
import os
import shlex
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from matplotlib.ticker import LogFormatter

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from models.errors import UserError
from models.sit import SiT
from models.vae import VAE, load_vae
from scripts import train_classifier
from utils import cli
from utils.checkpoint import Checkpoints, write_atomically
from utils.checks import changed_settings
from utils.config import load_config
from utils.evaluation import Options, evaluate
from utils.feature_stats import Ranks
from utils.generate import Sampling, draw_images, draw_labels
from utils.images import pm1_to_u8, u8_to_pm1
from utils.metrics import LatentStatistics, psnr

ROOT = Path(__file__).resolve().parents[1]
OUT = Path("exps/digits")  # the configs name files in it
ARMS = {  # file in configs/digits => name; the slow ones first, so that no core waits at the end
    "repae": "REPA-E",
    "naive": "naive end-to-end",
    "no-latent-norm": "REPA-E, no latent norm",
    "repa": "REPA",
    "sit": "SiT",
}
METRICS = {  # of one checkpoint => title, and the scale of its axis
    "fd": ("Frechet distance to the training digits", "log"),
    "label_accuracy": ("label accuracy of 1,000 samples", "linear"),
    "spatial_variance": ("spatial variance of the latents", "log"),
    "total_variation": ("total variation of the latents", "log"),
}
CLASSIFIERS = {  # file => network, input side, steps, seed; the encoder as in quickstart.sh
    "encoder.safetensors": ("test_resnet", 64, 150, 0),
    "judge.safetensors": ("test_byobnet", 16, 500, 1),
}
STARTING_VAE = "vae/checkpoints/0000300/vae"  # of configs/digits/vae.yaml; base.yaml names it
PROGRESS = "progress.json"  # in the folder of a run
DATA = "digits:train@16"
SAMPLING = Sampling(solver="ode-ab2", steps=16, class_balanced=True, precision="fp32")
NUM, CHUNK = 1000, 100  # samples of one measurement, and of one network call


def main(args: argparse.Namespace) -> None:
    """Train what is missing, measure what is new, show it all."""
    args.seeds = list(dict.fromkeys(args.seeds))
    start, pairs = time.monotonic(), [(arm, seed) for arm in ARMS for seed in args.seeds]
    if args.dry_run:
        for arm, seed in pairs:
            print(shlex.join(["python", *train_command(arm, seed, args.overrides)]))
        return
    for pair in pairs:
        refuse_other_settings(*pair, args.overrides)
    prepare()
    with ThreadPoolExecutor(args.jobs) as pool:
        jobs = [pool.submit(train_and_measure, *pair, args) for pair in pairs]
        try:
            for job in jobs:
                job.result()
        finally:  # where one fails, the others need not begin
            pool.shutdown(cancel_futures=True)
    found = {arm: {seed: read_progress(arm, seed) for seed in args.seeds} for arm in ARMS}
    write_atomically(OUT / "results.json", json.dumps(found, indent=1) + "\n")
    text = markdown(found)
    write_atomically(OUT / "results.md", text)
    draw(found, OUT / "results.png")
    print(f"\n{text}\n{OUT}/results.png  results.md  results.json")
    print(f"{(time.monotonic() - start) / 60:.1f} min in this call")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1], metavar="N")
    parser.add_argument(
        "--jobs", type=cli.positive, default=2, help="runs at a time, the cores shared"
    )
    parser.add_argument("--dry-run", action="store_true", help="print the commands, and stop")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="for every arm")


# --------------------------------------------------------------------------------------
# Training.


def prepare() -> None:
    """What all arms share: the encoder to align with, the judge (another architecture, another
    seed), the starting VAE."""
    for name, (network, size, steps, seed) in CLASSIFIERS.items():
        if not (OUT / name).exists():
            words = f"--network {network} --size {size} --steps {steps} --seed {seed}".split()
            run(["scripts/train_classifier.py", *words, "--out", str(OUT / name)])
    if not (OUT / STARTING_VAE).exists():
        run(["train_repae.py", "--config", "configs/digits/vae.yaml"], OUT / "vae.log")


def train_command(arm: str, seed: int, overrides: list[str]) -> list[str]:
    words = [f"run.name={run_name(arm, seed)}", f"run.seed={seed}", *overrides]
    return ["train_repae.py", "--config", f"configs/digits/{arm}.yaml", *words]


def refuse_other_settings(arm: str, seed: int, overrides: list[str]) -> None:
    """What was trained otherwise is no result of this command."""
    _, _, config, *words = train_command(arm, seed, overrides)
    changed = changed_settings(load_config([ROOT / config], words))
    if changed:
        raise UserError(
            f"{OUT / run_name(arm, seed)} was trained with {', '.join(changed)}: delete {OUT}, or "
            "move it away"
        )


def train_and_measure(arm: str, seed: int, args: argparse.Namespace) -> None:
    """One run; a finished one ends at once."""
    folder = OUT / run_name(arm, seed)
    run(train_command(arm, seed, args.overrides), folder.with_suffix(".log"), args.jobs)
    log = folder.with_name(f"{folder.name}-measured.log")
    run(["scripts/digits_experiment.py", str(folder)], log, args.jobs)


def run_name(arm: str, seed: int) -> str:
    return f"{arm}-seed{seed}"


def run(words: list[str], log: Path | None = None, jobs: int = 1) -> None:
    """One of our scripts in a process of its own, with its share of the cores."""
    said, (script, *words) = shlex.join(words), words
    if log:
        log.parent.mkdir(parents=True, exist_ok=True)
    threads = str(max(1, os.cpu_count() // jobs))
    environment = os.environ | {"OMP_NUM_THREADS": threads, "OMP_WAIT_POLICY": "passive"}
    start = time.monotonic()
    with open(log, "w") if log else nullcontext() as file:
        words = [str(ROOT / w) if w.startswith("configs/") else w for w in words]
        command = [sys.executable, str(ROOT / script), *words]
        done = subprocess.run(command, env=environment, stdout=file, stderr=file)
    if done.returncode:
        raise UserError(f"{said} failed" + (f": see {log}" if log else ""))
    print(f"{time.monotonic() - start:5.0f} s  {said}", flush=True)


# --------------------------------------------------------------------------------------
# Measuring.


class Ruler:
    """What every checkpoint is measured with."""

    def __init__(self) -> None:
        judge = OUT / "judge.safetensors"
        self.judge, _ = train_classifier.load(judge)
        network = f"timm:{CLASSIFIERS[judge.name][0]}@{judge}"
        self.options = Options(network, ("fid",), cache=OUT / "statistics")
        self.ranks = Ranks(distributed=False)
        self.net = self.options.load(self.ranks)
        self.x_u8, _ = train_classifier.read_all("digits", None, 16, "train")

    @torch.no_grad()
    def measure(self, checkpoint: Path) -> dict[str, float]:
        """METRICS of one checkpoint, and the PSNR of its VAE."""
        vae = load_vae(str(checkpoint)).eval()
        sit = SiT.from_pretrained(checkpoint / "sit_ema").eval()
        blocks = [range(i, i + CHUNK) for i in range(0, NUM, CHUNK)]
        images = torch.cat([draw_images(SAMPLING, sit, vae, b, sit.device) for b in blocks])
        y = draw_labels(SAMPLING, range(NUM), sit.config.num_classes)
        record = evaluate(images, DATA, self.options, net=self.net, ranks=self.ranks)
        ((name, distance),) = record["metrics"].items()
        floor = distance / record["details"][name]["times_floor"]
        accuracy = (self.judge.predict(images) == y).float().mean().item()
        values = {"fd": distance, "fd_floor": floor, "label_accuracy": accuracy}
        return values | self.latents(vae)

    def latents(self, vae: VAE) -> dict[str, float]:
        """Of all training digits, posterior means, never normalised."""
        found, error = LatentStatistics(vae.latent_channels), 0.0
        for x_u8 in self.x_u8.split(CHUNK):
            z = vae.encode(u8_to_pm1(x_u8)).mean
            found.add(z)
            error += psnr(x_u8, pm1_to_u8(vae.decode(z))).sum().item()
        result = found.result()
        return {k: result[k] for k in ("spatial_variance", "total_variation")} | {
            "psnr": error / len(self.x_u8)
        }


def measure_run(folder: Path) -> None:
    """{step: METRICS} of a run's checkpoints into its progress.json, kept as they are made."""
    ruler, file = Ruler(), folder / PROGRESS
    found = json.loads(file.read_text()) if file.exists() else {}
    for checkpoint in Checkpoints(folder).whole():
        step = str(int(checkpoint.name))
        if step not in found:
            found[step] = ruler.measure(checkpoint)
            write_atomically(file, json.dumps(found, indent=1) + "\n")


def read_progress(arm: str, seed: int) -> dict[str, dict[str, float]]:
    return json.loads((OUT / run_name(arm, seed) / PROGRESS).read_text())


# --------------------------------------------------------------------------------------
# Showing.

Found = dict[str, dict[int, dict[str, dict[str, float]]]]  # arm => seed => step => metric


def markdown(found: Found) -> str:
    """All figures at the last step, and two of them at every step: the mean over seeds, and in
    brackets each seed."""
    head = ["arm", "Frechet distance", "label accuracy", "spatial variance", "total variation"]
    names, steps = [*METRICS, "psnr"], list(next(iter(next(iter(found.values())).values())))
    rows = [[cell(found[arm], steps[-1], name) for name in names] for arm in found]
    pages = [table([*head, "PSNR of the VAE, dB"], found, rows)]
    for name in ("fd", "label_accuracy"):
        rows = [[cell(found[arm], step, name) for step in steps] for arm in found]
        pages.append(table([f"{METRICS[name][0]}, step", *steps], found, rows))
    return "\n".join(pages)


def table(head: list[str], found: Found, rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *([ARMS[arm], *row] for arm, row in zip(found, rows))]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def cell(runs: dict[int, dict[str, dict[str, float]]], step: str, name: str) -> str:
    values = [run[step][name] for run in runs.values()]
    each = ", ".join(f"{v:.3g}" for v in values)
    return f"{statistics.fmean(values):.3g} ({each})" if len(values) > 1 else each


def draw(found: Found, path: Path) -> None:
    """Every metric over steps: mean over seeds as a line, their range as a band."""
    figure, axes = plt.subplots(
        1, len(METRICS), figsize=(4.2 * len(METRICS), 3.6), layout="constrained"
    )
    for axis, (name, (title, scale)) in zip(axes, METRICS.items()):
        for arm, runs in found.items():
            steps = sorted(map(int, next(iter(runs.values()))))
            values = [[run[str(step)][name] for run in runs.values()] for step in steps]
            (line,) = axis.plot(steps, [statistics.fmean(v) for v in values], ".-", label=ARMS[arm])
            low, high = [min(v) for v in values], [max(v) for v in values]
            axis.fill_between(steps, low, high, color=line.get_color(), alpha=0.2)
        axis.set(title=title, xlabel="step", yscale=scale)
        if scale == "log":
            axis.yaxis.set_major_formatter(LogFormatter())
            axis.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(1.5, 0.5)))
        axis.spines[["top", "right"]].set_visible(False)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(ARMS), frameon=False)
    figure.savefig(path, dpi=100)
    plt.close(figure)


if __name__ == "__main__":
    parser = cli.Parser(description="Measure one run; everything: reproduce_tables.py digits")
    parser.add_argument("folder", type=Path, help="exps/digits/ARM-seedN")
    cli.run(lambda: measure_run(parser.parse_args().folder))
