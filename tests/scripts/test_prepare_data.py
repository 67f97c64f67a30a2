"""Packing: the same pixels as the folder, whatever interrupts it."""

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import zlib
from collections import namedtuple
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from filelock import FileLock
from PIL import Image

from models.checks.errors import UserError
from scripts import prepare_data
from utils import cli, files
from utils.data.base import hash_images
from utils.data.decoding.conversion import Conversion
from utils.data.registry import open_source
from utils.data.sampling import StepSampler, make_loader
from utils.data.sources import packed as packed_data

SCRIPT = Path(prepare_data.__file__)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """23 images in 3 classes, 2 of them broken."""
    root = tmp_path_factory.mktemp("source")
    rng = np.random.default_rng(0)
    for i in range(23):
        path = root / f"class{i % 3 * 5}" / f"{i}.png"
        path.parent.mkdir(exist_ok=True)
        width, height = rng.integers(10, 60, 2)
        Image.fromarray(rng.integers(0, 256, (height, width, 3), "u1")).save(path)
    (root / "class5/4.png").write_bytes(b"no image")
    whole = (root / "class10/8.png").read_bytes()
    (root / "class10/8.png").write_bytes(whole[: len(whole) // 2])
    return root


def pack(src, out, *options, workers=0) -> None:
    words = [src, out, "--resolution", 16, "--shard-size", 5, "--workers", workers, *options]
    prepare_data.main([str(word) for word in words])


def content(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in out.iterdir() if path.name != ".lock"}


@pytest.fixture(scope="module")
def packed(folder, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("packed") / "out"
    pack(folder, out)
    return out


def test_packed_equals_folder_bit_for_bit(folder, packed):
    images, source = open_source("folder", folder, 16), open_source("packed", packed, 16)
    assert len(source) == 21 and source.num_classes == 3
    assert source.classes == images.classes == ["class0", "class5", "class10"]
    index = {images.key(i): i for i in range(len(images))}
    for i in range(len(source)):
        x_u8, y = images[index[source.key(i)]]
        assert torch.equal(source[i][0], x_u8) and source[i][1] == y
    assert np.load(packed / "labels.npy").tolist() == [y for _, y in source]


def test_unreadable_images_are_listed(packed):
    lines = (packed / "skipped.txt").read_text().splitlines()
    assert lines[0] == "class5/4.png\tnot an image, but a text file"
    assert lines[1].startswith("class10/8.png\t") and len(lines) == 2
    meta = json.loads((packed / "meta.json").read_text())
    assert meta["num_skipped"] == 2 and meta["shards"] == [5, 5, 4, 5, 2]
    assert not list(packed.glob("*.tmp"))


def test_shards_are_plain_npy_files(packed):
    for path, rows in zip(sorted(packed.glob("shard-*.npy")), [5, 5, 4, 5, 2], strict=True):
        array = np.load(path)
        assert array.shape == (rows, 16, 16, 3) and array.dtype == np.uint8
        assert path.stat().st_size == 128 + array.nbytes


def test_workers_and_reruns_change_no_byte(folder, packed, tmp_path, capsys):
    pack(folder, tmp_path / "out", workers=2)
    assert content(tmp_path / "out") == content(packed)
    pack(folder, tmp_path / "out", workers=2)
    assert content(tmp_path / "out") == content(packed)
    output = capsys.readouterr().out
    assert (
        "0.00 MiB still to write" in output and "packed 21 images, 3 classes, 2 skipped" in output
    )
    line = f"use: data.source=packed data.path={tmp_path / 'out'} data.resolution=16"
    assert output.rstrip().endswith(line)


@pytest.mark.parametrize("lost", [["shard-00001.npy"], ["shard-00002.json"], ["shard-00004.npy"]])
def test_lost_shards_are_made_again(folder, packed, tmp_path, lost):
    out = tmp_path / "out"
    shutil.copytree(packed, out)
    for name in [*lost, "meta.json"]:
        (out / name).unlink()
    (out / "shard-00003.npy").write_bytes(b"cut short")
    (out / "shard-00003.tmp").write_bytes(b"left over")
    with pytest.raises(UserError, match="unfinished"):
        open_source("packed", out, 16)
    pack(folder, out)
    assert content(out) == content(packed)


@pytest.mark.slow
def test_kill_and_rerun(tmp_path, capsys):
    """kill -9 after the first shard, then the same command: as if nothing had happened."""
    src, out = tmp_path / "src", tmp_path / "out"
    src.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (300, 400, 3), "u1")
    for i in range(120):
        Image.fromarray(np.roll(pixels, i, 0)).save(src / f"{i:03d}.png", compress_level=1)
    options = ["--resolution", "64", "--shard-size", "10", "--workers", "2"]
    command = [sys.executable, str(SCRIPT), str(src), str(out), *options]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    while not (out / "shard-00000.json").exists():
        assert process.poll() is None, process.stdout.read().decode()
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    process.stdout.read()  # ends when the workers, who share the pipe, have ended too
    assert not (out / "meta.json").exists()
    whole = [record.with_suffix(".npy") for record in out.glob("shard-*.json")]
    finished = {path: path.stat().st_mtime_ns for path in whole}
    assert 1 <= len(finished) < 12
    prepare_data.main([str(src), str(out), *options[:-1], "0"])
    assert "packed 120 images, 1 classes, 0 skipped" in capsys.readouterr().out
    assert all(path.stat().st_mtime_ns == time_ns for path, time_ns in finished.items())
    prepare_data.main([str(src), str(tmp_path / "reference"), *options[:-1], "0"])
    assert content(out) == content(tmp_path / "reference")


def test_changed_settings_are_refused(folder, packed, tmp_path):
    for options, message in (
        (["--resolution", 8], "begun with resolution=16, now 8; use the same"),
        (["--shard-size", 6], "begun with shard_size=5, now 6"),
    ):
        with pytest.raises(UserError, match=message) as error:
            pack(folder, packed, *options)
        assert "\n" not in str(error.value)
    shutil.copytree(folder, tmp_path / "src")
    (tmp_path / "src/class0/0.png").write_bytes(b"another size")
    with pytest.raises(UserError, match="begun with other images; use the same"):
        pack(tmp_path / "src", packed)
    (tmp_path / "src/class0/0.png").unlink()
    with pytest.raises(UserError, match="begun with num_listed=23, now 22;"):
        pack(tmp_path / "src", packed)


def test_changed_crop_is_refused(folder, packed, monkeypatch):
    monkeypatch.setattr(packed_data, "CROP_VERSION", "new")
    with pytest.raises(UserError, match="begun with crop_version=adm-center-crop-2, now new"):
        pack(folder, packed)


def test_dry_run_and_full_disk_write_nothing(folder, tmp_path, capsys, monkeypatch):
    pack(folder, tmp_path / "out", "--dry-run")
    assert "0.02 MiB still to write" in capsys.readouterr().out
    usage = namedtuple("usage", "free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(1000))
    with pytest.raises(UserError, match=r"not enough disk: 0\.02 MiB .*, 0\.00 MiB free"):
        pack(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_places_that_are_refused(folder, tmp_path):
    with pytest.raises(UserError, match="lies inside"):
        pack(folder, folder / "packed")
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"holds other files \(notes\.txt\)"):
        pack(folder, tmp_path)
    with pytest.raises(UserError, match=r"notes\.txt is no folder"):
        pack(folder, tmp_path / "notes.txt")


def test_two_runs_on_one_folder_are_refused(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(files, "LOCK_SECONDS", 0.05)
    with (
        FileLock(tmp_path / ".lock"),
        pytest.raises(UserError, match="another run writes"),
    ):
        pack(folder, tmp_path)


def test_nothing_readable(tmp_path):
    (tmp_path / "src").mkdir()
    (tmp_path / "src/a.png").write_bytes(b"x")
    with pytest.raises(UserError, match="none of the 1 images is readable"):
        pack(tmp_path / "src", tmp_path / "out")
    assert not (tmp_path / "out/meta.json").exists()


def test_a_dying_worker_ends_the_run(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(packed_data, "_pack_image", die)
    with pytest.raises(UserError, match="one of 1 workers died"):
        pack(folder, tmp_path / "out", workers=1)


def die(task):
    os._exit(9)


def test_ctrl_c_is_one_line(folder, tmp_path, monkeypatch):
    def interrupted(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(packed_data, "_write_shards", interrupted)
    with pytest.raises(UserError, match="interrupted; run the same command again"):
        pack(folder, tmp_path / "out", workers=1)


def test_hdf5_to_packed(tmp_path):
    src = tmp_path / "src"
    src.mkdir()
    rng = np.random.default_rng(0)
    names = [f"00000/img{i}.png" for i in range(7)]
    with h5py.File(src / "images.h5", "w") as file:
        for name in names:
            data = io.BytesIO()
            Image.fromarray(rng.integers(0, 256, (16, 16, 3), "u1")).save(data, "PNG")
            file[name] = np.frombuffer(data.getvalue(), np.uint8)
    (src / "images_h5.json").write_text(json.dumps(names))
    labels = [[name, 6 - i] for i, name in enumerate(names)]
    (src / "dataset.json").write_text(json.dumps({"labels": labels}))
    pack(src, tmp_path / "out", "--source", "hdf5", workers=1)
    source, packed = open_source("hdf5", src, 16), open_source("packed", tmp_path / "out", 16)
    assert packed.num_classes == 7
    for i in range(7):
        assert packed.key(i) == source.key(i) and packed[i][1] == source[i][1] == 6 - i
        assert torch.equal(packed[i][0], source[i][0])


def test_packed_through_the_loader(packed):
    """By workers or not: the rows as they lie on disk, (H, W, 3) in memory."""
    source = open_source("packed", packed, 16)
    sampler = StepSampler(len(source), 10, seed=0, end_step=3)
    parallel = list(make_loader(source, sampler, workers=2))
    for (x, y), (x_ref, y_ref) in zip(parallel, make_loader(source, sampler), strict=True):
        assert torch.equal(x, x_ref) and torch.equal(y, y_ref)
        assert x.permute(0, 2, 3, 1).is_contiguous() and x_ref.permute(0, 2, 3, 1).is_contiguous()


def test_pixels_are_not_packed_again(packed, tmp_path):
    with pytest.raises(UserError, match="holds pixels already"):
        pack(packed, tmp_path / "out", "--source", "packed")


def test_a_folder_of_an_earlier_version_is_refused_and_trained_on(folder, packed, tmp_path):
    """Its plan has names and sizes of files, its records no hashes: whether the pixels are still
    those of the source is not known."""
    out = tmp_path / "out"
    shutil.copytree(packed, out)
    plan = json.loads((out / "plan.json").read_text())
    for name in ("images_sha256", "labels_sha256"):
        del plan[name]
    (out / "plan.json").write_text(json.dumps(plan | {"source_sha256": "0" * 64}))
    for path in out.glob("shard-*.json"):
        record = json.loads(path.read_text())
        del record["hashes"]
        path.write_text(json.dumps(record))
    meta = json.loads((out / "meta.json").read_text())
    del meta["pixels_sha256"]
    (out / "meta.json").write_text(json.dumps(meta))
    with pytest.raises(UserError, match="by an earlier version, without a hash of its images"):
        pack(folder, out)
    old, new = open_source("packed", out, 16), open_source("packed", packed, 16)
    assert old.fingerprint() == new.fingerprint() and torch.equal(old[3][0], new[3][0])


def replace_by_equal_size(path: Path, in_place: bool) -> None:
    """Other pixels, for which all else is as before: name, size, times."""
    before, picture = path.stat(), Image.open(path)
    other = Image.fromarray(255 - np.asarray(picture))
    other.save(path.with_suffix(".new"), "BMP")
    if in_place:
        path.write_bytes(path.with_suffix(".new").read_bytes())
        path.with_suffix(".new").unlink()
    else:
        path.with_suffix(".new").replace(path)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    after = path.stat()
    assert (after.st_size, after.st_mtime_ns) == (before.st_size, before.st_mtime_ns)


@pytest.fixture
def bitmaps(tmp_path) -> Path:
    """Seven uncompressed images in two classes: all files have one size."""
    rng = np.random.default_rng(1)
    for i in range(7):
        path = tmp_path / "bitmaps" / "ab"[i % 2] / f"{i}.bmp"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (16, 16, 3), "u1")).save(path)
    return tmp_path / "bitmaps"


@pytest.mark.parametrize("in_place", [True, False], ids=["in place", "by rename"])
def test_replaced_pictures_are_not_called_packed(bitmaps, tmp_path, in_place):
    """The finished folder stays as it is; packed anew, it is another data set."""
    pack(bitmaps, tmp_path / "out")
    before, old = content(tmp_path / "out"), open_source("packed", tmp_path / "out", 16)
    replace_by_equal_size(bitmaps / "a/2.bmp", in_place)
    with pytest.raises(UserError, match=r"was begun with other images; .* or delete"):
        pack(bitmaps, tmp_path / "out")
    assert content(tmp_path / "out") == before
    pack(bitmaps, tmp_path / "anew")
    new = open_source("packed", tmp_path / "anew", 16)
    hashes = [json.loads((tmp_path / out / "meta.json").read_text()) for out in ("out", "anew")]
    assert [m["pixels_sha256"] for m in hashes] == [old.fingerprint(), new.fingerprint()]
    assert old.fingerprint() != new.fingerprint()


def test_the_identity_of_packed_data_is_that_of_their_pixels(bitmaps, tmp_path):
    """Whatever the shards are, or the container; what is overwritten is another identity."""
    pack(bitmaps, tmp_path / "a")
    pack(bitmaps, tmp_path / "b", "--shard-size", 3)
    a, b = (open_source("packed", tmp_path / out, 16) for out in "ab")
    pixels = np.stack([x.permute(1, 2, 0).numpy() for x, _ in a])
    assert a.fingerprint() == b.fingerprint() == hash_images((16, 16), pixels)
    rows = np.load(tmp_path / "a/shard-00001.npy", mmap_mode="r+")
    rows[0, 0, 0, 0] ^= 1
    del rows
    assert a.fingerprint() != b.fingerprint()
    with pytest.raises(
        UserError, match=r"shard-00001\.npy holds other pixels .*; delete shard-00001"
    ):
        pack(bitmaps, tmp_path / "a")
    (tmp_path / "a/shard-00001.json").unlink()
    pack(bitmaps, tmp_path / "a")
    assert open_source("packed", tmp_path / "a", 16).fingerprint() == b.fingerprint()


def test_pictures_that_are_replaced_while_they_are_packed(bitmaps, tmp_path, monkeypatch):
    def pack_and_replace(*arguments):
        packed_data.pack(*arguments)
        replace_by_equal_size(bitmaps / "a/2.bmp", in_place=True)

    monkeypatch.setattr(prepare_data, "pack", pack_and_replace)
    with pytest.raises(UserError, match="the data have changed while"):
        pack(bitmaps, tmp_path / "out")
    assert not (tmp_path / "out/meta.json").exists()


def test_mistakes_are_one_line(tmp_path, monkeypatch, capsys):
    """In the command itself, found before its slow imports or after them."""
    command = [sys.executable, str(SCRIPT), "a", "b", "--resolution", "0"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "least 1" in done.stderr
    monkeypatch.setattr(sys, "argv", ["prepare_data.py", "nowhere", "out"])
    with pytest.raises(SystemExit) as end:
        cli.run(prepare_data.main)
    assert end.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "SRC nowhere: no such folder" in error


@pytest.mark.parametrize(
    "options",
    [
        ["--workers", "-1"],
        ["--workers", "1e9"],
        ["--workers", "nan"],
        ["--workers", ""],
        ["--resolution", "0"],
        ["--resolution", "99999"],
        ["--resolution", "16.5"],
        ["--shard-size", "0"],
        ["--shard-size", "inf"],
        ["--source", "imagefolder"],
        ["--source", "synthetic"],
        ["--source", "packed"],
        ["--source", "hdf5"],
        ["more"],
    ],
    ids=" ".join,
)
def test_options_that_are_refused_write_nothing(folder, tmp_path, options):
    with pytest.raises(UserError) as error:
        pack(folder, tmp_path / "out", *options)
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()


def test_outputs_that_cannot_be_are_refused(folder, tmp_path):
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "dead").symlink_to("nowhere")
    (tmp_path / "file").write_text("x")
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "link").symlink_to(folder)
    (tmp_path / "lock/.lock").mkdir(parents=True)
    names = ["loop", "loop/x", "dead", "file/x", "fifo", "link/x", "lock", "x" * 300, "a/" * 2500]
    for name in names:
        with pytest.raises(UserError) as error:
            pack(folder, tmp_path / name)
        assert "\n" not in str(error.value)
    with pytest.raises(UserError):
        pack(folder, "")
    assert not (tmp_path / "nowhere").exists() and not (folder / "x").exists()


@pytest.mark.parametrize(
    "record",
    [
        "{}",
        '{"keys": 1, "labels": [], "hashes": [], "skipped": []}',
        '{"keys": ["a"], "labels": [1, 2], "hashes": ["0"], "skipped": []}',
        '{"keys": ["a"], "labels": [1], "hashes": [], "skipped": []}',
        '{"keys": ["a"], "labels": [1], "hashes": ["0"], "skipped": []}',
        '{"keys": [1, 2, 3], "labels": [0, 0, 0], "hashes": ["0", "0", "0"], "skipped": []}',
        '{"keys": ["a", "b"], "labels": [0, -1], "hashes": ["0", "0"], "skipped": []}',
        '{"keys": ["a"], "labels": [0], "hashes": ["0"], "skipped": [["a"]]}',
        '{"keys": ["a"], "labels": [0], "hashes": [0], "skipped": []}',
    ],
)
def test_records_that_do_not_fit_are_refused(folder, packed, tmp_path, record):
    out = tmp_path / "out"
    shutil.copytree(packed, out)
    (out / "meta.json").unlink()
    (out / "shard-00000.json").write_text(record)
    with pytest.raises(UserError) as error:
        pack(folder, out)
    assert "\n" not in str(error.value) and not (out / "meta.json").exists()


def odd_pictures(root: Path) -> Path:
    """Of four pictures one is turned by EXIF, one transparent, one grey of 12 bits."""
    (root / "a").mkdir(parents=True)
    grey = (np.arange(256) * 16).astype(np.uint16).reshape(16, 16)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray((grey // 16).astype(np.uint8)).save(root / "a/0.png")
    Image.fromarray(grey).save(root / "a/1.png")
    Image.fromarray((grey // 16).astype(np.uint8)).save(root / "a/2.png", exif=exif)
    Image.new("RGBA", (16, 16)).save(root / "a/3.png")
    (root / "a/4.heic").touch()
    return root


def test_odd_pictures_are_counted_and_said_and_their_conversion_recorded(tmp_path, capsys):
    src = odd_pictures(tmp_path / "src")
    pack(src, tmp_path / "plain")
    said = capsys.readouterr().out.rpartition("still to write")[2]
    for words in (
        "note: 1 of 4 pictures are to be turned by their EXIF data, which is not done",
        "note: 1 of 4 pictures are transparent: they are put on white",
        "note: 1 of 4 pictures are 16-bit grey (1 with values below 4,096): ",
        "note: ignored: 1 .heic below",
        "packed 4 images, 1 classes, 0 skipped",
    ):
        assert words in said
    pack(src, tmp_path / "asked", "--exif", "--depth-range", 0, 4095, workers=2)
    plain, asked = (
        json.loads((tmp_path / n / "meta.json").read_text()) for n in ("plain", "asked")
    )
    odd = {"turned by EXIF": 1, "transparent": 1, "16-bit grey below 4,096": 1}
    assert plain["oddities"] == asked["oddities"] == odd
    assert plain["crop_version"] == "adm-center-crop-2"
    assert plain["conversion"] == {
        "exif": False, "depth_range": None, "background": [255, 255, 255]
    }  # fmt: skip
    assert asked["conversion"] == plain["conversion"] | {"exif": True, "depth_range": [0, 4095]}
    first, grey, turned, white = (x_u8 for x_u8, _ in open_source("packed", tmp_path / "asked", 16))
    assert torch.equal(grey, first) and torch.equal(turned, first.rot90(-1, (1, 2)))
    assert (white == 255).all()
    with pytest.raises(UserError, match=r"begun with conversion=.*use the same input and settings"):
        pack(src, tmp_path / "plain", "--exif")


def test_packed_data_keep_the_conversion_that_they_were_packed_with(tmp_path):
    """They need no settings; settings that ask for another conversion are refused."""
    pack(odd_pictures(tmp_path / "src"), tmp_path / "out", "--exif")
    plain, how = open_source("packed", tmp_path / "out", 16), Conversion(exif=True)
    assert plain.conversion == how
    assert len(open_source("packed", tmp_path / "out", 16, conversion=how)) == 4
    other = Conversion(depth_range=(0, 9))
    with pytest.raises(UserError, match=r"was packed with exif, and .* leave depth_range 0 9 out"):
        open_source("packed", tmp_path / "out", 16, conversion=other)


@pytest.mark.parametrize("words", [(5, 5), (9, 3), (0, 65536)])
def test_a_range_of_depths_without_values_is_refused(tmp_path, words):
    (tmp_path / "src").mkdir()
    with pytest.raises(UserError, match=r"--depth-range \d+ \d+: expected 0 <= LO < HI <= 65535"):
        pack(tmp_path / "src", tmp_path / "out", "--depth-range", *words)


def test_a_class_of_which_nothing_is_readable_is_no_class(folder, tmp_path, capsys):
    shutil.copytree(folder, tmp_path / "src")
    for path in (tmp_path / "src/class5").iterdir():
        path.write_bytes(b"broken")
    pack(tmp_path / "src", tmp_path / "out")
    assert "no picture of 1 class can be read: class5; see" in capsys.readouterr().out
    source = open_source("packed", tmp_path / "out", 16)
    assert source.classes == ["class0", "class10"] and source.notes
    assert {y for _, y in source} == {0, 1}


def test_bombs_are_skipped_by_their_headers(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "src")
    Image.new("1", (1, 600_000)).save(tmp_path / "src/class0/narrow.png")
    head = (tmp_path / "src/class0/narrow.png").read_bytes()[:16]
    sides = (60_000).to_bytes(4, "big") * 2
    body = b"IHDR" + sides + bytes([8, 0, 0, 0, 0])
    content = head[:12] + body + zlib.crc32(body).to_bytes(4, "big") + b"\0\0\0\x09IDAT"
    (tmp_path / "src/class0/square.png").write_bytes(content + bytes(99))
    pack(tmp_path / "src", tmp_path / "out")
    lines = (tmp_path / "out/skipped.txt").read_text()
    assert "class0/narrow.png\t1 x 600000" in lines and "class0/square.png\tImage size" in lines
