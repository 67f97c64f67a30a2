"""The diffusion objective: mean squared error of the velocity (SiT, arXiv 2401.08740, Eq. 7)."""

import torch


def velocity_loss(v_hat: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Predicted and true velocity (N, C, h, w) => their mean squared error, float32."""
    return (v_hat.float() - v.float()).square().flatten(1).mean(dim=1).mean()
