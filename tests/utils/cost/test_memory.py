"""The memory estimate: allocations of known networks, properties, and a true run beside it.

python -m pytest tests/utils/cost/test_memory.py        (CPU; fake tensors, no GPU needed)
"""

import pytest
import torch
from torch import nn

import train_repae
from models.checks.errors import UserError
from tests.tiny import start, tiny_config
from utils.checkpoint import contents_of
from utils.cost import memory
from utils.cost.counter import Counter
from utils.cost.fake_run import FakeRun
from utils.cost.memory import Estimate, checkpoint_bytes, estimate
from utils.training.networks import skeleton

FLOAT = 4  # bytes


def estimated(*overrides: str) -> Estimate:
    c = tiny_config(*overrides)
    return estimate(c, skeleton(c, 10), train_repae.train_step)


def per_image(found: Estimate) -> int:
    """Bytes of one image more in a large batch."""
    return found.peak(1001) - found.peak(1000)


@pytest.fixture(scope="module")
def plain() -> Estimate:
    return estimated()


def test_a_net_whose_saved_tensors_are_known():
    """Forward keeps what backward needs: ReLU its output, the layers their inputs."""
    n, wide = 5, 16
    net = nn.Sequential(nn.Linear(8, wide, bias=False), nn.ReLU(), nn.Linear(wide, 4, bias=False))
    x = torch.zeros(n, 8)
    with Counter(old=[x, *net.parameters()]) as live:
        out = net(x)
        assert live.alive == FLOAT * (n * wide + n * 4)  # ReLU's output and `out`; `x` was there
        out.sum().backward()
        del out
        gradients = FLOAT * (8 * wide + wide * 4)
        assert live.alive == gradients
    # at the end of backward: both gradients, and the hidden layer's on its way down
    assert max(live.curve) >= gradients + FLOAT * n * wide
    net[0].weight.grad = net[2].weight.grad = None
    assert live.alive == 0


def test_a_storage_counts_once_and_until_its_last_view_is_gone():
    with Counter() as live:
        x = torch.zeros(100)
        views = [x[:50], x.view(10, 10), x.detach()]
        assert live.alive == 100 * FLOAT
        del x
        assert live.alive == 100 * FLOAT
        views.clear()
        assert live.alive == 0


@pytest.mark.slow
def test_any_batch_follows_from_two_small_ones(monkeypatch):
    """Extrapolated from 2 and 3 images, 8 need what 8 tried out need, to the byte. In bf16, where
    copies of the weights do not grow with the batch."""
    expected = estimated("run.precision=bf16").peak(8)
    monkeypatch.setattr(memory, "PROBES", (8, 9))
    assert estimated("run.precision=bf16").peak(8) == expected


def test_twice_the_images_need_twice_the_activations(plain):
    twice, once = plain.peak(4000) - plain.peak(2000), plain.peak(2000) - plain.peak(1000)
    assert twice == 2 * once > 0


LESS = {
    "run.checkpointing=both": 0.8,
    "vae.train=false vae.weights=hub": 0.3,
    "run.precision=bf16": 0.85,
    "data.resolution=8 encoder.grid=2 disc.layers=1": 0.3,
}


@pytest.mark.slow
@pytest.mark.parametrize("change", LESS)
def test_what_lowers_the_memory_of_an_image(change, plain):
    assert 0 < per_image(estimated(*change.split())) < LESS[change] * per_image(plain)


@pytest.mark.slow
def test_checkpointing_keeps_a_blocks_input_and_computes_one_block_again():
    """Each block more costs its input alone; what is inside one of them comes on top, once."""
    wide = ("vae.train=false", "vae.weights=hub", "sit.hidden_size=256", "loss.align.sit=0")
    plain, again = (
        [per_image(estimated(*wide, "loss.align.vae=0", f"sit.depth={n}", flag)) for n in (4, 6)]
        for flag in ("run.accumulation=1", "run.checkpointing=both")
    )
    tokens = FLOAT * 16 * 256  # 4 x 4 tokens of width 256
    assert again[1] - again[0] == 2 * tokens
    assert plain[1] - plain[0] > 10 * 2 * tokens
    assert again[0] > 10 * tokens


def test_micro_batches_need_less_but_all_images_wait(plain):
    sizes = [plain.peak(1024, k) for k in (1, 2, 4, 8)]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[1] == plain.peak(512) + 512 * plain.waiting


def test_the_fewest_micro_batches_that_fit(plain):
    limit = plain.peak(96, 4) + memory.RESERVE
    assert plain.accumulation_that_fits(96, limit) == 4
    assert plain.accumulation_that_fits(96, limit - 1) == 6  # 5 does not divide 96
    assert plain.accumulation_that_fits(96, 10**12) == 1
    assert plain.accumulation_that_fits(96, memory.RESERVE) is None


@pytest.fixture(scope="module")
def real():
    """A true run's networks on the CPU, with gradients and moments."""
    config = tiny_config("loss.reg.lecam=0.1")
    nets, _ = start(config)
    for trained in nets.trained.values():
        for p in trained.params:
            p.grad = torch.zeros_like(p)
        trained.opt.step()
    return config, nets


def test_what_is_resident_is_what_a_true_run_holds(real):
    _, nets = real
    found = estimated("loss.reg.lecam=0.1")
    networks = (nets.vae, nets.sit, nets.ema, nets.disc, nets.lecam, *nets.encoders)
    tensors = [t for net in networks for t in (*net.parameters(), *net.buffers())]
    for trained in nets.trained.values():
        tensors += [p.grad for p in trained.params]
        states = trained.opt.state.values()
        tensors += [t for s in states for name, t in s.items() if name != "step"]
    held = sum(t.numel() * t.element_size() for t in {id(t): t for t in tensors}.values())
    assert sum(found.resident.values()) == held


def test_shared_optimizers_keep_a_share_of_the_moments_and_the_ema():
    c = tiny_config("run.shard_optimizer=true")
    whole, shared = (FakeRun(c, skeleton(c, 10), ranks).resident for ranks in (1, 8))
    for name in ("EMA", "Adam"):
        assert shared[name] == whole[name] // 8
    assert shared["weights"] == whole["weights"] and shared["gradients"] == whole["gradients"]


EVERY_KIND = [
    "loss.diffusion.vae=1 disc.norm=group loss.reg.gan_start=100 loss.reg.lpips=1",
    "encoder.names=[timm:test_resnet/16,timm:test_vit] encoder.weights=[random,random] "
    "sit.projector=conv loss.align.spatial_norm=0.6 sit.qk_norm=true",
    pytest.param(
        "vae.name=tiny-qwen encoder.grid=1 run.checkpointing=both run.precision=fp16",
        marks=pytest.mark.slow,
    ),
    "run.compile=true run.channels_last=true run.accumulation=4 loss.reg.gan=0",
]


@pytest.mark.slow
@pytest.mark.parametrize("change", EVERY_KIND)
def test_every_kind_of_run_has_an_estimate(change):
    found = estimated(*change.split())
    assert per_image(found) > 0 and all(size > 0 for size in found.resident.values())


def test_a_checkpoint_is_weights_ema_and_two_moments(real, tmp_path):
    config, nets = real
    contents_of(nets).write(tmp_path)
    written = sum(f.stat().st_size for f in tmp_path.rglob("*") if f.is_file())
    assert checkpoint_bytes(nets, config) == pytest.approx(written, rel=0.05)


def test_shapes_that_do_not_meet_are_the_users_mistake():
    c = tiny_config("encoder.grid=2")
    with pytest.raises(UserError, match=r"set encoder\.grid=4"):
        skeleton(c, 10)
