"""Sources, step-indexed sampling, loader."""

import io
import itertools
import json
import pickle

import h5py
import numpy as np
import pytest
import torch
from PIL import Image

from models.errors import UserError
from utils.data import StepSampler, make_loader, open_source, step_indices
from utils.images import CROP_VERSION, center_crop
from utils.sources import PACKED_FORMAT, Names


def picture(seed: int, size: tuple[int, int] = (20, 28)) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size, 3), "u1"))


def fill(root, names):
    for seed, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        picture(seed).save(root / name)
    return root


def one_line(error) -> str:
    assert "\n" not in str(error.value)
    return str(error.value)


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
    one_line(error)
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
        assert x_u8.shape == (64, 3, 8, 8) and x_u8.dtype == torch.uint8 and x_u8.is_contiguous()
        assert y.dtype == torch.int64 and y.tolist() == source.labels[indices].tolist()
        assert torch.equal(x_u8[5], source[indices[5]][0])


def test_workers_change_nothing_and_spawn_works(tmp_path):
    names = [f"{c}/{i}.png" for c in "abc" for i in range(30)]
    source = open_source("folder", fill(tmp_path, names), 8)
    expected = batches(source)
    for options in ({"workers": 2}, {"workers": 1, "context": "spawn"}):
        actual = batches(source, **options)
        for (x, y), (x_ref, y_ref) in zip(actual, expected, strict=True):
            assert torch.equal(x, x_ref) and torch.equal(y, y_ref)


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
    one_line(error)


# ---- sources -------------------------------------------------------------------------------------


def test_unknown_source_and_missing_paths(tmp_path):
    with pytest.raises(UserError, match="'imagenet': expected one of digits, folder, packed") as e:
        open_source("imagenet")
    one_line(e)
    with pytest.raises(UserError, match=r"needs data\.path"):
        open_source("folder")
    with pytest.raises(UserError, match="none: no such folder"):
        open_source("packed", tmp_path / "none")
    with pytest.raises(UserError, match="only digits is split"):
        open_source("folder", tmp_path, split="train")
    with pytest.raises(UserError, match="expected all, train or test"):
        open_source("digits", split="val")


def test_digits():
    source = open_source("digits", resolution=32)
    assert len(source) == 1797 and source.num_classes == 10 and source.resolution == 32
    x_u8, y = source[0]
    assert x_u8.shape == (3, 32, 32) and x_u8.dtype == torch.uint8 and y == 0
    assert type(y) is int and torch.equal(x_u8[0], x_u8[2]) and x_u8.max() > 200


def test_digits_at_their_own_size_are_the_grey_values():
    from sklearn.datasets import load_digits

    source = open_source("digits", resolution=8)
    expected = np.rint(load_digits().images[7] * 255 / 16)
    assert np.array_equal(source[7][0][1].numpy(), expected)


def test_digits_split_is_disjoint_stratified_and_fixed():
    whole, train, test = (
        open_source("digits", resolution=8, split=s) for s in ("all", "train", "test")
    )
    keys = [{s.key(i) for i in range(len(s))} for s in (whole, train, test)]
    assert keys[1] | keys[2] == keys[0] and not keys[1] & keys[2]
    counts = np.bincount(whole.labels)
    assert np.abs(np.bincount(test.labels) - counts / 5).max() <= 0.5
    assert [test.key(i) for i in range(5)] == ["1", "9", "11", "12", "14"]
    i = int(test.key(3))
    assert torch.equal(test[3][0], whole[i][0]) and test[3][1] == whole[i][1]


def test_synthetic_depends_on_the_index_alone():
    a, b = open_source("synthetic", resolution=9), open_source("synthetic", resolution=9)
    assert len(a) == 10_000 and a.num_classes == 1000
    assert torch.equal(a[7][0], b[7][0]) and not torch.equal(a[7][0], a[8][0])
    assert a[0][0].shape == (3, 9, 9) and {a[i][1] for i in range(1000)} == set(range(1000))
    with pytest.raises(IndexError):
        a[10_000]


def test_folder_labels_keys_and_order(tmp_path):
    names = ["class10/a.png", "class2/b.JPEG", "class2/sub/a.webp", "class2/a.bmp", "class2/z.jpg"]
    fill(tmp_path, names)
    (tmp_path / "class2/notes.txt").write_text("x")
    (tmp_path / "class2/._a.png").write_text("x")
    (tmp_path / ".cache").mkdir()
    source = open_source("folder", tmp_path, 16)
    assert source.classes == ["class2", "class10"] and source.num_classes == 2
    keys = [source.key(i) for i in range(len(source))]
    assert keys == [
        "class2/a.bmp",
        "class2/b.JPEG",
        "class2/sub/a.webp",
        "class2/z.jpg",
        "class10/a.png",
    ]
    assert [y for _, y in source] == [0, 0, 0, 0, 1]
    expected = np.asarray(center_crop(picture(0), 16)).transpose(2, 0, 1)
    assert np.array_equal(source[4][0].numpy(), expected)


def test_wnids_keep_their_usual_order(tmp_path):
    names = ["n02000000", "n01440764", "n01000009", "n01000010"]
    source = open_source("folder", fill(tmp_path, [f"{n}/x.png" for n in names]), 8)
    assert source.classes == sorted(names)


@pytest.mark.parametrize("names", [["b.png", "a.png"], ["only/b.png", "only/a.png"]])
def test_one_class_flat_or_not(tmp_path, names):
    source = open_source("folder", fill(tmp_path, names), 8)
    assert source.num_classes == 1 and [y for _, y in source] == [0, 0]
    assert [source.key(i) for i in range(2)] == sorted(names)


def test_folders_that_are_refused(tmp_path):
    with pytest.raises(UserError, match="no images in"):
        open_source("folder", tmp_path, 8)
    fill(tmp_path, ["a/1.png"])
    (tmp_path / "b").mkdir()
    with pytest.raises(UserError, match="b holds no images"):
        open_source("folder", tmp_path, 8)
    (tmp_path / "b").rmdir()
    fill(tmp_path, ["stray.png"])
    with pytest.raises(UserError, match=r"stray\.png\) beside class folders"):
        open_source("folder", tmp_path, 8)


def test_linked_class_folders_are_followed(tmp_path):
    fill(tmp_path / "real", ["a/1.png"])
    (tmp_path / "data").mkdir()
    (tmp_path / "data/a").symlink_to(tmp_path / "real/a")
    assert len(open_source("folder", tmp_path / "data", 8)) == 1


def test_names_keep_odd_characters():
    names = ["a/\u00e9.png", "", "b/\udcff.png", "c d"]
    stored = pickle.loads(pickle.dumps(Names(names)))
    assert list(stored) == names and len(stored) == 4


# ---- packed (more in tests/scripts/test_prepare_data.py) -----------------------------------------


def pack_by_hand(root, lengths=(3, 0, 2), **changes):
    root.mkdir()
    rows = np.random.default_rng(0).integers(0, 256, (sum(lengths), 8, 8, 3), "u1")
    starts = np.cumsum([0, *lengths])
    for i, (start, end) in enumerate(itertools.pairwise(starts)):
        np.save(root / f"shard-{i:05d}.npy", rows[start:end])
    np.save(root / "labels.npy", np.arange(len(rows)) % 3)
    (root / "keys.txt").write_text("".join(f"k{i}\n" for i in range(len(rows))))
    meta = {"format": PACKED_FORMAT, "crop_version": CROP_VERSION, "resolution": 8}
    meta |= {"shards": list(lengths), "classes": ["a", "b", "c"], "num_images": len(rows)}
    (root / "meta.json").write_text(json.dumps(meta | changes))
    return rows


def test_packed_reads_every_row_of_every_shard(tmp_path):
    rows = pack_by_hand(tmp_path / "p")
    source = open_source("packed", str(tmp_path / "p"), 8)
    assert len(source) == 5 and source.num_classes == 3
    for i in (4, 0, 3, 2, 1):
        assert np.array_equal(source[i][0].numpy(), rows[i].transpose(2, 0, 1))
        assert source[i][1] == i % 3 and source.key(i) == f"k{i}"
    again = pickle.loads(pickle.dumps(source))
    assert again._shards == {} and torch.equal(again[4][0], source[4][0])
    with pytest.raises(IndexError):
        source[5]


@pytest.mark.parametrize(
    ("changes", "resolution", "message"),
    [
        ({"crop_version": "old"}, 8, f"crop version old, but {CROP_VERSION} is asked for; pack"),
        ({}, 16, "resolution 8, but 16 is asked for; pack again"),
        ({"format": "x"}, 8, "format 'x', expected"),
        ({"shards": [3, 9, 2]}, 8, "shard-00001.npy is missing or cut short"),
    ],
)
def test_packed_that_does_not_fit_is_refused(tmp_path, changes, resolution, message):
    pack_by_hand(tmp_path / "p", **changes)
    with pytest.raises(UserError, match=message) as error:
        open_source("packed", tmp_path / "p", resolution)
    one_line(error)


def test_unfinished_packed_folder_says_so(tmp_path):
    with pytest.raises(UserError, match=r"meta\.json not found; .*unfinished: run the same"):
        open_source("packed", tmp_path, 8)


# ---- hdf5 ----------------------------------------------------------------------------------------


def official_h5(root, names, labels, in_file=None):
    root.mkdir()
    with h5py.File(root / "images.h5", "w") as file:
        for seed, name in enumerate(in_file or names):
            data = io.BytesIO()
            picture(seed, (8, 8)).save(data, "PNG")
            file[name] = np.frombuffer(data.getvalue(), dtype=np.uint8)
    (root / "images_h5.json").write_text(json.dumps(names))
    (root / "dataset.json").write_text(json.dumps({"labels": labels}))
    return root


H5_NAMES = ["00000/img2.png", "00000/img0.png", "00000/img1.png"]
H5_LABELS = [["00000/img1.png", 1], ["00000/img2.png", 4], ["00000/img0.png", 0], ["more.png", 9]]


def test_hdf5_joins_labels_by_name(tmp_path):
    root = official_h5(tmp_path / "h", [*H5_NAMES, "dataset.json"], H5_LABELS, H5_NAMES)
    source = open_source("hdf5", root, 8)
    assert [source.key(i) for i in range(len(source))] == sorted(H5_NAMES)
    assert [y for _, y in source] == [0, 1, 4] and source.num_classes == 5
    pixels = {name: np.asarray(picture(i, (8, 8))) for i, name in enumerate(H5_NAMES)}
    for i in range(3):
        assert np.array_equal(source[i][0].permute(1, 2, 0).numpy(), pixels[source.key(i)])


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_hdf5_is_opened_by_the_workers_only(tmp_path, context):
    source = open_source("hdf5", official_h5(tmp_path / "h", H5_NAMES, H5_LABELS), 8)
    sampler = StepSampler(3, 3, seed=0, end_step=2)
    expected = list(make_loader(source, sampler))
    assert source._file is None
    actual = list(make_loader(source, sampler, workers=1, context=context))
    assert source._file is None
    assert all(torch.equal(a[0], b[0]) for a, b in zip(actual, expected, strict=True))


def test_hdf5_without_labels_is_one_class(tmp_path):
    source = open_source("hdf5", official_h5(tmp_path / "h", H5_NAMES, None), 8)
    assert source.num_classes == 1 and [y for _, y in source] == [0, 0, 0]


def test_hdf5_refuses_missing_names_and_files(tmp_path):
    root = official_h5(tmp_path / "h", H5_NAMES, H5_LABELS[:2])
    with pytest.raises(UserError, match=r"no label for 00000/img0\.png \(1 such of 3") as error:
        open_source("hdf5", root, 8)
    one_line(error)
    root = official_h5(tmp_path / "i", H5_NAMES, H5_LABELS, H5_NAMES[:2])
    with pytest.raises(UserError, match=r"00000/img1\.png is listed .* but missing in"):
        open_source("hdf5", root, 8)[1]
    (root / "dataset.json").write_text("{")
    with pytest.raises(UserError, match=r"dataset\.json is no valid JSON"):
        open_source("hdf5", root, 8)
    (root / "images.h5").unlink()
    with pytest.raises(UserError, match=r"images\.h5 not found; the layout is"):
        open_source("hdf5", root, 8)


def test_sources_can_be_pickled(tmp_path):
    fill(tmp_path / "f", ["a/1.png"])
    for name, path in (("digits", None), ("synthetic", None), ("folder", tmp_path / "f")):
        source = open_source(name, path, 8)
        again = pickle.loads(pickle.dumps(source))
        assert len(again) == len(source) and torch.equal(again[0][0], source[0][0])
