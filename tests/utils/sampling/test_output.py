"""Blocks on disk, and the .npz they are streamed into.

python -m pytest tests/utils/sampling/test_output.py
"""

import tracemalloc
from pathlib import Path

import numpy as np
import torch

from utils.sampling.images import DrawnImages
from utils.sampling.load import SampledCheckpoint
from utils.sampling.output import SampleFiles
from utils.sampling.settings import BLOCK, SamplingSettings

SIDE = 64


def files_of(out: Path, num_samples: int, **changes) -> SampleFiles:
    settings = SamplingSettings(path="linear", **changes)
    checkpoint = SampledCheckpoint(Path("nowhere"), settings, SIDE, 8, {"vae/x": "0" * 64})
    return SampleFiles(out, checkpoint, num_samples)


def test_memory_does_not_grow_with_the_number_of_images(tmp_path):
    """Joining 13 blocks of 1.2 MB needs a few blocks of memory, not 15 MB."""
    files = files_of(tmp_path / "a.npz", 12 * BLOCK + 78)
    for block in files.begin():
        num = len(files.blocks.items(block))
        images = torch.full((num, 3, SIDE, SIDE), block, dtype=torch.uint8)
        files.write(block, DrawnImages(images.device, [images]))
    tracemalloc.start()
    files.finish({}, lambda *_: None)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 5 * BLOCK * SIDE * SIDE * 3
    with np.load(tmp_path / "a.npz", allow_pickle=False) as file:
        assert file.files == ["arr_0"]
        images = file["arr_0"]
    assert images.shape == (12 * BLOCK + 78, SIDE, SIDE, 3)
    assert np.array_equal(images[:, 0, 0, 0], np.arange(len(images)) // BLOCK)


def test_blocks_do_not_depend_on_the_batch_size(tmp_path):
    files = [files_of(tmp_path / "a.npz", 250, batch_size=size) for size in (64, 32)]
    assert files[0].settings == files[1].settings
    assert files[0].begin() == files[1].begin() == [0, 1, 2]
    assert [len(files[0].blocks.items(block)) for block in range(3)] == [100, 100, 50]
