"""LPIPS against the formula and against its own package, and the file of its VGG-16."""

import math
from pathlib import Path

import lpips
import pytest
import torch
import torch.nn.functional as F
import torchvision

from loss.reconstruction import perceptual_loss
from models.checks.errors import UserError
from models.lpips import build_lpips, halve, load_lpips, vgg_weight_file


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def images(num=2, side=32):
    return torch.rand(num, 3, side, side) * 2 - 1


def vgg_shapes():
    with torch.device("meta"):
        features = torchvision.models.vgg16(weights=None, init_weights=False).features
    return {f"features.{name}": value.shape for name, value in features.state_dict().items()}


@pytest.fixture(scope="module")
def vgg_file(tmp_path_factory):
    """Random weights in the format of torchvision's vgg16 file."""
    torch.manual_seed(1)
    state = {}
    for name, shape in vgg_shapes().items():
        scale = math.sqrt(2 / math.prod(shape[1:])) if len(shape) > 1 else 0.1
        state[name] = scale * torch.randn(shape)
    state |= {"classifier.0.weight": torch.zeros(1), "classifier.0.bias": torch.zeros(1)}
    path = tmp_path_factory.mktemp("vgg") / "vgg16.pth"
    torch.save(state, path)
    return path


@pytest.fixture(scope="module")
def net(vgg_file):
    return load_lpips(str(vgg_file))


def literal_lpips(state, heads, x, y):
    """arXiv 1801.03924, Eq. 1, on VGG-16 after relu1_2, 2_2, 3_3, 4_3, 5_3: (N,), float64."""
    shift = torch.tensor([-0.030, -0.088, -0.188], dtype=torch.float64).view(1, 3, 1, 1)
    scale = torch.tensor([0.458, 0.448, 0.450], dtype=torch.float64).view(1, 3, 1, 1)

    def stages(h):
        h, index, found = (h.double() - shift) / scale, 0, []
        for convolutions in (2, 2, 3, 3, 3):
            for _ in range(convolutions):
                weight, bias = (state[f"features.{index}.{p}"].double() for p in ("weight", "bias"))
                h, index = F.conv2d(h, weight, bias, padding=1).clamp(min=0), index + 2
            found.append(h / (h.square().sum(dim=1, keepdim=True).sqrt() + 1e-10))
            h, index = F.max_pool2d(h, 2), index + 1
        return found

    distance = 0
    for k, (a, b) in enumerate(zip(stages(x), stages(y))):
        weight = heads[f"lin{k}.model.1.weight"].double()  # (1, C, 1, 1)
        distance = distance + ((a - b).square() * weight).sum(dim=1).mean(dim=(1, 2))
    return distance


def test_lpips_equals_the_literal_formula(net, vgg_file):
    heads = Path(lpips.__file__).parent / "weights" / "v0.1" / "vgg.pth"
    heads = torch.load(heads, map_location="cpu", weights_only=True)
    x, y = images(), images()
    expected = literal_lpips(torch.load(vgg_file, weights_only=True), heads, x, y)
    assert expected.min() > 1e-3
    assert torch.allclose(net(x, y).flatten().double(), expected, rtol=1e-4)
    loss = perceptual_loss(net, x, y).item()
    assert loss == pytest.approx(expected.mean().item(), rel=1e-5)
    assert perceptual_loss(net, x, x).item() == 0


def test_double_scaling_feeds_2x_minus_1(net):
    """The reference's quirk: images of [-1, 1] reach VGG as [-3, 1]."""
    x, y = images(), images()
    doubled = perceptual_loss(net, x, y, double_scaling=True)
    assert doubled.item() == pytest.approx(net(2 * x - 1, 2 * y - 1).mean().item(), rel=1e-6)
    assert abs(doubled.item() / perceptual_loss(net, x, y).item() - 1) > 0.01


def test_lpips_is_frozen_but_passes_gradients_to_the_reconstruction(net):
    assert not any(p.requires_grad for p in net.parameters())
    assert not any(m.training for m in net.modules())
    x_hat = images().requires_grad_()
    perceptual_loss(net, x_hat, images()).backward()
    assert x_hat.grad.isfinite().all() and x_hat.grad.abs().sum() > 0
    assert all(p.grad is None for p in net.parameters())


def test_lpips_is_float32_for_half_precision_images(net):
    x, y = images().bfloat16(), images().bfloat16()
    loss = perceptual_loss(net, x, y)
    assert loss.dtype == torch.float32
    assert loss.item() == perceptual_loss(net, x.float(), y.float()).item()


def test_the_random_network_is_the_same_but_for_its_weights(net):
    random = build_lpips()
    assert [n for n, _ in random.named_parameters()] == [n for n, _ in net.named_parameters()]
    assert not any(p.requires_grad for p in random.parameters()) and not random.training
    heads = {k: v for k, v in net.state_dict().items() if k.startswith("lin")}
    assert heads and all(torch.equal(random.state_dict()[k], v) for k, v in heads.items())


def test_the_file_of_vgg_and_what_to_do_without_it(tmp_path, monkeypatch):
    """How a file is found, fetched and hashed is tested in weights/test_published.py."""
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path))
    file = vgg_weight_file()
    assert file.find() is None
    assert file.url == "https://download.pytorch.org/models/vgg16-397923af.pth"
    assert file.sha256 == "397923af"  # torchvision writes it into the name
    for missing in (
        lambda: load_lpips(None, False),
        lambda: load_lpips(str(tmp_path / "mine.pth")),
    ):
        with pytest.raises(UserError) as error:
            missing()
        parts = (file.url, "loss.reg.lpips_weights=", "loss.reg.lpips=0")
        assert all(part in str(error.value) for part in parts)


@pytest.mark.slow
def test_the_copy_in_torchs_cache_is_loaded(tmp_path, monkeypatch, vgg_file, net):
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path))
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "vgg16-397923af.pth").symlink_to(vgg_file)
    cached, (x, y) = load_lpips(download=False), (images(), images())
    assert torch.equal(cached(x, y), net(x, y))


@pytest.mark.slow
def test_weights_of_another_network_are_refused(tmp_path):
    path = tmp_path / "vgg16.pth"
    for key, words in (("conv1.weight", "no tensors"), ("features.0.weight", "25 missing")):
        torch.save({key: torch.zeros(3, 3)}, path)
        match = rf"{path}.*do not fit torchvision's VGG-16.*{words}"
        with pytest.raises(UserError, match=match):
            load_lpips(str(path))


def gradients(net, x_hat, x, weight=1.0):
    x_hat = x_hat.clone().requires_grad_()
    loss = perceptual_loss(net, x_hat, x)
    (weight * loss).backward()
    return loss.item(), x_hat.grad


@pytest.mark.parametrize("num", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_a_half_vgg_has_the_noise_of_tf32(vgg_file, net, num):
    """0.1 % in the value, 5.5 % in the gradient, as TF32 has; without a loss scale it is 29 % or
    more. Whatever the loss is multiplied by later: fp16 training multiplies it by 65536."""
    torch.manual_seed(2)
    x = F.avg_pool2d(images(num, 64), 2)
    x_hat = x + 0.03 * torch.randn(x.shape)
    half = load_lpips(str(vgg_file))
    halve(half)
    value, exact = gradients(net, x_hat, x)
    for weight in (1.0, 65536.0):
        found, gradient = gradients(half, x_hat, x, weight)
        assert abs(found / value - 1) < 1e-3
        assert ((gradient / weight - exact).norm() / exact.norm()).item() < 0.055
    assert {p.dtype for p in half.net.parameters()} == {torch.float16}


def test_the_gradient_that_is_found_at_once_is_that_of_the_formula(net):
    x, x_hat = images(), images().requires_grad_()
    (wanted,) = torch.autograd.grad(3 * net(x_hat, x).mean(), x_hat)
    loss = perceptual_loss(net, x_hat, x)
    torch.testing.assert_close(torch.autograd.grad(3 * loss, x_hat)[0], wanted)
    assert not perceptual_loss(net, x, x_hat.detach()).requires_grad
    with torch.no_grad():
        assert not perceptual_loss(net, x_hat, x).requires_grad
