"""A network together with what trains it: gradient synchronisation, AdamW, loss scale, clipping.

Automatic mixed precision in float16 needs a loss scale, and each network needs its own. With one
for all, clipping one network would also un-scale the gradients of the others, and what these have
gathered from earlier micro-batches would be lost.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext

import torch
import torch.nn as nn
from accelerate import Accelerator

from utils.config.schema import OptimConfig
from utils.training.nonfinite import SkippedUpdates, UpdateGuard
from utils.training.phases import phase


class TrainedNetwork:
    """`net` is the raw network: saved, sampled, called where it is not trained. `ddp` is the same
    weights behind the wrapper that averages gradients over ranks: called where it is trained.
    `lr` is the learning rate of the last update, 0 before the first. `net` must be on the
    accelerator's device already. `left_out` (), bool, says on the device whether the last update
    was left out; None where updates are not guarded. `skipped` counts them, None where none can be.

    The network is frozen except inside `only_training`.
    """

    def __init__(
        self, net: nn.Module, optim: OptimConfig, accelerator: Accelerator, precision: str
    ):
        self.net, self.optim, self.accelerator = net, optim, accelerator
        self.params = [p for p in net.parameters() if p.requires_grad]
        self.opt = torch.optim.AdamW(
            self.params,
            lr=optim.lr,
            betas=(optim.beta1, optim.beta2),
            eps=optim.eps,
            weight_decay=optim.weight_decay,
            fused=accelerator.device.type in ("cuda", "cpu"),
        )
        self.lr = 0.0
        self.scaler = torch.amp.GradScaler(accelerator.device.type, enabled=precision == "fp16")
        self.guard: UpdateGuard | None = None
        self.left_out: torch.Tensor | None = None
        self.skipped = SkippedUpdates(accelerator.device) if precision == "fp16" else None
        # Wrap first, freeze after: DDP never synchronises a parameter that was frozen when wrapped.
        self.ddp = accelerator.prepare_model(net)
        self.freeze()

    def skip_nonfinite(self, *others: nn.Module) -> None:
        """Leave out updates that are not finite from now on, with what they would have moved of the
        buffers of this network and of `others`."""
        self.guard = UpdateGuard(b for net in (self.net, *others) for b in net.buffers())
        self.skipped = self.skipped or SkippedUpdates(self.accelerator.device)

    def freeze(self, frozen: bool = True) -> None:
        """Exclude the parameters from gradients, or include them again."""
        for p in self.params:
            p.requires_grad_(not frozen)

    def micro_batches(self, batches: Sequence) -> Iterator:
        """Each micro-batch in turn; ranks exchange gradients only in the backward of the last."""
        for number, batch in enumerate(batches, start=1):
            last = number == len(batches)
            with nullcontext() if last else self.accelerator.no_sync(self.ddp):
                yield batch

    def backward(self, loss: torch.Tensor) -> None:
        """Add the gradients of one micro-batch, at the loss scale."""
        start = self.guard.gradient_of(loss) if self.guard else None
        self.scaler.scale(loss).backward(start)

    def step(self, step: int) -> torch.Tensor:
        """Clip this network's gradients and update it as optimizer step `step` (0-based, for the
        warm-up); return the norm of the gradients before clipping."""
        with phase("optimizer"):
            return self._step(step)

    def _step(self, step: int) -> torch.Tensor:
        self.scaler.unscale_(self.opt)
        grads = [p.grad for p in self.params if p.grad is not None]
        norm = nn.utils.get_total_norm(grads)
        if self.optim.clip > 0:
            nn.utils.clip_grads_with_norm_(self.params, self.optim.clip, norm)
        self.lr = self.optim.lr * min(1.0, (step + 1) / max(1, self.optim.warmup_steps))
        for group in self.opt.param_groups:
            group["lr"] = self.lr
        self._note_what_is_left_out(norm)
        self.scaler.step(self.opt)
        self.scaler.update()
        return norm

    def _note_what_is_left_out(self, norm: torch.Tensor) -> None:
        if self.guard:
            self.left_out = self.guard.check(norm)
            # fused AdamW then changes nothing; a loss scale sets this by itself
            setattr(self.opt, "found_inf", self.left_out.float())  # noqa: B010
        if self.skipped:
            self.skipped.add(
                norm.isfinite().logical_not() if self.left_out is None else self.left_out
            )

    def state_dict(self) -> dict:
        """Moments of AdamW, the loss scale, and the number of updates left out."""
        state = {"opt": self.opt.state_dict(), "scaler": self.scaler.state_dict()}
        return state | ({"skipped": self.skipped.state_dict()} if self.skipped else {})

    def load_state_dict(self, state: dict) -> None:
        """Continue from `state_dict()`; a run may continue in another precision, and with other
        settings of AdamW: those of `optim` count, not those in the state."""
        own = [{k: v for k, v in g.items() if k != "params"} for g in self.opt.param_groups]
        self.opt.load_state_dict(state["opt"])
        for group, settings in zip(self.opt.param_groups, own):
            group.update(settings)
        if state["scaler"]:
            self.scaler.load_state_dict(state["scaler"])
        if self.skipped and "skipped" in state:
            self.skipped.load_state_dict(state["skipped"])


@contextmanager
def only_training(trained: TrainedNetwork) -> Iterator[None]:
    """Thaw one network, with fresh gradients; they stay readable until its next phase."""
    trained.opt.zero_grad(set_to_none=True)
    trained.freeze(False)
    try:
        yield
    finally:
        trained.freeze()
