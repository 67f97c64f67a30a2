"""Batch normalisation whose moments belong to the joint batch of all ranks, on CPU and GPU alike.

Not `torch.nn.SyncBatchNorm`: it refuses CPU tensors, so a run on CPU ranks could never be tested
with it; and it filters empty ranks by a mask, for which the host waits for the GPU in every forward
and torch.compile breaks the graph. The collectives here are functional ones, which compile.
N batch, C channels, h w latent grid.
"""

from typing import Any

import torch
import torch.distributed as dist
import torch.nn as nn
from torch.distributed import _functional_collectives as collectives


class JointBatchNorm2d(nn.BatchNorm2d):
    """`BatchNorm2d` over all ranks: k ranks with N images each equal one rank with k * N images.

    State-dict keys are those of `BatchNorm2d`. One process runs torch's own kernel.
    """

    # always there, as in every norm made with running statistics
    running_mean: torch.Tensor
    running_var: torch.Tensor
    num_batches_tracked: torch.Tensor
    momentum: float

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, C, H, W) => (N, C, H, W), by batch moments in train mode, else by running ones."""
        if not (self.training and dist.is_initialized() and dist.get_world_size() > 1):
            return super().forward(x)
        mean, var = joint_moments(x)
        count = dist.get_world_size() * x.numel() / x.shape[1]  # values of one channel
        self._update_running(mean.detach(), var.detach() * count / (count - 1))
        x = (x - mean[:, None, None]) * (var[:, None, None] + self.eps).rsqrt()
        if self.affine:
            x = x * self.weight[:, None, None] + self.bias[:, None, None]
        return x

    @torch.no_grad()
    def _update_running(self, mean: torch.Tensor, unbiased_var: torch.Tensor) -> None:
        self.num_batches_tracked += 1
        self.running_mean.lerp_(mean, self.momentum)
        self.running_var.lerp_(unbiased_var, self.momentum)


def joint_moments(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(N, C, H, W) on every rank, the same N on each => mean (C,) and biased variance (C,) over the
    images of all ranks."""
    var, mean = torch.var_mean(x, dim=(0, 2, 3), correction=0)
    return _JointMoments.apply(torch.stack([mean, var])).unbind()


class _JointMoments(torch.autograd.Function):
    """Mean and biased variance of each rank, (2, C) => those of the joint batch, (2, C).

    mean = average of mean_k, var = average of var_k + (mean_k - mean)^2 over ranks k: exact also
    where the variance is much smaller than the squared mean, unlike a difference of joint sums.
    One collective each way. In a backward that DDP shares, the order of collectives is that of
    autograd, which is the same on every rank, as for `SyncBatchNorm`.
    """

    @staticmethod
    def forward(ctx: Any, own: torch.Tensor) -> torch.Tensor:
        ranks, rank = dist.get_world_size(), dist.get_rank()
        # a sum in which each rank fills its own row: gathering has another name in each torch
        rows = own.new_zeros(ranks, *own.shape)
        rows[rank] = own
        means, variances = _sum_over_ranks(rows).unbind(1)
        mean = means.mean(dim=0)
        ctx.save_for_backward(own[0] - mean)
        return torch.stack([mean, (variances + (means - mean).square()).mean(dim=0)])

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        """The loss of every rank depends on the moments of each."""
        (deviation,) = ctx.saved_tensors
        grad_mean, grad_var = (_sum_over_ranks(grad) / dist.get_world_size()).unbind()
        return torch.stack([grad_mean + 2 * deviation * grad_var, grad_var])


def _sum_over_ranks(x: torch.Tensor) -> torch.Tensor:
    group: Any = dist.group.WORLD  # torch types it as if there might be none
    total = collectives.all_reduce(x.contiguous(), "sum", group)
    return collectives.wait_tensor(total)


class LatentNorm(JointBatchNorm2d):
    """The latent batch norm of REPA-E (arXiv 2504.10483, Sec. 3), and its exact inverse.

    No affine part: a learnt scale would let the network shrink the diffusion loss.
    With `fixed=True` the running statistics are constants: for a frozen VAE, and for the ablation
    without batch statistics.
    """

    def __init__(
        self, channels: int, fixed: bool = False, eps: float = 1e-4, momentum: float = 0.1
    ):
        super().__init__(channels, eps=eps, momentum=momentum, affine=False)
        self.fixed = fixed
        self.train(self.training)

    def train(self, mode: bool = True) -> "LatentNorm":
        return super().train(mode and not self.fixed)

    def inverse(self, z_n: torch.Tensor) -> torch.Tensor:
        """Normalised => latent, both (N, C, h, w), by the running statistics with the same eps."""
        std = (self.running_var + self.eps).sqrt()
        return z_n * std[:, None, None] + self.running_mean[:, None, None]

    @torch.no_grad()
    def set_stats(self, mean: torch.Tensor, std: torch.Tensor) -> None:
        """Set the running statistics to per-channel mean and std (C,) of latents."""
        self.running_mean.copy_(mean)
        self.running_var.copy_(std.square())

    def stats(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Per-channel (mean, std), (C,): (z - mean) / std is what `forward` does in eval mode."""
        return self.running_mean, (self.running_var + self.eps).sqrt()
