"""Reading images: every container gives the same bytes, and damaged ones end in one line."""

import json
import os
import tarfile
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

from models.checks.errors import UserError
from tests.utils.evaluation.toy_network import sampling_record
from utils.config.schema import DataConfig
from utils.distributed import Ranks
from utils.evaluation.evaluate import evaluate
from utils.evaluation.images.beside import record_beside
from utils.evaluation.images.image_sets import (
    open_images,
    subset,
)
from utils.evaluation.images.naming import is_source, path_of, spec_of_data
from utils.evaluation.images.reader import read_ahead
from utils.evaluation.options import Options, sampling_settings
from utils.process.written import LONGEST_JSON


@pytest.fixture
def pictures():
    rng = np.random.Generator(np.random.PCG64(0))
    return rng.integers(0, 256, (13, 6, 5, 3), dtype=np.uint8)


def containers(folder, pictures):
    """The same images in every way a user may bring them."""
    np.savez(folder / "stored.npz", pictures)
    np.savez_compressed(folder / "packed.npz", pictures)
    np.save(folder / "plain.npy", pictures)
    return {
        "npz": folder / "stored.npz",
        "npz (compressed)": folder / "packed.npz",
        "npy": str(folder / "plain.npy"),
        "array": pictures,
        "tensor": torch.from_numpy(pictures).permute(0, 3, 1, 2),
    }


def save_folder(folder, pictures, ending="png"):
    folder.mkdir()
    for i, picture in enumerate(pictures):
        Image.fromarray(picture).save(folder / f"{i}.{ending}")
    return folder


def test_every_container_reads_as_the_array_and_has_the_same_fingerprint(tmp_path, pictures):
    fingerprints = set()
    for kind, spec in containers(tmp_path, pictures).items():
        images = open_images(spec)
        assert (images.kind, len(images), tuple(images.size)) == (kind, 13, (6, 5))
        assert np.array_equal(images.read(3, 7), pictures[3:7])
        assert np.array_equal(images.read(0, 2), pictures[:2])  # backwards too
        assert np.array_equal(images.read(12, 13), pictures[12:])
        fingerprints.add(images.fingerprint())
    assert len(fingerprints) == 1
    pictures[5, 0, 0, 0] ^= 1
    assert open_images(pictures).fingerprint() not in fingerprints


def test_a_stored_npz_is_mapped_and_not_loaded(tmp_path, pictures):
    np.savez(tmp_path / "a.npz", mu=np.zeros(3), arr_0=pictures)
    images = open_images(tmp_path / "a.npz")
    assert isinstance(images.array, np.memmap)
    with (
        zipfile.ZipFile(tmp_path / "big.npz", "w") as archive,
        archive.open("arr_0.npy", "w", force_zip64=True) as member,  # as for more than 4 GiB
    ):
        np.lib.format.write_array(member, pictures)
    assert np.array_equal(open_images(tmp_path / "big.npz").read(0, 13), pictures)


def test_a_folder_is_read_in_natural_order_below_all_subfolders(tmp_path, pictures):
    folder = save_folder(tmp_path / "images", pictures)
    images = open_images(folder)
    assert np.array_equal(images.read(0, 13), pictures)  # 2.png before 10.png
    assert not images.lossy
    first = images.fingerprint()
    (folder / "sub").mkdir()
    Image.fromarray(pictures[0]).save(folder / "sub" / "0.jpg")
    images = open_images(folder)
    assert len(images) == 14
    assert images.lossy
    assert images.fingerprint() != first


def test_sources_are_named_with_split_and_resolution():
    images = open_images("digits:test@16")
    assert (len(images), images.size, images.name) == (359, (16, 16), "digits:test@16")
    image, _ = images.source[3]
    assert np.array_equal(images.read(3, 4)[0], image.permute(1, 2, 0))
    assert open_images("digits", 8, "train").name == "digits:train@8"
    assert is_source("packed:/data/x@256")
    assert not is_source("samples/x.npz")
    with pytest.raises(UserError, match="no such file or folder"):
        open_images("digit:test")


def test_a_folder_as_data_is_cropped(tmp_path, pictures):
    folder = save_folder(tmp_path / "images", pictures)
    images = open_images(f"folder:{folder}@4")
    assert images.read(0, 2).shape == (2, 4, 4, 3)
    assert images.fingerprint() != open_images(f"folder:{folder}@5").fingerprint()


def test_a_reference_needs_no_labels(tmp_path, pictures):
    """The printed command of a run with data.labels=none was once refused."""
    folder = save_folder(tmp_path / "images", pictures)
    save_folder(folder / "more", pictures[:2])
    images = open_images(f"folder:{folder}@4")
    assert len(images) == 15 and images.notes == [
        f"all images are taken, though {folder} holds images (0.png) beside class folders"
    ]
    for name in ("train", "test"):
        with tarfile.open(tmp_path / f"{name}-0.tar", "w") as file:
            file.add(folder / "more", "x")
    with pytest.raises(UserError, match="choose one: tar:PATH,split=train"):
        open_images(f"tar:{tmp_path}@4")
    assert len(open_images(f"tar:{tmp_path}@4,split=test")) == 2


def test_a_spec_says_what_the_settings_of_a_run_say(tmp_path):
    """Else samples would be compared with other pictures than those that were trained on."""
    path = tmp_path / "a"
    path.mkdir()
    deep = np.full((4, 4), 4095, dtype=np.uint16)
    Image.fromarray(deep).save(path / "0.png")
    data = DataConfig(source="folder", path=str(path), resolution=4, depth_range=[0, 4095])
    images = open_images(spec_of_data(data))
    assert images.name == f"folder:{path}@4,depth_range=0-4095"
    assert np.all(images.read(0, 1) == 255)
    data = DataConfig(source="folder", path=str(path), resolution=4, exif=True)
    assert open_images(spec_of_data(data)).source.conversion.exif
    tar = DataConfig(source="tar", path="x", split="train", exif=True, depth_range=[1, 9])
    assert spec_of_data(tar) == "tar:x@256,split=train,exif,depth_range=1-9"
    assert is_source(spec_of_data(tar)) and path_of(spec_of_data(tar)) == "x"
    with pytest.raises(UserError, match="expected 0 <= LO < HI"):
        open_images(f"folder:{path}@4,depth_range=9-3")


def test_a_meta_json_that_lies_about_is_no_fingerprint(tmp_path, pictures, monkeypatch):
    """Once any meta.json, in the current folder or beside the images, was hashed in their place."""
    before = open_images("digits:test@8").fingerprint()
    monkeypatch.chdir(tmp_path)
    (tmp_path / "meta.json").write_text("{}")
    assert open_images("digits:test@8").fingerprint() == before
    folder = save_folder(tmp_path / "images", pictures)
    (folder / "meta.json").write_text("{}")
    first = open_images(f"folder:{folder}@4").fingerprint()
    Image.fromarray(np.zeros((6, 5, 3), np.uint8)).save(folder / "0.png")
    assert open_images(f"folder:{folder}@4").fingerprint() != first


def test_subsets_are_spread_evenly(pictures):
    images = subset(open_images(pictures), 4)
    assert np.array_equal(images.read(0, 4), pictures[[0, 3, 6, 9]])
    assert subset(images, None) is images
    with pytest.raises(UserError, match=r"expected 1 \.\. 13"):
        subset(open_images(pictures), 14)


def test_read_ahead_gives_every_block_once_as_nchw(pictures):
    blocks = [(0, 5), (5, 10), (10, 13)]
    found = list(read_ahead(open_images(pictures), blocks))
    assert [len(block) for block in found] == [5, 5, 3]
    assert torch.equal(torch.cat(found), torch.from_numpy(pictures).permute(0, 3, 1, 2))
    assert list(read_ahead(open_images(pictures), [])) == []


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((4, 6, 6, 3), np.float32), "float32 images, expected uint8"),
        (np.zeros((4, 6, 6, 1), np.uint8), "RGB"),
        (np.zeros((4, 6, 6), np.uint8), "RGB"),
        (np.zeros((4, 3, 6, 6), np.uint8), "expected .N, H, W, 3."),
    ],
)
def test_arrays_that_are_no_uint8_rgb_are_refused(tmp_path, array, message):
    np.savez(tmp_path / "a.npz", array)
    np.savez_compressed(tmp_path / "b.npz", array)
    np.save(tmp_path / "c.npy", array)
    for spec in (tmp_path / "a.npz", tmp_path / "b.npz", tmp_path / "c.npy", array):
        with pytest.raises(UserError, match=message):
            open_images(spec)


def test_truncated_and_damaged_files_are_refused(tmp_path, pictures):
    containers(tmp_path, pictures)
    for name in ("stored.npz", "packed.npz", "plain.npy"):
        data = (tmp_path / name).read_bytes()
        (tmp_path / f"cut-{name}").write_bytes(data[: len(data) // 2])
        with pytest.raises(UserError, match="truncated or damaged"):
            open_images(tmp_path / f"cut-{name}")
    data = bytearray((tmp_path / "packed.npz").read_bytes())
    data[600:900] = bytes(300)
    (tmp_path / "garbage.npz").write_bytes(data)
    with pytest.raises(UserError, match="truncated or damaged"):
        open_images(tmp_path / "garbage.npz").fingerprint()
    with zipfile.ZipFile(tmp_path / "short.npz", "w") as archive:
        archive.writestr("arr_0.npy", (tmp_path / "plain.npy").read_bytes()[:-100])
    with pytest.raises(UserError, match="cut short"):
        open_images(tmp_path / "short.npz")


def test_pickled_arrays_are_refused(tmp_path):
    np.save(tmp_path / "a.npy", np.array([{}], dtype=object), allow_pickle=True)
    np.savez(tmp_path / "b.npz", np.array([{}], dtype=object))
    for name in ("a.npy", "b.npz"):
        with pytest.raises(UserError):
            open_images(tmp_path / name)


def test_npz_without_images_and_missing_files_are_refused(tmp_path):
    np.savez(tmp_path / "stats.npz", mu=np.zeros(3), sigma=np.eye(3))
    with pytest.raises(UserError, match="holds mu, sigma, but no images"):
        open_images(tmp_path / "stats.npz")
    with pytest.raises(UserError, match="no such file"):
        open_images(tmp_path / "absent.npz")


def test_folders_of_mixed_sizes_modes_or_nothing_are_refused(tmp_path, pictures):
    mixed = save_folder(tmp_path / "mixed", pictures)
    Image.fromarray(pictures[0][:4]).save(mixed / "99.png")
    with pytest.raises(UserError, match="4x5, the first image 6x5"):
        open_images(mixed).read(0, 14)
    grey = tmp_path / "grey"
    grey.mkdir()
    with pytest.raises(UserError, match="no images in"):
        open_images(grey)
    Image.fromarray(pictures[0, :, :, 0]).save(grey / "0.png")
    with pytest.raises(UserError, match="mode L, expected 8-bit RGB"):
        open_images(grey)
    (grey / "0.png").write_bytes(b"no image")
    with pytest.raises(UserError, match="not an image"):
        open_images(grey)


def test_the_record_beside_the_samples_is_found(tmp_path, pictures):
    path = tmp_path / "s.npz"
    assert record_beside(path) == record_beside(pictures) == (None, "")
    np.savez(path, pictures)
    record = sampling_record(13, uint8="round") | {"seconds": 1}
    path.with_suffix(".json").write_text(json.dumps(record))
    images = open_images(path)
    assert sampling_settings(images.record)["uint8"] == "round" and not images.notes
    assert sampling_settings({"metrics": {}}) == {}


FOREIGN = {
    "a list": b"[1, 2]",
    "broken": b'{"settings": ',
    "empty": b"",
    "deep": b"[" * 99_999,
    "no UTF-8": b"\xff\xfe\x00",
    "of another program": b'{"solver": "dpm", "settings": {"solver": "dpm"}}',
    "an evaluation": b'{"metrics": {}, "samples": {}}',
    "of more samples": json.dumps(sampling_record(14)).encode(),
    "with changed settings": json.dumps(
        sampling_record(13) | {"settings": {"solver": "ode"}}
    ).encode(),
    "of other samples": json.dumps(sampling_record(13) | {"content_sha256": "0" * 64}).encode(),
}


@pytest.mark.parametrize("kind", [*FOREIGN, "huge", "a folder", "a FIFO", "a broken link"])
def test_a_json_that_is_not_theirs_is_a_warning_in_the_record(kind, tmp_path, pictures):
    np.savez(tmp_path / "s.npz", pictures)
    beside = tmp_path / "s.json"
    match kind:
        case "huge":
            with beside.open("wb") as file:
                file.truncate(LONGEST_JSON + 1)
        case "a folder":
            beside.mkdir()
        case "a FIFO":
            os.mkfifo(beside)
        case "a broken link":
            beside.symlink_to("nowhere")
        case _:
            beside.write_bytes(FOREIGN[kind])
    options = Options(features="pixel", metrics=("fid",), cache=None)
    record = evaluate(tmp_path / "s.npz", pictures, options, ranks=Ranks(False, "cpu"))
    assert record["samples"]["record"] is None and record["samples"]["uint8_rule"] is None
    (said,) = [text for text in record["warnings"] if "beside" in text or "s.json" in text]
    assert "\n" not in said and str(tmp_path) in said
