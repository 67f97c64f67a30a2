"""The diffusion objective: mean squared error of the velocity (SiT, arXiv 2401.08740, Eq. 7)."""

import torch

from models.layers.autocast import at_least_float32


def velocity_loss(v_hat: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Predicted and true velocity (N, C, h, w) => their mean squared error."""
    return (at_least_float32(v_hat) - v).square().flatten(1).mean(dim=1).mean()
