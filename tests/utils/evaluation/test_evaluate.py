"""The evaluator as a library: floors, references, caching, refusals, torch-fidelity."""

import json
import re

import numpy as np
import pytest
import torch
from torch_fidelity import calculate_metrics
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric

from models.checks.errors import UserError
from tests.random_inception import textures
from tests.utils.evaluation.toy_network import sampling_record, toy_net
from utils.distributed import Ranks
from utils.evaluation.evaluate import evaluate
from utils.evaluation.formulas.frechet import Moments, frechet_distance
from utils.evaluation.networks import load_features
from utils.evaluation.options import Options
from utils.evaluation.report import format_table, scalars
from utils.files import sha256_file

ALONE = Ranks(distributed=False)


@pytest.fixture
def options(tmp_path):
    return Options(features="pixel", cache=tmp_path / "cache", batch_size=16)


def pixels(x: torch.Tensor) -> np.ndarray:
    return toy_net().forward(x)["pool"].double().numpy()


def test_a_proxy_is_named_after_its_network_and_never_called_fid(options):
    record = evaluate("digits:test@16", "digits:train@16", options, ranks=ALONE)
    assert set(record["metrics"]) == {"FD[pixel12]", "precision[pixel12]", "recall[pixel12]"}
    detail = record["details"]["FD[pixel12]"]
    assert detail["times_floor"] == record["metrics"]["FD[pixel12]"] / detail["floor"]
    assert 0.5 < detail["times_floor"] < 2  # real digits against real digits
    assert record["comparable_to_papers"] is False
    for text in (json.dumps(record), format_table(record), *scalars(record)):
        assert not re.search(r"\bg?r?s?FID\b", text, re.IGNORECASE)
    assert f"{detail['times_floor']:.2f} x floor" in format_table(record)


def test_the_distance_is_that_of_the_features(options):
    real, fake = textures(60, 1, 16), textures(50, 2, 16)
    record = evaluate(fake, real, options, net=toy_net(), ranks=ALONE)
    stats = [(f.mean(0), np.cov(f, rowvar=False)) for f in (pixels(real), pixels(fake))]
    assert record["metrics"]["FD[toy]"] == pytest.approx(frechet_distance(*stats[0], *stats[1]))
    assert record["metrics"]["sFD[toy]"] > 0
    assert record["warnings"] == []


def test_arrays_files_and_batch_sizes_give_the_same_record(options, tmp_path):
    real, fake = textures(40, 1, 16), textures(33, 2, 16)
    np.savez(tmp_path / "s.npz", fake.permute(0, 2, 3, 1).numpy())
    first = evaluate(fake, real, options, net=toy_net(), ranks=ALONE)
    again = evaluate(
        tmp_path / "s.npz", real.permute(0, 2, 3, 1).numpy(), Options(cache=None, batch_size=7),
        net=toy_net(), ranks=ALONE,
    )  # fmt: skip
    assert again["metrics"] == pytest.approx(first["metrics"], rel=1e-9)
    assert again["samples"]["content_sha256"] == first["samples"]["content_sha256"]
    assert "uint8 rule and label sampling are unknown" in again["warnings"][0]


def test_reference_statistics_are_cached_by_content_and_network(options):
    real, fake, calls = textures(40, 1, 16), textures(40, 2, 16), []
    net = toy_net()
    forward = net.forward
    net.forward = lambda x: calls.append(len(x)) or forward(x)
    first = evaluate(fake, real, options, net=net, ranks=ALONE)
    assert sum(calls) == 80
    again = evaluate(fake, real, options, net=net, ranks=ALONE)
    assert sum(calls) == 120  # the reference was not looked at again
    assert (first["reference"]["cache"], again["reference"]["cache"]) == ("computed now", "hit")
    assert again["metrics"] == first["metrics"]
    assert again["details"] == first["details"]
    other = real.clone()
    other[0] ^= 1
    for reference, dim in ((other, 8), (real, 9)):
        record = evaluate(fake, reference, options, net=toy_net(dim), ranks=ALONE)
        assert record["reference"]["cache"] == "computed now"


def test_a_cache_without_rows_is_completed_when_precision_needs_them(options):
    real, fake = textures(40, 1, 16), textures(40, 2, 16)
    only = Options(metrics=("fid",), cache=options.cache)
    assert set(evaluate(fake, real, only, net=toy_net(), ranks=ALONE)["metrics"]) == {"FD[toy]"}
    record = evaluate(fake, real, options, net=toy_net(), ranks=ALONE)
    assert record["reference"]["cache"] == "computed now"
    assert "precision[toy]" in record["metrics"]


@pytest.mark.slow
def test_of_adms_file_distances_use_the_statistics_and_precision_the_images(tmp_path):
    rng = np.random.Generator(np.random.PCG64(0))
    real, fake = textures(30, 1, 16), textures(30, 2, 16)
    path = tmp_path / "VIRTUAL.npz"
    x = rng.standard_normal((2100, 2048), np.float32)
    mu, sigma = x.mean(0), np.cov(x, rowvar=False)
    np.savez(path, mu=mu, sigma=sigma, arr_0=real.permute(0, 2, 3, 1).numpy())
    net = toy_net()
    net.forward = lambda x: {"pool": x.float().flatten(1)[:, :512].repeat(1, 4) / 255}
    record = evaluate(fake, path, Options(metrics=("fid", "precision"), cache=None), net=net,
                      ranks=ALONE)  # fmt: skip
    feats = net.forward(fake)["pool"].double().numpy()
    expected = frechet_distance(mu, sigma, feats.mean(0), np.cov(feats, rowvar=False))
    assert record["metrics"]["FD[toy]"] == pytest.approx(expected, rel=1e-6)
    assert record["protocol"]["precision_recall"]["n_reference"] == 30
    assert record["details"]["FD[toy]"]["rank_deficient"]
    np.savez(tmp_path / "stats.npz", mu=mu, sigma=sigma)
    with pytest.raises(UserError, match="neither mu_s and sigma_s nor images"):
        evaluate(fake, tmp_path / "stats.npz", Options(metrics=("sfid",)), net=net, ranks=ALONE)
    with pytest.raises(UserError, match="it cannot serve pixel"):
        evaluate(fake, tmp_path / "stats.npz", Options(features="pixel", metrics=("fid",)),
                 ranks=ALONE)  # fmt: skip


def test_sorted_samples_are_reported_with_the_shuffled_inception_score(options):
    """6,000 one-colour images in 8 sorted classes: a split of 5,000 sees not all of them."""
    x = torch.zeros(6000, 3, 2, 4, dtype=torch.uint8)
    x.flatten(2)[torch.arange(6000), :, torch.arange(6000) // 750] = 255
    options = Options(metrics=("is",), cache=None, batch_size=1000)
    record = evaluate(x, None, options, net=toy_net(), ranks=ALONE)
    detail = record["details"]["IS[toy]"]
    assert detail["shuffled"] == pytest.approx(8, rel=0.02)
    assert record["metrics"]["IS[toy]"] < 6
    assert "sorted" in record["warnings"][0]


def test_wrong_inputs_are_refused(options, tmp_path):
    x = textures(8, 1, 16)
    pictures = x.permute(0, 2, 3, 1).numpy()
    np.savez(tmp_path / "ref.npz", mu=np.zeros(3), sigma=np.eye(3), arr_0=pictures)
    np.savez(tmp_path / "s.npz", pictures)
    np.savez(tmp_path / "t.npz", pictures)
    (tmp_path / "s.json").write_text(json.dumps(sampling_record(8)))

    def refused(samples, reference, message, **changes):
        with pytest.raises(UserError, match=message):
            evaluate(samples, reference, Options(features="pixel", cache=None, **changes),
                     ranks=ALONE)  # fmt: skip

    refused(x, textures(8, 1, 32), "16x16 images, in memory 32x32")
    refused(x[:3], x, "has 3 image.s., precision needs at least 4")
    refused(x, x[:3], "has 3 image.s., precision needs at least 4")
    refused(x[:1], x, "fid needs at least 2", metrics=("fid",))
    refused(x.bfloat16(), x, "bfloat16 images, expected uint8")
    refused(tmp_path / "ref.npz", tmp_path / "s.npz", "swapped")
    refused(tmp_path / "t.npz", tmp_path / "s.npz", "swapped")
    refused(x, x, "Inception features only", metrics=("sfid",))
    refused(x, x, "unknown, expected some of", metrics=("kids",))
    refused(x, None, "needs a --reference", metrics=("fid",))
    np.savez(tmp_path / "bad.npz", mu=np.zeros(3), sigma=np.eye(3))
    with pytest.raises(UserError, match=r"expected \(2048,\)"):
        evaluate(x, tmp_path / "bad.npz", Options(metrics=("fid",)), net=toy_net(), ranks=ALONE)


def test_identical_sets_are_reported_as_such(options):
    x = textures(20, 1, 16)
    record = evaluate(x, x, options, net=toy_net(), ranks=ALONE)
    assert abs(record["metrics"]["FD[toy]"]) < 1e-9
    assert record["metrics"]["precision[toy]"] == record["metrics"]["recall[toy]"] == 1
    assert "samples and reference are the same images" in record["warnings"]


class Images(torch.utils.data.Dataset):
    def __init__(self, x):
        self.x = x

    def __len__(self):
        return len(self.x)

    def __getitem__(self, i):
        return self.x[i]


@pytest.mark.slow
def test_the_pipeline_agrees_with_torch_fidelity(inception_weights, tmp_path):
    """Random Inception, 40 against 48 images. Rank-deficient: their distance, from eigenvalues of
    a non-symmetric product, is good to 1e-3 only; ours is compared with the exact one."""
    inception = load_features(
        "inception",
        weights=str(inception_weights),
        weights_sha256=sha256_file(inception_weights),
    )
    fake, real = textures(40, 2), textures(48, 1)
    options = Options(pr_mode="fp32", cache=tmp_path, batch_size=16)
    record = evaluate(fake, real, options, net=inception, ranks=ALONE)
    theirs = calculate_metrics(
        input1=Images(fake),
        input2=Images(real),
        cuda=False,
        isc=True,
        fid=True,
        prc=True,
        feature_extractor="inception-v3-compat",
        feature_extractor_weights_path=str(inception_weights),
        isc_splits=1,
        samples_shuffle=False,
        cache=False,
        save_cpu_ram=True,
        verbose=False,
    )
    label = inception.label
    ours = record["metrics"]
    assert ours[f"IS[{label}]"] == pytest.approx(theirs["inception_score_mean"], rel=1e-6)
    assert ours[f"precision[{label}]"] == pytest.approx(theirs["precision"])
    assert ours[f"recall[{label}]"] == pytest.approx(theirs["recall"])
    assert ours[f"FD[{label}]"] == pytest.approx(theirs["frechet_inception_distance"], rel=1e-3)
    x, y = (inception(images)["pool"].double() for images in (fake, real))
    xc, yc = ((f - f.mean(0)) / (len(f) - 1) ** 0.5 for f in (x, y))
    exact = (x.mean(0) - y.mean(0)).square().sum() + xc.square().sum() + yc.square().sum()
    exact -= 2 * torch.linalg.matrix_norm(xc @ yc.T, "nuc")
    assert ours[f"FD[{label}]"] == pytest.approx(exact.item(), rel=1e-6)


def test_the_distance_agrees_with_torch_fidelity_above_the_dimension():
    """Their formula on the same features, 150 and 130 images for 64 dimensions."""
    rng = np.random.Generator(np.random.PCG64(0))
    real = rng.standard_normal((150, 64)) @ rng.standard_normal((64, 64))
    fake = rng.standard_normal((130, 64)) @ rng.standard_normal((64, 64)) + 1
    statistics = [fid_features_to_statistics(torch.from_numpy(x)) for x in (fake, real)]
    theirs = fid_statistics_to_metric(*statistics, verbose=False)
    moments = [Moments(64), Moments(64)]
    for each, x in zip(moments, (real, fake)):
        each.add(torch.from_numpy(x))
    ours = frechet_distance(*(f() for m in moments for f in (m.mean, m.cov)))
    assert ours == pytest.approx(theirs["frechet_inception_distance"], rel=1e-9)
