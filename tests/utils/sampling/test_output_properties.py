"""Properties of sample blocks for any number of images, block size and ranks."""

import io
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

import sample_ddp
from utils.data.base import hash_images, join_hashes
from utils.data.sharded import ShardedFolder
from utils.sampling.images import split_evenly
from utils.sampling.output import SampleFiles


def folder(num: int, size: int, rows=None, place: Path | None = None) -> ShardedFolder:
    rows = rows or {"images": ((2, 2, 3), np.uint8)}
    place = place or Path("never-made")
    return ShardedFolder(place, plan={"n": num}, num_items=num, shard_size=size, rows=rows)


@given(st.integers(1, 400), st.integers(1, 70), st.integers(1, 9), st.data())
def test_every_image_is_made_once_whatever_the_ranks_and_the_blocks_that_are_left(
    num, size, world, data
):
    blocks = folder(num, size)
    done = data.draw(st.sets(st.integers(0, blocks.num_shards - 1)))
    todo = [block for block in range(blocks.num_shards) if block not in done]
    checkpoint = SimpleNamespace(settings=None)
    files = SimpleNamespace(blocks=blocks, num_samples=num, checkpoint=checkpoint)
    made: list[int] = []
    files.write = lambda block, indices: made.extend(indices)
    with mock.patch.object(sample_ddp, "begin_images", lambda settings, indices, *_: indices):
        for rank in range(world):
            ranks = SimpleNamespace(rank=rank, world=world, is_main=False, device="cpu")
            sample_ddp.make_blocks(files, (), todo, ranks)
    assert sorted(made) == [i for block in todo for i in blocks.items(block)]
    assert not done or len(made) < num
    assert done or sorted(made) == list(range(num))


@given(st.integers(1, 500), st.integers(1, 500), st.integers(1, 60))
def test_batches_are_consecutive_small_enough_and_of_two_sizes(first, count, most):
    indices = range(first, first + count)
    batches = split_evenly(indices, most)
    assert [i for batch in batches for i in batch] == list(indices)
    sizes = {len(batch) for batch in batches}
    assert min(sizes) >= 1 and max(sizes) <= most and max(sizes) - min(sizes) <= 1


@given(st.integers(1, 40), st.integers(1, 9), st.integers(1, 5), st.integers(0, 2**32))
def test_the_npz_holds_the_blocks_in_order_whatever_their_size(num, size, side, seed):
    images = np.random.default_rng(seed).integers(0, 256, (num, side, side, 3), "u1")
    blocks = folder(num, size, {"images": ((side, side, 3), np.uint8)})
    blocks.read = lambda k, name: images[blocks.items(k).start : blocks.items(k).stop]
    files = SimpleNamespace(num_samples=num, shape=(side, side, 3), blocks=blocks)
    written = []
    for _ in range(2):
        SampleFiles._write_npz(files, stream := io.BytesIO(), hashes := [])
        assert join_hashes((side, side), b"".join(hashes)) == hash_images((side, side), [images])
        written.append(stream.getvalue())
    assert written[0] == written[1]
    with np.load(io.BytesIO(written[0]), allow_pickle=False) as file:
        assert file.files == ["arr_0"] and file["arr_0"].dtype == np.uint8
        assert np.array_equal(file["arr_0"], images)
