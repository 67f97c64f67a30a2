"""What a chart shows of its points: extremes are kept, outliers do not set the range, gaps stay.

python -m pytest tests/utils/report/test_scales.py
"""

import math

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from utils.report import charts
from utils.report.catalog import kind_of
from utils.report.markup import figure
from utils.report.scales import BUCKETS, Point, fit_axis, short, smoothed, split, thin, ticks

NUMBERS = st.floats(-1e9, 1e9)


def test_a_hundred_thousand_points_become_few_and_keep_their_extremes():
    points: list[Point] = [(s, s * 7919 % 1000 / 1000) for s in range(100_000)]
    points[33_333], points[77_777], points[50_000] = (33_333, 99.0), (77_777, -99.0), (50_000, None)
    kept = thin(points)
    assert len(kept) <= 5 * BUCKETS and kept == sorted(kept, key=lambda point: point[0])
    assert {points[i] for i in (0, 33_333, 50_000, 77_777, 99_999)} <= set(kept)
    assert set(kept) <= set(points)


def test_one_spike_does_not_flatten_the_rest_and_is_counted():
    values = [1 + 0.1 * math.sin(i) for i in range(200)]
    axis = fit_axis([*values, 1e6])
    assert axis.high < 3 and axis.outside == 1 and not axis.log
    assert fit_axis([1.0, 2.0, 1e6]).outside == 0  # too few to call one an outlier


def test_decades_have_a_logarithmic_axis_and_few_multiples_none():
    assert fit_axis([10.0**i for i in range(6)]).log
    assert not fit_axis([1.0, 5.0, 9.0]).log and not fit_axis([0.0, 1e5]).log


@given(st.lists(NUMBERS, min_size=1, max_size=80))
@example([5e-324])
@example([1.0, 5e-324])
@example([1.0, 1.6e-294])
def test_any_values_have_an_axis_with_ticks_inside(values):
    axis = fit_axis(values)
    assert axis.low < axis.high
    assert all(-1e-6 <= axis.share(tick) <= 1 + 1e-6 for tick in axis.ticks())
    assert all(short(tick) for tick in axis.ticks())
    inside = sum(0 <= axis.share(v) <= 1 for v in values)
    assert inside == len(values) - axis.outside


def test_ticks_are_round():
    assert ticks(0, 100) == [0, 20, 40, 60, 80, 100] or ticks(0, 100) == [0, 50, 100]
    assert [short(t) for t in (0, 0.05, 12_000, 400_000, 1.5e6, 1e-5)] == [
        "0", "0.05", "12k", "400k", "1.5M", "1e-5",
    ]  # fmt: skip


def test_smoothing_keeps_gaps_ends_and_constants():
    points = [(s, 2.0 if s != 50 else None) for s in range(100)]
    means, count = smoothed(points)
    assert count >= 3 and all(v == pytest.approx(2) for _, v in means if v is not None)
    assert len(split(means)) == 2 and means[0][0] == 0
    assert smoothed(points[:10]) == ([], 0)
    spiky = [(s, 1e6 if s == 30 else 1.0) for s in range(60)]
    (middle,) = (v for s, v in smoothed(spiky, log=True)[0] if s == 30 and v)
    assert 1 < middle < 100  # a spike does not become a plateau on a logarithmic axis


def test_numbers_keep_their_zeros():
    written = [figure(v) for v in (4.7, 0.047, 1234.5, 0, 12, 1.5e-7, 2e9, -0.5, None)]
    assert written == ["4.700", "0.04700", "1,234", "0", "12", "1.50e-7", "2.00e9", "-0.5000",
                       "not finite"]  # fmt: skip


def test_a_gap_breaks_the_line_and_a_point_alone_is_marked():
    points = [
        *((s, 1.0) for s in range(40)),
        (40, None),
        (41, 1.0),
        (42, None),
        (43, 2.0),
        (44, 2.0),
    ]
    drawn = charts.curve(charts.Line("", 0, points), fit_axis([1.0, 2.0]), charts.Steps(0, 44))
    assert drawn.count("M") - drawn.count(charts.MARKS[0]) == 2 and drawn.count('class="mark') == 1


def test_metrics_have_words():
    assert kind_of("loss/vae/pixel", "mse").unit.startswith("mean squared")
    assert kind_of("eval/FD-1k[timm:x]/floor").title == "FD-1k[timm:x], in multiples of its floor"
    assert kind_of("eval/gFID-50K").better == "lower is better"
    assert kind_of("grad_norm/vae").title == "Gradient norm: VAE"
    assert kind_of("what/ever").group == "Others"
