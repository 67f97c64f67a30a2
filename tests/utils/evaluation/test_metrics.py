"""The tables of metrics: all that the evaluator knows of a metric is its row."""

import pytest
import torch

import evaluate_fid
from models.checks.errors import UserError
from tests.random_inception import textures
from tests.utils.evaluation.toy_network import toy_net
from utils.distributed import Ranks
from utils.evaluation.evaluate import choose_metrics, evaluate
from utils.evaluation.metrics import (
    METRICS,
    VAE_METRICS,
    Metric,
    Result,
    VaeMetric,
    select_metrics,
)
from utils.evaluation.options import Options

ALONE = Ranks(distributed=False)


def kernel_distance(x: torch.Tensor, y: torch.Tensor) -> float:
    """Unbiased squared MMD with the kernel of KID (arXiv 1801.01401), of features (N, D)."""

    def kernel(a, b):
        return (a @ b.T / a.shape[1] + 1) ** 3

    def mean_of_pairs(a):
        k = kernel(a, a)
        return (k.sum() - k.trace()) / (len(a) * (len(a) - 1))

    return (mean_of_pairs(x) + mean_of_pairs(y) - 2 * kernel(x, y).mean()).item()


@pytest.fixture
def mmd(monkeypatch):
    """What somebody would write who adds one: a function and a row."""

    def compute(pair) -> Result:
        reference, samples = pair.rows()
        value = kernel_distance(reference.double(), samples.double())
        return Result(value, {"n_reference": len(reference)}, {"mmd": "all images in one subset"})

    row = Metric(
        "mmd",
        compute,
        {"inception": ("MMD-50K", "MMD")},
        other="MMD",
        reference_rows=True,
        sample_rows=True,
        least_images=5,
        by_default=False,
    )
    monkeypatch.setitem(METRICS, "mmd", row)
    return row


def test_a_new_metric_is_one_row(mmd, tmp_path):
    real, fake, net = textures(40, 1, 16), textures(30, 2, 16), toy_net()
    options = Options(metrics=("fid", "mmd"), cache=tmp_path)
    for cache in ("computed now", "hit"):
        record = evaluate(fake, real, options, net=net, ranks=ALONE)
        assert list(record["metrics"]) == ["FD[toy]", "MMD[toy]"]
        expected = kernel_distance(*(net(x)["pool"].double() for x in (real, fake)))
        assert record["metrics"]["MMD[toy]"] == pytest.approx(expected, rel=1e-6)
        assert record["details"]["MMD[toy]"] == {"n_reference": 40}
        assert record["protocol"]["mmd"] == "all images in one subset"
        assert record["reference"]["cache"] == cache
    published = evaluate(fake, real, options, net=toy_net(published=True), ranks=ALONE)
    assert "MMD@30" in published["metrics"]
    with pytest.raises(UserError, match="mmd needs at least 5"):
        evaluate(fake[:4], real, Options(metrics=("mmd",)), net=net, ranks=ALONE)


def test_a_metric_outside_the_default_set_is_computed_only_when_named(mmd):
    real, fake = textures(40, 1, 16), textures(30, 2, 16)
    record = evaluate(fake, real, Options(cache=None), net=toy_net(), ranks=ALONE)
    assert not any(name.startswith("MMD") for name in record["metrics"])


def test_the_script_offers_what_is_in_the_tables(mmd, capsys):
    with pytest.raises(SystemExit):
        evaluate_fid.parse_args(["--help"])
    text = "".join(capsys.readouterr().out.split())
    assert ",".join(METRICS) in text
    assert ",".join(VAE_METRICS) in text
    args = evaluate_fid.parse_args(["--samples", "a.npz", "--metrics", "mmd"])
    evaluate_fid.check_args(args)


def test_statistics_without_images_serve_what_needs_no_rows(mmd):
    class OnlyStatistics:
        """As a `Reference` to a file of statistics."""

        def missing(self, family, feature, rows):
            return "holds no images" if rows else None

    chosen, left_out = choose_metrics(None, "inception", OnlyStatistics())
    assert [metric.name for metric in chosen] == ["fid", "sfid", "is"]
    assert left_out == [f"{name} left out: holds no images" for name in ("precision", "recall")]
    with pytest.raises(UserError, match="mmd: holds no images"):
        choose_metrics(("mmd",), "inception", OnlyStatistics())


def test_metrics_come_in_the_order_of_the_table():
    chosen, _ = choose_metrics(("recall", "is", "fid"), "inception", Everything())
    assert [metric.name for metric in chosen] == ["fid", "is", "recall"]
    assert [metric.name for metric in select_metrics(VAE_METRICS, ("ssim", "rfid"))] == [
        "rfid",
        "ssim",
    ]


class Everything:
    """As a `Reference` of images."""

    def missing(self, family, feature, rows):
        return None


def test_a_vae_metric_is_one_row(monkeypatch, tmp_path):
    """Mean absolute error, of a random VAE: as the mean over its pictures by hand."""
    from models.vae import load_vae
    from utils.data.images import pm1_to_u8, u8_to_pm1
    from utils.evaluation.images.image_sets import open_images
    from utils.evaluation.reconstruction import evaluate_vae

    row = VaeMetric(
        "mae",
        "mean absolute error on uint8",
        pictures=lambda p: (p.original_u8.float() - p.reconstruction_u8).abs().mean((1, 2, 3)),
        by_default=False,
    )
    monkeypatch.setitem(VAE_METRICS, "mae", row)
    torch.manual_seed(0)
    vae, x = load_vae("tiny-f8d4", None).eval(), textures(5, 1, 16)
    options = Options(metrics=("mae",), batch_size=2)
    record = evaluate_vae(vae, open_images(x), options, ranks=ALONE)
    assert record["protocol"]["mae"] == "mean absolute error on uint8"
    with torch.no_grad():
        y = pm1_to_u8(vae.decode(vae.encode(u8_to_pm1(x)).mode()))
    expected = (x.float() - y).abs().mean().item()
    assert record["metrics"] == {"MAE": pytest.approx(expected, rel=1e-5)}
    assert "mae" not in [metric.name for metric in select_metrics(VAE_METRICS, None)]


@pytest.mark.parametrize("table", [METRICS, VAE_METRICS])
def test_rows_stand_under_their_names(table):
    assert [row.name for row in table.values()] == list(table)
    for row in VAE_METRICS.values():
        assert sum(kind is not None for kind in (row.features, row.pictures, row.latents)) == 1
