"""Which images a step takes, and the loader."""

import numpy as np
import pytest
import torch

from models.checks.errors import UserError
from tests.utils.data.pictures import fill
from utils.data.registry import open_source
from utils.data.sampling import StepSampler, make_loader, step_indices

# ---- sampling ------------------------------------------------------------------------------------


def test_every_epoch_is_another_permutation():
    epochs = [
        np.concatenate([step_indices(103, 10, 0, step) for step in range(start, start + 10)])
        for start in (0, 10, 20)
    ]
    for epoch in epochs:
        assert len(set(epoch.tolist())) == 100 and epoch.min() >= 0 and epoch.max() < 103
    assert not np.array_equal(epochs[0], epochs[1])
    assert sorted(epochs[0]) != sorted(epochs[1])  # other images are left out
    assert not np.array_equal(step_indices(103, 10, 0, 0), step_indices(103, 10, 1, 0))
    assert step_indices(103, 10, 0, 0).dtype == np.int64


def test_indices_never_change_between_versions():
    assert step_indices(1000, 5, 7, 3).tolist() == [610, 399, 486, 515, 15]


@pytest.mark.parametrize("world", [1, 2, 4])
def test_ranks_share_the_one_process_batch(world):
    ranks = [
        list(StepSampler(50, 12, seed=3, rank=rank, world=world, end_step=9))
        for rank in range(world)
    ]
    for step in range(9):
        joined = [i for rank in ranks for i in rank[step]]
        assert joined == step_indices(50, 12, 3, step).tolist()


@pytest.mark.parametrize("start", [0, 1, 3, 4, 7, 11])
def test_resume_at_any_step(start):
    whole = list(StepSampler(50, 12, seed=0, end_step=12))
    rest = StepSampler(50, 12, seed=0, start_step=start, end_step=12)
    assert list(rest) == whole[start:] and len(rest) == 12 - start
    assert list(rest) == whole[start:]  # also when iterated again


def test_sampler_refuses_impossible_batches():
    with pytest.raises(UserError, match=r"global batch 51: expected 1 \.\. 50") as error:
        StepSampler(50, 51, seed=0, end_step=1)
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="global batch 10 cannot be shared equally by 4 ranks"):
        StepSampler(50, 10, seed=0, world=4, end_step=1)
    with pytest.raises(UserError, match="seed -1"):
        step_indices(50, 10, -1, 0)


# ---- loader --------------------------------------------------------------------------------------


def batches(source, **options):
    loader = make_loader(source, StepSampler(len(source), 64, seed=0, end_step=4), **options)
    return list(loader)


def test_loader_gives_the_images_of_each_step():
    source = open_source("digits", resolution=8)
    for step, (x_u8, y) in enumerate(batches(source)):
        indices = step_indices(len(source), 64, 0, step)
        assert x_u8.shape == (64, 3, 8, 8) and x_u8.dtype == torch.uint8
        assert y.dtype == torch.int64 and y.tolist() == source.labels[indices].tolist()
        assert torch.equal(x_u8, torch.stack([source[i][0] for i in indices]))


def test_workers_change_nothing(tmp_path):
    """Neither pixels nor memory layout. (Workers that are spawned: test_hdf5_is_opened_by...)"""
    names = [f"{c}/{i}.png" for c in "abc" for i in range(30)]
    source = open_source("folder", fill(tmp_path, names), 8)
    for (x, y), (x_ref, y_ref) in zip(batches(source, workers=2), batches(source), strict=True):
        assert torch.equal(x, x_ref) and torch.equal(y, y_ref)
        assert x.stride() == x_ref.stride() == (3 * 64, 1, 3 * 8, 3)  # channels-last


@pytest.mark.skipif(not torch.cuda.is_available(), reason="only CUDA pins memory")
@pytest.mark.parametrize("workers", [0, 1])
def test_pinned_batches_are_channels_last_too(workers):
    for x, _ in batches(open_source("digits", resolution=8), workers=workers, pin_memory=True):
        assert x.is_pinned() and x.is_contiguous(memory_format=torch.channels_last)


def test_loader_leaves_the_global_generator_alone():
    source = open_source("digits", resolution=8)
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    batches(source)
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("workers", [0, 1])
def test_unreadable_image_in_training_is_one_line_naming_the_file(tmp_path, workers):
    source = open_source("folder", fill(tmp_path, ["a/1.png", "a/2.png"]), 8)
    (tmp_path / "a/2.png").write_bytes(b"broken")
    loader = make_loader(source, StepSampler(2, 2, seed=0, end_step=1), workers=workers)
    with pytest.raises(UserError, match=r"cannot decode .*a/2\.png: not an image") as error:
        list(loader)
    assert "\n" not in str(error.value)
