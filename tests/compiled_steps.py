"""Training steps, eager and compiled, on however many ranks: run by test_compile.py.

    accelerate launch --multi_gpu --num_processes 2 tests/compiled_steps.py OUT [key=value ...]

Every rank writes OUT/rankN.json: the metrics of each step of both runs, and what torch.compile has
done after the first step in which every network runs, and after the last.
"""

import json
import sys
from dataclasses import fields
from pathlib import Path

import torch
import torch._dynamo
from torch._dynamo.utils import counters

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import train_repae
from tests.tiny import batch, start, tiny_config
from utils import compilation
from utils.config.schema import Config
from utils.data.registry import open_source
from utils.pictures.preview import Previewer
from utils.training.draws import Draws

STEPS = 10
# eps of AdamW is raised: its first steps are otherwise the sign of each gradient, rounding included
SETTINGS = "vae.optim.eps=1e-4 sit.optim.eps=1e-4 disc.optim.eps=1e-4 sit.depth=2 "
SETTINGS += "loss.align.depth=1 preview.steps=2 preview.cfg_scale=1.5"


def run(config: Config) -> tuple[list[dict[str, float]], list[dict[str, int]]]:
    """Metrics of each step; and what was compiled by the end of two steps, as above."""
    torch.manual_seed(0)  # LPIPS with random weights
    nets, accelerator = start(config)
    previewer = Previewer(config, open_source("digits", None, config.data.resolution), accelerator)
    rank, ranks = accelerator.process_index, accelerator.num_processes
    share = config.run.batch_size // ranks
    mine = slice(rank * share, (rank + 1) * share)
    settled = config.disc.pretrain_steps + config.loss.reg.gan_start
    rows, compiled = [], []
    for step in range(STEPS):
        x, y, draws = batch(config, step)
        draws = Draws(*(getattr(draws, f.name)[mine] for f in fields(draws)))
        metrics = train_repae.train_step(nets, x[mine], y[mine], draws, config, step)
        rows.append({name: float(value) for name, value in metrics.items()})
        if config.preview.every and config.run.compile and step in (settled, settled + 2):
            previewer.sample(nets)
            previewer.encode(nets)
        if step in (settled, STEPS - 1):
            compiled.append(done_by_dynamo())
            torch._dynamo.config.error_on_recompile = config.run.compile
    return rows, compiled


def done_by_dynamo() -> dict[str, int]:
    return {
        "graphs": counters["stats"]["unique_graphs"],
        "frames": counters["frames"]["total"],
        "breaks": sum(counters["graph_break"].values()),
    }


def main(out: Path, *overrides: str) -> None:
    compilation.BACKEND = "aot_eager"  # the graphs of inductor, and no kernels to build
    overrides = (*SETTINGS.split(), *overrides)
    eager, _ = run(tiny_config(*overrides))
    rows, compiled = run(tiny_config("run.compile=true", *overrides))
    rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
    report = {"eager": eager, "compiled": rows, "counts": compiled}
    (out / f"rank{rank}.json").write_text(json.dumps(report))


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
