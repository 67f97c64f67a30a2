"""The velocity loss."""

import pytest
import torch

from loss.diffusion import velocity_loss


def test_mean_squared_error_over_dimensions_and_images():
    """Errors 1 and 3 in one image, 0 in the other: (5 + 0) / 2."""
    v = torch.zeros(2, 1, 1, 2)
    v_hat = torch.tensor([[[[1.0, -3.0]]], [[[0.0, 0.0]]]])
    assert velocity_loss(v_hat, v).item() == 2.5
    assert velocity_loss(v, v).item() == 0


def test_gradient_is_twice_the_error_over_the_count():
    torch.manual_seed(0)
    v_hat, v = torch.randn(3, 2, 4, 5, requires_grad=True), torch.randn(3, 2, 4, 5)
    velocity_loss(v_hat, v).backward()
    assert torch.allclose(v_hat.grad, 2 * (v_hat - v).detach() / v.numel())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_predictions_are_squared_in_float32(dtype):
    """An error of 300 squared overflows float16."""
    v_hat, v = torch.full((1, 1, 2, 2), 300.0, dtype=dtype), torch.zeros(1, 1, 2, 2)
    loss = velocity_loss(v_hat, v)
    assert loss.dtype == torch.float32
    assert loss.item() == 90_000
