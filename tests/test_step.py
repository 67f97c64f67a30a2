"""One training step against the same step written out, and against itself in micro-batches.

python -m pytest tests/test_step.py
"""

import copy
import math

import pytest
import torch
import torch.nn.functional as F

import train_repae
from tests.tiny import batch, grads, start, tiny_config
from utils.training.draws import Draws

NO_CLIP = ("vae.optim.clip=0", "sit.optim.clip=0", "disc.optim.clip=0")


def relative(a: dict, b: dict) -> float:
    """|a - b| / |b| over all tensors of two equally named sets."""
    assert a.keys() == b.keys()
    gap = sum((a[k] - b[k]).double().square().sum() for k in a)
    return math.sqrt(gap / sum(b[k].double().square().sum() for k in b))


def cosine_double_loop(h, f):
    values = [F.cosine_similarity(a, b, dim=0) for hs, fs in zip(h, f) for a, b in zip(hs, fs)]
    return -torch.stack(values).mean()


def reference_step(nets, x, y, d: Draws, path: str = "linear", lr: float = 1e-3):
    """The step of the paper and its published recipe on plain copies of the networks: no phases,
    no learners, everything as formulas. Returns terms, gradients, statistics and EMA."""
    vae, sit, disc = (copy.deepcopy(n) for n in (nets.vae, nets.sit, nets.disc))
    ema = {k: v.clone() for k, v in nets.ema.state_dict().items()}
    for net in (vae, sit, disc):
        net.requires_grad_(True)
    feats = nets.encoders[0](x)
    t = d.t[:, None, None, None]
    if path == "linear":
        alpha, sigma, d_alpha, d_sigma = 1 - t, t, -1, 1
    else:
        alpha, sigma = torch.cos(math.pi / 2 * t), torch.sin(math.pi / 2 * t)
        d_alpha, d_sigma = -math.pi / 2 * sigma, math.pi / 2 * alpha

    # VAE
    moments = vae.net.quant_conv(vae.net.encoder(x))
    mean, logvar = moments.chunk(2, dim=1)
    logvar = logvar.clamp(-30, 20)
    z = mean + torch.exp(0.5 * logvar) * d.posterior_noise
    x_hat = vae.net.decoder(vae.net.post_quant_conv(z))
    m, v = sit.bn.running_mean[:, None, None], sit.bn.running_var[:, None, None]
    x_t = alpha * (z - m) / (v + 1e-4).sqrt() + sigma * d.eps
    _, (h,) = sit.eval()(x_t, d.t, y, stop_at_align=True)
    terms = {
        "loss/vae/pixel": (x_hat - x).abs().mean(),
        "loss/vae/kl": 0.5 * (mean**2 + logvar.exp() - 1 - logvar).sum(dim=(1, 2, 3)).mean(),
        "loss/vae/gan": -disc.main(x_hat).mean(),
        "loss/vae/align": cosine_double_loop(h, feats),
    }
    total = terms["loss/vae/pixel"] + 1e-6 * terms["loss/vae/kl"]
    total = total + 0.1 * terms["loss/vae/gan"] + 1.5 * terms["loss/vae/align"]
    g_vae = dict(zip(dict(vae.named_parameters()), torch.autograd.grad(total, vae.parameters())))

    # discriminator
    real, fake = disc.main(x), disc.main(x_hat.detach())
    terms["loss/disc/hinge"] = 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())
    g_disc = torch.autograd.grad(terms["loss/disc/hinge"], disc.parameters())
    g_disc = dict(zip(dict(disc.named_parameters()), g_disc))

    # SiT
    z = z.detach()
    mean = z.mean(dim=(0, 2, 3))
    var = z.var(dim=(0, 2, 3), unbiased=False)
    z_n = (z - mean[:, None, None]) / (var[:, None, None] + 1e-4).sqrt()
    v_hat, (h,) = sit(alpha * z_n + sigma * d.eps, d.t, torch.where(d.drop_label, 10, y))
    target = d_alpha * z_n + d_sigma * d.eps
    terms["loss/sit/diffusion"] = ((v_hat - target) ** 2).mean()
    terms["loss/sit/align"] = cosine_double_loop(h, feats)
    total = terms["loss/sit/diffusion"] + 0.5 * terms["loss/sit/align"]
    g_sit = dict(zip(dict(sit.named_parameters()), torch.autograd.grad(total, sit.parameters())))
    count = z.numel() / z.shape[1]
    stats = (
        0.9 * sit.bn.running_mean + 0.1 * mean,
        0.9 * sit.bn.running_var + 0.1 * var * count / (count - 1),
    )

    # AdamW's first step is lr * g / (|g| + eps); the EMA follows it, and the statistics
    new = {k: p - lr * g_sit[k] / (g_sit[k].abs() + 1e-8) for k, p in sit.named_parameters()}
    new |= {"bn.running_mean": stats[0], "bn.running_var": stats[1]}
    ema |= {k: 0.9999 * ema[k] + 0.0001 * value for k, value in new.items()}
    ema["bn.num_batches_tracked"] += 1  # an integer: copied, not averaged
    return terms, {"vae": g_vae, "disc": g_disc, "sit": g_sit}, stats, ema


@pytest.mark.parametrize("path", ["linear", "cosine"])
def test_a_step_equals_the_step_written_out(path):
    """Loss terms to 1e-5, gradients before clipping to 1e-4 in norm, statistics and EMA to 1e-6."""
    config = tiny_config(*NO_CLIP, f"loss.diffusion.path={path}", "sit.class_dropout_prob=0.3")
    nets, _ = start(config)
    x, y, draws = batch(config)
    terms, gradients, stats, ema = reference_step(nets, x, y, draws, path)
    metrics = train_repae.train_step(nets, x, y, draws, config, 0)
    for name, value in terms.items():
        assert metrics[name].item() == pytest.approx(value.item(), rel=1e-5), name
    for name, expected in gradients.items():
        net = getattr(nets, name)
        assert relative(grads(net), expected) < 1e-4, name
        norm = math.sqrt(sum(g.double().square().sum() for g in expected.values()))
        assert metrics[f"grad_norm/{name}"].item() == pytest.approx(norm, rel=1e-4)
    assert torch.allclose(nets.sit.bn.running_mean, stats[0], atol=1e-6)
    assert torch.allclose(nets.sit.bn.running_var, stats[1], atol=1e-6)
    for name, value in nets.ema.state_dict().items():
        assert torch.allclose(value.float(), ema[name].float(), atol=1e-6), name


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
