"""Which loss may touch which network: the routing table of train_repae.py, cell by cell.

python -m pytest tests/test_routing.py
"""

import pytest
import torch

import train_repae
from loss.gan import LeCam
from models.checks.errors import UserError
from models.sit import SiT
from tests.tiny import batch, grads, start, tiny_config
from utils.training.trained_network import only_training

NO_CLIP = ("vae.optim.clip=0", "sit.optim.clip=0", "disc.optim.clip=0")
ONLY = {  # overrides that leave one term in the loss
    "pixel": ("loss.reg.kl=0", "loss.reg.gan=0", "loss.align.vae=0"),
    "kl": ("loss.reg.pixel=0", "loss.reg.gan=0", "loss.align.vae=0"),
    "gan": ("loss.reg.pixel=0", "loss.reg.kl=0", "loss.align.vae=0"),
    "align": ("loss.reg.pixel=0", "loss.reg.kl=0", "loss.reg.gan=0"),
}


def touched(net) -> bool:
    return any(g.abs().max() > 0 for g in grads(net).values())


@pytest.fixture(scope="module")
def record():
    """Gradients of every network at the end of each phase of one step, and what the phases saw."""
    config = tiny_config(*NO_CLIP)
    nets, _ = start(config)
    x, y, draws = batch(config)
    seen, phases = {}, ("vae_phase", "discriminator_phase", "sit_phase")
    watched = {"vae": nets.vae, "sit": nets.sit, "disc": nets.disc}
    originals = {name: getattr(train_repae, name) for name in phases}

    def spy(name):
        def phase(*args):
            for trained in nets.trained.values():
                trained.opt.zero_grad(set_to_none=True)
            before = {k: [p.clone() for p in n.parameters()] for k, n in watched.items()}
            metrics = originals[name](*args)
            moved = {
                k: any((p != q).any() for p, q in zip(n.parameters(), before[k]))
                for k, n in watched.items()
            }
            seen[name] = {"grads": {k: touched(n) for k, n in watched.items()}, "moved": moved}
            return metrics

        return phase

    with pytest.MonkeyPatch.context() as patch:
        for name in phases:
            patch.setattr(train_repae, name, spy(name))
        train_repae.train_step(nets, x, y, draws, config, 0)
    return seen


TABLE = [
    ("vae_phase", "vae", True),
    ("vae_phase", "sit", False),
    ("vae_phase", "disc", False),
    ("discriminator_phase", "vae", False),
    ("discriminator_phase", "sit", False),
    ("discriminator_phase", "disc", True),
    ("sit_phase", "vae", False),
    ("sit_phase", "sit", True),
    ("sit_phase", "disc", False),
]


@pytest.mark.parametrize(("phase", "net", "expected"), TABLE)
def test_only_the_named_network_gets_gradients_and_moves(record, phase, net, expected):
    assert record[phase]["grads"][net] is expected
    assert record[phase]["moved"][net] is expected


@pytest.mark.parametrize("term", ONLY)
def test_every_term_of_the_vae_phase_reaches_the_vae(term):
    """Each alone gives the VAE a gradient; KL only its encoder, the alignment only its encoder."""
    config = tiny_config(*NO_CLIP, *ONLY[term])
    nets, _ = start(config)
    train_repae.train_step(nets, *batch(config), config, 0)
    reached = {name for name, g in grads(nets.vae).items() if g.abs().max() > 0}
    assert any("encoder" in name for name in reached)
    assert any("decoder" in name for name in reached) is (term in ("pixel", "gan"))


def test_projectors_and_blocks_learn_from_diffusion_and_alignment():
    """L_REPA reaches blocks 1..depth and the projector; L_DIFF every block and the final layer."""
    config = tiny_config(*NO_CLIP)
    nets, _ = start(config)
    train_repae.train_step(nets, *batch(config), config, 0)
    reached = {name for name, g in grads(nets.sit).items() if g.abs().max() > 0}
    missing = {name for name, _ in nets.sit.named_parameters()} - reached
    assert missing == set()


def collect(nets: SiT, monkeypatch) -> list[dict]:
    """Everything the SiT was called with during a step."""
    calls = []
    forward = nets.sit.forward

    def spy(x_t, t, y, stop_at_align=False):
        seen = {"x_t": x_t, "t": t, "y": y, "stop": stop_at_align}
        calls.append(seen | {"training": nets.sit.training})
        return forward(x_t, t, y, stop_at_align)

    monkeypatch.setattr(nets.sit, "forward", spy)
    return calls


def test_phases_share_t_and_eps_but_not_the_statistics_or_the_labels(monkeypatch):
    config = tiny_config("sit.class_dropout_prob=0.5", "vae.optim.lr=0")
    nets, _ = start(config)
    calls = collect(nets, monkeypatch)
    running = [s.clone() for s in nets.sit.bn.stats()]
    x, y, draws = batch(config)
    with torch.no_grad():
        _, z, _ = nets.vae(x, draws.posterior_noise)
    train_repae.train_step(nets, x, y, draws, config, 0)
    vae_call, sit_call = calls
    t = draws.t[:, None, None, None]

    assert vae_call["stop"] and not vae_call["training"]
    assert torch.equal(vae_call["y"], y)
    z_running = (z - running[0][:, None, None]) / running[1][:, None, None]
    assert torch.allclose(vae_call["x_t"], (1 - t) * z_running + t * draws.eps, atol=1e-5)

    assert not sit_call["stop"] and sit_call["training"]
    assert torch.equal(sit_call["y"], torch.where(draws.drop_label, 10, y))
    mean, var = z.mean(dim=(0, 2, 3)), z.var(dim=(0, 2, 3), unbiased=False)
    z_batch = (z - mean[:, None, None]) / (var[:, None, None] + 1e-4).sqrt()
    assert torch.allclose(sit_call["x_t"], (1 - t) * z_batch + t * draws.eps, atol=1e-4)
    assert not sit_call["x_t"].requires_grad
    assert torch.equal(vae_call["t"], sit_call["t"])


def test_the_running_statistics_move_once_a_step_and_only_in_the_sit_phase():
    config = tiny_config("vae.optim.lr=0")
    nets, _ = start(config)
    x, y, draws = batch(config)
    before = nets.sit.bn.running_mean.clone()
    with torch.no_grad():
        _, z, _ = nets.vae(x, draws.posterior_noise)
    train_repae.train_step(nets, x, y, draws, config, 0)
    expected = 0.9 * before + 0.1 * z.mean(dim=(0, 2, 3))
    assert torch.allclose(nets.sit.bn.running_mean, expected, atol=1e-6)
    assert nets.sit.bn.num_batches_tracked == 1


def test_naive_end_to_end_lets_the_diffusion_loss_into_the_vae():
    only_diffusion = ("loss.reg.pixel=0", "loss.reg.kl=0", "loss.reg.gan=0", "loss.align.vae=0")
    config = tiny_config(*NO_CLIP, *only_diffusion, "loss.diffusion.to_vae=true")
    nets, _ = start(config)
    metrics = train_repae.train_step(nets, *batch(config), config, 0)
    assert "loss/vae/diffusion" in metrics
    encoder = {k: v for k, v in grads(nets.vae).items() if "encoder" in k}
    assert all(g.abs().max() > 0 for g in encoder.values())


def test_a_frozen_vae_never_moves_and_its_norm_is_fixed():
    """REPA: vae.train=false."""
    config = tiny_config("vae.weights=hub", "vae.train=false")
    nets, _ = start(config)
    before = {k: v.clone() for k, v in nets.vae.state_dict().items()}
    stats = [s.clone() for s in nets.sit.bn.stats()]
    metrics = train_repae.train_step(nets, *batch(config), config, 0)
    assert all(torch.equal(v, before[k]) for k, v in nets.vae.state_dict().items())
    assert all(torch.equal(a, b) for a, b in zip(nets.sit.bn.stats(), stats))
    assert nets.disc is None and set(nets.trained) == {"sit"}
    assert {k for k in metrics if k.startswith("loss/")} == {"loss/sit/diffusion", "loss/sit/align"}


def test_plain_sit_loads_no_encoder(monkeypatch):
    def refuse(*args):
        raise AssertionError("an encoder was loaded")

    monkeypatch.setattr("utils.training.networks.load_encoder", refuse)
    config = tiny_config("vae.weights=hub", "vae.train=false", "loss.align.sit=0")
    nets, _ = start(config)
    metrics = train_repae.train_step(nets, *batch(config), config, 0)
    assert len(nets.sit.projectors) == 0
    assert {k for k in metrics if k.startswith("loss/")} == {"loss/sit/diffusion"}


def test_without_latent_norm_the_starting_statistics_stay():
    config = tiny_config("latent_norm.enabled=false")
    nets, _ = start(config)
    before = [s.clone() for s in nets.sit.bn.stats()]
    train_repae.train_step(nets, *batch(config), config, 0)
    assert all(torch.equal(a, b) for a, b in zip(nets.sit.bn.stats(), before))


def test_without_gan_there_is_no_discriminator():
    config = tiny_config("loss.reg.gan=0")
    nets, _ = start(config)
    metrics = train_repae.train_step(nets, *batch(config), config, 0)
    assert nets.disc is None and not any("disc" in name or "gan" in name for name in metrics)


def test_the_gan_term_starts_at_its_step():
    config = tiny_config("loss.reg.gan_start=1")
    nets, _ = start(config)
    names = [train_repae.train_step(nets, *batch(config, s), config, s) for s in (0, 1)]
    assert ["loss/vae/gan" in m for m in names] == [False, True]
    assert all("loss/disc/hinge" in m for m in names)


def test_the_discriminator_trains_alone_first():
    """disc.pretrain_steps: nothing else moves, statistics and EMA included; then the joint step is
    that of a run without such a phase, its counters (warm-up, gan_start) beginning there."""
    more = ["disc.pretrain_steps=2", "loss.reg.gan_start=1"]
    more += [f"{net}.optim.warmup_steps=10" for net in ("sit", "disc")]
    config = tiny_config(*more)
    nets, _ = start(config)
    others = {"vae": nets.vae, "sit": nets.sit, "ema": nets.ema}
    before = {k: {n: v.clone() for n, v in net.state_dict().items()} for k, net in others.items()}
    for step in (0, 1):
        disc = [p.clone() for p in nets.disc.parameters()]
        metrics = train_repae.train_step(nets, *batch(config, step), config, step)
        assert {k for k in metrics if k.startswith("loss/")} == {"loss/disc/hinge"}
        assert any((p != q).any() for p, q in zip(nets.disc.parameters(), disc))
    for name, net in others.items():
        assert all(torch.equal(v, before[name][n]) for n, v in net.state_dict().items())
    joint = [train_repae.train_step(nets, *batch(config, s), config, s) for s in (2, 3)]
    assert ["loss/vae/gan" in m for m in joint] == [False, True]
    lrs = [nets.trained[name].opt.param_groups[0]["lr"] for name in ("sit", "disc")]
    assert lrs == pytest.approx([2 / 10 * 1e-3, 4 / 10 * 1e-4])  # the second counts all four steps


def test_a_lonely_discriminator_needs_one():
    with pytest.raises(UserError, match=r"disc.pretrain_steps=2, but no discriminator trains"):
        tiny_config("disc.pretrain_steps=2", "loss.reg.gan=0")
    with pytest.raises(UserError, match=r"disc.pretrain_steps=4 of run.steps=4 leave none"):
        tiny_config("disc.pretrain_steps=4")


def test_networks_are_frozen_outside_their_phase():
    nets, _ = start(tiny_config())
    assert not any(p.requires_grad for n in (nets.vae, nets.sit, nets.disc) for p in n.parameters())
    with only_training(nets.trained["vae"]):
        assert all(p.requires_grad for p in nets.vae.parameters())
        assert not any(p.requires_grad for p in nets.sit.parameters())
    assert not any(p.requires_grad for p in nets.vae.parameters())


def test_lecam_enters_the_discriminator_loss_only():
    config = tiny_config("loss.reg.lecam=0.1")
    nets, _ = start(config)
    metrics = train_repae.train_step(nets, *batch(config), config, 0)
    assert isinstance(nets.lecam, LeCam)
    assert [name for name in metrics if "lecam" in name] == ["loss/disc/lecam"]
