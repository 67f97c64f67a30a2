"""Projectors against the formulas written out."""

import math

import pytest
import torch

from models.projector import build_projector


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def test_conv_projector_is_the_3x3_convolution_of_the_token_grid():
    """Literal sums over neighbours; tokens lie row by row, outside the grid is zero."""
    side, width, dim = 4, 6, 5
    projector = build_projector("conv", width, dim, projector_dim=99).double()
    h = torch.randn(2, side * side, width, dtype=torch.float64)
    out = projector(h)
    assert out.shape == (2, side * side, dim)
    expected = projector.bias.expand(2, side, side, dim).clone()
    for row in range(side):
        for column in range(side):
            for i in range(3):
                for j in range(3):
                    r, c = row + i - 1, column + j - 1
                    if 0 <= r < side and 0 <= c < side:
                        expected[:, row, column] += (
                            h[:, r * side + c] @ projector.weight[:, :, i, j].T
                        )
    assert (out - expected.reshape(2, -1, dim)).abs().max() < 1e-12


def test_conv_projector_sees_neighbours_only():
    projector = build_projector("conv", 3, 2, projector_dim=1)
    h = torch.randn(1, 25, 3, requires_grad=True)
    projector(h)[0, 2 * 5 + 2].sum().backward()  # the token in the middle of a 5 x 5 grid
    touched = h.grad.abs().sum(dim=2).view(5, 5) > 0
    expected = torch.zeros(5, 5, dtype=torch.bool)
    expected[1:4, 1:4] = True
    assert torch.equal(touched, expected)


def test_conv_projector_refuses_tokens_that_are_no_square():
    with pytest.raises(RuntimeError):
        build_projector("conv", 3, 2, projector_dim=1)(torch.randn(1, 12, 3))


def test_mlp_projector_is_three_linears_with_silu_between():
    projector = build_projector("mlp", 6, 5, projector_dim=7).double()
    w = dict(projector.named_parameters())
    h = torch.randn(2, 9, 6, dtype=torch.float64)
    expected = torch.empty(2, 9, 5, dtype=torch.float64)
    for n in range(2):
        for token in range(9):  # token by token: none sees another
            a = h[n, token]
            for i in (0, 2, 4):
                a = w[f"{i}.weight"] @ a + w[f"{i}.bias"]
                a = a * torch.sigmoid(a) if i < 4 else a
            expected[n, token] = a
    assert (projector(h) - expected).abs().max() < 1e-12


def test_published_widths():
    """D 1152 -> 2048 -> 2048 -> 768 of SiT-XL with DINOv2-B."""
    projector = build_projector("mlp", 1152, 768, 2048)
    assert [tuple(p.shape) for p in projector.parameters() if p.ndim == 2] == [
        (2048, 1152),
        (2048, 2048),
        (768, 2048),
    ]
    assert math.prod(build_projector("conv", 1152, 768, 2048).weight.shape) == 1152 * 768 * 9
