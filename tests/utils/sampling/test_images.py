"""Batches and labels; the images themselves are tested through sample_ddp.py.

python -m pytest tests/utils/sampling/test_images.py
"""

from dataclasses import replace

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from models.checks.errors import UserError
from models.sit import SiT
from models.vae import build_vae
from utils import compilation
from utils.precision import allow_tf32
from utils.sampling.images import (
    batches_of,
    begin_images,
    decoding,
    draw_images,
    draw_labels,
    split_evenly,
)
from utils.sampling.load import prepare_networks
from utils.sampling.settings import SamplingSettings

CPU = torch.device("cpu")
SETTINGS = SamplingSettings(
    solver="sde", steps=4, cfg_scale=2.0, guidance_high=0.7, precision="fp32",
    batch_size=5, decode_batch_size=3,
)  # fmt: skip


def networks(settings):
    """Random weights everywhere: at its own initialisation a SiT answers zero."""
    torch.manual_seed(0)
    sit = SiT(8, 2, 4, hidden_size=32, depth=2, num_heads=2, num_classes=3, encoder_dims=())
    for p in sit.parameters():
        torch.nn.init.normal_(p, std=0.2)
    sit.bn.set_stats(torch.zeros(4), torch.ones(4))
    return prepare_networks(sit, build_vae("tiny-f2d4"), settings, CPU)


@pytest.mark.parametrize(("num", "most"), [(100, 64), (100, 100), (7, 100), (101, 10), (5, 1)])
def test_batches_are_even_and_cover_everything_in_order(num, most):
    parts = split_evenly(range(300, 300 + num), most)
    assert [i for part in parts for i in part] == list(range(300, 300 + num))
    sizes = {len(part) for part in parts}
    assert max(sizes) <= most and max(sizes) - min(sizes) <= 1
    assert len(parts) == -(-num // most)  # no call more than needed


def test_random_labels_depend_on_seed_and_index_alone():
    def draw(seed, rows):
        return draw_labels(SamplingSettings(seed=seed), rows, 1000)

    y = draw(0, range(4000))
    assert torch.equal(torch.cat([draw(0, range(i, i + 100)) for i in range(0, 4000, 100)]), y)
    assert (y == draw(1, range(4000))).float().mean() < 0.01
    assert y.min() >= 0 and y.max() < 1000 and len(set(y.tolist())) > 950
    assert float(y.float().mean()) == pytest.approx(499.5, abs=20)


@pytest.mark.parametrize(("num", "most"), [(100, 64), (100, 48), (13, 5), (3, 5), (1, 1), (7, 2)])
def test_equal_batches_make_everything_once_and_have_one_size(num, most):
    indices = range(300, 300 + num)
    batches = batches_of(indices, most, equal=True)
    assert [i for _, new in batches for i in new] == list(indices)
    assert len({len(batch) for batch, _ in batches}) == 1 and len(batches) == -(-num // most)
    for batch, new in batches:
        assert set(new) <= set(batch) <= set(indices)


@pytest.mark.slow
def test_compiled_networks_see_one_size_of_batches(monkeypatch):
    """A graph for the SiT with guidance, one without, and one for the decoder; however the number
    of images divides. The images are those of networks that are not compiled."""
    expected = draw_images(SETTINGS, *networks(SETTINGS), range(13), CPU)
    monkeypatch.setattr(compilation, "BACKEND", counter := CompileCounter())
    compiled = replace(SETTINGS, compile=True)
    nets = networks(compiled)
    found = draw_images(compiled, *nets, range(13), CPU)
    assert counter.frame_count == 3
    draw_images(compiled, *nets, range(26, 39), CPU)
    assert counter.frame_count == 3
    distance = (found.int() - expected.int()).abs()
    assert distance.max() <= 1 and (distance > 0).float().mean() < 1e-3


def test_guidance_doubles_the_batch_inside_its_interval_only():
    sit, vae = networks(SETTINGS)
    seen = []
    sit.register_forward_pre_hook(
        lambda _, inputs: seen.append((float(inputs[1][0]), len(inputs[0])))
    )
    draw_images(SETTINGS, sit, vae, range(5), CPU)
    assert [rows for _, rows in seen] == [5 if t > 0.7 else 10 for t, _ in seen]
    assert {rows for _, rows in seen} == {5, 10}


def test_what_is_not_finite_is_refused_when_the_images_are_wanted():
    sit, vae = networks(SETTINGS)
    torch.nn.init.constant_(sit.final_layer.linear.bias, float("nan"))
    drawn = begin_images(SETTINGS, sit, vae, range(10, 17), CPU)
    with pytest.raises(UserError, match=r"images 10\.\.12 are not finite"):
        drawn.result()
    assert drawn.result(must_be_finite=False).shape == (7, 3, 16, 16)


def test_the_decoder_has_a_precision_of_its_own():
    """None leaves what the process has; afterwards all is as before."""

    def state():
        matmul = torch.backends.cuda.matmul.allow_tf32
        assert torch.backends.cudnn.allow_tf32 == matmul
        return matmul, torch.is_autocast_enabled("cpu")

    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    try:
        for allowed in (False, True):
            allow_tf32(allowed)
            for name, inside in (
                (None, (allowed, False)),
                ("fp32", (False, False)),
                ("tf32", (True, False)),
                ("bf16", (allowed, True)),
            ):
                with decoding(name, CPU):
                    assert state() == inside
                assert state() == (allowed, False)
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


@pytest.mark.gpu
def test_nothing_waits_for_the_gpu_until_the_images_are_wanted():
    """And they are those of the CPU, but for the rounding of its float32 convolutions."""
    expected = draw_images(SETTINGS, *networks(SETTINGS), range(8), CPU)
    device = torch.device("cuda")
    sit, vae = (net.to(device) for net in networks(SETTINGS))
    begin_images(SETTINGS, sit, vae, range(8), device).result()
    torch.cuda.set_sync_debug_mode("error")
    try:
        drawn = begin_images(SETTINGS, sit, vae, range(8), device)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(part.is_pinned() for part in drawn.parts)
    assert (drawn.result().int() - expected.int()).abs().max() <= 2
