"""Files that are read for an evaluation and are wrong in any way: one line, at once, in no memory.

python -m pytest tests/utils/evaluation/test_files.py
"""

import io
import json
import os
import zipfile

import numpy as np
import pytest
from PIL import Image

from models.checks.errors import UserError
from tests.utils.evaluation.toy_network import toy_net
from utils.distributed import Ranks
from utils.evaluation.evaluate import evaluate
from utils.evaluation.images.image_sets import open_images
from utils.evaluation.images.npz_images import open_array_file
from utils.evaluation.images.reader import read_ahead
from utils.evaluation.options import Options, sampling_settings
from utils.evaluation.reference import Reference

IMAGES = np.random.default_rng(0).integers(0, 256, (6, 16, 16, 3), np.uint8)
ALONE = Ranks(distributed=False, device="cpu")


def header(shape, descr="|u1", data=b"") -> bytes:
    """An .npy that begins as an array of this shape."""
    file = io.BytesIO()
    facts = {"descr": descr, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, facts)
    return file.getvalue() + data


def npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array, allow_pickle=True)
    return file.getvalue()


MEMBERS = {
    "none": {},
    "another name": {"x.npy": npy(IMAGES)},
    "text": {"arr_0.npy": b"hello"},
    "objects": {"arr_0.npy": npy(np.array([{}], dtype=object))},
    "floats": {"arr_0.npy": npy(IMAGES.astype("f4"))},
    "signed": {"arr_0.npy": npy(IMAGES.astype("i1"))},
    "structured": {"arr_0.npy": npy(np.zeros(6, dtype=[("a", "u1")]))},
    "one image of three axes": {"arr_0.npy": npy(IMAGES[0])},
    "four channels": {"arr_0.npy": npy(np.zeros((6, 16, 16, 4), np.uint8))},
    "channels first": {"arr_0.npy": npy(np.zeros((6, 3, 16, 16), np.uint8))},
    "no images": {"arr_0.npy": npy(IMAGES[:0])},
    "no pixels": {"arr_0.npy": npy(np.zeros((6, 0, 0, 3), np.uint8))},
    "10^12 images": {"arr_0.npy": header((10**12, 16, 16, 3))},
    "more bytes than numbers": {"arr_0.npy": header((2**62, 2**62, 2**62, 3))},
    "a negative number": {"arr_0.npy": header((-6, 16, 16, 3))},
    "cut short": {"arr_0.npy": header((6, 16, 16, 3), data=b"\0" * 100)},
    "too long": {"arr_0.npy": header((6, 16, 16, 3), data=b"\0" * 9999)},
    "fortran order": {"arr_0.npy": npy(np.asfortranarray(IMAGES))},
    "a header that is code": {"arr_0.npy": b"\x93NUMPY\x01\x00\x10\x00{'descr': import}\n"},
    "an unknown version": {"arr_0.npy": b"\x93NUMPY\x09\x00" + b"a" * 50},
    "a folder": {"arr_0/": b""},
}


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
@pytest.mark.parametrize("kind", MEMBERS)
def test_an_npz_that_holds_something_else_is_refused(kind, compression, tmp_path):
    path = tmp_path / "s.npz"
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in MEMBERS[kind].items():
            archive.writestr(name, content)
    with pytest.raises(UserError, match=r"s\.npz"):
        open_array_file(path)


def test_a_compressed_bomb_is_refused_before_memory_is_taken(tmp_path, monkeypatch):
    """It claims 10^12 images in a directory of the archive that agrees with the header."""
    path = tmp_path / "s.npz"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("arr_0.npy", header((10**12, 16, 16, 3)))
    claim = len(header((10**12, 16, 16, 3))) + 10**12 * 16 * 16 * 3
    known = zipfile.ZipFile.getinfo

    def claimed(self, name):
        info = known(self, name)
        info.file_size = claim
        return info

    monkeypatch.setattr(zipfile.ZipFile, "getinfo", claimed)
    with pytest.raises(UserError, match="cannot be in a file"):
        open_array_file(path)


@pytest.mark.parametrize("cut", [0, 10, 200, 500, -30, -1])
def test_a_truncated_file_is_refused(cut, tmp_path):
    for name, write in (("s.npz", np.savez), ("c.npz", np.savez_compressed), ("s.npy", np.save)):
        write(tmp_path / name, IMAGES)
        whole = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(whole[:cut] if cut else b"")
        with pytest.raises(UserError, match=name):
            open_array_file(tmp_path / name)


PLACES = {
    "absent": lambda path: None,
    "a folder": lambda path: path.mkdir(),
    "a FIFO": os.mkfifo,
    "an empty file": lambda path: path.touch(),
    "a text file": lambda path: path.write_text("hello"),
    "a zip archive": lambda path: zipfile.ZipFile(path, "w").writestr("a", "b"),
    "a Python pickle": lambda path: path.write_bytes(b"\x80\x04N."),
    "unreadable": lambda path: path.symlink_to(path),
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", ["x.npz", "x.npy", "x", "x.pt"])
def test_what_is_absent_and_what_is_something_else_are_two_messages(name, place, tmp_path):
    """Nothing is waited for, nothing unpickled."""
    path = tmp_path / name
    PLACES[place](path)
    with pytest.raises(UserError) as caught:
        Reference(str(path))
    assert str(path) in str(caught.value)
    assert ("no such file" in str(caught.value)) == (place == "absent")
    if place not in ("absent", "a folder"):
        assert place in str(caught.value)


def picture(size=(16, 16), mode="RGB") -> bytes:
    file = io.BytesIO()
    Image.new(mode, size).save(file, "PNG")
    return file.getvalue()


FOLDERS = {
    "empty": {},
    "no images": {"a.txt": b"x"},
    "of two sizes": {"a.png": picture(), "b.png": picture((8, 8))},
    "grey": {"a.png": picture(mode="L")},
    "with alpha": {"a.png": picture(mode="RGBA")},
    "an empty image": {"a.png": b""},
    "a broken image": {"a.png": picture(), "b.png": b"xx"},
    "a cut image": {"a.png": picture(), "b.png": picture()[:45]},
    "a PostScript file": {"a.png": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"},
    "packed, without a resolution": {"meta.json": b'{"format": "repae-packed-1"}'},
    "packed, of a wrong type": {"meta.json": b'{"format": "repae-packed-1", "resolution": "16"}'},
    "packed, unfinished": {"meta.json": b'{"format": "repae-packed-1", "resolution": 16}'},
}


@pytest.mark.parametrize("kind", FOLDERS)
def test_a_folder_of_other_things_is_refused(kind, tmp_path):
    for name, content in FOLDERS[kind].items():
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=str(tmp_path)):
        list(read_ahead(open_images(tmp_path), [(0, 2)]))


def test_damaged_statistics_in_the_cache_are_made_again(tmp_path):
    rng = np.random.default_rng(0)
    real, fake = (rng.integers(0, 256, (9, 16, 16, 3), np.uint8) for _ in range(2))
    options = Options(metrics=("fid",), cache=tmp_path)
    first = evaluate(fake, real, options, net=toy_net(), ranks=ALONE)
    for path in sorted(tmp_path.iterdir()):
        for content in (b"", b"text", path.read_bytes()[:-40]):
            path.write_bytes(content)
            again = evaluate(fake, real, options, net=toy_net(), ranks=ALONE)
            assert again["metrics"] == first["metrics"]
            assert again["reference"]["cache"] == "computed now"


def test_a_cache_that_cannot_be_written_costs_no_number(tmp_path, capsys):
    (tmp_path / "file").touch()
    rng = np.random.default_rng(0)
    real = rng.integers(0, 256, (9, 16, 16, 3), np.uint8)
    options = Options(metrics=("fid",), cache=tmp_path / "file" / "cache")
    assert evaluate(real, real, options, net=toy_net(), ranks=ALONE)["metrics"]
    assert str(tmp_path / "file") in capsys.readouterr().err


@pytest.mark.parametrize("record", [[1], 3, "x", {"settings": [1, "solver"]}, {"settings": 1}])
def test_a_json_of_another_kind_beside_samples_holds_no_settings(record):
    assert sampling_settings(json.loads(json.dumps(record))) == {}
