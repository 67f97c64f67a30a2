"""Pack a data set once, so that training reads raw pixels: no decoding, O(1) access, exact resume.

    python scripts/prepare_data.py SRC OUT --resolution 256

SRC is a folder of class folders (or of images), or the official HDF5 layout (--source hdf5). Images
are cropped as ADM does. Interrupted? Run the same command again: finished shards are kept.

OUT: shard-00000.npy ... (n, R, R, 3) uint8, each with a .json of its keys, labels and skipped
images; plan.json (what OUT was begun with); labels.npy, keys.txt, skipped.txt; last, meta.json.
"""

import argparse
import functools
import hashlib
import json
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import NamedTuple, TypeAlias

import numpy as np
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from models.errors import UserError
from utils.checkpoint import write_atomically
from utils.cli import Parser, positive, run
from utils.data import open_source
from utils.images import CROP_VERSION, UnreadableImageError
from utils.resumable import (
    META,
    PLAN,
    TEXT,
    check_disk,
    check_plan,
    list_keys,
    locked,
    write_json,
    write_lines,
)
from utils.sources import PACKED_FORMAT, FolderSource, Hdf5Source, shard_name

Listed: TypeAlias = FolderSource | Hdf5Source


class Shard(NamedTuple):
    """Images start .. end - 1 of the listing; `path` is its final name."""

    path: Path
    start: int
    end: int

    @property
    def record(self) -> Path:
        return self.path.with_suffix(".json")


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__.split("\n\n")[0])
    parser.add_argument("src", type=Path, help="folder of the source images")
    parser.add_argument("out", type=Path, help="folder to write; not inside SRC")
    parser.add_argument("--resolution", type=positive, default=256, help="pixels (256)")
    parser.add_argument("--source", choices=("folder", "hdf5"), default="folder")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes; 0: none")
    parser.add_argument("--shard-size", type=positive, default=32768, help="images (32768)")
    parser.add_argument("--dry-run", action="store_true", help="check, print the disk need, stop")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    check_places(args.src, args.out)
    print(f"listing {args.src} ...", flush=True)
    source = open_source(args.source, args.src, args.resolution)
    plan = make_plan(source, args)
    check_plan(args.out, plan)
    starts = range(0, len(source), args.shard_size)
    shards = [
        Shard(args.out / shard_name(i), start, min(start + args.shard_size, len(source)))
        for i, start in enumerate(starts)
    ]
    row_bytes = 3 * args.resolution**2
    todo = [shard for shard in shards if not is_finished(shard, row_bytes)]
    check_disk(args.out, sum(shard.end - shard.start for shard in todo) * row_bytes)
    if args.dry_run:
        return 0
    args.out.mkdir(parents=True, exist_ok=True)
    with locked(args.out):
        if todo:
            (args.out / META).unlink(missing_ok=True)
            write_json(args.out / PLAN, plan)
            done = len(source) - sum(shard.end - shard.start for shard in todo)
            pack(source, todo, args.workers, done)
        report = finish(args.out, shards, source, plan)
    print(report)
    return 0


def check_places(src: Path, out: Path) -> None:
    if out.resolve() == src.resolve() or src.resolve() in out.resolve().parents:
        raise UserError(f"OUT {out} lies inside SRC {src}; choose another OUT")
    if out.exists() and not out.is_dir():
        raise UserError(f"OUT {out} is a file; choose another OUT")


def make_plan(source: Listed, args: argparse.Namespace) -> dict:
    """What must not change between two runs that share an OUT."""
    digest = hashlib.sha256()
    for key, label in zip(list_keys(source), source.labels):
        digest.update(f"{key}\t{int(label)}\n".encode(*TEXT))
    for size in source.sizes():
        digest.update(f"{size}\n".encode())
    return {
        "format": PACKED_FORMAT,
        "crop_version": CROP_VERSION,
        "resolution": args.resolution,
        "shard_size": args.shard_size,
        "source": args.source,
        "num_listed": len(source),
        "source_sha256": digest.hexdigest(),
    }


def is_finished(shard: Shard, row_bytes: int) -> bool:
    """The record is written after the pixels, so where it is whole, they are."""
    if not (shard.record.is_file() and shard.path.is_file()):
        return False
    kept = len(json.loads(shard.record.read_text(encoding="utf-8"))["keys"])
    return shard.path.stat().st_size >= kept * row_bytes


# ---- worker side -------------------------------------------------------------------------------

_source: Listed | None = None  # set once per worker: it is too large to travel with every task


def start_worker(source: Listed) -> None:
    set_source(source)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    threading.Thread(target=_die_with_parent, daemon=True).start()


def set_source(source: Listed) -> None:
    global _source
    _source = source
    open_rows.cache_clear()


def _die_with_parent() -> None:
    """An executor's workers would outlive a killed parent."""
    multiprocessing.parent_process().join()
    os._exit(1)


@functools.lru_cache(maxsize=1)
def open_rows(path: str) -> np.ndarray:
    return np.load(path, mmap_mode="r+")


def pack_image(task: tuple[str, int, int]) -> str | None:
    """Write one image into its row of the shard; the reason if it is unreadable, else None."""
    path, row, index = task
    try:
        image, _ = _source[index]
    except UnreadableImageError as error:
        return error.reason
    open_rows(path)[row] = image.permute(1, 2, 0).numpy()
    return None


# ---- parent side -------------------------------------------------------------------------------


def pack(source: Listed, todo: list[Shard], workers: int, done: int) -> None:
    """Write the shards in `todo` one after the other, each with all workers."""
    if workers < 1:
        set_source(source)
        return pack_with(lambda tasks: map(pack_image, tasks), source, todo, done)
    with ProcessPoolExecutor(workers, initializer=start_worker, initargs=(source,)) as pool:
        chunk = max(1, min(32, (todo[0].end - todo[0].start) // (4 * workers)))
        try:
            mapper = functools.partial(pool.map, pack_image, chunksize=chunk)
            pack_with(mapper, source, todo, done)
        except BrokenProcessPool:
            text = f"one of {workers} workers died (out of memory?); run the same command again"
            raise UserError(f"{text}, or with fewer --workers") from None
        except KeyboardInterrupt:
            raise UserError("interrupted; run the same command again to continue") from None
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def pack_with(mapper: Callable, source: Listed, todo: list[Shard], done: int) -> None:
    pace = {"smoothing": 0.05, "mininterval": 0.5 if sys.stderr.isatty() else 30}  # s; 30: logs
    with tqdm(total=len(source), initial=done, unit=" images", **pace) as bar:
        for shard in todo:
            temp = create_rows(shard, source.resolution)
            indices = range(shard.start, shard.end)
            reasons = []
            for reason in mapper([(str(temp), row, i) for row, i in enumerate(indices)]):
                reasons.append(reason)
                bar.update()
            close_shard(shard, temp, source, reasons)


def create_rows(shard: Shard, resolution: int) -> Path:
    """An empty shard under a temporary name; a fresh file, which no left-over worker has open."""
    temp = shard.path.with_suffix(".tmp")
    temp.unlink(missing_ok=True)
    shape = (shard.end - shard.start, resolution, resolution, 3)
    rows = np.lib.format.open_memmap(temp, "w+", np.uint8, shape)
    if hasattr(os, "posix_fallocate"):  # a full disk would else kill the workers that write to it
        with open(temp, "r+b") as file:
            try:
                os.posix_fallocate(file.fileno(), 0, rows.offset + rows.nbytes)
            except OSError as error:
                raise UserError(f"cannot write {temp}: {error.strerror}; free some disk") from error
    return temp


def close_shard(shard: Shard, temp: Path, source: Listed, reasons: list[str | None]) -> None:
    """Close the gaps of unreadable images, make the file durable, give it its name and record."""
    kept = [row for row, reason in enumerate(reasons) if reason is None]
    rows = np.load(temp, mmap_mode="r+")
    for new, old in enumerate(kept):
        if new != old:
            rows[new] = rows[old]
    rows.flush()
    header = {"descr": "|u1", "fortran_order": False, "shape": (len(kept), *rows.shape[1:])}
    with open(temp, "r+b") as file:
        np.lib.format.write_array_header_1_0(file, header)
        assert file.tell() == rows.offset  # numpy pads headers so that the first axis can change
        file.truncate(rows.offset + len(kept) * rows[0].nbytes)
        os.fsync(file.fileno())
    os.replace(temp, shard.path)
    record = {
        "keys": [source.key(shard.start + row) for row in kept],
        "labels": [int(source.labels[shard.start + row]) for row in kept],
        "skipped": [
            [source.key(shard.start + row), " ".join(reason.split())]
            for row, reason in enumerate(reasons)
            if reason is not None
        ],
    }
    write_json(shard.record, record)


def finish(out: Path, shards: list[Shard], source: Listed, plan: dict) -> str:
    """Join the shards' records, write meta.json last, and return the line to print."""
    records = [json.loads(shard.record.read_text(encoding="utf-8")) for shard in shards]
    keys = [key for record in records for key in record["keys"]]
    skipped = [f"{key}\t{reason}" for record in records for key, reason in record["skipped"]]
    write_lines(out / "skipped.txt", skipped)
    if not keys:
        raise UserError(f"none of the {len(source)} images is readable; see {out / 'skipped.txt'}")
    labels = np.array([label for record in records for label in record["labels"]], dtype=np.int64)
    write_atomically(out / "labels.npy", lambda file: np.save(file, labels))
    write_lines(out / "keys.txt", keys)
    lengths = [len(record["keys"]) for record in records]
    counts = {"num_images": len(keys), "num_skipped": len(skipped), "shards": lengths}
    write_json(out / META, plan | counts | {"classes": source.classes})
    size = sum(shard.path.stat().st_size for shard in shards)
    return (
        f"packed {len(keys)} images, {source.num_classes} classes, {len(skipped)} skipped, "
        f"{size} bytes; use: data.source=packed data.path={out} data.resolution={source.resolution}"
    )


if __name__ == "__main__":
    run(main)
