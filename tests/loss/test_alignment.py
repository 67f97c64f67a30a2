"""Alignment against the literal double loop over images and tokens."""

import math

import pytest
import torch

from loss.alignment import alignment_loss, spatial_normalize


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def literal(h, f):
    """REPA, Eq. 8, as its authors' loop has it: image by image, token by token."""
    total = 0.0
    for n in range(h.shape[0]):
        of_image = 0.0
        for token in range(h.shape[1]):
            a, b = h[n, token].tolist(), f[n, token].tolist()
            dot = sum(x * y for x, y in zip(a, b))
            of_image -= dot / math.sqrt(sum(x * x for x in a)) / math.sqrt(sum(y * y for y in b))
        total += of_image / h.shape[1]
    return total / h.shape[0]


def test_equals_the_literal_double_loop():
    h, f = torch.randn(3, 7, 5), torch.randn(3, 7, 5)
    assert alignment_loss([h], [f]).item() == pytest.approx(literal(h, f), abs=1e-6)


def test_several_encoders_are_averaged():
    """Of different widths and token counts."""
    hs = [torch.randn(3, 7, 5), torch.randn(3, 4, 9), torch.randn(3, 7, 2)]
    feats = [torch.randn_like(h) for h in hs]
    expected = sum(literal(h, f) for h, f in zip(hs, feats)) / 3
    assert alignment_loss(hs, feats).item() == pytest.approx(expected, abs=1e-6)


def test_identical_features_give_minus_one_opposite_ones_one():
    f = torch.randn(2, 6, 8)
    assert alignment_loss([f], [f]).item() == pytest.approx(-1, abs=1e-6)
    assert alignment_loss([-f], [f]).item() == pytest.approx(1, abs=1e-6)


def test_scale_of_each_token_does_not_matter():
    h, f = torch.randn(2, 6, 8), torch.randn(2, 6, 8)
    scaled = h * (torch.rand(2, 6, 1) * 100 + 0.01)
    expected = alignment_loss([h], [f]).item()
    assert alignment_loss([scaled], [f * 1e-3]).item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("magnitude", [300.0, 1e-4])
def test_normalised_in_float32_whatever_comes_in(dtype, magnitude):
    """Squares of 300 overflow float16, those of 1e-4 vanish in it: neither reaches the loss."""
    h, f = ((magnitude * torch.randn(2, 6, 64)).to(dtype).requires_grad_() for _ in range(2))
    loss = alignment_loss([h], [f])
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(literal(h.float(), f.float()), abs=1e-5)
    loss.backward()
    assert h.grad.isfinite().all() and h.grad.any()


def test_a_zero_token_is_no_nan():
    h = torch.zeros(1, 2, 3, requires_grad=True)
    loss = alignment_loss([h], [torch.randn(1, 2, 3)])
    loss.backward()
    assert loss.item() == 0 and h.grad.isfinite().all()


def test_features_of_another_shape_are_refused():
    """Broadcasting would hide a mismatch of token grids."""
    with pytest.raises(AssertionError):
        alignment_loss([torch.randn(2, 6, 8)], [torch.randn(2, 1, 8)])
    with pytest.raises(AssertionError):
        alignment_loss([torch.randn(2, 6, 8)], [])
    with pytest.raises(AssertionError):
        alignment_loss([], [])


@pytest.mark.parametrize("alpha", [0.6, 1.0])
def test_spatial_normalize_written_out(alpha):
    """(f - alpha * mean over tokens) / std over tokens (n - 1), for each image and channel."""
    f = torch.randn(2, 9, 4, dtype=torch.float64) * 3 + 2
    found = spatial_normalize(f, alpha)
    for n in range(2):
        for channel in range(4):
            values = f[n, :, channel].tolist()
            mean = sum(values) / 9
            std = math.sqrt(sum((v - mean) ** 2 for v in values) / 8)
            expected = [(v - alpha * mean) / std for v in values]
            assert found[n, :, channel].tolist() == pytest.approx(expected, abs=1e-5)


def test_spatial_normalize_removes_what_all_patches_share():
    structure, shared = torch.randn(2, 16, 8), 10 * torch.randn(2, 1, 8)
    structure = structure - structure.mean(dim=1, keepdim=True)
    with_shared = spatial_normalize(structure + shared, 1.0)
    assert torch.allclose(with_shared, spatial_normalize(structure, 1.0), atol=1e-4)
    assert torch.allclose(with_shared.std(dim=1), torch.ones(2, 8), atol=1e-4)


def test_spatial_normalize_is_float32_and_finite():
    f = torch.full((1, 4, 3), 60_000.0, dtype=torch.float16)
    f[0, :, 0] = torch.tensor([1.0, 2.0, 3.0, 4.0])
    out = spatial_normalize(f, 0.6)
    assert out.dtype == torch.float32 and out.isfinite().all()
