"""Standard errors: by their definition, against the spread over draws, in records; KID."""

import numpy as np
import pytest
import torch
from torch_fidelity.metric_kid import kid_features_to_metric

from tests.random_inception import textures
from tests.utils.evaluation.toy_network import toy_net
from utils.distributed import Ranks
from utils.evaluation.evaluate import evaluate
from utils.evaluation.formulas.frechet import Statistics, frechet_between
from utils.evaluation.formulas.scores import (
    inception_score,
    inception_score_without,
    kid_of_subsets,
)
from utils.evaluation.formulas.uncertainty import (
    GROUPS,
    frechet_error,
    group_of,
    jackknife,
    share_error,
    without_group,
)
from utils.evaluation.options import Options
from utils.evaluation.report import format_table, with_error

ALONE = Ranks(distributed=False)


@pytest.fixture
def rng():
    return np.random.Generator(np.random.PCG64(0))


def statistics(x: np.ndarray, groups: int = 0, rows: bool = False) -> Statistics:
    result = Statistics(len(x), x.mean(0), np.cov(x, rowvar=False), x if rows else None)
    parts = [x[group_of(len(x), groups) == i] for i in range(groups)]
    result.groups = [statistics(part) for part in parts]
    return result


def test_the_jackknife_of_a_mean_is_its_standard_error(rng):
    x = rng.standard_normal(GROUPS) * 3 + 5
    without = [np.delete(x, i).mean() for i in range(GROUPS)]
    assert jackknife(without) == pytest.approx(x.std(ddof=1) / np.sqrt(GROUPS))


@pytest.mark.parametrize("rows", [False, True])
def test_moments_without_a_group_are_those_of_the_other_images(rng, rows):
    x = rng.standard_normal((100, 5)) * 3 + 7
    found = without_group(statistics(x, GROUPS, rows), 4)
    expected = statistics(x[group_of(100) != 4])
    assert found.n == expected.n
    np.testing.assert_allclose(found.mean, expected.mean, rtol=1e-12)
    np.testing.assert_allclose(found.cov, expected.cov, rtol=1e-10, atol=1e-12)
    assert rows == (found.rows is not None and len(found.rows) == found.n)


@pytest.mark.parametrize("in_turn", [False, True])
def test_the_standard_error_of_a_distance_is_the_spread_over_draws(rng, in_turn):
    """Classes at random or in turn, which moves a distance less: 1 to 1.41 times the spread."""
    centres = rng.standard_normal((10, 6)) * 2

    def draw(n):
        y = np.arange(n) % 10 if in_turn else rng.integers(0, 10, n)
        return centres[y] + rng.standard_normal((n, 6)) + 0.3

    reference = statistics(draw(20_000) - 0.3)
    sets = [statistics(draw(1000), GROUPS) for _ in range(60)]
    spread = np.std([frechet_between(reference, each) for each in sets])
    errors = [frechet_error(reference, each) for each in sets]
    assert 0.8 < np.mean(errors) / spread < 1.6
    assert np.std(errors) < 0.4 * np.mean(errors)


def test_the_inception_score_without_a_group_is_that_of_the_other_images(rng):
    """Of the same splits: 26 images a split lose 2 to each group."""
    pool, weight = rng.standard_normal((52, 6)), rng.standard_normal((4, 6))
    found = inception_score_without(pool, weight, split_size=26)
    for i in range(GROUPS):
        expected, _ = inception_score(pool[group_of(52) != i], weight, split_size=24)
        assert found[i] == pytest.approx(expected, rel=1e-6)
    # a split of one image is gone without its group
    assert np.isfinite(inception_score_without(pool[:27], weight, split_size=26)).all()


def test_kid_is_that_of_torch_fidelity(rng):
    x, y = (np.float32(rng.gamma(0.7, 0.6, (n, 32))) for n in (150, 90))
    expected = kid_features_to_metric(
        torch.from_numpy(x).double(), torch.from_numpy(y).double(),
        kid_subsets=7, kid_subset_size=40, rng_seed=2020, verbose=False,
    )  # fmt: skip
    values, _ = kid_of_subsets(
        torch.from_numpy(x), torch.from_numpy(y), subsets=7, size=40, seed=2020
    )
    assert values.mean() == pytest.approx(expected["kernel_inception_distance_mean"], rel=1e-9)
    assert values.std() == pytest.approx(expected["kernel_inception_distance_std"], rel=1e-9)


def test_kid_without_a_group_is_that_of_the_other_images(rng):
    x, y = (torch.from_numpy(rng.standard_normal((40, 5))) for _ in range(2))
    _, without = kid_of_subsets(x, y, subsets=1, size=40, seed=0)

    def mean(a, b, same):
        k = (a @ b.T / 5 + 1) ** 3
        return ((k.sum() - k.trace()) / (len(a) * (len(a) - 1)) if same else k.mean()).item()

    for i in range(GROUPS):
        left = x[torch.from_numpy(group_of(40) != i)]
        expected = mean(left, left, True) + mean(y, y, True) - 2 * mean(left, y, False)
        assert without[i] == pytest.approx(expected)


def test_kid_in_a_record_says_how_many_subsets_it_has():
    real, fake = textures(40, 1, 16), textures(30, 2, 16)
    options = Options(metrics=("kid",), cache=None)
    record = evaluate(fake, real, options, net=toy_net(published=True), ranks=ALONE)
    assert list(record["metrics"]) == ["KID@30"]
    protocol = record["protocol"]["kid"]
    assert (protocol["subsets"], protocol["subset_size"]) == (100, 30)
    assert any("subsets of 30 images" in text for text in record["warnings"])
    same = evaluate(real, real, options, net=toy_net(), ranks=ALONE)
    assert same["protocol"]["kid"]["subsets"] == 1
    assert same["metrics"]["KD[toy]"] <= 0  # unbiased, and so below zero for equal sets


def test_every_number_of_a_record_has_its_standard_error_if_asked_for():
    real, fake, net = textures(60, 1, 16), textures(52, 2, 16), toy_net()
    metrics = ("fid", "sfid", "is", "precision", "recall", "kid")
    plain = evaluate(fake, real, Options(metrics=metrics, cache=None), net=net, ranks=ALONE)
    options = Options(metrics=metrics, cache=None, uncertainty=True, batch_size=7)
    record = evaluate(fake, real, options, net=net, ranks=ALONE)
    assert record["metrics"] == pytest.approx(plain["metrics"], rel=1e-9)
    for name, value in record["metrics"].items():
        detail = record["details"][name]
        assert 0 < detail["standard_error"] < max(abs(value), 1)
        assert detail["uncertainty"]
        assert with_error(value, detail["standard_error"]).split(" ")[-1] in format_table(record)
    few = evaluate(fake[:25], real, options, net=net, ranks=ALONE)
    assert not any("standard_error" in detail for detail in few["details"].values())
    assert "at least 26 images" in "".join(few["warnings"])


def test_numbers_are_printed_to_the_digits_of_their_error():
    assert with_error(3.94256, 0.0213) == "3.943 ± 0.021"
    assert with_error(-0.000123, 0.00025) == "-0.00012 ± 0.00025"
    assert with_error(215.83, 12.3) == "216 ± 12"
    assert with_error(0.5, None) == with_error(0.5, 0.0) == "0.5000"


def test_no_share_is_certain():
    assert share_error(0.5, 10_000) == pytest.approx(0.005, rel=1e-3)
    assert share_error(0, 100) == pytest.approx(share_error(1, 100)) == pytest.approx(0.0135, 0.01)
