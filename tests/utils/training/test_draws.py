"""The random numbers of a step: which keys give which streams, and what is drawn from them."""

from dataclasses import fields, replace
from itertools import product

import pytest
import torch

from utils.random import generator
from utils.training.draws import Draws, draw

SHAPE = (4, 2, 3, 3)
NAMES = [f.name for f in fields(Draws)]


def drawn(shape=SHAPE, *, dropout=0.1, seed=0, step=0, hflip=True, **settings):
    settings |= {"seed": seed, "step": step, "hflip": hflip, "class_dropout_prob": dropout}
    return draw(shape, **settings)


def equal(a, b, names=NAMES):
    return all(torch.equal(getattr(a, n), getattr(b, n)) for n in names)


def test_streams_of_different_seed_step_or_rank_share_no_number():
    """Also where a sum or product of the three would collide."""
    keys = list(product((0, 1, 2, 12), (0, 1, 2, 399_999), (0, 1, 2, 7)))
    seen = {name: set() for name in ("posterior_noise", "t", "eps")}
    for seed, step, rank in keys:
        draws = drawn(seed=seed, step=step, rank=rank)
        for name, values in seen.items():
            values.update(getattr(draws, name).double().flatten().tolist())
    # float32 t has 2^24 values: among 256 of them a chance collision is unlikely, not impossible
    assert len(seen["posterior_noise"]) > 0.999 * len(keys) * 72
    assert len(seen["eps"]) > 0.999 * len(keys) * 72
    assert len(seen["t"]) >= len(keys) * 4 - 1
    assert len(seen["eps"] & seen["posterior_noise"]) < 0.001 * len(keys) * 72


def test_the_same_key_draws_the_same_whatever_was_drawn_before():
    """Nothing to save: a resumed run draws what an uninterrupted one would."""
    first = drawn(seed=3, step=5, rank=1)
    torch.manual_seed(99)
    drawn(seed=3, step=6, rank=1)
    torch.randn(7)
    assert equal(first, drawn(seed=3, step=5, rank=1))


def test_drawing_leaves_the_global_generator_alone():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    drawn()
    assert torch.equal(torch.get_rng_state(), before)


def test_switches_change_only_what_they_switch():
    base = drawn((64, 2, 3, 3))
    unflipped = drawn((64, 2, 3, 3), hflip=False)
    assert equal(base, unflipped, [n for n in NAMES if n != "flip"])
    kept = drawn((64, 2, 3, 3), dropout=0.0)
    assert equal(base, kept, [n for n in NAMES if n != "drop_label"])


def test_shapes_and_types():
    draws = drawn()
    assert draws.flip.shape == draws.t.shape == draws.drop_label.shape == (4,)
    assert draws.posterior_noise.shape == draws.eps.shape == SHAPE
    assert draws.flip.dtype == draws.drop_label.dtype == torch.bool
    assert draws.t.dtype == draws.eps.dtype == draws.posterior_noise.dtype == torch.float32


@pytest.mark.parametrize("parts", [1, 2, 4, 8])
def test_split_gives_micro_batches_in_order(parts):
    draws = drawn((8, 2, 3, 3))
    chunks = draws.split(parts)
    assert len(chunks) == parts
    for name in NAMES:
        pieces = [getattr(chunk, name) for chunk in chunks]
        assert all(len(piece) == 8 // parts for piece in pieces)
        assert torch.equal(torch.cat(pieces), getattr(draws, name))


def test_a_check_can_hand_in_its_own():
    t = torch.full((4,), 0.5)
    assert torch.equal(replace(drawn(), t=t).split(2)[1].t, t[2:])


def rate(flags, p):
    """Within five standard deviations of `p`."""
    return abs(flags.double().mean().item() - p) < 5 * (p * (1 - p) / len(flags)) ** 0.5


def test_flip_and_label_drop_rates():
    many = drawn((20_000, 1, 1, 1), dropout=0.1)
    assert rate(many.flip, 0.5) and rate(many.drop_label, 0.1)
    assert rate(many.drop_label[many.flip], 0.1)  # independently of each other
    assert not drawn((1000, 1, 1, 1), hflip=False).flip.any()
    assert not drawn((1000, 1, 1, 1), dropout=0.0).drop_label.any()
    assert drawn((1000, 1, 1, 1), dropout=1.0).drop_label.all()


def largest_gap(sample, cdf):
    """Kolmogorov-Smirnov distance of a sample from a distribution; 1.95 / sqrt(n) is p = 0.001."""
    values = sample.double().sort().values
    ranks = torch.arange(1, len(values) + 1) / len(values)
    return (cdf(values) - ranks).abs().max().item() * len(values) ** 0.5


def normal_cdf(x):
    return torch.special.ndtr(x)


def test_uniform_times():
    t = drawn((20_000, 1, 1, 1)).t
    assert ((t >= 0) & (t < 1)).all()
    assert largest_gap(t, lambda v: v) < 1.95


@pytest.mark.parametrize("path", ["linear", "cosine"])
def test_lognormal_times(path):
    """log(noise / data) is a standard normal: t / (1 - t) linear, tan(pi t / 2) cosine."""
    t = drawn((20_000, 1, 1, 1), time="lognormal", path=path).t.double()
    ratio = t / (1 - t) if path == "linear" else (torch.pi / 2 * t).tan()
    assert largest_gap(ratio.log(), normal_cdf) < 1.95
    assert largest_gap(t, lambda v: v) > 1.95  # and not uniform


def test_noises_are_standard_normal_and_independent():
    draws = drawn((1000, 4, 2, 2))
    for noise in (draws.eps, draws.posterior_noise):
        assert largest_gap(noise.flatten(), normal_cdf) < 1.95
    correlation = (draws.eps * draws.posterior_noise).mean().item()
    assert abs(correlation) < 5 / 16_000**0.5


def test_generators_of_different_keys_differ():
    keys = [(0,), (1,), ("a", 1), ("a", 2), ("b", 1), ("a", 1, 0), ("a", 11), ("a1", 1), (-1,)]
    seeds = {generator(*key).initial_seed() for key in keys}
    assert len(seeds) == len(keys)
    assert generator("a", 1).initial_seed() == generator("a", 1).initial_seed()
