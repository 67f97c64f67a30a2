"""Batch normalisation whose moments belong to the joint batch of all ranks, on CPU and GPU alike.

`torch.nn.SyncBatchNorm` refuses CPU tensors, so a run on CPU ranks could never be tested with it.
N batch, C channels, h w latent grid.
"""

import torch
import torch.distributed as dist
import torch.nn as nn
from torch.distributed.nn.functional import all_reduce


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
        # torch types its decorator as if it returned another decorator
        mean, var, count = joint_moments(x)  # pyright: ignore
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


@torch.compiler.disable  # collectives inside a graph would be traced as one rank sees them
def joint_moments(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, float]:
    """(N, C, H, W) on every rank, the same N on each => mean (C,) and biased variance (C,) over the
    images of all ranks, and the number of values of one channel.

    Two reductions, not one of (sum, sum of squares): the difference of squares has no correct
    digits left where the variance is much smaller than the squared mean.
    """
    ranks = dist.get_world_size()
    mean = all_reduce(x.mean(dim=(0, 2, 3))) / ranks
    var = all_reduce((x - mean[:, None, None]).square().mean(dim=(0, 2, 3))) / ranks
    return mean, var, ranks * x.numel() / x.shape[1]


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
