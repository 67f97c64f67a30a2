"""The phenomenon of the paper on a CPU: five ways to train on digits, from one starting VAE.

Trains an encoder to align with, a judge to measure with and a starting VAE, then each arm of `ARMS`
with each seed; measures every checkpoint; writes table and plot. All arms of a seed see the same
images, times and noises, and start from the same VAE. What is finished is not done again.
"""

import os
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from models.checks.errors import UserError
from models.checks.file_kinds import read_json
from models.sit import load_sit
from models.vae import VAE, load_vae
from utils.checkpoint import SIT_EMA, VAE_FOLDER, Checkpoints
from utils.cli import check_output
from utils.config.load import load_config
from utils.data.images import pm1_to_u8, u8_to_pm1
from utils.distributed import Ranks
from utils.doctor.run_folder import changed_settings
from utils.evaluation.evaluate import evaluate
from utils.evaluation.formulas.pictures import LatentStatistics, psnr
from utils.evaluation.networks import load_network
from utils.evaluation.options import Options
from utils.files import read_record, write_atomically, write_json
from utils.paper import classifier
from utils.paper.digits_results import ARMS, Measurements, markdown, plot
from utils.process.written import Kind
from utils.sampling.images import draw_images, draw_labels
from utils.sampling.settings import SamplingSettings

ROOT = Path(__file__).resolve().parents[2]
OUT = Path("exps/digits")  # the configs name files in it
CLASSIFIERS = {  # file => network, input side, steps, seed
    "encoder.safetensors": ("test_resnet", 64, 150, 0),
    "judge.safetensors": ("test_byobnet", 16, 500, 1),
}
STARTING_VAE = "vae/checkpoints/0000300/vae"  # of configs/digits/vae.yaml; base.yaml names it
PROGRESS = "progress.json"  # in the folder of a run: its measurements
MEASURED = Kind((".json",), "what this study has measured",
                lambda path: are_measurements(read_json(path, "")))  # fmt: skip
DATA, RESOLUTION = "digits:train@16", 16
NUM, CHUNK = 1000, 100  # samples of one measurement, and of one network call
SAMPLING = SamplingSettings(
    solver="ode-ab2", steps=16, class_balanced=True, precision="fp32", batch_size=CHUNK
)


def run_study(seeds: Sequence[int], jobs: int, overrides: Sequence[str]) -> None:
    """Train what is missing, `jobs` runs at a time; measure what is new; write and print it all."""
    start, seeds = time.monotonic(), list(dict.fromkeys(seeds))
    pairs = [(arm, seed) for arm in ARMS for seed in seeds]
    for pair in pairs:
        refuse_other_settings(*pair, overrides)
    prepare()
    with ThreadPoolExecutor(jobs) as pool:
        running = [pool.submit(train_and_measure, *pair, jobs, overrides) for pair in pairs]
        try:
            for run in running:
                run.result()
        finally:  # where one fails, the others need not begin
            pool.shutdown(cancel_futures=True)
    found = {arm: {seed: read_measurements(run_dir(arm, seed)) for seed in seeds} for arm in ARMS}
    write_json(OUT / "results.json", found)
    text = markdown(found)
    write_atomically(OUT / "results.md", text)
    plot(found, OUT / "results.png")
    print(f"\n{text}\n{OUT}/results.png  results.md  results.json")
    print(f"{(time.monotonic() - start) / 60:.1f} min in this call")


def prepare() -> None:
    """Make what all arms share: the encoder to align with, the judge, the starting VAE."""
    for name, (network, size, steps, seed) in CLASSIFIERS.items():
        if not (OUT / name).exists():
            words = f"--network {network} --size {size} --steps {steps} --seed {seed}".split()
            run_script(["scripts/train_classifier.py", *words, "--out", str(OUT / name)])
    if not (OUT / STARTING_VAE).exists():
        run_script(["train_repae.py", "--config", "configs/digits/vae.yaml"], OUT / "vae.log")


def run_dir(arm: str, seed: int) -> Path:
    return OUT / f"{arm}-seed{seed}"


def train_command(arm: str, seed: int, overrides: Sequence[str]) -> list[str]:
    words = [f"run.name={run_dir(arm, seed).name}", f"run.seed={seed}", *overrides]
    return ["train_repae.py", "--config", f"configs/digits/{arm}.yaml", *words]


def train_commands(seeds: Sequence[int], overrides: Sequence[str]) -> list[str]:
    """Every training command of the study, as lines to paste."""
    pairs = [(arm, seed) for arm in ARMS for seed in seeds]
    return [shlex.join(["python", *train_command(*pair, overrides)]) for pair in pairs]


def refuse_other_settings(arm: str, seed: int, overrides: Sequence[str]) -> None:
    """`UserError` if the run was trained with other settings: it is no result of this command."""
    _, _, config, *words = train_command(arm, seed, overrides)
    if changed := changed_settings(load_config([ROOT / config], words)):
        found = f"{run_dir(arm, seed)} was trained with {', '.join(changed)}"
        raise UserError(f"{found}: delete {OUT}, or move it away")


def train_and_measure(arm: str, seed: int, jobs: int, overrides: Sequence[str]) -> None:
    folder = run_dir(arm, seed)
    run_script(train_command(arm, seed, overrides), folder.with_suffix(".log"), jobs)
    words = ["scripts/reproduce_tables.py", "digits", "--measure", str(folder)]
    run_script(words, folder.with_name(f"{folder.name}-measured.log"), jobs)


def run_script(words: list[str], log: Path | None = None, jobs: int = 1) -> None:
    """Run one of our scripts in a process of its own, on its share of the cores."""
    if log:
        log.parent.mkdir(parents=True, exist_ok=True)
    threads = {
        "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // jobs)),
        "OMP_WAIT_POLICY": "passive",
    }
    paths = [str(ROOT / w) if w.startswith("configs/") else w for w in words[1:]]
    command, start = [sys.executable, str(ROOT / words[0]), *paths], time.monotonic()
    with open(log, "w") if log else nullcontext() as file:
        done = subprocess.run(command, env=os.environ | threads, stdout=file, stderr=file)
    if done.returncode:
        raise UserError(f"{shlex.join(words)} failed" + (f": see {log}" if log else ""))
    print(f"{time.monotonic() - start:5.0f} s  {shlex.join(words)}", flush=True)


class CheckpointEvaluator:
    """Measures checkpoints, all with the same judge, samples and training digits."""

    def __init__(self) -> None:
        self.judge, facts = classifier.load(OUT / "judge.safetensors")
        network = f"timm:{facts['network']}@{OUT}/judge.safetensors"
        self.options = Options(network, ("fid",), cache=OUT / "statistics")
        self.ranks = Ranks(distributed=False)
        self.net = load_network(self.options, self.ranks)
        self.x_u8, _ = classifier.read_all("digits", None, RESOLUTION, "train")

    @torch.no_grad()
    def measure(self, checkpoint: Path) -> dict[str, float]:
        """`digits_results.METRICS`, distance of two halves of the digits (fd_floor), PSNR in dB."""
        vae = load_vae(str(checkpoint / VAE_FOLDER)).eval()
        sit = load_sit(checkpoint / SIT_EMA).eval()
        images = draw_images(SAMPLING, sit, vae, range(NUM), sit.device)
        labels = draw_labels(SAMPLING, range(NUM), sit.config.num_classes)
        record = evaluate(images, DATA, self.options, net=self.net, ranks=self.ranks)
        ((name, distance),) = record["metrics"].items()
        return {
            "fd": distance,
            "fd_floor": distance / record["details"][name]["times_floor"],
            "label_accuracy": self.judge.accuracy(images, labels),
        } | self.measure_latents(vae)

    def measure_latents(self, vae: VAE) -> dict[str, float]:
        """Statistics of the posterior means of all training digits, not normalised, and PSNR."""
        statistics, error = LatentStatistics(vae.latent_channels), 0.0
        for x_u8 in self.x_u8.split(CHUNK):
            z = vae.encode(u8_to_pm1(x_u8)).mean
            statistics.add(z)
            error += psnr(x_u8, pm1_to_u8(vae.decode(z))).sum().item()
        found: dict = statistics.result() | {"psnr": error / len(self.x_u8)}
        return {name: found[name] for name in ("spatial_variance", "total_variation", "psnr")}


def measure_run(folder: Path) -> None:
    """Measure the checkpoints of a run that are not measured yet; each is kept as soon as it is."""
    check_output("--measure", folder / PROGRESS, MEASURED)
    evaluator, found = CheckpointEvaluator(), read_measurements(folder)
    for checkpoint in Checkpoints(folder).whole():
        step = str(int(checkpoint.name))
        if step not in found:
            found[step] = evaluator.measure(checkpoint)
            write_json(folder / PROGRESS, found)


def are_measurements(found: Any) -> bool:
    """Whether this is a JSON object of steps, with the figures of each."""
    pairs = found.items() if isinstance(found, dict) else [("", None)]
    return all(step.isdecimal() and isinstance(values, dict) for step, values in pairs)


def read_measurements(folder: Path) -> Measurements:
    return read_record(folder / PROGRESS) or {}
