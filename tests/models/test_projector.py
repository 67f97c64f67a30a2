"""Projectors from SiT tokens to encoder features."""

import pytest
import torch
import torch.nn.functional as F

from models.projector import build_projector


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def test_conv_projector_is_a_3x3_convolution_of_the_square_token_grid():
    """Token r * side + c is the cell in row r and column c; outside the grid is zero."""
    projector = build_projector("conv", 6, 5, projector_dim=99)
    h = torch.randn(2, 16, 6)
    grid = torch.stack([h[:, 4 * r : 4 * r + 4] for r in range(4)], dim=1)  # (N, row, column, D)
    expected = F.conv2d(grid.permute(0, 3, 1, 2), projector.weight, projector.bias, padding=1)
    found = projector(h)
    for row, column in ((0, 0), (1, 2), (3, 1)):
        assert torch.allclose(found[:, 4 * row + column], expected[:, :, row, column], atol=1e-6)
    assert found.shape == (2, 16, 5) and projector.kernel_size == (3, 3)


def test_conv_projector_refuses_tokens_that_are_no_square():
    with pytest.raises(RuntimeError):
        build_projector("conv", 3, 2, projector_dim=1)(torch.randn(1, 12, 3))


def test_mlp_projector_is_three_linears_with_silu_between_token_by_token():
    projector = build_projector("mlp", 6, 5, projector_dim=7)
    w, h = dict(projector.named_parameters()), torch.randn(2, 9, 6)
    a = h[1, 4]
    for i in (0, 2, 4):
        a = w[f"{i}.weight"] @ a + w[f"{i}.bias"]
        a = a * torch.sigmoid(a) if i < 4 else a
    assert torch.allclose(projector(h)[1, 4], a, atol=1e-6)


def test_published_widths():
    """D 1152 -> 2048 -> 2048 -> 768 of SiT-XL with DINOv2-B."""
    with torch.device("meta"):
        mlp, conv = (build_projector(kind, 1152, 768, 2048) for kind in ("mlp", "conv"))
    shapes = [tuple(p.shape) for p in mlp.parameters() if p.ndim == 2]
    assert shapes == [(2048, 1152), (2048, 2048), (768, 2048)]
    assert tuple(conv.weight.shape) == (768, 1152, 3, 3)
