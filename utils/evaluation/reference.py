"""What samples are measured against: images, or statistics that somebody computed before.

An ADM .npz holds `mu, sigma` (pool) and `mu_s, sigma_s` (spatial) of the whole training set, and in
`arr_0` the 10,000 images that precision and recall use. Any other reference is images; their
statistics are computed once and kept on disk.
"""

import hashlib
import json
import os
import sys
from collections.abc import Callable, Collection
from pathlib import Path
from typing import BinaryIO

import numpy as np

from models.errors import UserError
from utils.cli import expand_path
from utils.data.base import hash_lines
from utils.distributed import Ranks
from utils.evaluation.formulas.frechet import Statistics
from utils.evaluation.images.image_sets import ImageSet, open_images
from utils.evaluation.images.npz_images import npz_members, read_array, readable
from utils.evaluation.networks import FeatureNet
from utils.evaluation.options import Options
from utils.evaluation.statistics import collect
from utils.files import write_atomically

# feature of a network: names of its mean and covariance in the .npz files of the ADM suite
ADM_ARRAYS = {"pool": ("mu", "sigma"), "spatial": ("mu_s", "sigma_s")}
# dimensions of the features in a file of statistics, which are Inception's
INCEPTION_DIMS = {"pool": 2048, "spatial": 2023}
# reference images whose rows are held in memory
MAX_ROWS = 100_000
# version of the files in the cache; change it with anything that changes their numbers
CACHE_SCHEMA = 1


class Reference:
    """A reference set: images, or statistics in a file, or both (ADM's file).

    images   the images; None if there are only statistics
    in_file  names of the features whose statistics are in the file
    facts    what the record says of the reference; `statistics` adds to it
    """

    def __init__(self, spec, resolution: int = 256):
        spec = Path(expand_path(str(spec))) if isinstance(spec, str | Path) else spec
        is_npz = isinstance(spec, Path) and spec.suffix == ".npz" and not spec.is_dir()
        members = npz_members(spec) if is_npz else set()
        self.in_file = {name for name, arrays in ADM_ARRAYS.items() if members.issuperset(arrays)}
        self.path = spec if self.in_file else None
        only_statistics = self.in_file and "arr_0" not in members
        self.images = None if only_statistics else open_images(spec, resolution)
        self.name = self.images.name if self.images else str(spec)
        self.facts: dict = {"name": self.name}

    def missing(self, feature: str, rows: bool) -> str | None:
        """Why the statistics of a feature, or its rows, cannot be had; None if they can."""
        if self.images is not None:
            if rows and len(self.images) > MAX_ROWS:
                return (f"{self.name} has {len(self.images)} images, and what compares single ones "
                        f"takes at most {MAX_ROWS}: give ADM's 10,000")  # fmt: skip
            return None
        if rows:
            return f"{self.name} holds no images (arr_0)"
        if feature not in self.in_file:
            return f"{self.name} holds neither {' and '.join(ADM_ARRAYS[feature])} nor images"
        return None

    def statistics(
        self, net: FeatureNet, features: Collection[str], ranks: Ranks, options: Options, *,
        rows_of: Collection[str], progress: Callable[[int], None] | None = None,
    ) -> dict[str, Statistics]:  # fmt: skip
        """Statistics by feature, in the order of `features`, the same on every rank; from the file,
        the cache or the images; with rows for `rows_of`, always from the images. Complete on the
        main process alone."""
        from_file = self._read_file(net, features)
        to_compute = [name for name in features if name not in from_file or name in rows_of]
        if not to_compute:
            return from_file
        computed = self._of_images(net, to_compute, ranks, options, rows_of, progress)
        for name in from_file.keys() & computed.keys():
            from_file[name].rows = computed[name].rows
        return computed | from_file

    def check_file(self, net: FeatureNet, features: Collection[str]) -> None:
        """`UserError` if there is a file of statistics that does not fit this network."""
        if self.path is not None:
            self._read_file(net, features)

    def _read_file(self, net: FeatureNet, features: Collection[str]) -> dict[str, Statistics]:
        """The file's statistics, if they are of this network."""
        usable = [name for name in features if name in self.in_file and net.family == "inception"]
        if not usable and self.images is None:
            raise UserError(f"{self.path} holds statistics of Inception features and no images: it "
                            f"cannot serve {net.label}; give images")  # fmt: skip
        if not usable:
            return {}
        assert self.path is not None
        members, n = npz_members(self.path), None
        if "meta" in members:
            # a file of ours says which network it is of; ADM's does not, and is Inception's
            with readable(self.path), np.load(self.path, allow_pickle=False) as file:
                stated = json.loads(str(file["meta"]))["features"]
            if stated != net.facts:
                raise UserError(f"{self.path} holds statistics of {stated}, but the features are "
                                f"{net.facts}; give images, or statistics of the same network"
                                )  # fmt: skip
        if "n" in members:
            n = int(read_array(self.path, "n", ()))
        arrays = {name: self._read_moments(name) for name in usable}
        digest = hashlib.sha256(b"".join(a.tobytes() for pair in arrays.values() for a in pair))
        self.facts |= {"statistics": "from the file", "statistics_sha256": digest.hexdigest()}
        return {name: Statistics(n, mean, cov) for name, (mean, cov) in arrays.items()}

    def _read_moments(self, feature: str) -> tuple[np.ndarray, np.ndarray]:
        """Mean and covariance of a feature in the file; `UserError` if they cannot be that."""
        assert self.path is not None
        dim, names = INCEPTION_DIMS[feature], ADM_ARRAYS[feature]
        shapes = ((dim,), (dim, dim))
        mean, cov = (read_array(self.path, a, s).astype("f8") for a, s in zip(names, shapes))
        if not (np.isfinite(mean).all() and np.isfinite(cov).all()):
            raise UserError(f"{self.path}: {' or '.join(names)} is not finite; give another file")
        if not np.allclose(cov, cov.T, atol=1e-6) or cov.diagonal().min() < 0:
            raise UserError(f"{self.path}: {names[1]} is no covariance (it is not symmetric, or "
                            "has a negative variance); give another file")  # fmt: skip
        return mean, cov

    def _of_images(self, net, features, ranks, options, rows_of, progress) -> dict[str, Statistics]:
        """Statistics of the images, from the cache or computed now."""
        images = self.images
        assert images is not None
        content = ranks.on_main(images.fingerprint)
        cache = StatisticsCache(options.cache, images, net, content)
        stored = cache.load(features, rows_of) if ranks.is_main else None
        hit = ranks.on_main(lambda: stored is not None)
        self.facts |= {
            "n": len(images), "size": list(images.size), "content_sha256": content,
            "cache_key": cache.key, "cache": "hit" if hit else "computed now",
        }  # fmt: skip
        if hit:
            return stored or {}
        computed = collect(
            images, net, features, ranks, batch_size=options.batch_size, rows_of=rows_of,
            halves=not net.published, progress=progress,
        )  # fmt: skip
        if ranks.is_main:
            cache.store(computed)
        return computed


class StatisticsCache:
    """Statistics of one set of images by one network, filed under a hash of both: never stale.
    `folder` None: nothing is kept. The main process alone reads and writes.

    KEY.npz           mean and covariance, named as in `ADM_ARRAYS`; n; floor; meta (JSON)
    KEY.FEATURE.npy   the rows of a feature, where they were needed
    """

    def __init__(self, folder: str | Path | None, images: ImageSet, net: FeatureNet, content: str):
        facts = {"schema": CACHE_SCHEMA, "content": content, "n": len(images)}
        facts |= {"size": list(images.size), "features": net.facts, "family": net.family}
        self.meta, self.n = json.dumps(facts, sort_keys=True), len(images)
        self.key = hash_lines([self.meta])[:32]
        self.folder = Path(folder).expanduser() if folder else None

    def load(
        self, features: Collection[str], rows_of: Collection[str]
    ) -> dict[str, Statistics] | None:
        """What was stored, or None unless it is all that is needed now, and whole: with rows for
        `rows_of`, and for any feature whose covariance has not full rank."""
        if self.folder is None or not self._path(".npz").is_file():
            return None
        try:
            stored = self._load(features, rows_of)
        except Exception:  # numpy raises anything for a damaged file, which is then made again
            return None
        parts = [a for each in (stored or {}).values() for a in (each.mean, each.cov, each.rows)]
        finite = all(np.isfinite(array).all() for array in parts if array is not None)
        return stored if finite else None

    def _load(
        self, features: Collection[str], rows_of: Collection[str]
    ) -> dict[str, Statistics] | None:
        stored = {}
        with np.load(self._path(".npz"), allow_pickle=False) as file:
            if str(file["meta"]) != self.meta:
                return None
            for name in features:
                if ADM_ARRAYS[name][0] not in file:
                    return None
                mean, cov = (file[array] for array in ADM_ARRAYS[name])
                floor = float(file["floor"]) if name == "pool" and "floor" in file else None
                path = self._path(f".{name}.npy")
                rows = np.load(path, allow_pickle=False) if path.is_file() else None
                dim = len(mean)
                if cov.shape != (dim, dim) or (rows is not None and rows.shape != (self.n, dim)):
                    return None
                stored[name] = Statistics(self.n, mean, cov, rows, floor)
                if rows is None and (name in rows_of or stored[name].rank_deficient):
                    return None
        return stored

    def store(self, statistics: dict[str, Statistics]) -> None:
        if self.folder is None:
            return
        try:
            self._store(self.folder, statistics)
        except OSError as error:  # a full disk or no right: the numbers are there all the same
            print(f"warning: the statistics of the reference are not kept in {self.folder} "
                  f"({error.strerror})", file=sys.stderr)  # fmt: skip

    def _store(self, folder: Path, statistics: dict[str, Statistics]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        arrays = {"meta": np.array(self.meta), "n": np.array(next(iter(statistics.values())).n)}
        for name, each in statistics.items():
            arrays |= dict(zip(ADM_ARRAYS[name], (each.mean, each.cov)))
            if each.floor is not None:
                arrays["floor"] = np.array(each.floor)
            if each.rows is not None:
                self._write(f".{name}.npy", lambda file, rows=each.rows: np.save(file, rows))
        self._write(".npz", lambda file: np.savez(file, allow_pickle=False, **arrays))

    def _path(self, ending: str) -> Path:
        assert self.folder is not None
        return self.folder / f"{self.key}{ending}"

    def _write(self, ending: str, content: Callable[[BinaryIO], object]) -> None:
        # several runs may store the same statistics at the same time: a draft for each of them
        draft = self._path(f"{ending}.{os.getpid()}")
        write_atomically(draft, content)
        draft.replace(self._path(ending))
