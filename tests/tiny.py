"""The smallest complete run: what the tests of training share."""

import importlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import torch
from accelerate import Accelerator

from utils import cli, distributed
from utils.config.load import load_config
from utils.config.schema import Config
from utils.data.images import u8_to_pm1
from utils.data.registry import open_source
from utils.training.draws import Draws, drawing
from utils.training.networks import Networks, build_networks

ROOT = Path(__file__).resolve().parents[1]

TINY = (  # noqa: SIM905
    "run.name=tiny run.steps=4 run.batch_size=8 run.precision=fp32 run.trackers=[] run.log_every=2 "
    "run.save_every=2 data.source=digits data.resolution=16 data.workers=0 vae.name=tiny-f2d4 "
    "vae.weights=null vae.optim.lr=1e-3 sit.size=SiT-S/1 sit.depth=3 sit.hidden_size=32 "
    "sit.num_heads=2 sit.patch_size=2 sit.projector_dim=16 sit.optim.lr=1e-3 disc.layers=2 "
    "disc.channels=8 encoder.names=[timm:test_resnet/16] encoder.weights=[random] encoder.grid=4 "
    "loss.align.depth=2 loss.reg.lpips=0 latent_norm.stats_images=64 preview.every=0"
).split()


def tiny_config(*overrides: str) -> Config:
    return load_config([], [*TINY, *overrides])


def start(config: Config) -> tuple[Networks, Accelerator]:
    """Networks of a run on the CPU, the SiT's zero-initialised layers made random: at zero, most
    gradients would be zero for a reason that no routing has."""
    accelerator = distributed.start(config.run_dir, [], tf32=False)
    source = open_source("digits", None, config.data.resolution)
    nets, _ = build_networks(config, source, accelerator)
    wake(nets)
    return nets, accelerator


@torch.no_grad()
def wake(nets: Networks) -> None:
    g = torch.Generator().manual_seed(1)
    for (_, p), q in zip(nets.sit.named_parameters(), nets.ema.parameters()):
        p.add_(torch.randn(p.shape, generator=g) * 0.05)
        q.copy_(p)


def batch(config: Config, step: int = 0) -> tuple[torch.Tensor, torch.Tensor, Draws]:
    """Images, labels and draws of one step."""
    source = open_source("digits", None, config.data.resolution)
    indices = range(step * config.run.batch_size, (step + 1) * config.run.batch_size)
    x = u8_to_pm1(torch.stack([source[i][0] for i in indices]))
    y = torch.tensor([source[i][1] for i in indices])
    side = config.data.resolution // 2
    return x, y, draws_of(config, (config.run.batch_size, 4, side, side), step)


def draws_of(config: Config, shape: tuple[int, ...], step: int = 0) -> Draws:
    """The random numbers of one step of the run that `config` describes, on one rank."""
    return drawing(config)(shape, step=step)


def grads(net: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The gradients that reached `net`, by name; none for a parameter that got none."""
    return {n: p.grad.clone() for n, p in net.named_parameters() if p.grad is not None}


def launcher(ranks: int) -> list[str]:
    """`accelerate launch` of so many processes. With --cpu it would start a single one (accelerate
    1.15 leaves CPU ranks to MPI); --multi_gpu starts them by torchrun, and no GPU is visible."""
    if ranks == 1:
        return []
    words = "-m accelerate.commands.launch --multi_gpu --num_machines 1 --main_process_port 0 "
    words += f"--mixed_precision no --dynamo_backend no --num_processes {ranks}"
    return words.split()


def run_script(*command: str, ranks: int = 1, **kwargs) -> subprocess.CompletedProcess:
    """Run a root script as a user does: by python, or by `accelerate launch` on gloo ranks."""
    words = [sys.executable, *launcher(ranks), *map(str, command)]
    env = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(
        words, cwd=ROOT, env=env, capture_output=True, text=True, timeout=600, **kwargs
    )


def train(out: Path, *overrides: str, ranks: int = 1) -> subprocess.CompletedProcess:
    """`train_repae.py` with the tiny config, into `out`."""
    return run_script("train_repae.py", *TINY, f"run.out={out}", *overrides, ranks=ranks)


def run_here(script: str, *words) -> int:
    """A script in this process, without its seconds of imports; returns the exit code."""
    module = importlib.import_module(script.removesuffix(".py").replace("/", "."))
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)}
    torch.set_num_threads(1)  # as in the processes of `run_script`: results are equal bit by bit
    before = sys.argv
    sys.argv = [script, *map(str, words)]
    try:
        cli.run(module.main)
    except SystemExit as end:
        return end.code or 0
    finally:
        sys.argv = before
        for number, handler in handlers.items():
            signal.signal(number, handler)


def train_here(out: Path, *overrides: str) -> int:
    """`train` in this process; returns the exit code."""
    return run_here("train_repae.py", *TINY, f"run.out={out}", *overrides)
