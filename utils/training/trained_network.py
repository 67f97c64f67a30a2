"""A network together with what trains it: gradient synchronisation, AdamW, loss scale, clipping.

Automatic mixed precision in float16 needs a loss scale, and each network needs its own. With one
for all, clipping one network would also un-scale the gradients of the others, and what these have
gathered from earlier micro-batches would be lost.

`run.shard_optimizer` shares out the state of the optimizer over ranks by whole tensors, so that an
update is bit for bit that of whole state. torch's ZeroRedundancyOptimizer deals out the same way,
but hands neither the scale of gradients nor the flag that leaves out an update on to a fused AdamW,
and sends whole pickled shares for a checkpoint; FSDP's networks are no longer plain modules for
EMA, samplers and checkpoints.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext

import torch
import torch.distributed as dist
import torch.nn as nn
from accelerate import Accelerator
from torch import Tensor

from utils.config.schema import OptimConfig
from utils.training.nonfinite import SkippedUpdates, UpdateGuard
from utils.training.phases import phase

# Bytes that travel in one collective, and that are kept beside the tensors meanwhile.
BUCKET = 64 * 2**20
MOMENTS = ("exp_avg", "exp_avg_sq")  # of AdamW, beside the number of updates, "step"


class TrainedNetwork:
    """`net` is the raw network: saved, sampled, called where it is not trained. `ddp` is the same
    weights behind the wrapper that averages gradients over ranks: called where it is trained.
    `lr` is the learning rate of the last update, 0 before the first. `net` must be on the
    accelerator's device already. `left_out` (), bool, says on the device whether the last update
    was left out; None where updates are not guarded. `skipped` counts them, None where none can be.

    `shard`: each of several ranks keeps the moments of some parameters, updates these, and hands
    them to the others. `shares` says which; None without.

    The network is frozen except inside `only_training`.
    """

    def __init__(
        self,
        net: nn.Module,
        optim: OptimConfig,
        accelerator: Accelerator,
        precision: str,
        shard: bool = False,
    ):
        self.net, self.optim, self.accelerator = net, optim, accelerator
        self.params = [p for p in net.parameters() if p.requires_grad]
        self.opt = torch.optim.AdamW(
            self.params,
            lr=optim.lr,
            betas=(optim.beta1, optim.beta2),
            eps=optim.eps,
            weight_decay=optim.weight_decay,
            fused=True,  # one pass over all memory, which heeds `grad_scale` and `found_inf`
        )
        # Not on the CPU: there it saves little, and rounds otherwise than clipping before. The
        # kernel takes no scale but a float32 one.
        on_gpu = accelerator.device.type == "cuda"
        self.clips_in_kernel: bool = on_gpu and all(p.dtype == torch.float32 for p in self.params)
        self.shares = share_out(self.params) if shard else None
        self.lr = 0.0
        self.scaler = torch.amp.GradScaler(accelerator.device.type, enabled=precision == "fp16")
        self.guard: UpdateGuard | None = None
        self.left_out: Tensor | None = None
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

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of one micro-batch, at the loss scale."""
        start = self.guard.gradient_of(loss) if self.guard else None
        self.scaler.scale(loss).backward(start)

    def step(self, step: int) -> Tensor:
        """Clip this network's gradients and update it as optimizer step `step` (0-based, for the
        warm-up); return the norm of the gradients before clipping."""
        with phase("optimizer"):
            return self._step(step)

    def _step(self, step: int) -> Tensor:
        self.scaler.unscale_(self.opt)
        grads = [p.grad for p in self.params if p.grad is not None]
        norm = nn.utils.get_total_norm(grads, foreach=True)
        self._clip(norm)
        self.lr = self.optim.lr * min(1.0, (step + 1) / max(1, self.optim.warmup_steps))
        for group in self.opt.param_groups:
            group["lr"] = self.lr
        self._leave_out_if_not_finite(norm)
        # Not through `scaler.step`, which would put a flag of its own in place of `found_inf`.
        if self.shares:
            with self.shares.own_gradients():
                self.opt.step()
            self.shares.exchange()
        else:
            self.opt.step()
        self.scaler.update()
        return norm

    def _clip(self, norm: Tensor) -> None:
        """Scale the gradients to at most `clip` (0: leave them), here or in the optimizer's kernel,
        which then writes them back scaled as well."""
        clip = self.optim.clip
        if clip > 0 and self.clips_in_kernel:
            scale = ((norm + 1e-6) / clip).clamp(min=1.0)  # what the kernel divides by
            setattr(self.opt, "grad_scale", scale)  # noqa: B010
        elif clip > 0:
            nn.utils.clip_grads_with_norm_(self.params, clip, norm)

    def _leave_out_if_not_finite(self, norm: Tensor) -> None:
        """Tell the optimizer's kernel, which then changes nothing, where updates are guarded or
        have a loss scale. Nothing waits for the device."""
        if self.guard:
            self.left_out = self.guard.check(norm)
        if self.skipped:
            bad = norm.isfinite().logical_not() if self.left_out is None else self.left_out
            self.skipped.add(bad)
            setattr(self.opt, "found_inf", bad.float())  # noqa: B010

    def state_dict(self) -> dict:
        """Moments of AdamW, the loss scale, and the number of updates left out. With `shard`, all
        ranks call it together; the moments are then on rank 0 alone, all of them, on the CPU."""
        opt = self.opt.state_dict()
        if self.shares:
            opt = self.shares.gather_state(opt)
        state = {"opt": opt, "scaler": self.scaler.state_dict()}
        return state | ({"skipped": self.skipped.state_dict()} if self.skipped else {})

    def load_state_dict(self, state: dict) -> None:
        """Continue from `state_dict()`; a run may continue in another precision, and with other
        settings of AdamW: those of `optim` count, not those in the state."""
        own = [{k: v for k, v in g.items() if k != "params"} for g in self.opt.param_groups]
        opt = state["opt"]
        self.opt.load_state_dict(self.shares.own_state(opt) if self.shares else opt)
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


# --------------------------------------------------------------------------------------
# Shared out over ranks.


def deal(sizes: Sequence[int], ranks: int) -> list[int]:
    """The rank that owns each of the tensors with so many elements: from the largest to the
    smallest, each goes to the rank with the fewest elements so far."""
    owners, totals = [0] * len(sizes), [0] * ranks
    for index in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        owner = totals.index(min(totals))
        owners[index] = owner
        totals[owner] += sizes[index]
    return owners


class Shares:
    """Who owns which of `params`, which are the same on all ranks and stay the same tensors; this
    process is `rank` of `ranks`. Where "all ranks" stands, all have to call it together."""

    def __init__(self, params: Sequence[Tensor], rank: int, ranks: int):
        self.params, self.rank, self.ranks = list(params), rank, ranks
        self.owners = deal([p.numel() for p in self.params], ranks)
        self.own = [i for i, owner in enumerate(self.owners) if owner == rank]
        self.others = [p for p, owner in zip(self.params, self.owners) if owner != rank]

    @contextmanager
    def own_gradients(self) -> Iterator[None]:
        """Hide the gradients of what other ranks own from an optimizer of all parameters: it then
        neither updates them nor makes moments for them."""
        grads = [p.grad for p in self.others]
        for p in self.others:
            p.grad = None
        try:
            yield
        finally:
            for p, grad in zip(self.others, grads):
                p.grad = grad

    def own_state(self, state: dict) -> dict:
        """AdamW's state dict of all parameters => the same with the moments of this rank's."""
        moments = {i: state["state"][i] for i in self.own if i in state["state"]}
        return {**state, "state": moments}

    @torch.no_grad()
    def exchange(self, tensors: Sequence[Tensor] | None = None) -> None:
        """All ranks: overwrite each of `tensors`, which are shaped and owned like `params` (None:
        these themselves), with that of its owner. Nothing waits for the device."""
        for owner, bucket in self._buckets(self.params if tensors is None else tensors):
            flat = bucket[0] if len(bucket) == 1 else torch.cat(bucket)
            dist.broadcast(flat, src=owner)
            if owner != self.rank and len(bucket) > 1:
                parts = flat.split([t.numel() for t in bucket])
                torch._foreach_copy_(bucket, list(parts))  # pyright: ignore[reportPrivateImportUsage]

    def _buckets(self, tensors: Sequence[Tensor]) -> Iterator[tuple[int, list[Tensor]]]:
        """(owner, memory of some of its tensors as vectors of one type), at most `BUCKET` bytes
        unless it is one tensor."""
        for owner in range(self.ranks):
            owned = [_memory(t) for t, who in zip(tensors, self.owners) if who == owner]
            for dtype in dict.fromkeys(t.dtype for t in owned):
                bucket, size = [], 0
                for t in (t for t in owned if t.dtype == dtype):
                    if bucket and size + t.nbytes > BUCKET:
                        yield owner, bucket
                        bucket, size = [], 0
                    bucket.append(t)
                    size += t.nbytes
                if bucket:
                    yield owner, bucket

    @torch.no_grad()
    def gather_state(self, state: dict) -> dict:
        """All ranks: AdamW's state dict with this rank's moments => on rank 0 that of all
        parameters, as an optimizer that is not shared out would give it, on the CPU; elsewhere
        without moments. At most two tensors are on the device beside those there before."""
        steps = self._steps(state["state"])
        gathered = {}
        for i, (p, owner) in enumerate(zip(self.params, self.owners)):
            if steps[i] < 0:
                continue
            mine, moments = state["state"].get(i, {}), {}
            for name in MOMENTS:
                moment = mine[name] if owner == self.rank else torch.empty_like(p)
                if owner != 0:
                    dist.broadcast(_memory(moment), src=owner)
                if self.rank == 0:
                    moments[name] = moment.cpu()
            gathered[i] = {"step": torch.tensor(steps[i])} | moments
        return {**state, "state": gathered if self.rank == 0 else {}}

    def _steps(self, state: dict) -> list[float]:
        """The number of updates of each parameter, -1 where it has had no gradient yet."""
        steps = torch.full((len(self.params),), -1.0, device=self.params[0].device)
        for i, own in state.items():
            steps[i] = own["step"]
        dist.all_reduce(steps, dist.ReduceOp.MAX)
        return steps.tolist()


def _memory(tensor: Tensor) -> Tensor:
    """A dense tensor, in whatever order of its dimensions, as a vector of the same memory."""
    return tensor.detach().as_strided((tensor.numel(),), (1,))


def share_out(params: Sequence[Tensor]) -> Shares | None:
    """`Shares` over all ranks of this program; None if there is only one."""
    ranks = dist.get_world_size() if dist.is_initialized() else 1
    return Shares(params, dist.get_rank(), ranks) if ranks > 1 else None
