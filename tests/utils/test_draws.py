"""The random numbers of a step: which keys give which streams, and what is drawn from them."""

from dataclasses import fields, replace
from itertools import product

import pytest
import torch

from utils.config import Config
from utils.draws import Draws, draw, generator

SHAPE = (4, 2, 3, 3)
CPU = torch.device("cpu")
NAMES = [f.name for f in fields(Draws)]


def config(seed=0, hflip=True, dropout=0.1, time="uniform", path="linear"):
    c = Config()
    c.run.seed, c.data.hflip, c.sit.class_dropout_prob = seed, hflip, dropout
    c.loss.diffusion.time, c.loss.diffusion.path = time, path
    return c


def equal(a, b, names=NAMES):
    return all(torch.equal(getattr(a, n), getattr(b, n)) for n in names)


def test_streams_of_different_seed_step_or_rank_share_no_number():
    """Also where a sum or product of the three would collide (users.md, B2.24)."""
    keys = list(product((0, 1, 2, 12), (0, 1, 2, 399_999), (0, 1, 2, 7)))
    seen = {name: set() for name in ("posterior_noise", "t", "eps")}
    for seed, step, rank in keys:
        draws = draw(config(seed), step, rank, SHAPE, CPU)
        for name, values in seen.items():
            values.update(getattr(draws, name).double().flatten().tolist())
    # float32 t has 2^24 values: among 256 of them a chance collision is unlikely, not impossible
    assert len(seen["posterior_noise"]) > 0.999 * len(keys) * 72
    assert len(seen["eps"]) > 0.999 * len(keys) * 72
    assert len(seen["t"]) >= len(keys) * 4 - 1
    assert len(seen["eps"] & seen["posterior_noise"]) < 0.001 * len(keys) * 72


def test_the_same_key_draws_the_same_whatever_was_drawn_before():
    """Nothing to save: a resumed run draws what an uninterrupted one would."""
    first = draw(config(3), 5, 1, SHAPE, CPU)
    torch.manual_seed(99)
    draw(config(3), 6, 1, SHAPE, CPU)
    torch.randn(7)
    assert equal(first, draw(config(3), 5, 1, SHAPE, CPU))


def test_drawing_leaves_the_global_generator_alone():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    draw(config(), 0, 0, SHAPE, CPU)
    assert torch.equal(torch.get_rng_state(), before)


def test_switches_change_only_what_they_switch():
    base = draw(config(), 0, 0, (64, 2, 3, 3), CPU)
    unflipped = draw(config(hflip=False), 0, 0, (64, 2, 3, 3), CPU)
    assert equal(base, unflipped, [n for n in NAMES if n != "flip"])
    kept = draw(config(dropout=0.0), 0, 0, (64, 2, 3, 3), CPU)
    assert equal(base, kept, [n for n in NAMES if n != "drop_label"])


def test_shapes_and_types():
    draws = draw(config(), 0, 0, SHAPE, CPU)
    assert draws.flip.shape == draws.t.shape == draws.drop_label.shape == (4,)
    assert draws.posterior_noise.shape == draws.eps.shape == SHAPE
    assert draws.flip.dtype == draws.drop_label.dtype == torch.bool
    assert draws.t.dtype == draws.eps.dtype == draws.posterior_noise.dtype == torch.float32


@pytest.mark.parametrize("parts", [1, 2, 4, 8])
def test_split_gives_micro_batches_in_order(parts):
    draws = draw(config(), 0, 0, (8, 2, 3, 3), CPU)
    chunks = draws.split(parts)
    assert len(chunks) == parts
    for name in NAMES:
        pieces = [getattr(chunk, name) for chunk in chunks]
        assert all(len(piece) == 8 // parts for piece in pieces)
        assert torch.equal(torch.cat(pieces), getattr(draws, name))


def test_a_check_can_hand_in_its_own():
    t = torch.full((4,), 0.5)
    assert torch.equal(replace(draw(config(), 0, 0, SHAPE, CPU), t=t).split(2)[1].t, t[2:])


def rate(flags, p):
    """Within five standard deviations of `p`."""
    return abs(flags.double().mean().item() - p) < 5 * (p * (1 - p) / len(flags)) ** 0.5


def test_flip_and_label_drop_rates():
    many = draw(config(dropout=0.1), 0, 0, (20_000, 1, 1, 1), CPU)
    assert rate(many.flip, 0.5) and rate(many.drop_label, 0.1)
    assert rate(many.drop_label[many.flip], 0.1)  # independently of each other
    assert not draw(config(hflip=False), 0, 0, (1000, 1, 1, 1), CPU).flip.any()
    assert not draw(config(dropout=0.0), 0, 0, (1000, 1, 1, 1), CPU).drop_label.any()
    assert draw(config(dropout=1.0), 0, 0, (1000, 1, 1, 1), CPU).drop_label.all()


def largest_gap(sample, cdf):
    """Kolmogorov-Smirnov distance of a sample from a distribution; 1.95 / sqrt(n) is p = 0.001."""
    values = sample.double().sort().values
    ranks = torch.arange(1, len(values) + 1) / len(values)
    return (cdf(values) - ranks).abs().max().item() * len(values) ** 0.5


def normal_cdf(x):
    return torch.special.ndtr(x)


def test_uniform_times():
    t = draw(config(), 0, 0, (20_000, 1, 1, 1), CPU).t
    assert ((t >= 0) & (t < 1)).all()
    assert largest_gap(t, lambda v: v) < 1.95


@pytest.mark.parametrize("path", ["linear", "cosine"])
def test_lognormal_times(path):
    """log(noise / data) is a standard normal: t / (1 - t) linear, tan(pi t / 2) cosine."""
    t = draw(config(time="lognormal", path=path), 0, 0, (20_000, 1, 1, 1), CPU).t.double()
    ratio = t / (1 - t) if path == "linear" else (torch.pi / 2 * t).tan()
    assert largest_gap(ratio.log(), normal_cdf) < 1.95
    assert largest_gap(t, lambda v: v) > 1.95  # and not uniform


def test_noises_are_standard_normal_and_independent():
    draws = draw(config(), 0, 0, (1000, 4, 2, 2), CPU)
    for noise in (draws.eps, draws.posterior_noise):
        assert largest_gap(noise.flatten(), normal_cdf) < 1.95
    correlation = (draws.eps * draws.posterior_noise).mean().item()
    assert abs(correlation) < 5 / 16_000**0.5


def test_generators_of_different_keys_differ():
    keys = [(0,), (1,), ("a", 1), ("a", 2), ("b", 1), ("a", 1, 0), ("a", 11), ("a1", 1), (-1,)]
    seeds = {generator(*key).initial_seed() for key in keys}
    assert len(seeds) == len(keys)
    assert generator("a", 1).initial_seed() == generator("a", 1).initial_seed()
