"""Packed data: raw uint8 pixels of images that were cropped once; the reader and the writer.

shard-00000.npy ...            (n, R, R, 3) uint8
shard-00000.json ...           keys, labels and hashes of its images, and those that were skipped
labels.npy keys.txt            (N,) int64, one name a line, in the order of the rows
skipped.txt                    "name<TAB>reason" of each unreadable image
plan.json meta.json            what it was made from, with a hash of that; written last, with the
                               lengths of shards and a hash of all pixels
"""

import functools
import hashlib
import multiprocessing
import os
import signal
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

import numpy as np
import torch
from tqdm import tqdm

from models.checks.errors import UserError, printable
from models.checks.values import RecordError
from utils.data.base import (
    SHOWN_CLASSES,
    Allocator,
    Source,
    content_of,
    image_hashes,
    join_hashes,
)
from utils.data.content import digests
from utils.data.decoding.conversion import PLAIN, Conversion
from utils.data.decoding.oddities import notes_on, watched
from utils.data.images import CROP_VERSION, READ_CROPS, UnreadableImageError, array_to_u8
from utils.data.labels import number_classes
from utils.data.listing import IGNORED
from utils.data.sharded import (
    KEYS,
    META,
    ShardedFolder,
    ShardedRows,
    check_rows,
    load_column,
    load_keys,
    read_header,
    remedy_for_meta,
    shard_file,
)
from utils.files import write_atomically, write_lines
from utils.records import load_record, number

PACKED_FORMAT = "repae-packed-1"
ARRAY = "shard"  # the only array, hence shard-00000.npy
LABELS, SKIPPED = "labels.npy", "skipped.txt"
AGAIN = "run the same prepare_data.py command again"


@dataclass(kw_only=True)
class PackedMeta:
    """What meta.json must hold."""

    format: str
    crop_version: str
    resolution: int = number(at_least=1)
    num_images: int = number(at_least=1)
    shards: list[int] = number(at_least=0)  # images in each
    classes: list[str]
    conversion: Conversion = PLAIN  # of the files that were packed


@dataclass(kw_only=True)
class PackedShard:
    """What the record of a shard holds, of the images in the order of its rows."""

    keys: list[str]
    labels: list[int] = number(at_least=0)
    hashes: list[str]  # sha256 of the pixels
    skipped: list[tuple[str, str]]  # name and reason
    oddities: dict[str, int] = field(default_factory=dict)  # `watched` of its images

    def __post_init__(self) -> None:
        counts = {len(self.keys), len(self.labels), len(self.hashes)}
        if len(counts) > 1:
            text = f"{len(self.keys)} keys, {len(self.labels)} labels and {len(self.hashes)} hashes"
            raise RecordError(text)


class PackedSource(Source):
    """What scripts/prepare_data.py wrote."""

    root: Path
    labels: np.ndarray

    def __init__(self, root: Path, resolution: int, split: str = "all") -> None:
        super().__init__(root, resolution)
        self._again = again = AGAIN
        meta = _read_meta(root)
        asked, self.conversion = self.conversion, meta.conversion
        if asked not in (PLAIN, meta.conversion):
            text = (
                f"{root} was packed with {meta.conversion.describe() or 'the default conversion'}"
            )
            raise UserError(f"{text}, and holds no files to convert: leave {asked.describe()} out, "
                            "or pack again")  # fmt: skip
        if meta.resolution != resolution:
            asked, held = map(self.words.resolution.format, (resolution, meta.resolution))
            raise UserError(
                f"{root} was packed with resolution {meta.resolution}, but {asked} is asked for; "
                f"give {held}, or pack again with scripts/prepare_data.py"
            )
        if sum(meta.shards) != meta.num_images:
            text = f"{root / META}: {sum(meta.shards)} images in shards, num_images"
            raise UserError(f"{text}={meta.num_images}; {again}")
        files = [shard_file(root, ARRAY, shard) for shard in range(len(meta.shards))]
        row = ((resolution, resolution, 3), np.uint8)
        self._rows = ShardedRows(files, meta.shards, row, again)
        labels = load_column(root / LABELS, meta.num_images, np.int64, again)
        self.labels, self.classes, self.notes = number_classes(labels, meta.classes, root / LABELS)
        self._keys: list[str] | None = None

    @classmethod
    def own_resolution(cls, root: Path) -> int:
        """That of meta.json."""
        return _read_meta(root).resolution

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_keys": None}

    def __getitem__(self, i: int) -> tuple[torch.Tensor, int]:
        return array_to_u8(self._rows[i]), int(self.labels[i])

    def read_batch(
        self, indices: Sequence[int], empty: Allocator = torch.empty
    ) -> tuple[list[torch.Tensor], dict[str, str]]:
        """As `Source.read_batch`: every row is copied from its file straight into the batch."""
        rows = empty((len(indices), self.resolution, self.resolution, 3), dtype=torch.uint8)
        self._rows.gather(indices, rows.numpy())
        return [rows.permute(0, 3, 1, 2), torch.from_numpy(self.labels[indices])], {}

    def key(self, i: int) -> str:
        """The image's key in the source that was packed."""
        if self._keys is None:
            self._keys = load_keys(self.root, len(self), self._again)
        return self._keys[i]

    def fingerprint(self) -> str:
        """Of the pixels, as `hash_images` of them, whatever the shards."""
        hashes = hash_shards(self._rows.files, self.resolution)
        return join_hashes((self.resolution, self.resolution), b"".join(hashes))


def hash_shards(files: Sequence[Path], resolution: int) -> list[bytes]:
    """`image_hashes` of each shard; of one that stays the same, they are kept."""
    num_bytes = 3 * resolution**2

    def compute(path: str, tell: Callable[[int], None]) -> bytes:
        found = []
        with open(path, "rb") as file:
            file.seek(read_header(Path(path))[-1])
            while pixels := file.read(num_bytes):
                found.append(hashlib.sha256(pixels).digest())
                tell(num_bytes)
        return b"".join(found)

    return digests(files, f"images of {num_bytes} bytes", compute)


def _read_meta(root: Path) -> PackedMeta:
    """meta.json of packed data; `UserError` if it is absent, or of another format or crop."""
    other = "give the OUT of scripts/prepare_data.py, finished"
    meta = load_record(root / META, PackedMeta, remedy_for_meta(root, PACKED_FORMAT, AGAIN, other))
    for name, read in (("format", (PACKED_FORMAT,)), ("crop_version", READ_CROPS)):
        if (held := getattr(meta, name)) not in read:
            text = f"{root} was packed with {name.replace('_', ' ')} {held}, expected {read[-1]}"
            raise UserError(f"{text}; pack again with scripts/prepare_data.py")
    return meta


def packed_folder(out: Path, source: Source, name: str, shard_size: int) -> ShardedFolder:
    """The folder into which `source`, whose kind is `name`, is packed; nothing is written yet, and
    no image is read: the plan lacks `content_of` the source. `UserError` if the source holds pixels
    already."""
    if source.files() is None:
        given = source.words.source.format(name)
        raise UserError(f"{given} holds pixels already; train on it without packing")
    source.list_keys()  # refuses names that do not fit
    side, num = source.resolution, len(source)
    plan = {"format": PACKED_FORMAT, "crop_version": CROP_VERSION, "resolution": side}
    plan |= {"shard_size": shard_size, "source": name, "num_listed": num}
    plan |= {"conversion": source.conversion.record()}
    rows = {ARRAY: ((side, side, 3), np.uint8)}
    return ShardedFolder(out, plan=plan, num_items=num, shard_size=shard_size, rows=rows)


def pack(source: Source, folder: ShardedFolder, workers: int) -> None:
    """Write the unfinished shards one after the other, each with all worker processes (0 = in this
    process). `UserError` if a worker dies or on Ctrl-C; the same call then continues."""
    if not folder.unfinished():
        return
    if workers < 1:
        _set_source(source)
        return _write_shards(lambda tasks: map(_pack_image, tasks), source, folder)
    with ProcessPoolExecutor(workers, initializer=_start_worker, initargs=(source,)) as pool:
        chunk = max(1, min(32, folder.shard_size // (4 * workers)))
        try:
            _write_shards(functools.partial(pool.map, _pack_image, chunksize=chunk), source, folder)
        except BrokenProcessPool:
            text = f"one of {workers} workers died (out of memory?); run the same command again"
            raise UserError(f"{text}, or with fewer --workers") from None
        except KeyboardInterrupt:
            raise UserError("interrupted; run the same command again to continue") from None
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _write_shards(mapper: Callable, source: Source, folder: ShardedFolder) -> None:
    todo = folder.unfinished()
    done = len(source) - sum(len(folder.items(shard)) for shard in todo)
    pace = {"smoothing": 0.05, "mininterval": 0.5 if sys.stderr.isatty() else 30}  # s; 30: logs
    with tqdm(total=len(source), initial=done, unit=" images", **pace) as bar:
        for shard in todo:
            path = folder.draft(shard)[ARRAY].filename
            tasks = [(path, *task) for task in enumerate(folder.items(shard))]
            record = {"keys": [], "labels": [], "hashes": [], "skipped": []}
            kept, found = [], Counter()
            for (_, row, i), (sha256, reason, oddities) in zip(tasks, mapper(tasks)):
                if sha256:
                    found += oddities
                    kept.append(row)
                    record["keys"].append(source.key(i))
                    record["labels"].append(source.label(i))
                    record["hashes"].append(sha256)
                else:
                    record["skipped"].append([source.key(i), " ".join(reason.split())])
                bar.update()
            folder.seal(shard, record | {"oddities": found}, kept)


def finish_packing(folder: ShardedFolder, source: Source) -> str:
    """Join the records of all shards, write meta.json last, and return a summary to print.
    `UserError` if the source has changed since, or a shard does not hold what was written there."""
    folder.require_unchanged(content_of(source))
    out, records = folder.folder, folder.records(PackedShard)
    keys, labels, hashes, skipped = (
        [item for record in records for item in getattr(record, name)]
        for name in ("keys", "labels", "hashes", "skipped")
    )
    _check_shards(folder, records, source.resolution)
    write_lines(out / SKIPPED, [f"{key}\t{reason}" for key, reason in skipped])
    if not keys:
        first = f"{printable(skipped[0][0])}: {skipped[0][1]}"
        text = f"none of the {len(source)} images is readable (the first, {first})"
        raise UserError(f"{text}; see {out / SKIPPED}")
    number_classes(np.array(labels), source.classes, out)  # refuses other classes
    write_atomically(out / LABELS, lambda file: np.save(file, np.array(labels, dtype=np.int64)))
    write_lines(out / KEYS, keys)
    oddities = sum((Counter(record.oddities) for record in records), Counter())
    lengths = [len(record.keys) for record in records]
    counts = {"num_images": len(keys), "num_skipped": len(skipped), "shards": lengths}
    counts["oddities"] = dict(oddities)
    size = (source.resolution, source.resolution)
    counts["pixels_sha256"] = join_hashes(size, bytes.fromhex("".join(hashes)))
    folder.finish(folder.plan | counts | {"classes": list(source.classes)})
    size = sum(folder.file(ARRAY, shard).stat().st_size for shard in range(folder.num_shards))
    notes = notes_on(oddities, len(keys), source.conversion)
    return "\n".join([
        *(f"note: {note}" for note in [*notes, *_notes_on_absent(source, labels, out)]),
        f"packed {len(keys)} images, {source.num_classes} classes, {len(skipped)} skipped, "
        f"{size} bytes; use: data.source=packed data.path={out} data.resolution={source.resolution}"
    ])  # fmt: skip


def _notes_on_absent(source: Source, labels: Sequence[int], out: Path) -> Iterator[str]:
    """What was not packed: classes, files that are no pictures by their names."""
    packed = set(labels)
    if absent := [name for label, name in enumerate(source.classes) if label not in packed]:
        what = "1 class" if len(absent) == 1 else f"{len(absent)} classes"
        names = ", ".join(map(printable, absent[:SHOWN_CLASSES]))
        yield f"no picture of {what} can be read: {names}; see {out / SKIPPED}"
    yield from (note for note in source.notes if note.startswith(IGNORED))


def _check_shards(folder: ShardedFolder, records: Sequence[PackedShard], side: int) -> None:
    """Read all shards back, those that have changed or were not read yet. `UserError` for one that
    is not what its record says."""
    files, (row, dtype) = [folder.file(ARRAY, i) for i in range(len(records))], folder.row(ARRAY)

    def refuse(shard: int, why: object) -> NoReturn:
        again = f"delete {folder.record_file(shard).name} and run the same command again"
        raise UserError(f"{files[shard]} {why}; {again}")

    for shard, record in enumerate(records):
        try:
            check_rows(files[shard], (len(record.keys), *row), dtype)
        except ValueError as error:
            refuse(shard, error)
    for shard, found in enumerate(hash_shards(files, side)):
        if found.hex() != "".join(records[shard].hashes):
            refuse(shard, "holds other pixels than were packed")


_source: Source | None = None  # set once per worker: it is too large to travel with every task


def _start_worker(source: Source) -> None:
    _set_source(source)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    threading.Thread(target=_die_with_parent, daemon=True).start()


def _set_source(source: Source) -> None:
    global _source
    _source = source
    _open_rows.cache_clear()


def _die_with_parent() -> None:
    """An executor's workers would outlive a killed parent."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


@functools.lru_cache(maxsize=1)
def _open_rows(path: str) -> np.ndarray:
    return np.load(path, mmap_mode="r+")


def _pack_image(task: tuple[str, int, int]) -> tuple[str, str, Counter[str]]:
    """Write image `index` into row `row` of the array at `path`; returns the sha256 of its pixels
    and "", or "" and why it is unreadable; and what is odd about it."""
    path, row, index = task
    try:
        assert _source is not None
        with watched() as oddities:
            image, _ = _source[index]
    except UnreadableImageError as error:
        return "", error.reason, Counter()
    pixels = image.permute(1, 2, 0).numpy()
    _open_rows(path)[row] = pixels
    return image_hashes(pixels).hex(), "", oddities
