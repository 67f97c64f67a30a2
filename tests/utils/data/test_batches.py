"""A batch that is read at once holds the same bits as its items, and each image is copied once."""

import json
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from models.checks.errors import UserError
from tests.utils.data.pictures import fill
from tests.utils.data.test_sources import H5_LABELS, H5_NAMES, official_h5, pack_by_hand
from utils.data.base import BadImages, Source, collate
from utils.data.images import CROP_VERSION
from utils.data.latents import (
    CACHE_FORMAT,
    CachedFeatures,
    CachedSource,
    CacheMeta,
    LatentCache,
    cache_rows,
    checksum,
)
from utils.data.registry import open_source
from utils.data.sampling import StepSampler, make_loader, shared_empty
from utils.data.sharded import ShardedRows, shard_file
from utils.data.sources.hdf5 import Hdf5Source


def cache_by_hand(
    root: Path, source: Source, lengths: tuple[int, ...], broken: tuple[int, ...] = ()
) -> LatentCache:
    """Random latents and features of the images of `source`, two copies, in reversed order."""
    root.mkdir()
    order, rng = range(len(source))[::-1], np.random.default_rng(0)
    features = [CachedFeatures(name="e", weights="random", shape=(5, 6))]
    meta = CacheMeta(
        format=CACHE_FORMAT, crop_version=CROP_VERSION, vae="v", vae_sha256="0", resolution=8,
        num_images=len(order), copies=2, latent_shape=(4, 2, 2), shards=[*lengths],
        mean=[0.0] * 4, std=[1.0] * 4, encoders=features,
    )  # fmt: skip
    for array, (shape, dtype) in cache_rows(asdict(meta)).items():
        for shard, length in enumerate(lengths):
            rows = rng.normal(size=(length, *shape)).astype(dtype)
            np.save(shard_file(root, array, shard), rows)
    (root / "keys.txt").write_text("".join(f"{source.key(i)}\n" for i in order))
    sums = [0 if i in broken else checksum(source[i][0]) for i in order]
    np.save(root / "checksums.npy", np.array(sums, np.uint32))
    (root / "meta.json").write_text(json.dumps(asdict(meta)))
    return LatentCache(root)


def test_latents_of_the_first_crop_are_read_and_of_another_one_refused(tmp_path):
    cache = cache_by_hand(tmp_path / "c", packed(tmp_path), (9,))
    meta = json.loads((path := tmp_path / "c/meta.json").read_text())
    path.write_text(json.dumps(meta | {"crop_version": "adm-center-crop-1"}))
    assert len(LatentCache(tmp_path / "c")) == len(cache)
    path.write_text(json.dumps(meta | {"crop_version": "other"}))
    with pytest.raises(UserError, match="other"):
        LatentCache(tmp_path / "c")


def packed(tmp_path: Path) -> Source:
    pack_by_hand(tmp_path / "p", lengths=(3, 0, 2, 4))
    return open_source("packed", tmp_path / "p", 8)


def cached(tmp_path: Path, features: bool, pixels: bool) -> Source:
    source = packed(tmp_path)
    return CachedSource(source, cache_by_hand(tmp_path / "c", source, (4, 5)), features, pixels)


SOURCES = {
    "digits": lambda _: open_source("digits", resolution=20, split="test"),
    "synthetic": lambda _: open_source("synthetic", resolution=9),
    "folder": lambda path: open_source("folder", fill(path, ["a/1.png", "b/2.png", "b/3.png"]), 8),
    "hdf5": lambda path: open_source("hdf5", official_h5(path / "h", H5_NAMES, H5_LABELS), 8),
    "packed": packed,
    "cached": lambda path: cached(path, False, False),
    "cached with pixels": lambda path: cached(path, False, True),
    "cached with features": lambda path: cached(path, True, False),
}


def assert_same(batch: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    assert len(batch) == len(expected)
    for mine, theirs in zip(batch, expected):
        assert mine.dtype == theirs.dtype and torch.equal(mine, theirs)
    assert batch[0].permute(0, 2, 3, 1).is_contiguous()


@pytest.mark.parametrize("kind", SOURCES)
def test_a_batch_holds_the_bits_of_its_items(kind, tmp_path):
    """In any order, also twice the same image; and after it has been pickled."""
    source = SOURCES[kind](tmp_path)
    last = len(source) - 1
    for indices in ([last, 0, 1, last // 2, 1], [2], list(range(min(len(source), 40)))):
        batch, unreadable = source.read_batch(indices)
        assert not unreadable
        assert_same(batch, collate([source[i] for i in indices]))
    with pytest.raises(IndexError):
        source.read_batch([0, len(source)])


@pytest.mark.parametrize("kind", SOURCES)
def test_each_image_is_written_straight_into_the_memory_that_is_given(kind, tmp_path):
    """The loader gives pinned or shared memory: a batch that lay elsewhere would be copied."""
    given: list[torch.Tensor] = []

    def empty(shape, dtype):
        given.append(torch.empty(shape, dtype=dtype))
        return given[-1]

    source = SOURCES[kind](tmp_path)
    batch, _ = source.read_batch([0, 1], empty)
    large = [part for part in batch if part.dtype != torch.int64 and part.numel()]
    assert {part.data_ptr() for part in large} == {memory.data_ptr() for memory in given}
    assert len(given) == len(large)


@given(st.data(), st.lists(st.integers(0, 5), min_size=1, max_size=5), st.integers(1, 3))
def test_gathered_rows_are_those_of_the_shards(tmp_path_factory, data, lengths, open_files):
    """Over the ends of shards, empty ones too, however many files may be open."""
    total, folder = sum(lengths), tmp_path_factory.mktemp("rows")
    rows = np.arange(total * 6, dtype=np.int16).reshape(total, 2, 3)
    files = [shard_file(folder, "a", shard) for shard in range(len(lengths))]
    for file, part in zip(files, np.split(rows, np.cumsum(lengths)[:-1])):
        np.save(file, part)
    sharded = ShardedRows(files, lengths, ((2, 3), np.int16), "again", open_files)
    places = st.lists(st.integers(0, max(0, total - 1)), max_size=9 if total else 0)
    indices = data.draw(places)
    out = np.empty((len(indices), 2, 3), np.int16)
    sharded.gather(np.array(indices, dtype=np.int64), out)
    assert np.array_equal(out, rows[indices])
    for wrong in (-1, total):
        with pytest.raises(IndexError):
            sharded.gather([wrong], out[:1])


def test_a_shard_that_goes_away_is_named(tmp_path):
    source = packed(tmp_path)
    (tmp_path / "p/shard-00002.npy").unlink()
    source.read_batch([0, 1])
    with pytest.raises(UserError, match=r"shard-00002\.npy .*; run the same prepare_data"):
        source.read_batch([0, 4])


# ---- broken images -------------------------------------------------------------------------------


def with_broken(root: Path) -> Source:
    fill(root, [f"a/{i}.png" for i in range(6)])
    for name in ("a/2.png", "a/3.png"):
        (root / name).write_bytes(b"broken")
    return open_source("folder", root, 8)


def test_a_replaced_image_brings_its_own_label_and_latents(tmp_path):
    source = with_broken(tmp_path / "f")
    source.bad = BadImages(9)
    cache = cache_by_hand(tmp_path / "c", source, (6,), broken=(2, 3))
    joined = CachedSource(source, cache, features=True, pixels=True)
    batch, unreadable = joined.read_batch([5, 2, 0])
    assert_same(batch, collate([joined[5], joined[4], joined[0]]))
    assert [*unreadable] == ["a/2.png", "a/3.png"]
    joined.bad = source.bad = None
    with pytest.raises(UserError, match=r"cannot decode .*2\.png"):
        joined.read_batch([5, 2, 0])


# ---- the loader ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["packed", "cached with pixels"])
def test_workers_change_no_bit(kind, tmp_path):
    source = SOURCES[kind](tmp_path)
    sampler = StepSampler(len(source), 4, seed=0, end_step=5)
    pairs = zip(make_loader(source, sampler, workers=2), make_loader(source, sampler), strict=True)
    for batch, expected in pairs:
        assert batch[0].is_shared() and batch[0].stride() == expected[0].stride()
        assert_same(batch, expected)


def test_shared_memory_is_like_empty():
    memory = shared_empty((2, 3, 5), dtype=torch.float16)
    assert memory.is_shared() and memory.is_contiguous()
    assert memory.shape == (2, 3, 5) and memory.dtype == torch.float16


def test_hdf5_is_opened_once_for_a_batch(tmp_path, monkeypatch):
    source, opened = SOURCES["hdf5"](tmp_path), []
    new_file = Hdf5Source._new_file
    monkeypatch.setattr(Hdf5Source, "_new_file", lambda s: opened.append(1) or new_file(s))
    source.read_batch([2, 0, 1])
    assert len(opened) == 1 and source._file is None


def test_a_packed_batch_takes_less_time_than_its_items(tmp_path):
    """In CPU time, the best of several turns each: 2.5 to 3 times less where it was measured."""
    side, num = 128, 48
    rows = np.random.default_rng(0).integers(0, 256, (num, side, side, 3), "u1")
    pack_by_hand(tmp_path / "p", lengths=(num,), resolution=side)
    np.save(tmp_path / "p/shard-00000.npy", rows)
    source, indices = open_source("packed", tmp_path / "p", side), [*range(num)][::-1]
    ways = {"batch": source.read_batch, "items": lambda i: Source.read_batch(source, i)}
    seconds = dict.fromkeys(ways, float("inf"))
    for _ in range(15):
        for name, read in ways.items():
            before = time.process_time()
            read(indices)
            seconds[name] = min(seconds[name], time.process_time() - before)
    assert seconds["batch"] < seconds["items"], seconds


@pytest.mark.slow
def test_a_process_ends_though_an_exception_holds_its_loader(tmp_path):
    """Workers ignore SIGTERM, by which Python ends processes before it waits for them."""
    fill(tmp_path, ["a/1.png", "a/2.png"])
    (tmp_path / "a/2.png").write_bytes(b"broken")
    program = f"""
import sys
from utils.data.registry import open_source
from utils.data.sampling import StepSampler, make_loader
source = open_source("folder", {str(tmp_path)!r}, 8)
try:
    list(make_loader(source, StepSampler(2, 2, seed=0, end_step=1), workers=1))
except Exception as error:
    sys.kept = error
"""
    done = subprocess.run(
        [sys.executable, "-c", program], timeout=120, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
