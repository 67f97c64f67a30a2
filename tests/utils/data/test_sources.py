"""Every kind of data: images, labels, keys, and what tells one content from another."""

import hashlib
import io
import itertools
import json
import os
import pickle
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from models.checks.errors import UserError
from tests.utils.data.pictures import fill, picture
from utils.data import registry
from utils.data.base import Names, Source, content_of, hash_images
from utils.data.decoding.conversion import PLAIN
from utils.data.images import CROP_VERSION, center_crop
from utils.data.registry import open_source
from utils.data.sampling import StepSampler, make_loader
from utils.data.sources.packed import PACKED_FORMAT
from utils.evaluation.images.image_sets import open_images


def one_line(error) -> str:
    assert "\n" not in str(error.value)
    return str(error.value)


# ---- sources -------------------------------------------------------------------------------------


def test_unknown_source_and_missing_paths(tmp_path):
    with pytest.raises(UserError, match="=imagenet: expected one of digits, folder, packed") as e:
        open_source("imagenet")
    one_line(e)
    with pytest.raises(UserError, match=r"needs data\.path"):
        open_source("folder")
    with pytest.raises(UserError, match="none: no such folder"):
        open_source("packed", tmp_path / "none")
    with pytest.raises(UserError, match=r"data\.split=train: the source folder has all"):
        open_source("folder", tmp_path, split="train")
    with pytest.raises(UserError, match="has all, train, test"):
        open_source("digits", split="val")


class OneFile(Source):
    """A new kind of data, as a newcomer would write it: the pixels of a single .npy file."""

    path_may_be_file = True

    def __init__(self, root, resolution, split="all"):
        super().__init__(root, resolution)
        self.pixels, self.classes = np.load(root), ["a", "b"]

    def __len__(self):
        return len(self.pixels)

    def __getitem__(self, i):
        return torch.from_numpy(self.pixels[i]).permute(2, 0, 1), i % 2

    def key(self, i):
        return f"row {i}"


def test_a_new_source_is_one_class_and_one_row(tmp_path, monkeypatch):
    """Its defaults answer everything else that the code asks of a source."""
    pixels = np.random.default_rng(0).integers(0, 256, (4, 8, 8, 3), "u1")
    np.save(tmp_path / "data.npy", pixels)
    monkeypatch.setitem(registry.SOURCES, "one-file", (__name__, "OneFile"))
    source = open_source("one-file", tmp_path / "data.npy", 8)
    assert source.num_classes == 2 and source.labels is None and source.files() is None
    assert [source.label(i) for i in range(4)] == [0, 1, 0, 1]
    assert source.list_keys()[3] == "row 3"
    ((x_u8, y),) = make_loader(source, StepSampler(4, 4, seed=0, end_step=1))
    assert x_u8.shape == (4, 3, 8, 8) and y.sum() == 2
    assert source.fingerprint() == hash_images((8, 8), pixels)
    with pytest.raises(UserError, match="no such file or folder"):
        open_source("one-file", tmp_path / "none.npy", 8)
    with pytest.raises(UserError, match="expected a folder"):  # where a folder is expected
        open_source("folder", tmp_path / "data.npy", 8)


def test_the_protocol_must_be_complete():
    class Incomplete(Source):
        def __len__(self):
            return 0

    with pytest.raises(TypeError, match="__getitem__"):
        Incomplete(None, 8)


# ---- fingerprints --------------------------------------------------------------------------------


def pixels_sha256(source) -> str:
    hashes = (hashlib.sha256(x.permute(1, 2, 0).contiguous().numpy()).digest() for x, _ in source)
    size = f"{source.resolution}x{source.resolution}"
    return hashlib.sha256(size.encode() + b"".join(hashes)).hexdigest()


def test_a_foreign_meta_json_is_no_fingerprint(tmp_path, monkeypatch):
    """Neither one in the current folder, for data without a path, nor one in a folder of images:
    else other images would count as the same, and statistics of the old ones be used for them."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "meta.json").write_text("{}")
    digits = open_source("digits", resolution=8, split="test")
    assert digits.fingerprint() == pixels_sha256(digits)
    assert open_images("digits:test@8").fingerprint() == pixels_sha256(digits)
    (tmp_path / "images").mkdir()
    (tmp_path / "images/meta.json").write_text("{}")
    picture(0).save(tmp_path / "images/1.bmp")
    before = open_source("folder", tmp_path / "images", 8).fingerprint()
    picture(0, (30, 30)).save(tmp_path / "images/1.bmp")
    assert open_source("folder", tmp_path / "images", 8).fingerprint() != before


def invert(path: Path) -> None:
    """Other pixels in an uncompressed picture, in place; name, size and times as before."""
    before, data = path.stat(), bytearray(path.read_bytes())
    data[-24:] = bytes(255 - byte for byte in data[-24:])
    path.write_bytes(data)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def test_replaced_images_are_other_images(tmp_path):
    """Of a folder, as training and as evaluation read it, of HDF5 and of packed data."""
    folder = tmp_path / "f"
    for i, name in enumerate("ab"):
        (folder / name).mkdir(parents=True)
        picture(i, (8, 8)).save(folder / name / "1.bmp")
    official_h5(tmp_path / "h", H5_NAMES, H5_LABELS)
    pack_by_hand(tmp_path / "p")

    def fingerprints() -> list[str]:
        given = [("folder", folder), ("hdf5", tmp_path / "h"), ("packed", tmp_path / "p")]
        sources = [open_source(name, path, 8).fingerprint() for name, path in given]
        return [*sources, open_images(folder).fingerprint()]

    before = fingerprints()
    assert fingerprints() == before and len(set(before)) == 4
    invert(folder / "b/1.bmp")
    invert(tmp_path / "p/shard-00002.npy")
    with h5py.File(tmp_path / "h/images.h5", "r+") as file:
        data = file[H5_NAMES[1]]
        data[-20] = 255 - data[-20]
    assert not {*fingerprints()} & {*before}


def test_order_names_resolution_and_labels_count_where_they_matter(tmp_path):
    folder = fill(tmp_path / "f", ["a/1.png", "b/2.png"])
    before = content_of(open_source("folder", folder, 8))
    assert content_of(open_source("folder", folder, 8)) == before
    assert content_of(open_source("folder", folder, 9))["images_sha256"] != before["images_sha256"]
    (folder / "a/1.png").rename(folder / "a/3.png")
    assert content_of(open_source("folder", folder, 8))["images_sha256"] != before["images_sha256"]
    root = official_h5(tmp_path / "h", H5_NAMES, H5_LABELS)
    before = content_of(open_source("hdf5", root, 8))
    others = [[name, (label + 1) % 5] for name, label in H5_LABELS[:3]]
    (root / "dataset.json").write_text(json.dumps({"labels": others}))
    after = content_of(open_source("hdf5", root, 8))
    assert after["images_sha256"] == before["images_sha256"]
    assert after["labels_sha256"] != before["labels_sha256"]


# ---- each kind -----------------------------------------------------------------------------------


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
    assert torch.equal(again[4][0], source[4][0])
    for i in (5, -1):
        with pytest.raises(IndexError):
            source[i]


@pytest.mark.parametrize(
    ("changes", "resolution", "message"),
    [
        ({"crop_version": "old"}, 8, f"crop version old, expected {CROP_VERSION}; pack"),
        ({}, 16, "resolution 8, but data.resolution=16 is asked for; give data.resolution=8"),
        ({"format": "x"}, 8, "format x, expected"),
        ({"shards": [3, 9, 2], "num_images": 14}, 8, "shard-00001.npy holds .*expected"),
    ],
)
def test_packed_that_does_not_fit_is_refused(tmp_path, changes, resolution, message):
    pack_by_hand(tmp_path / "p", **changes)
    with pytest.raises(UserError, match=message) as error:
        open_source("packed", tmp_path / "p", resolution)
    one_line(error)


def test_packed_data_of_the_first_crop_are_read(tmp_path):
    """Their pixels are the same, unless there were transparent pictures among them."""
    pack_by_hand(tmp_path / "p", crop_version="adm-center-crop-1")
    assert open_source("packed", tmp_path / "p", 8).conversion == PLAIN


def test_unfinished_packed_folder_says_so(tmp_path):
    (tmp_path / "plan.json").write_text('{"format": "repae-packed-1"}')
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


def test_hdf5_counts_the_names_that_are_no_images(tmp_path):
    root = official_h5(tmp_path / "h", H5_NAMES, H5_LABELS)
    names = [*H5_NAMES, "a/1.heic", "a/2.heic", "dataset.json"]
    (root / "images_h5.json").write_text(json.dumps(names))
    assert open_source("hdf5", root, 8).notes[-1].startswith("ignored: 2 .heic below")


def test_hdf5_joins_labels_by_name(tmp_path):
    root = official_h5(tmp_path / "h", [*H5_NAMES, "dataset.json"], H5_LABELS, H5_NAMES)
    source = open_source("hdf5", root, 8)
    assert [source.key(i) for i in range(len(source))] == sorted(H5_NAMES)
    # the labels are 0, 1 and 4: no class is left without an image
    assert [y for _, y in source] == [0, 1, 2] and source.classes == ["0", "1", "4"]
    assert len(source.notes) == 1 and "no image has the label 2" in source.notes[0]
    pixels = {name: np.asarray(picture(i, (8, 8))) for i, name in enumerate(H5_NAMES)}
    for i in range(3):
        assert np.array_equal(source[i][0].permute(1, 2, 0).numpy(), pixels[source.key(i)])


@pytest.mark.parametrize("as_text", [False, True])
def test_hdf5_takes_the_labels_in_the_file(tmp_path, as_text):
    """Where the official script writes them, as bytes; a dataset.json beside the file is not read.
    `data.labels` comes first."""
    root = official_h5(tmp_path / "h", H5_NAMES, [["x", -1]])
    text = json.dumps({"labels": H5_LABELS})
    with h5py.File(root / "images.h5", "a") as file:
        file["dataset.json"] = text if as_text else np.array(text.encode(), dtype="S")
    assert open_source("hdf5", root, 8).classes == ["0", "1", "4"]
    assert open_source("hdf5", root, 8, labels="none").num_classes == 1
    assert open_source("hdf5", root, 8, labels="folder").classes == ["00000"]
    (tmp_path / "l.csv").write_text("".join(f"{name},{k}\n" for k, name in enumerate(H5_NAMES)))
    source = open_source("hdf5", root, 8, labels=str(tmp_path / "l.csv"))
    assert source.labels.tolist() == [1, 2, 0]
    (root / "dataset.json").unlink()
    assert open_source("hdf5", root, 8).num_classes == 3


@pytest.mark.parametrize("context", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
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
