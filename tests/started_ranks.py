"""A run with run.init_from on however many ranks, saved and resumed: run by
tests/utils/training/starting/test_inheritance.py.

    accelerate launch --multi_gpu --num_processes 2 tests/started_ranks.py OUT key=value ...

Rank 0 writes OUT/start.pt, the weights at the start. Any difference of a bit, between ranks or
between the run and its continuation, ends it with an error.
"""

import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import train_repae
from tests.sharded_ranks import require_equal, weights
from tests.tiny import tiny_config
from utils import distributed
from utils.checkpoint import contents_of
from utils.config.resuming import defining_settings
from utils.config.schema import Config
from utils.data.training import open_training_data
from utils.distributed import Ranks
from utils.sealed import seal_checkpoint
from utils.training.draws import Draws, drawing
from utils.training.networks import Networks, build_networks


def write(nets: Networks, c: Config, folder: Path, classes: Sequence[str]) -> None:
    """A checkpoint, as a run writes it. All ranks call it together."""
    with nets.update_ema.whole():
        contents = contents_of(nets)
        state = {"classes": list(classes), "path": "linear", "config": defining_settings(c)}
        Ranks().on_main(lambda: seal_checkpoint(folder, 2, contents.write, state))


def steps(nets: Networks, c: Config, numbers: range) -> None:
    """Steps on made-up images of three classes; each rank trains on its share of them."""
    ranks, size = Ranks(), c.run.batch_size
    mine = slice(ranks.rank * size // ranks.world, (ranks.rank + 1) * size // ranks.world)
    shape = (size, *nets.vae.latent_shape(c.data.resolution))
    for step in numbers:
        g = torch.Generator().manual_seed(step)
        x = torch.rand(size, 3, c.data.resolution, c.data.resolution, generator=g) * 2 - 1
        draws = drawing(c)(shape, step=step)
        draws = Draws(*(getattr(draws, f.name)[mine] for f in fields(draws)))
        train_repae.train_step(nets, x[mine], torch.arange(size)[mine] % 3, draws, c, step)


def require_same_on_all_ranks(nets: Networks) -> None:
    for value in (value for state in weights(nets).values() for value in state.values()):
        least, most = value.detach().double().clone(), value.detach().double().clone()
        dist.all_reduce(least, dist.ReduceOp.MIN)
        dist.all_reduce(most, dist.ReduceOp.MAX)
        assert torch.equal(least, most)


def main(out: Path, *overrides: str) -> None:
    c = tiny_config(f"run.out={out}", *overrides)
    source, accelerator = open_training_data(c), distributed.start(c.run_dir, [], tf32=False)
    nets, _ = build_networks(c, source, accelerator)
    require_same_on_all_ranks(nets)
    start = weights(nets)
    if accelerator.is_main_process:
        torch.save(start, out / "start.pt")
    steps(nets, c, range(2))
    write(nets, c, out / "own", source.classes)
    resumed, _ = build_networks(c, source, accelerator, out / "own")
    for each in (nets, resumed):
        steps(each, c, range(2, 4))
    require_equal(weights(resumed), weights(nets))
    accelerator.end_training()


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
