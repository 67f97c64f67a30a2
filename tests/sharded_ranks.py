"""Training with shared-out optimizers beside the same without, in one program of several ranks:
run by test_ddp.py.

    accelerate launch --multi_gpu --num_processes 2 tests/sharded_ranks.py

Any difference of a single bit ends it with an error.
"""

import math
import sys
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import train_repae
from tests.tiny import batch, start, tiny_config
from utils.checkpoint import contents_of
from utils.distributed import Ranks
from utils.training.draws import Draws
from utils.training.networks import Networks, restore_networks
from utils.training.nonfinite import require_finite

CLIP = [f"{name}.optim.clip=0.05" for name in ("vae", "sit", "disc")]
BAD = 2  # the step in which the images of the last rank are not numbers


def build(shard: bool, fp16: bool):
    """Loss scales, a guard and clipping in the kernel, around float32 arithmetic; or none of it."""
    words = [*CLIP, f"run.shard_optimizer={str(shard).lower()}"]
    config = tiny_config(*words, *(["run.on_nonfinite=skip"] if fp16 else []))
    config.run.precision = "fp16" if fp16 else "fp32"
    nets, accelerator = start(config)
    nets.precision = "fp32"
    for trained in nets.trained.values():
        trained.clips_in_kernel = fp16
    return nets, accelerator, config


def train(nets: Networks, accelerator, config, steps: range, bad: int = -1) -> list[dict]:
    rank, ranks = accelerator.process_index, accelerator.num_processes
    share, rows = config.run.batch_size // ranks, []
    mine = slice(rank * share, (rank + 1) * share)
    for step in steps:
        x, y, draws = batch(config, step)
        draws = Draws(*(getattr(draws, f.name)[mine] for f in fields(draws)))
        x = x[mine] * (math.nan if step == bad and rank == ranks - 1 else 1.0)
        rows.append(train_repae.train_step(nets, x, y[mine], draws, config, step))
    return rows


def leaves(value, name: str = "") -> Iterator[tuple[str, object]]:
    """(name, value) of everything in nested dictionaries and lists."""
    if isinstance(value, dict | list | tuple):
        pairs = value.items() if isinstance(value, dict) else enumerate(value)
        for key, inner in pairs:
            yield from leaves(inner, f"{name}.{key}")
    else:
        yield name, value


def require_equal(a, b) -> None:
    """Nested values: the same names in the same order, types, shapes, memory formats and bits."""
    left, right = list(leaves(a)), list(leaves(b))
    assert [name for name, _ in left] == [name for name, _ in right]
    for (name, x), (_, y) in zip(left, right):
        if isinstance(x, Tensor):
            assert isinstance(y, Tensor) and (x.dtype, x.stride()) == (y.dtype, y.stride()), name
            same = torch.equal(x, y) or bool((x.isnan() & y.isnan()).all())
        else:
            same = x == y
        assert same, (name, x, y)


def weights(nets: Networks) -> dict:
    networks = {"vae": nets.vae, "sit": nets.sit, "disc": nets.disc, "ema": nets.ema}
    with nets.update_ema.whole():
        return {name: dict(net.state_dict()) for name, net in networks.items() if net is not None}


def require_shares(nets: Networks, ranks: int) -> None:
    """Each rank keeps moments and EMA of what it owns and nothing else, a fair share of them."""
    for trained in nets.trained.values():
        shares = trained.shares
        assert shares
        owned = [trained.params[i] for i in shares.own]
        assert set(trained.opt.state) == set(owned)
        moments = sum(t.numel() for s in trained.opt.state.values() for t in s.values() if t.dim())
        assert moments == 2 * sum(p.numel() for p in owned)
        largest = max(p.numel() for p in trained.params)
        assert moments / 2 <= sum(p.numel() for p in trained.params) / ranks + largest
    shares, ema = nets.trained["sit"].shares, list(nets.ema.parameters())
    assert shares and [i for i, p in enumerate(ema) if not p.is_meta] == shares.own


def compare(fp16: bool) -> None:
    whole, shared = build(False, fp16), build(True, fp16)
    bad = BAD if fp16 else -1
    for first in (0, 2):
        steps = range(first, first + 2)
        require_equal(train(*shared, steps, bad), train(*whole, steps, bad))
        require_equal(weights(shared[0]), weights(whole[0]))
    nets, accelerator, _ = shared
    require_shares(nets, accelerator.num_processes)
    with nets.update_ema.whole():
        require_finite(nets.tensors(), accelerator, 4)
    states = [contents_of(n).optimizers for n in (nets, whole[0])]
    if accelerator.is_main_process:
        require_equal(*states)
    # a rollback, to a checkpoint of whole state
    folder = Path(sys.argv[1]) / f"fp16 {fp16}"
    Ranks().on_main(lambda: write(whole[0], folder))
    for net in (nets.vae, nets.sit):
        for p in net.parameters():
            p.data.zero_()
    restore_networks(nets, folder)
    for trained in nets.trained.values():
        if trained.guard:
            trained.guard.remember()
    require_shares(nets, accelerator.num_processes)
    steps = range(4, 6)
    require_equal(train(*shared, steps), train(*whole, steps))
    require_equal(weights(nets), weights(whole[0]))
    assert not any(p.isnan().any() for p in nets.sit.parameters())


def write(nets: Networks, folder: Path) -> None:
    folder.mkdir()
    contents_of(nets).write(folder)


if __name__ == "__main__":
    for fp16 in (False, True):
        compare(fp16)
    print("equal")
