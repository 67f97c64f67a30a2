"""What samples are measured against: images, or statistics that somebody computed before.

An ADM .npz brings `mu, sigma` (pool) and `mu_s, sigma_s` (spatial) of the whole training set, and
in `arr_0` the 10,000 images that precision and recall use. Everything else is images, whose
statistics are computed once and kept on disk under a hash of content and network.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np

from models.errors import UserError
from utils.feature_stats import Ranks, Statistics, collect
from utils.features import FeatureNet
from utils.image_sets import ImageSet, hash_lines, open_images
from utils.npz_images import npz_members, readable

SCHEMA = 1  # of the cache files; change it with anything that changes their numbers
ADM_KEYS = {"pool": ("mu", "sigma"), "spatial": ("mu_s", "sigma_s")}
MAX_ROWS = 100_000  # reference images for precision/recall: rows are held in memory


class Reference:
    """A reference set: `images`, or `external` statistics in a file, or both (ADM's file)."""

    def __init__(self, spec, resolution: int = 256):
        is_npz = isinstance(spec, str | Path) and Path(spec).suffix == ".npz"
        members = npz_members(Path(spec)) if is_npz else set()
        self.external = {key for key, names in ADM_KEYS.items() if members.issuperset(names)}
        self.path = Path(spec) if self.external else None
        only_statistics = self.external and "arr_0" not in members
        self.images = None if only_statistics else open_images(spec, resolution)
        self.name = self.images.name if self.images else str(spec)
        self.facts: dict = {"name": self.name}

    def has(self, key: str) -> bool:
        """Whether a feature's statistics can be had at all."""
        return self.images is not None or key in self.external

    def statistics(
        self,
        net: FeatureNet,
        keys: Iterable[str],
        ranks: Ranks,
        *,
        need_rows: bool,
        batch_size: int,
        cache: str | Path | None,
        progress: Callable[[int], None] | None = None,
    ) -> dict[str, Statistics]:
        """Statistics for `net` by feature, from file, cache or images; rank 0's are complete."""
        external = self._external(net, keys)
        wanted = [key for key in keys if key not in external or (need_rows and key == "pool")]
        found = {}
        if wanted:
            if need_rows and len(self.images) > MAX_ROWS:
                raise UserError(
                    f"precision/recall against {len(self.images)} reference images: at most "
                    f"{MAX_ROWS}; give ADM's 10,000"
                )
            found = self._of_images(net, wanted, ranks, need_rows, batch_size, cache, progress)
        for key, statistics in external.items():
            statistics.rows = found[key].rows if key in found else None
        return found | external

    def _external(self, net: FeatureNet, keys: Iterable[str]) -> dict[str, Statistics]:
        """The file's statistics, if they are of this network."""
        usable = [key for key in keys if key in self.external and net.family == "inception"]
        if not usable:
            if self.images is None:
                raise UserError(
                    f"{self.path} holds statistics of Inception features and no images: it cannot "
                    f"serve {net.label}; give images"
                )
            return {}
        with readable(self.path), np.load(self.path, allow_pickle=False) as file:
            _check_network(self.path, file, net)
            n = int(file["n"]) if "n" in file else None
            found = {key: [np.float64(file[name]) for name in ADM_KEYS[key]] for key in usable}
        digest = hashlib.sha256(b"".join(a.tobytes() for pair in found.values() for a in pair))
        self.facts |= {"statistics": "from the file", "statistics_sha256": digest.hexdigest()}
        for key, (mean, cov) in found.items():
            _check_shapes(self.path, key, mean, cov)
        return {key: Statistics(n, mean, cov) for key, (mean, cov) in found.items()}

    def _of_images(self, net, keys, ranks, need_rows, batch_size, cache, progress):
        content = ranks.on_main(self.images.fingerprint)
        store = Cache(cache, self.images, net, content)
        held = store.load(keys, need_rows) if ranks.is_main else None
        hit = ranks.on_main(lambda: held is not None)
        self.facts |= {
            "n": len(self.images),
            "size": list(self.images.size),
            "content_sha256": content,
            "cache_key": store.key,
            "cache": "hit" if hit else "computed now",
        }
        if hit:
            return held or {}
        found = collect(
            self.images, net, keys, ranks, batch_size=batch_size, keep_rows=need_rows,
            halves=not net.published, progress=progress,
        )  # fmt: skip
        if ranks.is_main:
            store.store(found)
        return found


def _check_network(path: Path, file, net: FeatureNet) -> None:
    """A file of ours says which network it is of; ADM's does not and is taken on trust."""
    if "meta" not in file:
        return
    stated = json.loads(str(file["meta"])).get("features")
    if stated != net.facts:
        raise UserError(f"{path} holds statistics of {stated}, but the features are {net.facts}; "
                        "give images, or statistics of the same network")  # fmt: skip


def _check_shapes(path: Path, key: str, mean: np.ndarray, cov: np.ndarray) -> None:
    dim = {"pool": 2048, "spatial": 2023}[key]
    if mean.shape != (dim,) or cov.shape != (dim, dim):
        raise UserError(f"{path}: {ADM_KEYS[key]} have shapes {mean.shape}, {cov.shape}, expected "
                        f"({dim},), ({dim}, {dim}); give ADM's file")  # fmt: skip


class Cache:
    """Statistics of references on disk, under a hash of content and network: never stale.

    `KEY.npz` holds mu, sigma, mu_s, sigma_s as the ADM suite names them, and `meta` (JSON);
    `KEY.pool.npy` the feature rows where they were needed. Only rank 0 reads and writes.
    """

    def __init__(self, folder: str | Path | None, images: ImageSet, net: FeatureNet, content: str):
        facts = {"schema": SCHEMA, "content": content, "n": len(images), "size": list(images.size)}
        facts |= {"features": net.facts, "family": net.family}
        self.meta = json.dumps(facts, sort_keys=True)
        self.key = hash_lines([self.meta])[:32]
        self.folder = Path(folder).expanduser() if folder else None

    def path(self, ending: str) -> Path:
        return self.folder / f"{self.key}{ending}"

    def load(self, keys: Iterable[str], need_rows: bool) -> dict[str, Statistics] | None:
        """What was stored, or None if it does not hold all that is needed now."""
        if self.folder is None or not self.path(".npz").is_file():
            return None
        with np.load(self.path(".npz"), allow_pickle=False) as file:
            assert str(file["meta"]) == self.meta, self.path(".npz")
            if any(ADM_KEYS[key][0] not in file for key in keys):
                return None
            found = {key: self._read(file, key) for key in keys}
        wanting = {key for key, s in found.items() if s.rank_deficient}
        wanting |= {"pool"} if need_rows else set()
        return None if any(found[key].rows is None for key in wanting) else found

    def _read(self, file, key: str) -> Statistics:
        mean, cov = (file[name] for name in ADM_KEYS[key])
        floor = float(file["floor"]) if key == "pool" and "floor" in file else None
        rows = self.path(f".{key}.npy")
        return Statistics(
            int(file["n"]), mean, cov, np.load(rows) if rows.is_file() else None, floor
        )

    def store(self, found: dict[str, Statistics]) -> None:
        """Write and rename: a reader sees a whole file or none."""
        if self.folder is None:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        arrays = {"meta": np.array(self.meta), "n": np.array(next(iter(found.values())).n)}
        for key, statistics in found.items():
            arrays |= dict(zip(ADM_KEYS[key], (statistics.mean, statistics.cov)))
            if statistics.floor is not None:
                arrays["floor"] = np.array(statistics.floor)
            if statistics.rows is not None:
                _write(self.path(f".{key}.npy"), lambda f, s=statistics: np.save(f, s.rows))
        _write(self.path(".npz"), lambda f: np.savez(f, **arrays))


def _write(path: Path, save: Callable) -> None:
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    with open(temporary, "wb") as file:
        save(file)
    os.replace(temporary, path)
