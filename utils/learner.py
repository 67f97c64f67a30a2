"""A network together with what trains it: gradient synchronisation, AdamW, loss scale, clipping.

Automatic mixed precision in float16 needs a loss scale, and each network its own: one scaler for
all un-scales every optimizer's gradients at each clip, and earlier micro-batches vanish.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext

import torch
import torch.nn as nn
from accelerate import Accelerator

from utils.config import Optim

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


class Learner:
    """`net` is the raw network: saved, sampled, called where it is not trained. `ddp` is the same
    weights behind the wrapper that averages gradients over ranks: called where it is trained.

    The network is frozen except inside `only_training`.
    """

    def __init__(self, net: nn.Module, optim: Optim, accelerator: Accelerator, precision: str):
        self.net, self.optim = net.to(accelerator.device), optim
        self.accelerator = accelerator
        self.params = [p for p in net.parameters() if p.requires_grad]
        self.opt = torch.optim.AdamW(
            self.params,
            lr=optim.lr,
            betas=(optim.beta1, optim.beta2),
            eps=optim.eps,
            weight_decay=optim.weight_decay,
            fused=accelerator.device.type in ("cuda", "cpu"),
        )
        self.scaler = torch.amp.GradScaler(accelerator.device.type, enabled=precision == "fp16")
        # Wrap first, freeze after: DDP never synchronises a parameter that was frozen when wrapped.
        self.ddp = accelerator.prepare_model(net)
        self.freeze()

    def freeze(self, frozen: bool = True) -> None:
        for p in self.params:
            p.requires_grad_(not frozen)

    def micro_batches(self, parts: Sequence) -> Iterator:
        """Each part in turn; ranks exchange gradients only in the backward of the last."""
        for number, part in enumerate(parts, start=1):
            last = number == len(parts)
            with nullcontext() if last else self.accelerator.no_sync(self.ddp):
                yield part

    def backward(self, loss: torch.Tensor) -> None:
        """Add the gradients of one micro-batch, at the loss scale."""
        self.scaler.scale(loss).backward()

    def step(self, step: int) -> torch.Tensor:
        """Clip this network's gradients and update it; return their norm before clipping."""
        self.scaler.unscale_(self.opt)
        norm = nn.utils.clip_grad_norm_(self.params, self.optim.clip or float("inf"))
        for group in self.opt.param_groups:
            group["lr"] = self.optim.lr * min(1.0, (step + 1) / max(1, self.optim.warmup_steps))
        self.scaler.step(self.opt)
        self.scaler.update()
        return norm

    def state_dict(self) -> dict:
        return {"opt": self.opt.state_dict(), "scaler": self.scaler.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        self.opt.load_state_dict(state["opt"])
        if state["scaler"]:
            self.scaler.load_state_dict(state["scaler"])


@contextmanager
def only_training(learner: Learner) -> Iterator[None]:
    """Thaw one network, with fresh gradients; they stay readable until its next phase."""
    learner.opt.zero_grad(set_to_none=True)
    learner.freeze(False)
    try:
        yield
    finally:
        learner.freeze()
