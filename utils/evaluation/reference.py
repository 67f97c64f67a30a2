"""What samples are measured against: images, or statistics that somebody computed before.

ADM's .npz holds statistics of the whole training set, and in `arr_0` the 10,000 images that
precision and recall use. Any other reference is one or the other; the statistics of images are
computed once and kept on disk.
"""

import hashlib
from collections.abc import Collection
from pathlib import Path

from models.checks.errors import UserError
from models.checks.file_kinds import PICKLE, what_is
from utils.cli import expand_path
from utils.data.content import file_sha256
from utils.distributed import Ranks
from utils.evaluation.formulas.frechet import Statistics
from utils.evaluation.images.image_sets import open_images
from utils.evaluation.images.npz_images import NPZ
from utils.evaluation.networks import FeatureNet
from utils.evaluation.options import Options
from utils.evaluation.references.cache import ARRAYS, StatisticsCache
from utils.evaluation.references.files import read_statistics
from utils.evaluation.references.known import KNOWN
from utils.evaluation.statistics import Progress, collect

LABELS = {"inception": "Inception", "dinov2": "DINOv2"}
# reference images whose rows are held in memory
MAX_ROWS = 100_000


class Reference:
    """A reference set: images, or statistics in a file, or both (ADM's file).

    images   the images; None if there are only statistics
    file     the file of statistics; None if there is none
    facts    what the record says of the reference; `statistics` adds to it
    """

    def __init__(self, spec, resolution: int = 256):
        spec = Path(expand_path(str(spec))) if isinstance(spec, str | Path) else spec
        statistics = isinstance(spec, Path) and _may_hold_statistics(spec)
        self.file = read_statistics(spec) if statistics else None
        only_statistics = self.file is not None and not self.file.has_images
        self.images = None if only_statistics else open_images(spec, resolution)
        self.name = self.images.name if self.images else str(spec)
        self.facts: dict = {"name": self.name}
        self._found: dict[tuple, dict[str, Statistics]] = {}

    def notes(self, family: str) -> list[str]:
        """What a reader of the numbers must know of the images, or of the file's statistics of a
        network."""
        if self.images is not None:
            return [f"reference: {note}" for note in self.images.notes]
        networks = self.file.networks if self.file else {}
        return networks[family].notes if family in networks else []

    def missing(self, family: str, feature: str, rows: bool) -> str | None:
        """Why the statistics of a feature of a network, or its rows, cannot be had; None if they
        can. `UserError` if there is nothing at all for this network."""
        if self.images is not None:
            if rows and len(self.images) > MAX_ROWS:
                return (f"{self.name} has {len(self.images)} images, and what compares single ones "
                        f"takes at most {MAX_ROWS}: give ADM's 10,000")  # fmt: skip
            return None
        assert self.file is not None
        if not self.file.features(family):
            held = " and ".join(LABELS.get(each, each) for each in self.file.networks)
            raise UserError(f"{self.name} holds statistics of {held} features and no images: it "
                            f"cannot serve {family}; give images")  # fmt: skip
        if feature not in self.file.features(family):
            return f"{self.name} holds neither {' and '.join(ARRAYS[feature])} nor images"
        if rows and not self.file.has_rows(family):
            return f"{self.name} holds no images (arr_0)"
        return None

    def statistics(
        self, net: FeatureNet, features: Collection[str], ranks: Ranks, options: Options, *,
        rows_of: Collection[str], progress: Progress | None = None,
    ) -> dict[str, Statistics]:  # fmt: skip
        """Statistics by feature, in the order of `features`, the same on every rank; from the file,
        the cache or the images; with rows for `rows_of`. Complete on the main process alone. A
        further call for the same ones, by the same network, gives them again."""
        key = (net.label, tuple(features), frozenset(rows_of))
        if key not in self._found:
            self._found[key] = self._find(net, features, ranks, options, rows_of, progress)
        return self._found[key]

    def _find(self, net, features, ranks, options, rows_of, progress) -> dict[str, Statistics]:
        from_file = self._read_file(net, features)
        if from_file:
            ranks.on_main(lambda: self._describe_file(net.family, from_file))
        to_compute = [name for name in features if name not in from_file
                      or (name in rows_of and from_file[name].rows is None)]  # fmt: skip
        if not to_compute:
            return from_file
        computed = self._of_images(net, to_compute, ranks, options, rows_of, progress)
        for name in from_file.keys() & computed.keys():
            from_file[name].rows = computed[name].rows
        return computed | from_file

    def check_file(self, net: FeatureNet, features: Collection[str]) -> None:
        """`UserError` if there is a file of statistics that does not fit this network."""
        self._read_file(net, features)

    def _read_file(self, net: FeatureNet, features: Collection[str]) -> dict[str, Statistics]:
        """The file's statistics, if they are of this network."""
        if self.file is None:
            return {}
        usable = [name for name in features if name in self.file.features(net.family)]
        # a file of ours says which network it is of; others are of the published ones
        if usable and self.file.facts not in (None, net.facts):
            raise UserError(f"{self.file.path} holds statistics of {self.file.facts}, but the "
                            f"features are {net.facts}; give images, or statistics of the same "
                            "network")  # fmt: skip
        return {name: self.file.statistics(net.family, name) for name in usable}

    def _describe_file(self, family: str, statistics: dict[str, Statistics]) -> None:
        """Add to `facts` what is known of the file, by its hash or else by its form."""
        assert self.file is not None
        moments = [array for each in statistics.values() for array in (each.mean, each.cov)]
        digest = hashlib.sha256(b"".join(array.tobytes() for array in moments))
        sha256 = file_sha256(self.file.path)
        known = KNOWN.get(sha256)
        self.facts |= {
            "statistics": "from the file", "statistics_sha256": digest.hexdigest(),
            "file_sha256": sha256, "published_as": known and known.name,
            "made_by": known.made_by if known else self.file.made_by,
            "resized_by": known.resized_by if known else self.file.networks[family].resized_by,
        }  # fmt: skip
        for each in statistics.values():
            each.n = known.n if known else each.n
        if next(iter(statistics.values())).n is not None:
            self.facts["n_statistics"] = next(iter(statistics.values())).n

    def _of_images(self, net, features, ranks, options, rows_of, progress) -> dict[str, Statistics]:
        """Statistics of the images, from the cache or computed now."""
        images = self.images
        assert images is not None
        content = ranks.on_main(images.fingerprint)
        cache = StatisticsCache(
            options.cache, content, len(images), images.size, net.facts, net.family
        )
        stored = cache.load(features, rows_of) if ranks.is_main else None
        hit = ranks.on_main(lambda: stored is not None)
        self.facts |= {
            "n": len(images), "size": list(images.size), "content_sha256": content,
            "cache_key": cache.key, "cache": "hit" if hit else "computed now",
        }  # fmt: skip
        if hit:
            return stored or {}
        if ranks.is_main:
            cache.prepare()
        computed = collect(
            images, net, features, ranks, batch_size=options.batch_size, rows_of=rows_of,
            groups={"pool": 1 if net.published else 2}, workers=options.workers, progress=progress,
        )  # fmt: skip
        if ranks.is_main:
            cache.store(computed)
        return computed


def _may_hold_statistics(path: Path) -> bool:
    """Whether a path is of the kinds of files that statistics stand in, by its name or content."""
    return path.suffix in (".npz", ".pkl", ".pickle") or what_is(path) in (NPZ, PICKLE)
