"""One training step against the same step written out, and against itself in micro-batches.

python -m pytest tests/test_step.py
"""

import copy
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

import train_repae
from tests.tiny import batch, grads, start, tiny_config
from utils.training.draws import Draws
from utils.training.ema import EmaUpdate

NO_CLIP = ("vae.optim.clip=0", "sit.optim.clip=0", "disc.optim.clip=0")
CLIP_HALF = [f"{name}.optim.clip=0.5" for name in ("vae", "sit", "disc")]


def relative(a: dict, b: dict) -> float:
    """|a - b| / |b| over all tensors of two equally named sets."""
    assert a.keys() == b.keys()
    gap = sum((a[k] - b[k]).double().square().sum() for k in a)
    return math.sqrt(gap / sum(b[k].double().square().sum() for k in b))


def cosine_double_loop(h, f):
    values = [F.cosine_similarity(a, b, dim=0) for hs, fs in zip(h, f) for a, b in zip(hs, fs)]
    return -torch.stack(values).mean()


class Written:
    """Steps of the paper and its published recipe on plain copies of the networks: no phases, no
    learners, everything as formulas. `clip`: largest norm of each network's gradient; `lecam`: its
    weight; `gan_start`: first step with a GAN term in the VAE's loss."""

    def __init__(self, nets, path="linear", clip=math.inf, lecam=0.0, gan_start=0):
        self.vae, self.sit, self.disc = map(copy.deepcopy, (nets.vae, nets.sit, nets.disc))
        self.encoder, self.perceptual = nets.encoders[0], nets.perceptual
        self.ema = copy.deepcopy(nets.ema)
        self.nets = {"vae": self.vae, "sit": self.sit, "disc": self.disc}
        self.moments = {}
        for name, net in self.nets.items():
            net.requires_grad_(True)
            self.moments[name] = {k: [0.0, 0.0] for k, _ in net.named_parameters()}
        self.path, self.clip, self.lecam, self.gan_start = path, clip, lecam, gan_start
        self.real = self.fake = 0.0  # moving averages of LeCam
        self.steps = 0

    def coefficients(self, t):
        """alpha, sigma and their derivatives."""
        if self.path == "linear":
            return 1 - t, t, -1, 1
        alpha, sigma = torch.cos(math.pi / 2 * t), torch.sin(math.pi / 2 * t)
        return alpha, sigma, -math.pi / 2 * sigma, math.pi / 2 * alpha

    def step(self, x, y, d: Draws):
        """=> terms, and gradients as they are before clipping. All networks are updated, each after
        its loss."""
        feats = self.encoder(x)
        terms, total, z, x_hat = self.loss_of_vae(x, y, d, feats)
        gradients = {"vae": self.update("vae", total, lr=1e-3)}
        more, total = self.loss_of_disc(x, x_hat.detach())
        terms |= more
        gradients["disc"] = self.update("disc", total, lr=1e-4)
        more, total = self.loss_of_sit(z.detach(), y, d, feats)
        terms |= more
        gradients["sit"] = self.update("sit", total, lr=1e-3)
        for average, value in zip(floats(self.ema).values(), floats(self.sit).values()):
            average.copy_(0.9999 * average + 0.0001 * value)
        self.steps += 1
        return terms, gradients

    def loss_of_vae(self, x, y, d, feats):
        moments = self.vae.net.quant_conv(self.vae.net.encoder(x))
        mean, logvar = moments.chunk(2, dim=1)
        logvar = logvar.clamp(-30, 20)
        z = mean + torch.exp(0.5 * logvar) * d.posterior_noise
        x_hat = self.vae.net.decoder(self.vae.net.post_quant_conv(z))
        bn = self.sit.bn
        m, v = bn.running_mean[:, None, None], bn.running_var[:, None, None]
        alpha, sigma, _, _ = self.coefficients(d.t[:, None, None, None])
        x_t = alpha * (z - m) / (v + 1e-4).sqrt() + sigma * d.eps
        _, (h,) = self.sit.eval()(x_t, d.t, y, stop_at_align=True)
        terms = {
            "loss/vae/pixel": (x_hat - x).abs().mean(),
            "loss/vae/kl": 0.5 * (mean**2 + logvar.exp() - 1 - logvar).sum(dim=(1, 2, 3)).mean(),
            "loss/vae/align": cosine_double_loop(h, feats),
        }
        total = terms["loss/vae/pixel"] + 1e-6 * terms["loss/vae/kl"]
        total = total + 1.5 * terms["loss/vae/align"]
        if self.perceptual:
            terms["loss/vae/perceptual"] = self.perceptual(x_hat, x).mean()
            total = total + terms["loss/vae/perceptual"]
        if self.steps >= self.gan_start:
            terms["loss/vae/gan"] = -self.disc.main(x_hat).mean()
            total = total + 0.1 * terms["loss/vae/gan"]
        return terms, total, z, x_hat

    def loss_of_disc(self, x, x_hat):
        real, fake = self.disc.main(x), self.disc.main(x_hat)
        hinge = 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())
        if not self.lecam:
            return {"loss/disc/hinge": hinge}, hinge
        lecam = (F.relu(real - self.fake) ** 2).mean() + (F.relu(self.real - fake) ** 2).mean()
        self.real = 0.999 * self.real + 0.001 * real.mean().detach()
        self.fake = 0.999 * self.fake + 0.001 * fake.mean().detach()
        return {"loss/disc/hinge": hinge, "loss/disc/lecam": lecam}, hinge + self.lecam * lecam

    def loss_of_sit(self, z, y, d, feats):
        mean = z.mean(dim=(0, 2, 3))
        var = z.var(dim=(0, 2, 3), unbiased=False)
        z_n = (z - mean[:, None, None]) / (var[:, None, None] + 1e-4).sqrt()
        alpha, sigma, d_alpha, d_sigma = self.coefficients(d.t[:, None, None, None])
        v_hat, (h,) = self.sit(alpha * z_n + sigma * d.eps, d.t, torch.where(d.drop_label, 10, y))
        target = d_alpha * z_n + d_sigma * d.eps
        terms = {
            "loss/sit/diffusion": ((v_hat - target) ** 2).mean(),
            "loss/sit/align": cosine_double_loop(h, feats),
        }
        count, bn = z.numel() / z.shape[1], self.sit.bn
        bn.running_mean = 0.9 * bn.running_mean + 0.1 * mean
        bn.running_var = 0.9 * bn.running_var + 0.1 * var * count / (count - 1)
        return terms, terms["loss/sit/diffusion"] + 0.5 * terms["loss/sit/align"]

    def update(self, name, loss, lr):
        """Clip and AdamW (no weight decay); returns the gradients before clipping."""
        params = dict(self.nets[name].named_parameters())
        gradients = dict(zip(params, torch.autograd.grad(loss, params.values())))
        k = self.steps + 1
        for key, g in self.clipped(gradients).items():
            m, v = self.moments[name][key]
            m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
            self.moments[name][key] = [m, v]
            step = (m / (1 - 0.9**k)) / ((v / (1 - 0.999**k)).sqrt() + 1e-8)
            params[key].data -= lr * step
        return gradients

    def clipped(self, gradients):
        factor = min(1.0, self.clip / (norm_of(gradients) + 1e-6))
        return {key: g * factor for key, g in gradients.items()}


def norm_of(tensors: dict) -> float:
    return math.sqrt(sum(value.double().square().sum() for value in tensors.values()))


@pytest.mark.parametrize("path", ["linear", "cosine"])
def test_a_step_equals_the_step_written_out(path):
    """Loss terms to 1e-5, gradients before clipping to 1e-4 in norm, statistics and EMA to 1e-6."""
    config = tiny_config(*NO_CLIP, f"loss.diffusion.path={path}", "sit.class_dropout_prob=0.3")
    nets, _ = start(config)
    x, y, draws = batch(config)
    written = Written(nets, path)
    terms, gradients = written.step(x, y, draws)
    stats, ema = (written.sit.bn.running_mean, written.sit.bn.running_var), written.ema
    ema = ema.state_dict() | {"bn.num_batches_tracked": torch.tensor(1)}  # copied, not averaged
    metrics = train_repae.train_step(nets, x, y, draws, config, 0)
    for name, value in terms.items():
        assert metrics[name].item() == pytest.approx(value.item(), rel=1e-5), name
    for name, expected in gradients.items():
        net = getattr(nets, name)
        assert relative(grads(net), expected) < 1e-4, name
        norm = norm_of(expected)
        assert metrics[f"grad_norm/{name}"].item() == pytest.approx(norm, rel=1e-4)
    assert torch.allclose(nets.sit.bn.running_mean, stats[0], atol=1e-6)
    assert torch.allclose(nets.sit.bn.running_var, stats[1], atol=1e-6)
    for name, value in nets.ema.state_dict().items():
        assert torch.allclose(value.float(), ema[name].float(), atol=1e-6), name


def start_in_float64(config):
    """Networks of a run that begin with its own weights, and compute in float64."""
    nets, _ = start(config)
    for net in (nets.vae, nets.sit, nets.ema, nets.disc, nets.lecam, nets.perceptual):
        net.double()
    nets.encoders[0].double()
    nets.update_ema = EmaUpdate(nets.ema, nets.sit)  # its buffers are other tensors now
    return nets


def batch_in_float64(config, step):
    x, y, d = batch(config, step)
    wide = {name: getattr(d, name).double() for name in ("posterior_noise", "t", "eps")}
    return x.double(), y, replace(d, **wide)


@pytest.mark.parametrize("path", ["linear", "cosine"])
def test_steps_in_float64_equal_the_steps_written_out(path):
    """Three steps with clipping, LeCam, a perceptual term and `gan_start`: losses, gradients and
    weights after AdamW to 1e-12 (measured: 8e-15), latent norm to 1e-14, EMA to 1e-15 (1.3e-16).

    In float32, gradients of equal steps differ by up to 2e-2 from rounding at the kinks of L1, ReLU
    and max pooling alone (measured through the f8d4 VAE at full width: GAN 1.8e-2, LPIPS 9.7e-3,
    MSE 9e-6): tests/loss/test_reconstruction.py has the arithmetic.
    """
    config = tiny_config(
        *CLIP_HALF, f"loss.diffusion.path={path}", "sit.class_dropout_prob=0.3",
        "run.batch_size=4", "loss.reg.lecam=0.1", "loss.reg.gan_start=1", "loss.reg.perceptual=1",
        "loss.reg.perceptual_net=timm:test_resnet@random",
    )  # fmt: skip
    nets = start_in_float64(config)
    assert nets.trained["sit"].opt.param_groups[0]["params"][0].dtype == torch.float64
    written = Written(nets, path, clip=0.5, lecam=0.1, gan_start=1)
    for step in range(3):
        x, y, draws = batch_in_float64(config, step)
        terms, gradients = written.step(x, y, draws)
        metrics = train_repae.train_step(nets, x, y, draws, config, step)
        for name, value in terms.items():
            assert metrics[name].item() == pytest.approx(value.item(), rel=1e-12), (step, name)
        for name, net in written.nets.items():
            own, expected = getattr(nets, name), written.clipped(gradients[name])
            assert relative(grads(own), expected) < 1e-12, (step, name)
            assert relative(floats(own), floats(net)) < 1e-12, (step, name)  # after AdamW
        for own, expected in zip(nets.sit.bn.stats(), written.sit.bn.stats()):
            torch.testing.assert_close(own, expected, rtol=1e-14, atol=1e-14)
        assert relative(floats(nets.ema), floats(written.ema)) < 1e-15, step


def floats(net: torch.nn.Module) -> dict:
    """Parameters and buffers, without those that count."""
    return {k: v for k, v in net.state_dict().items() if v.is_floating_point()}


def test_each_network_is_clipped_by_its_own_norm():
    """clip=0.01 leaves gradients of norm 0.01 in every network, whatever the others' norms."""
    clips = [f"{name}.optim.clip=0.01" for name in ("vae", "sit", "disc")]
    config = tiny_config(*clips)
    nets, _ = start(config)
    train_repae.train_step(nets, *batch(config), config, 0)
    for net in (nets.vae, nets.sit, nets.disc):
        norm = math.sqrt(sum(g.double().square().sum() for g in grads(net).values()))
        assert norm == pytest.approx(0.01, rel=1e-3)


@pytest.mark.parametrize("precision", ["fp32", "scaled"])
def test_micro_batches_equal_the_big_batch(precision, monkeypatch):
    """Gradients, statistics and metrics of 4 micro-batches of 2 = one batch of 8, for all three
    networks; "scaled" with the loss scalers of fp16 on, around float32 arithmetic."""
    results = []
    for parts in (1, 4):
        extra = ("disc.norm=group", "disc.channels=16", f"run.accumulation={parts}")
        config = tiny_config(*NO_CLIP, *extra)
        if precision == "scaled":
            config.run.precision = "fp16"
        nets, _ = start(config)
        nets.precision = "fp32"
        metrics = train_repae.train_step(nets, *batch(config), config, 0)
        found = {
            f"{n}.{k}": g
            for n in ("vae", "sit", "disc")
            for k, g in grads(getattr(nets, n)).items()
        }
        results.append((found, nets.sit.bn.running_var.clone(), metrics))
        scale = nets.trained["vae"].scaler.get_scale()
        assert scale == (1.0 if precision == "fp32" else 65536.0)
    (big, var, metrics), (small, var_small, metrics_small) = results
    assert relative(small, big) < 1e-4
    assert torch.allclose(var, var_small, atol=1e-6)
    for name in (k for k in metrics if k.startswith("loss/")):
        assert metrics_small[name].item() == pytest.approx(metrics[name].item(), rel=1e-4), name


def test_fp16_scales_of_the_networks_are_independent():
    """An overflow in one network's gradients skips its update alone and halves its scale alone."""
    config = tiny_config()
    config.run.precision = "fp16"
    nets, _ = start(config)
    nets.precision = "fp32"
    nets.trained["vae"].freeze(False)
    nets.trained["vae"].params[0].register_hook(lambda g: g * float("inf"))
    nets.trained["vae"].freeze()
    before = {name: [p.clone() for p in l.params] for name, l in nets.trained.items()}
    train_repae.train_step(nets, *batch(config), config, 0)
    moved = {
        name: any((p != q).any() for p, q in zip(learner.params, before[name]))
        for name, learner in nets.trained.items()
    }
    assert moved == {"vae": False, "sit": True, "disc": True}
    scales = {name: learner.scaler.get_scale() for name, learner in nets.trained.items()}
    assert scales == {"vae": 32768.0, "sit": 65536.0, "disc": 65536.0}


@pytest.mark.usefixtures("native_halves")
@pytest.mark.parametrize("overrides", [("run.precision=bf16",), ("run.checkpointing=both",)])
def test_other_ways_to_compute_a_step_agree_with_it(overrides):
    """bf16 autocast to 3 %, gradient checkpointing to rounding."""
    losses = []
    for extra in ((), overrides):
        config = tiny_config(*extra)
        nets, _ = start(config)
        metrics = train_repae.train_step(nets, *batch(config), config, 0)
        losses.append({k: v.item() for k, v in metrics.items() if k.startswith("loss/")})
    tolerance = 0.03 if "bf16" in overrides[0] else 1e-5
    for name, value in losses[0].items():
        assert losses[1][name] == pytest.approx(value, rel=tolerance, abs=tolerance / 3), name


def test_several_encoders_and_the_irepa_variant_train():
    """Two encoders of different width; a conv projector on spatially normalised features."""
    config = tiny_config(
        "encoder.names=[timm:test_resnet/16,timm:test_vit]",
        "encoder.weights=[random,random]",
        "sit.projector=conv",
        "loss.align.spatial_norm=0.6",
    )
    nets, _ = start(config)
    train_repae.train_step(nets, *batch(config), config, 0)
    assert [p.weight.shape[0] for p in nets.sit.projectors] == [192, 64]
    assert all(p.weight.grad.abs().max() > 0 for p in nets.sit.projectors)


@pytest.mark.parametrize("name", ["tiny-f8d4", "tiny-f8d16", "tiny-f16d32", "tiny-qwen"])
def test_every_vae_family_trains_jointly(name):
    """Three steps at the token grid that fits: f8 with patch 2, f16 with patch 1; 4x4 tokens."""
    patch = 1 if "f16" in name else 2
    config = tiny_config(
        f"vae.name={name}", f"sit.patch_size={patch}", "data.resolution=64", "run.batch_size=2"
    )
    nets, _ = start(config)
    for step in range(3):
        x, y, draws = batch(config, step)
        shape = (2, *nets.vae.latent_shape(64))
        draws.eps, draws.posterior_noise = torch.randn(shape), torch.randn(shape)
        metrics = train_repae.train_step(nets, x, y, draws, config, step)
    assert all(v.isfinite() for v in metrics.values())
    assert metrics["grad_norm/vae"] > 0
