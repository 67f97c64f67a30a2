"""Every term of L_REG against the formula written out, and LPIPS against its own package."""

import copy
import math
import socket
import time
from pathlib import Path

import lpips
import pytest
import torch
import torch.nn.functional as F
import torchvision

from loss import reconstruction as rec
from models.errors import UserError

URL = "https://download.pytorch.org/models/vgg16-397923af.pth"


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def images(num=2, side=32):
    return torch.rand(num, 3, side, side) * 2 - 1


# --------------------------------------------------------------------------------------
# Pixels and KL


def test_pixel_losses_are_means_over_all_values():
    x_hat, x = images(), images()
    pairs = list(zip(x_hat.flatten().tolist(), x.flatten().tolist()))
    l1 = sum(abs(a - b) for a, b in pairs) / len(pairs)
    mse = sum((a - b) ** 2 for a, b in pairs) / len(pairs)
    assert rec.pixel_loss(x_hat, x).item() == pytest.approx(l1, rel=1e-5)
    assert rec.pixel_loss(x_hat, x, "l1").item() == pytest.approx(l1, rel=1e-5)
    assert rec.pixel_loss(x_hat, x, "mse").item() == pytest.approx(mse, rel=1e-5)
    with pytest.raises(AssertionError):
        rec.pixel_loss(x_hat, x, "l2")


def test_kl_is_summed_over_the_latent_and_averaged_over_images():
    mean, logvar = torch.randn(3, 2, 4, 4), torch.randn(3, 2, 4, 4)
    total = 0.0
    for m, lv in zip(mean.flatten().tolist(), logvar.flatten().tolist()):
        total += 0.5 * (m**2 + math.exp(lv) - 1 - lv)
    assert rec.kl_loss(mean, logvar).item() == pytest.approx(total / 3, rel=1e-5)


def test_kl_is_that_of_torch_distributions():
    mean, logvar = torch.randn(3, 2, 4, 4), torch.randn(3, 2, 4, 4)
    posterior = torch.distributions.Normal(mean, (logvar / 2).exp())
    prior = torch.distributions.Normal(torch.zeros(()), torch.ones(()))
    expected = torch.distributions.kl_divergence(posterior, prior).sum(dim=(1, 2, 3)).mean()
    assert rec.kl_loss(mean, logvar).item() == pytest.approx(expected.item(), rel=1e-5)
    assert rec.kl_loss(torch.zeros(2, 1, 2, 2), torch.zeros(2, 1, 2, 2)).item() == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_moments_do_not_overflow(dtype):
    """The mean of 300 whose square is infinite in float16 (users.md, B1.16)."""
    mean, logvar = (
        torch.full((1, 1, 2, 2), 300.0, dtype=dtype),
        torch.zeros(1, 1, 2, 2, dtype=dtype),
    )
    assert rec.kl_loss(mean, logvar).item() == 4 * 0.5 * 90_000
    loss = rec.pixel_loss(mean, -mean, "mse")
    assert loss.dtype == torch.float32 and loss.item() == 360_000


# --------------------------------------------------------------------------------------
# GAN


def test_hinge_and_generator_hand_values():
    real, fake = torch.tensor([2.0, 0.5, -1.0, 1.0]), torch.tensor([-3.0, 0.0, 1.0, -0.5])
    # relu(1 - real) = 0, 0.5, 2, 0; relu(1 + fake) = 0, 1, 2, 0.5
    assert rec.hinge_loss(real, fake).item() == pytest.approx(0.5 * (2.5 / 4 + 3.5 / 4))
    assert rec.generator_loss(fake).item() == pytest.approx(2.5 / 4)


def test_each_side_pushes_its_own_way():
    """Discriminator: real up, fake down, nothing beyond the margins. VAE: fake up, always."""
    real = torch.tensor([0.0, 2.0], requires_grad=True)
    fake = torch.tensor([0.0, -2.0], requires_grad=True)
    rec.hinge_loss(real, fake).backward()
    assert real.grad.tolist() == [-0.25, 0.0]
    assert fake.grad.tolist() == [0.25, 0.0]
    fake.grad = None
    rec.generator_loss(fake).backward()
    assert fake.grad.tolist() == [-0.5, -0.5]


def test_real_and_fake_may_differ_in_number():
    assert rec.hinge_loss(torch.zeros(4, 1, 2, 2), torch.ones(2, 1, 2, 2)).item() == 1.5


def test_lecam_formula_and_moving_averages_over_three_batches():
    """mean relu(D(real) - a_fake)^2 + mean relu(a_real - D(fake))^2 with the averages of before."""
    lecam, a_real, a_fake = rec.LeCam(decay=0.9), 0.0, 0.0
    for _ in range(3):
        real, fake = torch.randn(3, 1, 2, 2) + 1, torch.randn(3, 1, 2, 2) - 1
        r, f = real.flatten().tolist(), fake.flatten().tolist()
        expected = sum(max(v - a_fake, 0) ** 2 for v in r) / len(r)
        expected += sum(max(a_real - v, 0) ** 2 for v in f) / len(f)
        assert lecam(real, fake).item() == pytest.approx(expected, rel=1e-5)
        lecam.update(real.mean(), fake.mean())
        a_real = 0.9 * a_real + 0.1 * sum(r) / len(r)
        a_fake = 0.9 * a_fake + 0.1 * sum(f) / len(f)
        assert lecam.real.item() == pytest.approx(a_real, rel=1e-5)
        assert lecam.fake.item() == pytest.approx(a_fake, rel=1e-5)


def test_lecam_gradients_reach_the_logits_alone():
    lecam = rec.LeCam(decay=0.5)
    lecam.real.fill_(1.0)
    lecam.fake.fill_(-1.0)
    real = torch.tensor([0.0, -2.0], requires_grad=True)
    fake = torch.tensor([0.5, 3.0], requires_grad=True)
    lecam(real, fake).backward()
    lecam.update(real.detach().mean(), fake.detach().mean())
    assert real.grad.tolist() == [1.0, 0.0]  # 2 (0 + 1) / 2
    assert fake.grad.tolist() == [-0.5, 0.0]  # -2 (1 - 0.5) / 2
    assert lecam.real.item() == 0.0 and not lecam.real.requires_grad


def test_lecam_averages_travel_with_the_state_dict():
    """A resumed run goes on with the averages it had."""
    one, other = rec.LeCam(), rec.LeCam()
    one.update(torch.randn(8).mean(), torch.randn(8).mean())
    assert set(one.state_dict()) == {"real", "fake"} and not list(one.parameters())
    other.load_state_dict(copy.deepcopy(one.state_dict()))
    real, fake = torch.randn(8), torch.randn(8)
    assert torch.equal(one(real, fake), other(real, fake))
    assert one.state_dict() == other.state_dict()
    assert rec.LeCam().decay == 0.999


# --------------------------------------------------------------------------------------
# LPIPS


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
    return rec.load_lpips(str(vgg_file))


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
    package = Path(lpips.__file__).parent
    heads = package / "weights" / "v0.1" / "vgg.pth"
    heads = torch.load(heads, map_location="cpu", weights_only=True)
    x, y = images(), images()
    expected = literal_lpips(torch.load(vgg_file, weights_only=True), heads, x, y)
    assert expected.min() > 1e-3
    assert torch.allclose(net(x, y).flatten().double(), expected, rtol=1e-4)
    loss = rec.perceptual_loss(net, x, y).item()
    assert loss == pytest.approx(expected.mean().item(), rel=1e-5)


def test_lpips_equals_the_package_own_network(net, vgg_file):
    theirs, state = (
        lpips.LPIPS(net="vgg", pnet_rand=True, verbose=False),
        torch.load(vgg_file, weights_only=True),
    )
    with torch.no_grad():
        for name, p in theirs.net.named_parameters():  # sliceK.INDEX.weight
            p.copy_(state["features." + name.split(".", 1)[1]])
    x, y = images(), images()
    assert torch.equal(net(x, y), theirs(x, y))
    assert rec.perceptual_loss(net, x, x).item() == 0


def test_double_scaling_feeds_2x_minus_1(net):
    """The reference's quirk: images of [-1, 1] reach VGG as [-3, 1]."""
    x, y = images(), images()
    doubled = rec.perceptual_loss(net, x, y, double_scaling=True)
    assert doubled.item() == pytest.approx(net(2 * x - 1, 2 * y - 1).mean().item(), rel=1e-6)
    assert abs(doubled.item() / rec.perceptual_loss(net, x, y).item() - 1) > 0.01


def test_lpips_is_frozen_but_passes_gradients_to_the_reconstruction(net):
    assert not any(p.requires_grad for p in net.parameters())
    assert not any(m.training for m in net.modules())
    x_hat = images().requires_grad_()
    rec.perceptual_loss(net, x_hat, images()).backward()
    assert x_hat.grad.isfinite().all() and x_hat.grad.abs().sum() > 0
    assert all(p.grad is None for p in net.parameters())


def test_lpips_is_float32_for_half_precision_images(net):
    x, y = images().bfloat16(), images().bfloat16()
    loss = rec.perceptual_loss(net, x, y)
    assert loss.dtype == torch.float32
    assert loss.item() == rec.perceptual_loss(net, x.float(), y.float()).item()


@pytest.fixture
def no_network(monkeypatch):
    """Any attempt to connect fails at once, and is counted."""
    attempts = []

    def refuse(*args, **kwargs):
        attempts.append(args)
        raise OSError("no network")

    for name in ("create_connection", "getaddrinfo"):
        monkeypatch.setattr(socket, name, refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    return attempts


def check_message(error, path):
    message = str(error.value)
    assert "\n" not in message
    assert all(part in message for part in (str(path), URL, "loss.reg.lpips=0"))


def test_missing_file_is_one_line_with_file_url_and_switch(tmp_path, no_network):
    path = tmp_path / "nowhere.pth"
    with pytest.raises(UserError) as error:
        rec.load_lpips(str(path))
    check_message(error, path)
    assert not no_network  # a named file is never replaced by a download


@pytest.mark.parametrize("download", [False, True])
def test_without_network_the_missing_cache_is_said_at_once(
    tmp_path, monkeypatch, no_network, download
):
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path / "hub"))
    began = time.perf_counter()
    with pytest.raises(UserError) as error:
        rec.load_lpips(None, download)
    assert time.perf_counter() - began < 3
    check_message(error, tmp_path / "hub" / "checkpoints" / "vgg16-397923af.pth")
    assert bool(no_network) == download
    assert not list(tmp_path.rglob("*.pth"))


def test_a_download_of_other_bytes_is_refused(tmp_path, monkeypatch):
    """What a captive portal sends is neither used nor kept."""
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path))
    page = tmp_path / "page.html"
    page.write_text("please log in")
    real = torch.hub.download_url_to_file
    monkeypatch.setattr(
        torch.hub,
        "download_url_to_file",
        lambda url, dst, **kwargs: real(page.as_uri(), dst, progress=False, **kwargs),
    )
    with pytest.raises(UserError) as error:
        rec.load_lpips()
    check_message(error, tmp_path / "checkpoints" / "vgg16-397923af.pth")
    assert not list((tmp_path / "checkpoints").iterdir())


def test_hub_cache_is_used_without_network(tmp_path, monkeypatch, no_network, vgg_file, net):
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path))
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "vgg16-397923af.pth").symlink_to(vgg_file)
    cached, (x, y) = rec.load_lpips(), (images(), images())
    assert torch.equal(cached(x, y), net(x, y))
    assert not no_network


@pytest.mark.parametrize("content", ["text", "other network", "truncated"])
def test_a_file_that_is_no_vgg16_is_one_line(tmp_path, vgg_file, content):
    path = tmp_path / "vgg16.pth"
    if content == "text":
        path.write_text("404: not found")
    elif content == "truncated":
        path.write_bytes(vgg_file.read_bytes()[:100_000])
    else:
        torch.save({"conv1.weight": torch.zeros(3, 3)}, path)
    with pytest.raises(UserError) as error:
        rec.load_lpips(str(path))
    assert str(path) in str(error.value) and "\n" not in str(error.value)
