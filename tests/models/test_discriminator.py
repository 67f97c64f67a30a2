"""The PatchGAN against pix2pix's, written out with torch's own layers."""

import pytest
import torch
import torch.nn as nn

from models.checks.errors import UserError
from models.discriminator import PatchGAN
from tests.tiny import tiny_config
from utils.training.networks import build_disc


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


class Pix2Pix(nn.Module):
    """`NLayerDiscriminator` with 3 layers and 8 channels, layer by layer."""

    def __init__(self):
        super().__init__()
        self.main = nn.Sequential(
            nn.Conv2d(3, 8, kernel_size=4, stride=2, padding=1),
            nn.LeakyReLU(0.2, True),
            nn.Conv2d(8, 16, kernel_size=4, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(16),
            nn.LeakyReLU(0.2, True),
            nn.Conv2d(16, 32, kernel_size=4, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(32),
            nn.LeakyReLU(0.2, True),
            nn.Conv2d(32, 64, kernel_size=4, stride=1, padding=1, bias=False),
            nn.BatchNorm2d(64),
            nn.LeakyReLU(0.2, True),
            nn.Conv2d(64, 1, kernel_size=4, stride=1, padding=1),
        )

    def forward(self, x):
        return self.main(x)


def test_it_is_the_published_network_with_the_published_keys():
    """Strict exchange of state dicts; same logits and same running statistics in train mode."""
    ours, theirs = PatchGAN(layers=3, channels=8), Pix2Pix()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    for _ in range(2):
        x = torch.randn(4, 3, 32, 32)
        assert torch.equal(ours(x)[0], theirs(x))
    for key, value in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[key], value), key
    x = torch.randn(4, 3, 32, 32)
    assert torch.equal(ours.eval()(x)[0], theirs.eval()(x))


def test_gradients_are_those_of_the_published_network():
    ours, theirs = PatchGAN(layers=3, channels=8), Pix2Pix()
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(4, 3, 32, 32)
    for net, y in ((ours, ours(x)[0]), (theirs, theirs(x))):
        net.zero_grad()
        y.square().mean().backward()
    for (name, a), b in zip(ours.named_parameters(), theirs.parameters()):
        assert torch.allclose(a.grad, b.grad, rtol=1e-5, atol=1e-8), name


def test_published_size():
    """pix2pix prints 2.769 M for 3 layers, 64 channels and its 6 input channels."""
    count = sum(p.numel() for p in PatchGAN(in_channels=6).parameters())
    assert round(count / 1e6, 3) == 2.769


def test_one_logit_judges_70_pixels():
    net = PatchGAN(layers=3, channels=4).eval()
    x = torch.randn(1, 3, 160, 160, requires_grad=True)
    (logits,) = net(x)
    middle = logits.shape[2] // 2
    logits[0, 0, middle, middle].backward()
    seen = x.grad.abs().sum(dim=(0, 1)) > 0
    assert seen.any(dim=0).sum() == 70 and seen.any(dim=1).sum() == 70


@pytest.mark.parametrize("norm", ["batch", "group"])
def test_two_batches_in_one_call_equal_two_calls(norm):
    """Statistics of real and fake images are never mixed, and move the running ones one by one."""
    once, twice = PatchGAN(channels=8, norm=norm), PatchGAN(channels=8, norm=norm)
    twice.load_state_dict(once.state_dict())
    real, fake = torch.randn(4, 3, 32, 32), 3 * torch.randn(4, 3, 32, 32) + 1
    both = once(real, fake)
    (first,), (second,) = twice(real), twice(fake)
    assert torch.equal(both[0], first) and torch.equal(both[1], second)
    for key, value in twice.state_dict().items():
        assert torch.equal(once.state_dict()[key], value), key


def test_mixing_the_batches_would_show():
    """The test above can fail: over the joint batch the logits are others."""
    net = PatchGAN(channels=8)
    real, fake = torch.randn(4, 3, 32, 32), 3 * torch.randn(4, 3, 32, 32) + 1
    (joint,) = net(torch.cat([real, fake]))
    assert (joint[:4] - net(real, fake)[0]).abs().max() > 1e-2


@pytest.mark.parametrize(("norm", "independent"), [("group", True), ("batch", False)])
def test_group_norm_has_no_dependence_across_images(norm, independent):
    net = PatchGAN(channels=8, norm=norm)
    x = torch.randn(4, 3, 32, 32, requires_grad=True)
    (logits,) = net(x)
    logits[0].square().sum().backward()
    others = x.grad[1:].abs().max()
    assert (others == 0) == independent
    if independent:
        (alone,) = net(x[:1])
        assert torch.allclose(alone, logits[:1], atol=1e-6)
        assert not list(net.buffers())


def test_initial_weights_are_those_of_pix2pix():
    for norm in ("batch", "group"):
        for module in PatchGAN(channels=64, norm=norm).modules():
            if isinstance(module, nn.Conv2d):
                assert module.weight.std().item() == pytest.approx(0.02, rel=0.06)
            elif isinstance(module, nn.BatchNorm2d | nn.GroupNorm):
                assert module.weight.mean().item() == pytest.approx(1, abs=0.01)
                assert module.weight.std().item() == pytest.approx(0.02, rel=0.25)
                assert not module.bias.any()


@pytest.mark.parametrize("layers", [1, 2, 3, 4])
def test_check_resolution_refuses_exactly_what_leaves_no_patch(layers):
    """Against the network itself, which fails in a convolution if nothing is left."""
    net = PatchGAN(layers=layers, channels=2).eval()
    for resolution in range(4, 64):
        try:
            works = net(torch.randn(1, 3, resolution, resolution))[0].numel() > 0
        except RuntimeError:
            works = False
        if works:
            net.check_resolution(layers, resolution)
            continue
        with pytest.raises(UserError) as error:
            net.check_resolution(layers, resolution)
        message = str(error.value)
        assert f"disc.layers={layers}" in message and f"{resolution} px" in message
        assert "\n" not in message


@pytest.mark.parametrize("wrap", [
    lambda state: state,
    lambda state: {"discriminator": {f"module.{k}": v for k, v in state.items()}, "steps": 1},
    lambda state: {"state_dict": {f"loss.discriminator.{k}": v for k, v in state.items()}
                   | {"encoder.conv_in.weight": torch.ones(1)}},
])  # fmt: skip
def test_the_discriminator_of_a_training_checkpoint_is_found(wrap, tmp_path):
    """The discriminators of REPA-E's checkpoints, and of taming-transformers' VQGAN."""
    c = tiny_config("disc.layers=2", "disc.channels=8")
    trained = build_disc(c, None).state_dict()
    torch.save(wrap(trained), path := tmp_path / "disc.pt")
    loaded = build_disc(c, str(path)).state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in trained.items())
    torch.save({"model": {"a": torch.ones(1)}}, path)
    with pytest.raises(UserError, match=r"do not fit the discriminator of this config: .*model\.a"):
        build_disc(c, str(path))
