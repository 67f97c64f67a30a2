"""Statistics of reference images that were computed here before, kept on disk."""

import json
import os
import sys
from collections.abc import Callable, Collection
from pathlib import Path
from typing import BinaryIO

import numpy as np

from models.checks.errors import short
from utils.data.base import hash_lines
from utils.evaluation.formulas.frechet import Statistics
from utils.files import reason, write_atomically

# feature of a network: names of its mean and covariance, as in the files of the ADM suite
ARRAYS = {"pool": ("mu", "sigma"), "spatial": ("mu_s", "sigma_s")}
# version of the files; change it with anything that changes their numbers, or what identifies them.
# 2: sets of images are identified by their content, no longer by names and sizes of files
CACHE_SCHEMA = 2


class StatisticsCache:
    """Statistics of one set of images by one network, filed under a hash of both: never stale.

    KEY.npz           mean and covariance, named as in `ARRAYS`; n; floor; meta (JSON)
    KEY.FEATURE.npy   the rows of a feature, where they were needed

    folder: None = nothing is kept. content: fingerprint of the images, n: their number, size: (H,
    W). features, family: `FeatureNet.facts` and `.family`. Only the main process reads and writes.
    What goes wrong is told in a line, and costs no number.
    """

    def __init__(
        self, folder: str | Path | None, content: str, n: int, size: tuple[int, int],
        features: dict, family: str,
    ):  # fmt: skip
        facts = {"schema": CACHE_SCHEMA, "content": content, "n": n, "size": list(size)}
        facts |= {"features": features, "family": family}
        self.meta, self.n = json.dumps(facts, sort_keys=True), n
        self.key = hash_lines([self.meta])[:32]
        self.folder = Path(folder).expanduser() if folder else None

    def load(
        self, features: Collection[str], rows_of: Collection[str]
    ) -> dict[str, Statistics] | None:
        """What was stored, or None unless it is all that is needed now, and whole: with rows for
        `rows_of`, and for any feature whose covariance has not full rank."""
        if self.folder is None or not os.path.lexists(self._path(".npz")):
            return None
        try:
            return self._load(features, rows_of)
        except Exception as error:  # numpy raises anything for a damaged file
            say(f"{self._path('.npz')} is damaged ({short(error, 100)}): computed again")
            return None

    def _load(
        self, features: Collection[str], rows_of: Collection[str]
    ) -> dict[str, Statistics] | None:
        stored = {}
        with np.load(self._path(".npz"), allow_pickle=False) as file:
            if str(file["meta"]) != self.meta:
                raise ValueError("it is of other images or another network")
            for name in features:
                if ARRAYS[name][0] not in file:
                    return None
                mean, cov = (file[array] for array in ARRAYS[name])
                floor = float(file["floor"]) if name == "pool" and "floor" in file else None
                path = self._path(f".{name}.npy")
                rows = np.load(path, allow_pickle=False) if path.is_file() else None
                self._check(mean, cov, rows)
                stored[name] = Statistics(self.n, mean, cov, rows, floor)
                if rows is None and (name in rows_of or stored[name].rank_deficient):
                    return None
        return stored

    def _check(self, mean: np.ndarray, cov: np.ndarray, rows: np.ndarray | None) -> None:
        """`ValueError` unless the arrays fit each other and are finite."""
        dim = len(mean)
        if cov.shape != (dim, dim) or (rows is not None and rows.shape != (self.n, dim)):
            raise ValueError("its arrays do not fit each other")
        if not all(np.isfinite(a).all() for a in (mean, cov, rows) if a is not None):
            raise ValueError("its numbers are not finite")

    def prepare(self) -> None:
        """Before the work: if nothing can be kept here, say so, and keep nothing."""
        if self.folder is None:
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            probe = self._path(f".{os.getpid()}.probe")
            probe.touch()
            probe.unlink()
        except OSError as error:
            self._give_up(error)

    def store(self, statistics: dict[str, Statistics]) -> None:
        if self.folder is None:
            return
        try:
            self._store(statistics)
        except OSError as error:  # a disk that is full: the numbers are there all the same
            self._give_up(error)

    def _store(self, statistics: dict[str, Statistics]) -> None:
        arrays = {"meta": np.array(self.meta), "n": np.array(self.n)}
        for name, each in statistics.items():
            arrays |= dict(zip(ARRAYS[name], (each.mean, each.cov)))
            if each.floor is not None:
                arrays["floor"] = np.array(each.floor)
            if each.rows is not None:
                self._write(f".{name}.npy", lambda file, rows=each.rows: np.save(file, rows))
        self._write(".npz", lambda file: np.savez(file, allow_pickle=False, **arrays))

    def _give_up(self, error: OSError) -> None:
        say(f"the statistics of the reference are not kept in {self.folder} ({reason(error)})")
        self.folder = None

    def _path(self, ending: str) -> Path:
        assert self.folder is not None
        return self.folder / f"{self.key}{ending}"

    def _write(self, ending: str, content: Callable[[BinaryIO], object]) -> None:
        # several runs may store the same statistics at the same time: a draft for each of them
        draft = self._path(f"{ending}.{os.getpid()}")
        write_atomically(draft, content)
        draft.replace(self._path(ending))


def say(text: str) -> None:
    print(f"warning: {text}", file=sys.stderr)
