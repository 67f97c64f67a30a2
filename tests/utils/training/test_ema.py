"""The moving average against its formula, running statistics included."""

import pytest
import torch
import torch.nn as nn

from models.sit import SiT
from utils.training.ema import EmaUpdate, ema_decay, make_ema
from utils.training.trained_network import Shares


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def network():
    return nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 2))


def move(net):
    """What a training step does: other weights, other running statistics, one batch counted."""
    with torch.no_grad():
        for p in net.parameters():
            p.add_(torch.randn_like(p))
    net.train()(torch.randn(8, 4) + 1)


def snapshot(net):
    return {name: value.clone() for name, value in net.state_dict().items()}


def test_formula_over_three_steps_batch_norm_statistics_included():
    net, decay = network(), 0.9
    ema, expected = make_ema(net), snapshot(net)
    for _ in range(3):
        move(net)
        EmaUpdate(ema, net)(decay)
        for name, value in net.state_dict().items():
            if value.is_floating_point():
                expected[name] = decay * expected[name] + (1 - decay) * value
            else:
                expected[name] = value.clone()
    assert {"1.running_mean", "1.running_var", "1.num_batches_tracked"} <= set(expected)
    for name, value in ema.state_dict().items():
        assert torch.allclose(value, expected[name], rtol=1e-6, atol=1e-7), name
        if name.endswith("num_batches_tracked"):
            assert value == 3 and value.dtype == torch.int64


def test_the_tensors_are_listed_once_and_not_at_every_step(monkeypatch):
    """Walking two XL state dicts in every step costs milliseconds of the host."""
    net = network()
    ema = make_ema(net)
    update = EmaUpdate(ema, net)
    monkeypatch.setattr(nn.Module, "state_dict", None)
    move(net)
    update(0.5)
    monkeypatch.undo()
    assert not torch.equal(ema.state_dict()["0.weight"], net.state_dict()["0.weight"])
    update(0.0)
    assert torch.equal(ema.state_dict()["0.weight"], net.state_dict()["0.weight"])


def test_decay_of_the_published_runs_is_not_lost_in_rounding():
    """0.9999 in float32: ten steps towards a constant 1 from 0 give 1 - 0.9999^10."""
    net = nn.Linear(2, 2)
    ema = make_ema(net)
    for p, e in zip(net.parameters(), ema.parameters()):
        p.data.fill_(1.0)
        e.data.zero_()
    for _ in range(10):
        EmaUpdate(ema, net)(0.9999)
    assert ema.weight[0, 0].item() == pytest.approx(1 - 0.9999**10, rel=1e-5)


def test_decay_0_copies_bit_by_bit():
    net = network()
    ema = make_ema(net)
    move(net)
    EmaUpdate(ema, net)(0.0)
    for name, value in net.state_dict().items():
        assert torch.equal(ema.state_dict()[name], value), name


def test_the_network_itself_is_left_alone():
    net = network()
    ema = make_ema(net)
    move(net)
    before = snapshot(net)
    EmaUpdate(ema, net)(0.5)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_it_is_a_frozen_copy_in_eval_mode_that_shares_no_memory():
    net = network().train()
    ema = make_ema(net)
    assert not any(p.requires_grad for p in ema.parameters())
    assert not any(m.training for m in ema.modules())
    assert net.training and all(p.requires_grad for p in net.parameters())
    before = snapshot(ema)
    move(net)
    assert all(torch.equal(value, before[name]) for name, value in ema.state_dict().items())


def test_the_average_of_a_sit_holds_its_latent_norm_and_position_embedding():
    shape = {"hidden_size": 32, "depth": 1, "num_heads": 2, "align_depth": 1, "encoder_dims": (8,)}
    net = SiT(input_size=4, num_classes=2, projector_dim=8, **shape)
    ema = make_ema(net)
    z = 3 * torch.randn(16, 4, 4, 4) + 1
    net.train().normalize(z)
    EmaUpdate(ema, net)(0.75)
    assert torch.allclose(ema.bn.running_mean, 0.25 * net.bn.running_mean)
    assert torch.allclose(ema.bn.running_var, 0.75 + 0.25 * net.bn.running_var)
    assert ema.bn.num_batches_tracked == 1
    assert torch.allclose(ema.pos_embed, net.pos_embed)
    ema.normalize(z)
    assert ema.bn.num_batches_tracked == 1  # eval mode: only `EmaUpdate` moves it


@pytest.mark.parametrize("decay", [0.9999, 0.5])
def test_warm_up(decay):
    for step in (0, 1, 9, 100, 10**6):
        assert ema_decay(step, decay, warmup=False) == decay
        assert ema_decay(step, decay, warmup=True) == min(decay, (1 + step) / (10 + step))
    assert ema_decay(0, 0.9999, warmup=True) == 0.1
    assert ema_decay(10**6, 0.9999, warmup=True) == 0.9999


@pytest.mark.parametrize("decay", [0.0, 0.3, 0.9999])
def test_a_flag_on_the_device_leaves_the_average_as_it_is_or_changes_nothing(decay):
    """Bit by bit, integers too."""
    net = network()
    ema, plain = make_ema(net), make_ema(net)
    update, without = EmaUpdate(ema, net), EmaUpdate(plain, net)
    for left_out in (False, True, False):
        move(net)
        before = snapshot(ema)
        update(decay, torch.tensor(left_out))
        if not left_out:
            without(decay)
        expected = before if left_out else snapshot(plain)
        assert all(torch.equal(v, expected[name]) for name, v in snapshot(ema).items())


def test_a_rank_keeps_and_moves_its_share_of_the_average(monkeypatch):
    """Two copies play the ranks. What the other one owns has no memory but inside `whole`; buffers
    are on both; together they are the whole average, bit by bit."""
    net = network()
    shares = [Shares([*net.parameters()], rank, 2) for rank in range(2)]
    emas, plain = [make_ema(net), make_ema(net)], make_ema(net)
    updates = [EmaUpdate(ema, net, share) for ema, share in zip(emas, shares)]
    whole = EmaUpdate(plain, net)
    for decay in (0.9, 0.5):
        move(net)
        for update in (*updates, whole):
            update(decay)
    names = [name for name, _ in net.named_parameters()]
    for ema, share in zip(emas, shares):
        for name, value in ema.state_dict().items():
            if name in names and share.owners[names.index(name)] != share.rank:
                assert value.is_meta and value.shape == plain.state_dict()[name].shape
            else:
                assert torch.equal(value, plain.state_dict()[name])

    def exchange(share, tensors):
        for i, (tensor, owner) in enumerate(zip(tensors, share.owners)):
            tensor.copy_(emas[owner].get_parameter(names[i]))

    monkeypatch.setattr(Shares, "exchange", exchange)
    for ema, update in zip(emas, updates):
        with update.whole():
            assert [*ema.state_dict()] == [*plain.state_dict()]
            assert not any(p.requires_grad for p in ema.parameters())
            for name, value in ema.state_dict().items():
                assert torch.equal(value, plain.state_dict()[name])
        assert any(p.is_meta for p in ema.parameters())
