"""Statistics of a reference in a file of somebody's: which are in it, who made it, and whether they
can be means and covariances at all.

.npz   mu, sigma           ADM's suite, pytorch-fid, clean-fid, EDM, MAR, JiT, RAE: Inception's pool
       ref_mu, ref_sigma   the same, of iMF and other JAX code
       mu_s, sigma_s       of ADM's suite: the features of sFID
       pool_3              score-based code: the features of all images, one a row
       meta                only if it is the JSON of `references.cache`: it names the network
.pkl   fid, fd_dinov2      EDM2: a dict of {"mu", "sigma"} for each network; or mu, sigma alone

Other arrays are ignored, whatever they are called; `arr_0` are images. Pickles are read without
being executed. D is the dimension of a feature.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch

from models.checks.errors import UserError
from models.checks.file_kinds import PICKLE, what_is
from utils.evaluation.formulas.frechet import Moments, Statistics
from utils.evaluation.images.npz_images import npz_members, read_array, require_kind
from utils.evaluation.references.known import TF1, UNKNOWN, named
from utils.evaluation.references.pickles import read_pickle

# dimension of each feature of the networks that are found in files of statistics
DIMENSIONS = {"inception": {"pool": 2048, "spatial": 2023}, "dinov2": {"pool": 1024}}
# names of mean and covariance => the feature of Inception that they are of
INCEPTION_ARRAYS = {
    ("mu", "sigma"): "pool", ("ref_mu", "ref_sigma"): "pool", ("mu_s", "sigma_s"): "spatial",
}  # fmt: skip
# names of the networks in EDM2's files
EDM2 = {"fid": "inception", "fd_dinov2": "dinov2"}
EDM2_RESIZED = {"inception": TF1, "dinov2": "torch bicubic, antialias"}
EDM2_NOTES = {
    "inception": "from NVIDIA's translation of the Inception of 2015: the same weights; how far "
    "its features are from those here was not measured",
    "dinov2": "EDM2 resizes for DINOv2 by torch's bicubic with antialias, the samples here by "
    "PIL's: 0.3 grey levels apart on the mean",
}
# relative error of a covariance that float32 sums may leave; types of less precision add theirs
ROUNDING = 1e-6
ROWS_AT_A_TIME = 1000  # that are added to a covariance
# keys by which a `meta` is recognised as ours
OUR_META = {"schema", "content", "features", "family", "n", "size"}
EXPECTED = "mu and sigma, pool_3, images in arr_0, or EDM2's dict of fid and fd_dinov2"

# functions that read a mean and a covariance
Arrays = tuple[Callable[[], np.ndarray], Callable[[], np.ndarray]]


@dataclass
class OfNetwork:
    """What a file holds of the features of one network."""

    # what resized the images, as far as the file tells
    resized_by: str
    # readers of mean and covariance, by feature
    moments: dict[str, Arrays] = field(default_factory=dict)
    # in their place: a reader of the "pool" features of all images, (N, D)
    rows: Callable[[], np.ndarray] | None = None
    # what a reader of the numbers must know: one sentence each
    notes: list[str] = field(default_factory=list)

    @property
    def features(self) -> set[str]:
        return {"pool"} if self.rows else set(self.moments)


@dataclass
class ReferenceFile:
    """A file with statistics. Opening one reads no large array of an .npz."""

    path: Path
    # who made it, as far as the file tells
    made_by: str
    # by network family
    networks: dict[str, OfNetwork]
    # number of images behind mean and covariance; None = the file does not say
    n: int | None = None
    # whether it holds images, too
    has_images: bool = False
    # `FeatureNet.facts` of the network, in a file of ours
    facts: dict | None = None
    _read: dict[tuple[str, str], Statistics] = field(default_factory=dict)

    def features(self, family: str) -> set[str]:
        """Names of the features of a network whose statistics are here."""
        return self.networks[family].features if family in self.networks else set()

    def has_rows(self, family: str) -> bool:
        return family in self.networks and self.networks[family].rows is not None

    def statistics(self, family: str, feature: str) -> Statistics:
        """Validated, float64; read once. `UserError` if they cannot be a mean and a covariance."""
        key, network = (family, feature), self.networks[family]
        if key not in self._read and network.rows:
            self._read[key] = self._of_rows(network, network.rows())
        elif key not in self._read:
            mean, cov = (read() for read in network.moments[feature])
            dim = len(mean) if self.facts else DIMENSIONS[family][feature]
            require_moments(self.path, mean, cov, dim)
            self._note_precision(network, "mu or sigma", min(mean.dtype, cov.dtype, key=_digits))
            mean, cov = mean.astype(np.float64), cov.astype(np.float64)
            self._read[key] = Statistics(self.n, mean, (cov + cov.T) / 2)
        return self._read[key]

    def _of_rows(self, network: OfNetwork, rows: np.ndarray) -> Statistics:
        require_floats(self.path, "pool_3", rows)
        if len(rows) < 2:
            raise UserError(f"{self.path}: pool_3 has {len(rows)} row(s), a covariance needs 2; "
                            "give another file")  # fmt: skip
        self._note_precision(network, "pool_3", rows.dtype)
        moments, rows = Moments(rows.shape[1]), np.ascontiguousarray(rows, np.float32)
        for start in range(0, len(rows), ROWS_AT_A_TIME):
            moments.add(torch.from_numpy(rows[start : start + ROWS_AT_A_TIME]))
        return Statistics(len(rows), moments.mean(), moments.cov(), rows)

    def _note_precision(self, network: OfNetwork, what: str, dtype: np.dtype) -> None:
        note = f"{self.path}: {what} in {dtype}: such rounding moves a distance by up to 0.7 %"
        if _digits(dtype) < _digits(np.dtype(np.float32)) and note not in network.notes:
            network.notes.append(note)


def read_statistics(path: Path) -> ReferenceFile | None:
    """What statistics a file holds; None if it holds images alone. Only an .npz and a pickle are
    taken; `UserError` for anything else, which is named for what it is."""
    if path.suffix in (".pkl", ".pickle") or what_is(path) == PICKLE:
        require_kind(path, PICKLE)
        return _of_pickle(path, read_pickle(path))
    members = npz_members(path)
    if (meta := _our_meta(path, members)) is not None:
        return _of_ours(path, meta, members)
    moments: dict[str, Arrays] = {}
    for names, feature in INCEPTION_ARRAYS.items():
        if members.issuperset(names) and feature not in moments:
            moments[feature] = _arrays(path, *names, DIMENSIONS["inception"][feature])
    if moments or "pool_3" in members:
        maker, network = _of_moments(path, moments) if moments else _of_features(path)
        return ReferenceFile(path, maker, {"inception": network}, has_images="arr_0" in members)
    if "arr_0" not in members:
        held = ", ".join(sorted(members))[:200] or "nothing"
        raise UserError(f"{path} holds {held}: expected {EXPECTED}")
    return None


def _of_moments(path: Path, moments: dict[str, Arrays]) -> tuple[str, OfNetwork]:
    """mu and sigma of Inception. The names of its arrays show ADM's file; of the others only the
    name of the file may tell who made them."""
    if "spatial" in moments:
        return "the ADM evaluation suite, by the names of its arrays", OfNetwork(TF1, moments)
    maker, resize = named(path.stem) or (UNKNOWN, UNKNOWN)
    maker = maker if maker == UNKNOWN else f"{maker}, by the name of the file"
    network = OfNetwork(resize, moments)
    if resize == UNKNOWN:
        network.notes.append(
            f"{path} does not say what resized its images: pytorch-fid's bilinear and clean-fid's "
            f"bicubic give another FID than the {TF1} here, by 0.08 and more")  # fmt: skip
    elif resize != TF1:
        network.notes.append(f"{path}: its images were resized by {resize}, by the name of the "
                             f"file, the samples by {TF1}: this is neither's FID")  # fmt: skip
    return maker, network


def _of_features(path: Path) -> tuple[str, OfNetwork]:
    """pool_3 of score-based code (score_sde): an Inception of TF-Hub with the weights of 2015."""
    rows = partial(read_array, path, "pool_3", (None, DIMENSIONS["inception"]["pool"]))
    note = (f"{path}: features of TF-Hub's Inception, fed with (x - 127.5) / 127.5 where here it "
            "is (x - 128) / 128; for images of 256 px and more score_sde took another network, "
            "which the file does not show")  # fmt: skip
    maker = "score-based code, by the name pool_3: Inception of TF-Hub"
    return maker, OfNetwork(UNKNOWN, rows=rows, notes=[note])


def _of_ours(path: Path, meta: dict, members: set[str]) -> ReferenceFile:
    """A file of the statistics cache: of any network, which it names."""
    names = {"pool": ("mu", "sigma"), "spatial": ("mu_s", "sigma_s")}
    moments = {feature: _arrays(path, *pair, None) for feature, pair in names.items()
               if members.issuperset(pair)}  # fmt: skip
    network = OfNetwork(str(meta["features"].get("resize", UNKNOWN)), moments)
    n = meta["n"] if type(meta["n"]) is int else None
    networks = {meta["family"]: network}
    return ReferenceFile(path, "this evaluator", networks, n=n, facts=meta["features"])


def _our_meta(path: Path, members: set[str]) -> dict | None:
    """What a file of ours says of itself; None for a `meta` of somebody else's, which may be
    anything."""
    if "meta" not in members:
        return None
    try:
        meta = json.loads(str(read_array(path, "meta", (), kinds="U")))
    except (UserError, ValueError, RecursionError):
        return None
    if not (isinstance(meta, dict) and meta.keys() >= OUR_META):
        return None
    fits = isinstance(meta["features"], dict) and isinstance(meta["family"], str)
    return meta if fits else None


def _arrays(path: Path, mean: str, cov: str, dim: int | None) -> Arrays:
    """Readers of two arrays of an .npz, of this dimension, or of any for None."""
    return partial(read_array, path, mean, (dim,)), partial(read_array, path, cov, (dim, dim))


def _of_pickle(path: Path, content: object) -> ReferenceFile:
    """EDM2's statistics, or mu and sigma alone as EDM has them."""
    held = content if isinstance(content, dict) else {}
    sets = {EDM2[name]: held[name] for name in EDM2 if isinstance(held.get(name), dict)}
    maker = "EDM2, by its form"
    if not sets and {"mu", "sigma"} <= set(held):
        sets, maker = {"inception": held}, "EDM, by its form"
    wrong = not all(isinstance(each.get(name), np.ndarray)
                    for each in sets.values() for name in ("mu", "sigma"))  # fmt: skip
    if wrong or not sets:
        names = ", ".join(map(str, held))[:200]
        what = f"a dict of {names}, but no arrays mu and sigma" if held else "no dict of statistics"
        raise UserError(f"{path} is a Python pickle and holds {what}: expected {EXPECTED}")
    networks = {}
    for family, each in sets.items():
        mean, cov = each["mu"], each["sigma"]
        moments = {"pool": (lambda mean=mean: mean, lambda cov=cov: cov)}
        networks[family] = OfNetwork(
            EDM2_RESIZED[family], moments, notes=[f"{path}: {EDM2_NOTES[family]}"]
        )
    n = held.get("num_images")
    n = n if type(n) is int and n > 0 else None
    return ReferenceFile(path, maker, networks, n=n)


def require_moments(path: Path, mean: np.ndarray, cov: np.ndarray, dim: int) -> None:
    """`UserError` unless these are a mean (dim,) and a covariance (dim, dim), up to rounding."""
    for name, array, shape in (("mu", mean, (dim,)), ("sigma", cov, (dim, dim))):
        if array.shape != shape or not dim:
            raise UserError(f"{path}: {name} has the shape {array.shape}, expected {shape}; give "
                            "another file")  # fmt: skip
        require_floats(path, name, array)
    precision, cov = max(float(np.finfo(cov.dtype).eps), ROUNDING), cov.astype(np.float64)
    if (gap := np.abs(cov - cov.T).max()) > precision * np.abs(cov).max():
        raise UserError(f"{path}: sigma is not symmetric (two entries that should be equal differ "
                        f"by {gap:.3g}), so it is no covariance; give another file")  # fmt: skip
    if (lowest := _lowest_eigenvalue(cov)) < -precision * np.linalg.norm(cov):
        raise UserError(f"{path}: sigma has the eigenvalue {lowest:.3g}, so it is no "
                        "covariance: no variance is negative; give another file")  # fmt: skip


def require_floats(path: Path, name: str, array: np.ndarray) -> None:
    """`UserError` unless all numbers are real, floating and finite."""
    if array.dtype.kind != "f":
        kind = {"c": "complex numbers", "i": "integers", "u": "integers", "b": "true and false"}
        raise UserError(f"{path}: {name} holds {kind.get(array.dtype.kind, array.dtype)}, expected "
                        "real floating numbers; give another file")  # fmt: skip
    if not np.isfinite(array).all():
        raise UserError(f"{path}: {name} holds nan or inf, expected finite numbers; give another "
                        "file")  # fmt: skip


def _lowest_eigenvalue(cov: np.ndarray) -> float:
    """0 for a covariance of full rank, which costs little to see; else the lowest eigenvalue."""
    try:
        np.linalg.cholesky(cov)
        return 0.0
    except np.linalg.LinAlgError:
        return float(np.linalg.eigvalsh(cov)[0])


def _digits(dtype: np.dtype) -> float:
    """Bits of the fraction of a type of floats."""
    return np.finfo(dtype).nmant
