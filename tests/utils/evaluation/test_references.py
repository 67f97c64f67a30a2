"""Statistics in files of others: what is taken, how it is called, what is refused.

python -m pytest tests/utils/evaluation/test_references.py
"""

import json
import os
import pickle
import zipfile
from dataclasses import replace

import numpy as np
import pytest

from models.checks.errors import UserError
from tests.random_inception import textures
from tests.utils.evaluation.test_files import ALONE, header
from tests.utils.evaluation.toy_network import toy_net
from utils.evaluation.evaluate import evaluate
from utils.evaluation.formulas.frechet import frechet_distance
from utils.evaluation.options import Options
from utils.evaluation.reference import Reference
from utils.evaluation.references import files, known
from utils.evaluation.references.files import read_statistics
from utils.evaluation.references.known import Published

DIM = 8  # of the toy network; the files of networks of these names have more


@pytest.fixture(autouse=True)
def small(monkeypatch):
    dimensions = {"inception": {"pool": DIM, "spatial": DIM}, "dinov2": {"pool": DIM}}
    monkeypatch.setattr(files, "DIMENSIONS", dimensions)


def features(n: int = 40) -> np.ndarray:
    mixed = np.random.default_rng(0).standard_normal((n, DIM)) @ np.diag(10.0 ** -np.arange(DIM))
    return mixed.astype(np.float32)


MU, SIGMA = features().mean(0).astype("f8"), np.cov(features(), rowvar=False)


def with_entry(value: float, both: bool = True) -> np.ndarray:
    sigma = np.eye(DIM)
    sigma[0, 1] = value
    sigma[1, 0] = value if both else 0
    return sigma


class Bomb:
    """Unpickling it creates a file."""

    def __init__(self, mark):
        self.mark = str(mark)

    def __reduce__(self):
        return os.mkdir, (self.mark,)


REFUSED = {
    "expected (8,)": {"mu": np.zeros(4), "sigma": np.eye(4)},
    "mu has shape (8, 8)": {"mu": np.eye(DIM), "sigma": np.zeros(DIM)},
    "mu has shape (1, 8)": {"mu": MU[None]},
    "mu holds nan": {"mu": np.full(DIM, np.nan)},
    "sigma holds nan": {"sigma": with_entry(np.nan)},
    "sigma holds nan or inf": {"sigma": with_entry(np.inf)},
    "sigma is not symmetric": {"sigma": with_entry(0.5, both=False)},
    "sigma is not symmetric (two": {"sigma": with_entry(1e-4, both=False)},
    "the eigenvalue -0.5": {"sigma": with_entry(1.5)},
    "the eigenvalue -0.001": {"sigma": with_entry(1.001)},
    "the eigenvalue -1": {"sigma": -np.eye(DIM)},
    "sigma holds complex numbers": {"sigma": SIGMA.astype("c16")},
    "mu holds complex numbers": {"mu": MU.astype("c8")},
    "mu holds integers": {"mu": np.zeros(DIM, int)},
    "sigma holds integers": {"sigma": np.eye(DIM, dtype="u1")},
    "sigma holds true and false": {"sigma": np.eye(DIM, dtype=bool)},
    "mu holds Python objects": {"mu": MU.astype(object)},
    "mu has shape (8,) and dtype <U1": {"mu": np.array(["a"] * DIM)},
}


@pytest.mark.parametrize("why", REFUSED)
def test_what_is_no_mean_and_covariance_is_refused_for_what_it_is(why, tmp_path):
    np.savez(tmp_path / "r.npz", **{"mu": MU, "sigma": SIGMA} | REFUSED[why])
    with pytest.raises(UserError) as caught:
        Reference(tmp_path / "r.npz").check_file(toy_net(), {"pool"})
    assert why in str(caught.value) and str(tmp_path / "r.npz") in str(caught.value)


HELD = {
    "holds mu: expected mu and sigma": {"mu": MU},
    "holds nothing": {},
    "pool_3 has 1 row(s)": {"pool_3": features(1)},
    "pool_3 holds nan": {"pool_3": np.full((9, DIM), np.nan)},
    "pool_3 holds integers": {"pool_3": np.zeros((9, DIM), int)},
}


@pytest.mark.parametrize("why", HELD)
def test_files_without_statistics_say_what_they_hold(why, tmp_path, monkeypatch):
    np.savez(tmp_path / "r.npz", **HELD[why])
    if not HELD[why]:  # NumPy writes an empty archive
        why = "an empty zip archive"
    with pytest.raises(UserError) as caught:
        Reference(tmp_path / "r.npz").check_file(toy_net(), {"pool"})
    assert why in str(caught.value)


def test_statistics_of_10_to_12_numbers_take_no_memory(tmp_path):
    with zipfile.ZipFile(tmp_path / "r.npz", "w") as archive:
        for name in ("mu", "sigma"):
            archive.writestr(f"{name}.npy", header((10**12,), "<f8"))
    with pytest.raises(UserError, match="mu"):
        Reference(tmp_path / "r.npz").check_file(toy_net(), {"pool"})


@pytest.mark.parametrize("dtype", ["f2", "f4", "f8", ">f4", "longdouble"])
@pytest.mark.parametrize("n", [4, 40])
def test_rounded_covariances_are_taken_and_only_float16_is_warned_of(n, dtype, tmp_path):
    """Also of fewer images than dimensions, whose eigenvalues 0 are rounded below 0."""
    x = features(n)
    sigma = np.asfortranarray(np.cov(x, rowvar=False).astype(dtype))
    np.savez(tmp_path / "r.npz", mu=x.mean(0).astype(dtype), sigma=sigma, mu_s=MU, sigma_s=SIGMA)
    reference = Reference(tmp_path / "r.npz")
    reference.check_file(toy_net(), {"pool"})
    notes = reference.notes("inception")
    assert ["float16" in note and "0.7 %" in note for note in notes] == [True] * (dtype == "f2")


FOREIGN = {
    "a dict": np.array({"a": 1}, dtype=object),
    "JSON of somebody": np.array('{"features": "vgg"}'),
    "a list": np.array("[1]"),
    "no JSON": np.array("{"),
    "deep": np.array("[" * 9999),
    "numbers": np.arange(5),
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_keys_of_somebody_else_are_ignored(kind, tmp_path):
    others: dict = dict.fromkeys(("meta", "n", "labels", "floor"), FOREIGN[kind])
    np.savez(tmp_path / "r.npz", mu=MU, sigma=SIGMA, **others)
    record = evaluate(textures(9, 1, 16), tmp_path / "r.npz", Options(metrics=("fid",)),
                      net=toy_net(), ranks=ALONE)  # fmt: skip
    assert record["details"]["FD[toy]"]["n_reference"] is None
    assert record["reference"]["made_by"] == "unknown" == record["reference"]["resized_by"]


def test_who_made_a_file_and_what_resized_is_told_as_far_as_it_can_be(tmp_path, monkeypatch):
    def told(name, **arrays):
        np.savez(tmp_path / name, allow_pickle=False, **arrays)
        file = read_statistics(tmp_path / name)
        assert file is not None
        return file.made_by, file.networks["inception"].resized_by, file.networks["inception"].notes

    both = {"mu": MU, "sigma": SIGMA}
    maker, resize, notes = told("x.npz", **both, mu_s=MU, sigma_s=SIGMA, mu_clip=MU)
    assert "ADM" in maker and resize == "TF1 bilinear" and not notes
    maker, resize, notes = told("adm_in256_stats.npz", **both)
    assert maker.startswith("MAR") and "by the name" in maker and not notes
    maker, resize, notes = told("ffhq_clean_trainval_256.npz", **both)
    assert resize == "PIL bicubic" and "neither's FID" in notes[0]
    maker, resize, notes = told("y.npz", ref_mu=MU, ref_sigma=SIGMA)
    assert maker == resize == "unknown" and "does not say what resized" in notes[0]
    # a hash tells more than any name
    monkeypatch.setitem(known.KNOWN, files_sha(tmp_path / "y.npz"),
                        Published("P.npz", "X", "by hand", 77, 16, False, "here"))  # fmt: skip
    record = evaluate(textures(9, 1, 16), tmp_path / "y.npz", Options(metrics=("fid",)),
                      net=toy_net(), ranks=ALONE)  # fmt: skip
    facts = record["reference"]
    assert (facts["published_as"], facts["made_by"]) == ("P.npz", "X")
    assert record["details"]["FD[toy]"]["n_reference"] == 77


def files_sha(path) -> str:
    from utils.files import sha256_file

    return sha256_file(path)


def edm2(**changes) -> dict:
    each = {"mu": MU, "sigma": SIGMA}
    return {"num_images": 500, "fid": each, "fd_dinov2": dict(each)} | changes


@pytest.mark.parametrize("protocol", range(2, 6))
def test_edm2s_pickle_serves_both_networks(protocol, tmp_path):
    path = tmp_path / "img512.pkl"
    path.write_bytes(pickle.dumps(edm2(), protocol=protocol))
    for family, word in (("inception", "NVIDIA"), ("dinov2", "antialias")):
        reference = Reference(path)
        assert reference.missing(family, "pool", rows=False) is None
        reference.check_file(toy_net(family=family), {"pool"})
        assert reference.file is not None
        found = reference.file.statistics(family, "pool")
        assert (found.mean == MU).all() and (found.cov == SIGMA).all() and found.n == 500
        assert word in reference.notes(family)[0]
    with pytest.raises(UserError, match="cannot serve pixel"):
        Reference(path).missing("pixel", "pool", rows=False)


def test_arrays_of_other_orders_and_edms_own_form_are_read(tmp_path):
    path = tmp_path / "cifar.pkl"
    big = {"mu": MU.astype(">f4"), "sigma": np.asfortranarray(with_entry(0.25))}
    path.write_bytes(pickle.dumps(big))
    file = read_statistics(path)
    assert file is not None
    found = file.statistics("inception", "pool")
    assert (found.mean == big["mu"].astype("f8")).all() and (found.cov == big["sigma"]).all()


def test_pickles_of_anything_else_are_refused_and_not_executed(tmp_path):
    mark, path = tmp_path / "executed", tmp_path / "r.pkl"
    loop: dict = {}
    loop["fid"] = loop
    wrong = {
        "calls 'posix.mkdir'": Bomb(mark),
        "calls 'posix.mkdir': expected": edm2(fid={"mu": Bomb(mark), "sigma": SIGMA}),
        "Python objects": edm2(fid={"mu": np.array([{}]), "sigma": SIGMA}),
        "holds a dict of fid, but no arrays mu and sigma": {"fid": {"mu": MU}},
        "holds a dict of raw_mean": {"raw_mean": MU},
        "holds no dict of statistics": [MU, SIGMA],
        "sigma holds complex": edm2(fid={"mu": MU, "sigma": SIGMA.astype("c16")}),
        "damaged": loop,
        "holds a dict of a, but": {"a": {1}},
    }
    for why, content in wrong.items():
        path.write_bytes(pickle.dumps(content))
        with pytest.raises(UserError, match=why) as caught:
            Reference(path).check_file(toy_net(), {"pool"})
        assert str(path) in str(caught.value) and not mark.exists()
    whole = pickle.dumps(edm2())
    for cut in (1, 20, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:cut])
        with pytest.raises(UserError, match=r"r\.pkl"):
            read_statistics(path)


def test_pool_3_gives_mean_covariance_and_rows(tmp_path):
    """Features of all images, as score-based code has them: precision and recall are possible."""
    net, real, fake = toy_net(), textures(40, 1, 16), textures(30, 2, 16)
    rows = net.forward(real)["pool"].numpy()
    np.savez(tmp_path / "stats.npz", pool_3=rows, logits=np.zeros((40, 3)))
    options = Options(metrics=("fid", "precision", "recall"), cache=None)
    theirs = evaluate(fake, tmp_path / "stats.npz", options, net=net, ranks=ALONE)
    ours = evaluate(fake, real, options, net=net, ranks=ALONE)
    assert theirs["metrics"] == pytest.approx(ours["metrics"], rel=1e-9)
    assert theirs["protocol"] == ours["protocol"]
    assert "TF-Hub" in theirs["reference"]["made_by"] and "another network" in theirs["warnings"][0]


def test_a_file_of_the_cache_is_a_reference_for_its_own_network_alone(tmp_path):
    net, real, fake = toy_net(), textures(40, 1, 16), textures(30, 2, 16)
    options = Options(metrics=("fid",), cache=tmp_path)
    first = evaluate(fake, real, options, net=net, ranks=ALONE)
    (path,) = tmp_path.glob("*.npz")
    again = evaluate(fake, path, options, net=net, ranks=ALONE)
    assert again["metrics"] == pytest.approx(first["metrics"], rel=1e-9)
    assert again["details"]["FD[toy]"]["n_reference"] == 40
    with pytest.raises(UserError, match="statistics of the same network"):
        evaluate(fake, path, options, net=replace(net, facts={"dim": 9}), ranks=ALONE)


def test_a_damaged_cache_is_a_miss_with_a_word_and_an_unwritable_one_is_told_at_once(
    tmp_path, capsys
):
    real, fake = textures(20, 1, 16), textures(20, 2, 16)
    options = Options(metrics=("fid",), cache=tmp_path / "cache")
    first = evaluate(fake, real, options, net=toy_net(), ranks=ALONE)
    (path,) = (tmp_path / "cache").glob("*.npz")
    with np.load(path) as held:
        other = dict(held) | {"meta": np.array(json.dumps({"schema": 1}))}
    capsys.readouterr()
    for damage in (
        lambda: path.write_bytes(b"x"),
        lambda: np.savez(path, allow_pickle=False, **other),
    ):
        damage()
        again = evaluate(fake, real, options, net=toy_net(), ranks=ALONE)
        assert again["reference"]["cache"] == "computed now"
        assert again["metrics"] == first["metrics"]
        assert f"{path} is damaged" in capsys.readouterr().err
    (tmp_path / "file").touch()
    seen = []
    options = replace(options, cache=tmp_path / "file" / "cache")
    progress = lambda what: lambda *done: seen.append(capsys.readouterr().err)  # noqa: E731
    evaluate(fake, real, options, net=toy_net(), ranks=ALONE, progress=progress)
    assert "are not kept in" in seen[0]  # after the first images of the reference
    assert "".join([*seen[1:], capsys.readouterr().err]) == ""


def test_the_distance_to_a_file_is_that_of_its_numbers(tmp_path):
    net, fake = toy_net(), textures(30, 2, 16)
    np.savez(tmp_path / "r.npz", mu=MU, sigma=SIGMA)
    record = evaluate(fake, tmp_path / "r.npz", Options(metrics=("fid",)), net=net, ranks=ALONE)
    x = net.forward(fake)["pool"].double().numpy()
    expected = frechet_distance(MU, SIGMA, x.mean(0), np.cov(x, rowvar=False))
    assert record["metrics"]["FD[toy]"] == pytest.approx(expected, rel=1e-9)
