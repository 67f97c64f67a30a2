"""Three training steps on however many ranks, from draws of the joint batch: run by test_ddp.py.

    accelerate launch --cpu --num_processes 2 tests/two_ranks.py OUT [key=value ...]

Every rank writes OUT/rankN.pt: weights, statistics, EMA, and the gradients of the last step.
"""

import sys
from dataclasses import fields
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import train_repae
from tests.tiny import batch, start, tiny_config
from utils.training.draws import Draws


def main(out: Path, *overrides: str) -> None:
    config = tiny_config(*overrides)
    nets, accelerator = start(config)
    rank, ranks = accelerator.process_index, accelerator.num_processes
    share = config.run.batch_size // ranks
    mine = slice(rank * share, (rank + 1) * share)
    for step in range(3):
        x, y, draws = batch(config, step)
        draws = Draws(*(getattr(draws, f.name)[mine] for f in fields(draws)))
        train_repae.train_step(nets, x[mine], y[mine], draws, config, step)
    trained = {"vae": nets.vae, "sit": nets.sit, "disc": nets.disc}
    state = {f"{n}.{k}": v for n, net in trained.items() for k, v in net.state_dict().items()}
    state |= {f"ema.{k}": v for k, v in nets.ema.state_dict().items()}
    grads = {f"{n}.{k}": p.grad for n, net in trained.items() for k, p in net.named_parameters()}
    torch.save({"state": state, "grads": grads}, out / f"rank{rank}.pt")
    accelerator.end_training()


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
