"""Data that are not as they should be: one line that names what is wrong, and nothing that waits,
takes memory, or is silently something else."""

import io
import json
import os
import re
import socket
import struct
import zipfile
import zlib
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from PIL import Image

from models.checks.errors import UserError
from tests.utils.data.pictures import fill, picture
from tests.utils.data.test_sources import (
    H5_LABELS,
    H5_NAMES,
    official_h5,
    one_line,
    pack_by_hand,
)
from utils.data.base import BadImages, cautions, describe
from utils.data.decoding.conversion import PLAIN
from utils.data.images import MAX_PIXELS, UnreadableImageError, read_image
from utils.data.latents import LatentCache
from utils.data.registry import open_source
from utils.data.sampling import StepSampler, make_loader

# ---- images --------------------------------------------------------------------------------------


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def png(width: int, height: int, data: bytes = b"", extra: bytes = b"") -> bytes:
    """A PNG of this size in its header, grey, with `data` as its compressed pixels."""

    def chunk(name: bytes, content: bytes) -> bytes:
        crc = struct.pack(">I", zlib.crc32(name + content))
        return struct.pack(">I", len(content)) + name + content + crc

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + extra + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def bomb(width: int, height: int) -> bytes:
    """A whole PNG of one colour, compressed row by row."""
    press, rows = zlib.compressobj(1), []
    for _ in range(height):
        rows.append(press.compress(bytes(width + 1)))
    return png(width, height, b"".join(rows) + press.flush())


def damaged_png() -> bytes:
    content = bytearray(encoded(picture(0, (99, 99)), "PNG"))
    content[len(content) // 2 :] = bytes(len(content) - len(content) // 2)
    return bytes(content)


LARGE = encoded(picture(0, (99, 99)), "JPEG")
SMALL_BMP = encoded(picture(0), "BMP")
UNREADABLE = {
    "empty": b"",
    "text": b"no image",
    "zip": b"PK\x03\x04" + bytes(99),
    "html": b"<!DOCTYPE html><html></html>",
    "eps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n",
    "tga": encoded(picture(0), "TGA"),
    "heic": b"\0\0\0\x18ftypheic" + bytes(99),
    "truncated TIFF": encoded(picture(0), "TIFF")[:200],
    "truncated PNG": encoded(picture(0, (99, 99)), "PNG")[:999],
    "PNG that ends after its header": encoded(picture(0), "PNG")[:40],
    "zeros in a PNG": damaged_png(),
    "truncated JPEG": LARGE[: len(LARGE) // 3],
    "a JPEG's first bytes": LARGE[:4],
    "truncated WebP": encoded(picture(0, (99, 99)), "WEBP")[:200],
    "truncated GIF": encoded(picture(0, (99, 99)), "GIF")[:200],
    "truncated BMP": SMALL_BMP[: len(SMALL_BMP) // 2],
    "BMP of negative width": SMALL_BMP[:18] + struct.pack("<i", -9) + SMALL_BMP[22:],
    "PNG without pixels": png(0, 0),
    "PNG of 2^31 x 2^31": png(2**31 - 1, 2**31 - 1),
    "PNG of 60000 x 60000": png(60_000, 60_000, zlib.compress(bytes(9))),
    "PNG of just too many": png(10_000, MAX_PIXELS // 10_000 + 1),
    "narrow, 1 x 60000": bomb(1, 60_000),
    "flat, 60000 x 1": bomb(60_000, 1),
    "narrow, 3 x 60000": bomb(3, 60_000),
    "a text chunk of 99 MB": png(
        9, 9, b"", b"".join([struct.pack(">I", 40), b"zTXt" + b"a\0\0" + bytes(37), bytes(4)])
    ),
}


@pytest.mark.parametrize("kind", UNREADABLE)
def test_an_image_that_cannot_be_read_is_named(kind, tmp_path):
    """Also where the file has the name of an image, and whatever Pillow makes of it."""
    path = tmp_path / "a.png"
    path.write_bytes(UNREADABLE[kind])
    for given in (path, io.BytesIO(UNREADABLE[kind])):
        with pytest.raises(UnreadableImageError, match="cannot decode X: ") as error:
            read_image(given, "X", 256, PLAIN)
        assert one_line(error) and error.value.reason and "0x" not in error.value.reason


@pytest.mark.parametrize("kind", ["fifo", "socket", "device", "folder"])
def test_what_is_no_file_is_never_waited_for(kind, tmp_path):
    path = tmp_path / "a.png"
    match kind:
        case "fifo":
            os.mkfifo(path)
        case "socket":
            socket.socket(socket.AF_UNIX).bind(str(path))
        case "device":
            path.symlink_to("/dev/zero")
        case "folder":
            path.mkdir()
    with pytest.raises(UserError, match=r"cannot (read|decode) X: "):
        read_image(path, "X", 8, PLAIN)


def test_odd_images_are_read(tmp_path):
    """Grey of 16 bits, CMYK, palette, animation, an EXIF orientation (ignored), a large profile."""
    rotated = Image.Exif()
    rotated[0x0112] = 6
    images = {
        "cmyk.jpg": encoded(picture(0).convert("CMYK"), "JPEG"),
        "exif.jpg": encoded(picture(0), "JPEG", exif=rotated),
        "profile.jpg": encoded(picture(0), "JPEG", icc_profile=bytes(1_000_000)),
        "profile.png": encoded(picture(0), "PNG", icc_profile=bytes(900_000)),
        "gif.png": encoded(picture(0), "GIF", save_all=True, append_images=[picture(1)] * 9),
        "moves.png": encoded(picture(0), "PNG", save_all=True, append_images=[picture(1)] * 9),
        "moves.webp": encoded(picture(0), "WEBP", save_all=True, append_images=[picture(1)] * 9),
        "1.bmp": encoded(picture(0).convert("1"), "BMP"),
    }
    fill(tmp_path, ["16.png"])
    Image.fromarray(np.arange(900, dtype=np.uint16).reshape(30, 30) * 70).save(tmp_path / "16.png")
    for name, content in images.items():
        (tmp_path / name).write_bytes(content)
    source = open_source("folder", tmp_path, 8)
    assert len(source) == 9 and all(x.shape == (3, 8, 8) and x.float().std() > 1 for x, _ in source)


# ---- images that are replaced in training --------------------------------------------------------


def folder_with_broken(root: Path, broken: list[str]) -> Path:
    fill(root, [f"{c}/{i}.png" for c in "abc" for i in range(10)])
    for name in broken:
        (root / name).write_bytes(b"broken")
    return root


def batches_of(source, most: int, workers: int = 0, start: int = 0, end: int = 6):
    source.bad = BadImages(most)
    sampler = StepSampler(len(source), 10, seed=0, start_step=start, end_step=end)
    return list(make_loader(source, sampler, workers))


BROKEN = ["a/3.png", "a/9.png", "b/0.png", "c/9.png"]


def test_the_next_image_takes_the_place_with_its_own_label(tmp_path, capfd):
    source = open_source("folder", folder_with_broken(tmp_path, BROKEN), 8)
    source.bad = BadImages(100)
    for i, j in {3: 4, 9: 11, 10: 11, 29: 0, 5: 5}.items():
        (x_u8, y), found = source.read(i)
        assert torch.equal(x_u8, source[j][0]) and y == source[j][1] and len(found) == (j - i) % 30
    batches_of(source, 100)
    assert list(source.bad.reasons) and set(source.bad.reasons) == set(BROKEN)
    assert source.bad.error is None
    printed = capfd.readouterr().err
    assert all(printed.count(f"{name} cannot be read") == 1 for name in BROKEN)


@pytest.mark.parametrize(("workers", "start"), [(2, 0), (0, 4)])
def test_replacements_depend_on_nothing_but_the_step(tmp_path, workers, start):
    """Neither on workers nor on where a run goes on."""
    source = open_source("folder", folder_with_broken(tmp_path, BROKEN), 8)
    expected = batches_of(source, 100)[start:]
    found = batches_of(source, 100, workers, start)
    assert len(found) == len(expected)
    for (x, y), (x_ref, y_ref) in zip(found, expected):
        assert torch.equal(x, x_ref) and torch.equal(y, y_ref)
    assert set(source.bad.reasons) <= set(BROKEN)


@pytest.mark.parametrize("most", [0, 1, 3])
def test_too_many_bad_images_are_an_error_to_stop_with(tmp_path, most):
    source = open_source("folder", folder_with_broken(tmp_path, BROKEN), 8)
    source.bad = bad = BadImages(most)
    for number, i in enumerate((3, 9, 10, 29), start=1):
        source.take(i)
        assert (bad.error is not None) == (len(bad.reasons) > most), number
    assert "data.max_bad_images" in one_line_of(bad.error) and str(most) in str(bad.error)


def one_line_of(error) -> str:
    assert error is not None and "\n" not in str(error)
    return str(error)


def test_nothing_but_bad_images_ends(tmp_path):
    fill(tmp_path, [f"{i}.png" for i in range(5)])
    for path in tmp_path.iterdir():
        path.write_bytes(b"broken")
    source = open_source("folder", tmp_path, 8)
    for most in (0, 2, 100):
        source.bad = BadImages(most)
        with pytest.raises(UserError, match="cannot decode"):
            source.read(1)


def test_missing_files_are_replaced_too(tmp_path):
    fill(tmp_path, ["a/0.png", "a/1.png", "a/2.png", "b/1.png"])
    source = open_source("folder", tmp_path, 8)
    for name in ("a/0.png", "a/1.png"):
        (tmp_path / name).unlink()
    with pytest.raises(UserError, match="cannot read"):  # not so where no run allows it
        source.take(0)
    source.bad = BadImages(9)
    assert torch.equal(source.take(0)[0], source.take(2)[0])
    assert len(source.take(3)) == 2 and len(source.bad.reasons) == 2


# ---- labels --------------------------------------------------------------------------------------

LABELS = [1_000_000_000, -1, 0.5, True, "", "-1", None, [1], {}, float("nan"), float("inf"), 2**70]


@pytest.mark.parametrize("label", LABELS, ids=str)
@pytest.mark.parametrize("kind", ["hdf5", "folder"])
def test_labels_that_are_no_class_are_refused(tmp_path, kind, label):
    pairs = [["00000/img1.png", label], ["00000/img2.png", 4], ["00000/img0.png", 0]]
    root = tmp_path / "d"
    if kind == "hdf5":
        official_h5(root, H5_NAMES, pairs)
    else:
        fill(root, H5_NAMES)
        (root / "dataset.json").write_text(json.dumps({"labels": pairs}))
    with pytest.raises(UserError, match=r"dataset\.json.*expected") as error:
        open_source(kind, root, 8)
    one_line(error)


@pytest.mark.parametrize(
    ("content", "word"),
    [
        ("", "empty file"),
        ("[]", "labels"),
        ("{}", "labels"),
        ("7", "labels"),
        ('{"labels": 7}', "expected"),
        ('{"labels": {}}', "no label"),
        ('{"labels": "x"}', "expected"),
        ('{"labels": [7]}', "expected"),
        ('{"labels": [["a", 1, 2]]}', "expected"),
        ('{"labels": [[1, "a"]]}', "expected"),
        ('{"labels": []}', "no label"),
        ('{"labels": [["00000/img1.png", 1], ["00000/img1.png", 2]]}', "two labels"),
        ("[" * 99_999, "no valid JSON"),
        ("\udcff", "no text in UTF-8"),
    ],
)
def test_dataset_json_that_is_none_is_refused(tmp_path, content, word):
    root = official_h5(tmp_path / "h", H5_NAMES, H5_LABELS)
    (root / "dataset.json").write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(UserError, match=rf"dataset\.json.*{word}") as error:
        open_source("hdf5", root, 8)
    one_line(error)


@pytest.mark.parametrize("used", [[1, 2, 3], [0, 1, 999], [5, 5, 5], [0, 1, 2]])
def test_labels_that_skip_numbers_are_renumbered_in_order(tmp_path, used):
    pairs = list(zip(sorted(H5_NAMES), used))
    source = open_source("hdf5", official_h5(tmp_path / "h", H5_NAMES, pairs), 8)
    assert source.classes == [str(label) for label in sorted(set(used))]
    assert [source.classes[y] for _, y in source] == [str(label) for label in used]
    assert bool(source.notes) == (used != [0, 1, 2])


def test_storage_folders_are_no_classes(tmp_path):
    """The layout of EDM's and REPA's tools: the labels stand in dataset.json."""
    names = [f"{k // 4:05d}/img{k:08d}.png" for k in range(12)]
    fill(tmp_path, names)
    record = {"labels": [[name, k % 5] for k, name in enumerate(names)]}
    (tmp_path / "dataset.json").write_text(json.dumps(record))
    source = open_source("folder", tmp_path, 8)
    assert [y for _, y in source] == [k % 5 for k in range(12)] and source.num_classes == 5
    assert "dataset.json" in source.notes[0]
    record["labels"].pop()
    (tmp_path / "dataset.json").write_text(json.dumps(record))
    with pytest.raises(UserError, match=r"no label for 00002/img00000011\.png"):
        open_source("folder", tmp_path, 8)


# ---- folders -------------------------------------------------------------------------------------


@pytest.mark.parametrize("parts", [["train", "val"], ["train"], ["Training", "test"]])
def test_a_folder_one_level_too_high_is_refused(tmp_path, parts):
    fill(tmp_path, [f"{part}/n0{k}/{i}.png" for part in parts for k in range(3) for i in range(2)])
    with pytest.raises(UserError, match=rf"data\.path={tmp_path}/{parts[-1]}|{parts[0]}") as error:
        open_source("folder", tmp_path, 8)
    assert one_line(error).count(parts[0])
    source = open_source("folder", tmp_path / parts[0], 8)
    assert source.classes == ["n00", "n01", "n02"] and not cautions(source)


def test_what_is_said_of_a_folder(tmp_path):
    fill(tmp_path, [f"{c}/{d}/1.png" for c in ("cats", "Cats") for d in "xy"])
    (tmp_path / "cats/read.me").write_text("")
    source = open_source("folder", tmp_path, 8)
    assert describe(source) == "4 images of 2 classes: Cats, cats"
    text = " ".join(cautions(source))
    assert all(word in text for word in ("too high", "case", "cats/read.me", "1 .me"))
    one = open_source("folder", fill(tmp_path / "one", ["a.png", "b.png"]), 8)
    assert describe(one) == "2 images of 1 class: ." and "one class" in cautions(one)[0]
    many = open_source("synthetic", None, 8)
    assert describe(many) == "10,000 images of 1,000 classes: 0, 1, 2, 3, 4, ..."


def test_names_that_are_no_text_can_be_printed(tmp_path):
    folder = os.fsencode(tmp_path) + b"/\xff\xfe"
    os.mkdir(folder)
    for name in (b"/\xff.png", b"/a\nb.png"):
        Path(os.fsdecode(folder + name)).write_bytes(encoded(picture(0), "PNG"))
    source = open_source("folder", tmp_path, 8)
    describe(source).encode()
    assert len([*source]) == 2
    Path(os.fsdecode(folder + b"/\xff.png")).write_bytes(b"")
    source.bad = BadImages(3)
    source.take(1)
    assert len(source.bad.reasons) == 1


# ---- what stands at data.path --------------------------------------------------------------------


def zip_at(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("a/1.png", "x")


PLACES = {
    "x.zip": (zip_at, "zip archive.*data.source=zip"),
    "x.tar": (lambda p: p.write_bytes(bytes(257) + b"ustar" + bytes(300)), "data.source=tar"),
    "x.tar.gz": (lambda p: p.write_bytes(b"\x1f\x8b\x08" + bytes(99)), "gzip archive.*unpack"),
    "x.pt": (lambda p: torch.save({}, p), "PyTorch"),
    "x.parquet": (lambda p: p.write_bytes(b"PAR1\xff\xfe\x00"), "prepare_data"),
    "x.h5": (lambda p: h5py.File(p, "w").close(), "HDF5.*data.source=hdf5"),
    "x.npz": (lambda p: np.savez(p, a=1), "NumPy"),
    "x.png": (lambda p: picture(0).save(p), "PNG image"),
    "text": (lambda p: p.write_text("x"), "text file"),
    "empty": (lambda p: p.write_text(""), "empty file"),
    "fifo": (os.mkfifo, "FIFO"),
    "dead": (lambda p: p.symlink_to("nowhere"), "link to nothing"),
    "loop": (lambda p: p.symlink_to("loop"), "Too many levels"),
    "device": (lambda p: p.symlink_to("/dev/null"), "device"),
}


@pytest.mark.parametrize("name", PLACES)
@pytest.mark.parametrize("source", ["folder", "packed", "hdf5"])
def test_a_path_that_is_no_folder_is_called_what_it_is(tmp_path, name, source):
    make, words = PLACES[name]
    make(tmp_path / name)
    with pytest.raises(UserError, match=rf"data\.path=.*{name}.*{words}") as error:
        open_source(source, tmp_path / name, 8)
    assert "no such" not in one_line(error)


@pytest.mark.parametrize("path", ["", "a\0b", "x" * 300, "x/" * 3000, "~nobody/x", "/proc/1/mem"])
def test_paths_that_are_none(path):
    with pytest.raises(UserError) as error:
        open_source("folder", path, 8)
    one_line(error)


def test_an_absent_folder_suggests_its_neighbour(tmp_path):
    (tmp_path / "imagenet").mkdir()
    with pytest.raises(UserError, match=f"no such folder; did you mean {tmp_path}/imagenet"):
        open_source("folder", tmp_path / "imagnet", 8)


def packed_at(root: Path) -> None:
    root.rmdir()
    pack_by_hand(root)


def h5_at(root: Path) -> None:
    root.rmdir()
    official_h5(root, H5_NAMES, H5_LABELS)


FOLDERS = {
    "packed": (packed_at, "data.source=packed"),
    "hdf5": (h5_at, "data.source=hdf5"),
    "folder": (lambda p: fill(p, ["a/1.png"]), "data.source=folder"),
    "latents": (lambda p: (p / "plan.json").write_text('{"format": "repae-latents-1"}'), "latents"),
    "tars": (lambda p: (p / "0000.tar").write_text(""), "webdataset"),
    "parquet": (lambda p: (p / "train-0.parquet").write_text(""), "parquet"),
    "weights": (lambda p: (p / "model.safetensors").write_text(""), "weights"),
    "run": (lambda p: (p / "checkpoints").mkdir(), "folder of a run"),
    "empty": (lambda p: None, "empty folder"),
}


@pytest.mark.parametrize("held", FOLDERS)
@pytest.mark.parametrize("source", ["folder", "packed", "hdf5"])
def test_a_folder_of_another_kind_is_called_what_it_is(tmp_path, held, source):
    make, words = FOLDERS[held]
    root = tmp_path / "d"
    root.mkdir()
    make(root)
    if held == source:
        assert len(open_source(source, root, 8)) > 0
        return
    with pytest.raises(UserError, match=words) as error:
        open_source(source, root, 8)
    one_line(error)


@pytest.mark.parametrize("resolution", [0, -1, 10**9, 2.5, "8", True * 10_000])
def test_resolutions_that_no_image_has(resolution):
    with pytest.raises(UserError, match="resolution"):
        open_source("digits", None, resolution)


# ---- metadata ------------------------------------------------------------------------------------

VALUES = [None, True, "x", "8", -1, 0, 2.5, 10**30, [], [1], ["x"], {}, [[1]], [-1], [True], [1.5]]


@pytest.mark.parametrize("key", ["format", "crop_version", "resolution", "shards", "classes"])
def test_meta_of_packed_data_that_does_not_fit_is_refused(tmp_path, key):
    root = tmp_path / "p"
    pack_by_hand(root)
    meta = json.loads((root / "meta.json").read_text())
    for value in VALUES:
        (root / "meta.json").write_text(json.dumps(meta | {key: value}))
        with pytest.raises(UserError) as error:
            open_source("packed", root, 8)
        assert str(root) in one_line(error)
    (root / "meta.json").write_text(json.dumps({k: v for k, v in meta.items() if k != key}))
    with pytest.raises(UserError, match=rf"{key} is missing"):
        open_source("packed", root, 8)


@pytest.mark.parametrize("content", ["", "[]", "7", "null", '"x"', "{", "[" * 99_999, "\udcff"])
@pytest.mark.parametrize("name", ["meta.json", "images_h5.json"])
def test_metadata_that_is_no_object_is_refused(tmp_path, name, content):
    packed, hdf5 = tmp_path / "p", official_h5(tmp_path / "h", H5_NAMES, H5_LABELS)
    pack_by_hand(packed)
    kind, root = ("packed", packed) if name == "meta.json" else ("hdf5", hdf5)
    (root / name).write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(UserError, match=re.escape(name)) as error:
        open_source(kind, root, 8)
    one_line(error)


def replaced(path: Path, content) -> None:
    if isinstance(content, np.ndarray):
        np.save(path, content, allow_pickle=True)
    else:
        path.write_bytes(content)


@pytest.mark.parametrize(
    "labels",
    [
        np.arange(4),
        np.arange(6),
        np.zeros((5, 1), np.int64),
        np.zeros(5),
        np.zeros(5, bool),
        np.array(list("abcde")),
        np.array([0, 1, 2, 1, 10**9]),
        np.array([0, 1, 2, 1, -1]),
        np.array([{}] * 5, object),
        np.int64(1),
        b"",
        b"text",
        b"PK\x03\x04",
    ],
    ids=str,
)
def test_labels_of_packed_data_that_do_not_fit_are_refused(tmp_path, labels):
    pack_by_hand(tmp_path / "p")
    replaced(tmp_path / "p/labels.npy", labels)
    with pytest.raises(UserError, match=r"labels\.npy") as error:
        open_source("packed", tmp_path / "p", 8)
    one_line(error)


@pytest.mark.parametrize("keys", ["", "k0\n", "k0\nk1\nk2\nk3\nk4\nk5\n", "k0\nk1\nk2\nk3\nk3\n"])
def test_keys_of_packed_data_that_do_not_fit_are_refused(tmp_path, keys):
    pack_by_hand(tmp_path / "p")
    source = open_source("packed", tmp_path / "p", 8)
    (tmp_path / "p/keys.txt").write_text(keys)
    with pytest.raises(UserError, match=r"keys\.txt"):
        source.key(0)
    (tmp_path / "p/keys.txt").unlink()
    with pytest.raises(UserError, match=r"keys\.txt is absent"):
        source.key(0)


def test_two_classes_of_one_name_are_refused(tmp_path):
    root = tmp_path / "p"
    pack_by_hand(root)
    meta = json.loads((root / "meta.json").read_text())
    (root / "meta.json").write_text(json.dumps(meta | {"classes": ["a"] * len(meta["classes"])}))
    with pytest.raises(UserError, match="two classes are called a"):
        open_source("packed", root, 8)


def test_what_to_do_about_a_meta_depends_on_what_is_there(tmp_path):
    """A damaged one is not an unfinished folder; a folder of another kind is not made again."""
    root = tmp_path / "p"
    pack_by_hand(root)
    (root / "plan.json").write_text('{"format": "repae-packed-1"}')
    for content, said in (("[]", "again"), (None, "unfinished")):
        (root / "meta.json").unlink()
        (root / "meta.json").write_text(content) if content else None
        with pytest.raises(UserError, match=said) as error:
            open_source("packed", root, 8)
        assert ("unfinished" in one_line(error)) == (content is None)
    with pytest.raises(UserError) as error:
        LatentCache(root)
    assert "again" not in one_line(error) and "cache_latents.py" in one_line(error)


def test_a_packed_class_without_images_is_no_class(tmp_path):
    pack_by_hand(tmp_path / "p", classes=["a", "b", "c", "d"])
    source = open_source("packed", tmp_path / "p", 8)
    assert source.classes == ["a", "b", "c"] and "label 3" in source.notes[0]


@pytest.mark.parametrize("damage", ["text", "empty", "cut", "fifo", "folder", "no images in it"])
def test_an_h5_file_that_is_none_is_refused_at_the_start(tmp_path, damage):
    root = official_h5(tmp_path / "h", H5_NAMES, H5_LABELS)
    path = root / "images.h5"
    content = path.read_bytes()
    path.unlink()
    match damage:
        case "text" | "empty" | "cut":
            path.write_bytes({"text": b"text", "empty": b"", "cut": content[:1000]}[damage])
        case "fifo":
            os.mkfifo(path)
        case "folder":
            path.mkdir()
        case _:
            h5py.File(path, "w").close()
    with pytest.raises(UserError, match=r"images\.h5") as error:
        open_source("hdf5", root, 8)
    one_line(error)


def test_odd_entries_of_an_h5_file_are_unreadable_images(tmp_path):
    """Replaced in training, skipped when packing."""
    root = official_h5(tmp_path / "h", H5_NAMES, H5_LABELS)
    with h5py.File(root / "images.h5", "a") as file:
        for name in H5_NAMES[:2]:
            del file[name]
        file[H5_NAMES[0]] = np.zeros((3, 3), np.float32)
        file.create_group(H5_NAMES[1])
    source = open_source("hdf5", root, 8)
    assert source.key(1) == H5_NAMES[2]
    for i in (0, 2):
        with pytest.raises(UnreadableImageError):
            source[i]
    source.bad = BadImages(9)
    assert torch.equal(source.take(0)[0], source[1][0]) and len(source.bad.reasons) == 1
