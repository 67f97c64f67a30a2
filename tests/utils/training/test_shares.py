"""Tensors shared out over ranks, without processes: copies of a network play the ranks.

tests/test_ddp.py has the same over two processes.
"""

import pytest
import torch
import torch.nn as nn

from utils.training import trained_network
from utils.training.trained_network import Shares, deal, share_out

SHAPES = [(7, 5), (3,), (1, 1), (64, 3), (5, 4, 3, 3), (11,), (2, 2), (8, 8)]


@pytest.mark.parametrize("ranks", [1, 2, 3, 8, 20])
def test_every_tensor_has_one_owner_and_the_shares_are_fair(ranks):
    """None has more than an even share and one largest tensor; more ranks than tensors leave some
    without any."""
    sizes = [torch.Size(s).numel() for s in SHAPES]
    owners = deal(sizes, ranks)
    totals = [sum(n for n, o in zip(sizes, owners) if o == rank) for rank in range(ranks)]
    assert len(owners) == len(sizes) and sum(totals) == sum(sizes)
    assert max(totals) <= sum(sizes) / ranks + max(sizes)
    everything = [i for rank in range(ranks) for i in shares_of(rank, ranks).own]
    assert sorted(everything) == list(range(len(sizes)))


def test_the_flagship_is_shared_within_a_hundredth():
    """SiT-XL: blocks of (1152 x 6912, 1152 x 4608 twice, 1152 x 3456, 1152 x 1152), 28 times."""
    sizes = [1152 * n for n in (6912, 4608, 4608, 3456, 1152, 6, 4, 4, 3, 1)] * 28
    owners = deal(sizes, 8)
    totals = [sum(n for n, o in zip(sizes, owners) if o == rank) for rank in range(8)]
    assert max(totals) < 1.01 * sum(sizes) / 8


def shares_of(rank: int, ranks: int, tensors=None) -> Shares:
    return Shares(tensors or [torch.zeros(shape) for shape in SHAPES], rank, ranks)


def adamw(params):
    return torch.optim.AdamW(params, lr=0.1, weight_decay=0.1, fused=True)


def network():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4), nn.Conv2d(4, 3, 1))
    return net.to(memory_format=torch.channels_last)


def give_gradients(nets, step: int) -> None:
    for net in nets:
        g = torch.Generator().manual_seed(step)
        for p in net.parameters():
            p.grad = torch.randn(p.shape, generator=g).contiguous(
                memory_format=torch.channels_last if p.dim() == 4 else torch.contiguous_format
            )


@pytest.mark.parametrize("ranks", [2, 3, 7])
def test_shares_put_together_are_bit_for_bit_the_whole_update(ranks):
    """Weights and moments over three steps, with more ranks than tensors too."""
    whole, copies = network(), [network() for _ in range(ranks)]
    opt = adamw(whole.parameters())
    shares = [Shares([*net.parameters()], rank, ranks) for rank, net in enumerate(copies)]
    opts = [adamw(net.parameters()) for net in copies]
    for step in range(3):
        give_gradients([whole, *copies], step)
        opt.step()
        for share, o in zip(shares, opts):
            with share.own_gradients():
                o.step()
            assert all(p.grad is not None for p in share.params)
        for share in shares:  # what `exchange` does between processes
            for i in share.own:
                for other in shares:
                    other.params[i].data.copy_(share.params[i].data)
    for net in copies:
        assert all(torch.equal(p, q) for p, q in zip(net.parameters(), whole.parameters()))
    state = opt.state_dict()["state"]
    parts = [o.state_dict()["state"] for o in opts]
    assert [sorted(part) for part in parts] == [share.own for share in shares]
    for i, moments in {i: m for part in parts for i, m in part.items()}.items():
        assert all(torch.equal(moments[name], state[i][name]) for name in state[i])


def test_own_state_is_what_a_rank_goes_on_from():
    net = network()
    opt = adamw(net.parameters())
    give_gradients([net], 0)
    opt.step()
    state, share = opt.state_dict(), Shares([*net.parameters()], 1, 2)
    own = share.own_state(state)
    assert sorted(own["state"]) == share.own and own["param_groups"] == state["param_groups"]
    assert sorted(state["state"]) == list(range(len(share.params)))
    assert share.own_state(opt.__class__(network().parameters()).state_dict())["state"] == {}


def test_buckets_hold_all_memory_once_by_owner_and_by_type(monkeypatch):
    """In any memory format; a bucket is full unless the next tensor would not fit."""
    monkeypatch.setattr(trained_network, "BUCKET", 400)
    tensors = [torch.randn(shape) for shape in SHAPES]
    tensors[4] = tensors[4].contiguous(memory_format=torch.channels_last)
    tensors += [torch.randn(5).double(), torch.randn(6)]
    share = Shares(tensors, 0, 2)
    buckets = list(share._buckets(tensors))
    assert all(len({t.dtype for t in bucket}) == 1 for _, bucket in buckets)
    assert all(len(b) == 1 or sum(t.nbytes for t in b) <= 400 for _, b in buckets)
    memory = {t.data_ptr(): owner for owner, bucket in buckets for t in bucket}
    assert memory == {t.data_ptr(): owner for t, owner in zip(tensors, share.owners)}
    for _, bucket in buckets:
        for vector in bucket:
            vector.fill_(3.0)
    assert all((t == 3).all() for t in tensors)
    assert len(buckets) < len(tensors)


def test_a_single_process_shares_nothing():
    assert share_out([*network().parameters()]) is None


def test_gradients_come_back_although_the_optimizer_fails():
    net = network()
    give_gradients([net], 0)
    share = Shares([*net.parameters()], 0, 2)

    def fail():
        assert sum(p.grad is None for p in net.parameters()) == len(share.others) > 0
        raise OSError

    with pytest.raises(OSError), share.own_gradients():
        fail()
    assert all(p.grad is not None for p in net.parameters())
