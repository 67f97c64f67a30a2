"""Images inside other files: zips and tars, read in place, and parquet files, to be packed."""

import io
import json
import pickle
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from models.checks.errors import UserError
from scripts import prepare_data
from tests.tiny import tiny_config
from tests.utils.data.pictures import fill, picture
from utils.data.base import BadImages, content_of, describe
from utils.data.registry import open_source, source_of
from utils.data.sampling import StepSampler, make_loader
from utils.data.training import open_training_data

NAMES = [f"{k // 4:05d}/img{k:08d}.png" for k in range(12)]
LABELS = [k * 7 % 5 for k in range(12)]
RECORD = json.dumps({"labels": [[n, label] for n, label in zip(NAMES, LABELS)]}).encode()


def png(seed: int) -> bytes:
    file = io.BytesIO()
    picture(seed).save(file, "PNG")
    return file.getvalue()


PICTURES = [png(k) for k in range(12)]
EDM = dict(zip(NAMES, PICTURES)) | {"dataset.json": RECORD}
CLASSES = {f"{c}/{k}.png": PICTURES[k + 2 * (c == "b")] for c in "ab" for k in range(2)}


def zipped(path: Path, members: dict[str, bytes], how: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", how) as file:
        for name, data in members.items():
            file.writestr(name, data)
    return path


def tarred(path: Path, members: dict[str, bytes], mode: str = "w") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as file:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            file.addfile(info, io.BytesIO(data))
    return path


def unpacked(root: Path, members: dict[str, bytes]) -> Path:
    for name, data in members.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    return root


def of(source) -> tuple:
    """All that training takes from a source."""
    pixels = torch.stack([x for x, _ in source])
    keys = [source.key(i) for i in range(len(source))]
    return source.labels.tolist(), list(source.classes), keys, pixels.numpy().tobytes()


# ---- the same as a folder ------------------------------------------------------------------------

WRAPPED = {"data/": b"", "data/readme.txt": b"x"} | {f"data/{n}": d for n, d in CLASSES.items()}
APPLE = {"__MACOSX/a/._0.png": b"x", "a/.DS_Store": b"x"}
ARCHIVES = {
    "stored": lambda path: zipped(path, EDM),
    "deflated": lambda path: zipped(path, EDM, zipfile.ZIP_DEFLATED),
    "backslashes": lambda path: zipped(path, {n.replace("/", "\\"): d for n, d in EDM.items()}),
    "labels below": lambda path: zipped(path, {f"images/{n}": d for n, d in EDM.items()}),
    "classes": lambda path: zipped(path, CLASSES | APPLE),
    "classes in a folder": lambda path: zipped(path, WRAPPED),
    "tar": lambda path: tarred(path, {f"./{n}": d for n, d in EDM.items()}),
    "tar of classes": lambda path: tarred(path, WRAPPED),
}


@pytest.mark.parametrize("kind", ARCHIVES)
def test_an_archive_is_what_its_folder_is(tmp_path, kind):
    """The same images, labels, names and order, hence the same run; and the same fingerprint, so
    that a run goes on and cached latents fit when the folder is replaced by the archive."""
    path = ARCHIVES[kind](tmp_path / "archive")
    source = open_source("tar" if "tar" in kind else "zip", path, 8)
    members = CLASSES if "classes" in kind else EDM
    folder = open_source("folder", unpacked(tmp_path / "folder", members), 8)
    assert of(source) == of(folder) and content_of(source) == content_of(folder)
    if members is EDM:
        assert [source.classes[y] for _, y in source] == [str(label) for label in LABELS]
    assert list(source.files()) == [path] and source_of(path) == ("tar" if "tar" in kind else "zip")


def test_workers_read_an_archive_as_one_process_does(tmp_path):
    source = open_source("zip", zipped(tmp_path / "x.zip", EDM, zipfile.ZIP_DEFLATED), 8)
    source[0]  # nothing of it may be shared with the workers
    sampler = StepSampler(12, 4, seed=0, end_step=6)
    expected = list(make_loader(source, sampler))
    actual = list(make_loader(source, sampler, workers=2))
    for a, b in zip(actual, expected, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b))
    assert of(pickle.loads(pickle.dumps(source))) == of(source)


def test_a_damaged_member_is_replaced_or_named(tmp_path):
    data = bytearray(zipped(tmp_path / "x.zip", CLASSES).read_bytes())
    at = data.index(b"IDAT") + 20
    data[at : at + 4] = bytes(255 - byte for byte in data[at : at + 4])
    (tmp_path / "x.zip").write_bytes(data)
    source = open_source("zip", tmp_path / "x.zip", 8)
    with pytest.raises(UserError, match=r"a/0\.png in .*checksum"):
        source[0]
    source.bad = BadImages(1)
    assert torch.equal(source.take(0)[0], source[1][0]) and len(source.fingerprint()) == 64


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


REFUSED = {
    "parts": (lambda p: zipped(p, {"train/a/0.png": b"", "val/a/0.png": b""}), "parts of a data"),
    "zip in a zip": (lambda p: zipped(p, {"a.zip": b"PK"}), r"holds archives \(a\.zip\)"),
    "unusual": (lambda p: zipped(p, CLASSES, zipfile.ZIP_LZMA), "compressed by.*zip -r -0"),
    "nothing": (lambda p: zipped(p, {"a.txt": b""}), "no images in"),
    "half": (lambda p: truncated(zipped(p, EDM)), "is a zip archive, cut short"),
    "text": (lambda p: p.write_text("x"), "is a text file, expected a zip"),
    "folder": (lambda p: p.mkdir(), "is a folder, expected a zip"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_zips_that_are_refused(tmp_path, what):
    make, words = REFUSED[what]
    make(tmp_path / "x.zip")
    with pytest.raises(UserError, match=words) as error:
        open_source("zip", tmp_path / "x.zip", 8)
    assert "\n" not in str(error.value)


def test_an_encrypted_zip_is_refused(tmp_path):
    data = zipped(tmp_path / "x.zip", CLASSES).read_bytes()
    at = data.index(b"PK\1\2") + 8  # flags in the central directory
    (tmp_path / "x.zip").write_bytes(data[:at] + b"\1" + data[at + 1 :])
    with pytest.raises(UserError, match="is encrypted; make it again"):
        open_source("zip", tmp_path / "x.zip", 8)


# ---- WebDataset ----------------------------------------------------------------------------------


def samples(first: int, cls: str = "{}") -> dict[str, bytes]:
    found = {}
    for k in range(first, first + 4):
        found |= {f"{k:04d}.png": PICTURES[k], f"{k:04d}.json": b"{}"}
        found |= {f"{k:04d}.cls": cls.format(LABELS[k]).encode()} if cls else {}
    return found


def shards(root: Path, **given) -> Path:
    for k in range(3):
        tarred(root / f"set-{k:06d}.tar", samples(4 * k, **given))
    return root


def test_shards_with_classes(tmp_path):
    source = open_source("tar", shards(tmp_path / "a"), 8)
    labels, classes, _, pixels = of(source)
    assert labels == LABELS and classes == list("01234")
    assert pixels == of(open_source("zip", zipped(tmp_path / "x.zip", EDM), 8))[3]
    assert "ignored: 12 .json" in source.notes[-1]
    named = open_source("tar", shards(tmp_path / "b", cls="cat {}\n"), 8)
    assert [named.classes[i] for i in named.labels] == [f"cat {label}" for label in LABELS]
    without = open_source("tar", shards(tmp_path / "c", cls=""), 8)
    assert without.num_classes == 1 and "hold the classes, write these as" in without.notes[-1]


def test_shards_may_repeat_names_and_be_parts(tmp_path):
    for name in ("train-0", "train-1", "val-0"):
        tarred(tmp_path / f"{name}.tar", samples(0))
    with pytest.raises(UserError, match=r"parts of a data set: train, validation; .*split=train"):
        open_source("tar", tmp_path, 8)
    source = open_source("tar", tmp_path, 8, split="train")
    assert len(source) == len({*source.list_keys()}) == 8 and source.key(4) == "train-1/0000.png"
    with pytest.raises(UserError, match="name train, validation"):
        open_source("tar", tmp_path, 8, split="test")


def test_tars_that_may_be_classes_are_asked_for(tmp_path):
    for k, wnid in enumerate(("n01440764", "n01443537")):
        tarred(tmp_path / f"{wnid}.tar", {f"{wnid}_{i}.JPEG": PICTURES[k + i] for i in range(2)})
    with pytest.raises(UserError, match=r"labels=folder if they are, else data\.labels=none"):
        open_source("tar", tmp_path, 8)
    source = open_source("tar", tmp_path, 8, labels="folder")
    assert describe(source) == "4 images of 2 classes: n01440764, n01443537"


SAMPLES = {
    "a mask beside": ({"0000.seg.png": b"x"}, ""),
    "two pictures": ({"0000.jpg": b"x"}, r"several pictures: \.jpg, \.png"),
    "one without a class": ({"9.png": b"x"}, r"9\.png .*no \.cls beside it \(1 such of 5"),
    "no class": ({"0000.cls": b""}, "label '' of 0000.cls"),
}


@pytest.mark.parametrize("what", SAMPLES)
def test_odd_samples(tmp_path, what):
    more, words = SAMPLES[what]
    path = tarred(tmp_path / "0.tar", samples(0) | more)
    if words:
        with pytest.raises(UserError, match=words):
            open_source("tar", path, 8)
    else:
        assert len(open_source("tar", path, 8)) == 4


def test_tars_that_are_refused(tmp_path):
    whole = tarred(tmp_path / "whole.tar", samples(0)).read_bytes()
    second = whole.index(b"0001.png")
    cuts = {tmp_path / f"{n}.tar": n for n in (300, second - 700, second + 300, second + 800)}
    inner = tarred(tmp_path / "inner.tar", {"n01440764.tar": bytes(600)})
    zipped_tar = tarred(tmp_path / "x.tar.gz", samples(0), "w:gz")
    words = {inner: "holds archives", zipped_tar: "unpack it to"}
    for path, length in cuts.items():
        path.write_bytes(whole[:length])
        words[path] = "cannot be read as a tar"
    for file, expected in words.items():
        with pytest.raises(UserError, match=expected):
            open_source("tar", file, 8)


def test_links_in_a_tar_are_taken_or_counted(tmp_path):
    """tar stores the second of two names of a file as a link to the first; these were left out."""
    with tarfile.open(tarred(tmp_path / "x.tar", CLASSES), "a") as file:
        for name, kind in (("hard", tarfile.LNKTYPE), ("soft", tarfile.SYMTYPE)):
            info = tarfile.TarInfo(f"b/{name}.png")
            info.type, info.linkname = kind, "a/0.png"
            file.addfile(info)
    source = open_source("tar", tmp_path / "x.tar", 8)
    assert source.labels.tolist() == [0, 0, 1, 1, 1] and source.key(4) == "b/hard.png"
    assert torch.equal(source[4][0], source[0][0]) and "ignored: 1 link below" in source.notes[-1]


def test_files_that_are_missing_are_said(tmp_path):
    table(tmp_path / "a/b/train-00000-of-00003.parquet")
    table(tmp_path / "a/b/train-00002-of-00003.parquet")
    assert source_of(tmp_path) == "parquet"  # two levels below, as on the hub
    assert "2 of the 3 files" in open_source("parquet", tmp_path, 8).notes[-1]


# ---- parquet -------------------------------------------------------------------------------------


def table(path: Path, rows=range(12), metadata: bool = True, **columns) -> Path:
    """Images as Hugging Face's datasets library writes them, in groups of 5 rows."""
    images = [{"bytes": PICTURES[k], "path": f"img{k:08d}.png"} for k in rows]
    content = {"image": images} | columns
    features = {"image": {"_type": "Image"}}
    features |= {
        name: {"_type": "ClassLabel", "names": list("abcde")} for name in columns if "label" in name
    }
    found = pa.table(content)
    if metadata:
        text = json.dumps({"info": {"features": features}})
        found = found.replace_schema_metadata({"huggingface": text})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(found, path, row_group_size=5)
    return path


def test_parquet_gives_the_images_and_the_names_of_classes(tmp_path):
    expected = of(open_source("zip", zipped(tmp_path / "x.zip", EDM), 8))
    for k in range(2):
        rows = range(6 * k, 6 * k + 6)
        columns = {"label": [LABELS[i] for i in rows], "caption": ["x"] * 6}
        table(tmp_path / f"d/data/train-0000{k}-of-00002.parquet", rows, **columns)
    table(tmp_path / "d/data/test-00000-of-00001.parquet", label=[-1] * 12)
    with pytest.raises(UserError, match="parts of a data set: test, train"):
        open_source("parquet", tmp_path / "d", 8)
    with pytest.raises(UserError, match=r"without a label.*label=-1"):
        open_source("parquet", tmp_path / "d", 8, split="test")
    source = open_source("parquet", tmp_path / "d", 8, split="train")
    assert of(source)[0] == LABELS and of(source)[3] == expected[3]
    assert source.classes == list("abcde") and "not read: caption" in source.notes[0]
    assert len({*source.list_keys()}) == 12 and source_of(tmp_path / "d") == "parquet"
    assert of(pickle.loads(pickle.dumps(source))) == of(source)


def test_columns_are_found_by_their_names(tmp_path):
    named = table(tmp_path / "a.parquet", metadata=False, labels=[str(i) for i in LABELS])
    assert open_source("parquet", named, 8).labels.tolist() == LABELS
    fine = table(tmp_path / "b.parquet", coarse_label=[0] * 12, fine_label=LABELS)
    assert open_source("parquet", fine, 8).labels.tolist() == LABELS
    path = tmp_path / "c.parquet"
    pq.write_table(pa.table({"jpg": PICTURES, "cls": LABELS, "__key__": NAMES}), path)
    assert open_source("parquet", path, 8).labels.tolist() == LABELS
    (tmp_path / "l.csv").write_text("".join(f"{n},{i}\n" for n, i in zip(NAMES, LABELS)))
    alone = table(tmp_path / "d.parquet")
    assert open_source("parquet", alone, 8).num_classes == 1
    given = open_source("parquet", alone, 8, labels=str(tmp_path / "l.csv"))
    assert given.labels.tolist() == LABELS


COLUMNS = {
    "no image": ({"x": [1]}, r"no column of images \(its columns: x\)"),
    "two images": ({"a": [b"x"], "b": [b"x"]}, "several columns of images"),
    "several labels": ({"image": [b"x"], "label": [[1, 2]]}, "label holds list"),
    "no rows": ({"image": pa.array([], pa.binary())}, "holds no rows"),
}


@pytest.mark.parametrize("what", COLUMNS)
def test_tables_that_are_refused(tmp_path, what):
    columns, words = COLUMNS[what]
    pq.write_table(pa.table(columns), tmp_path / "x.parquet")
    with pytest.raises(UserError, match=words) as error:
        open_source("parquet", tmp_path / "x.parquet", 8)
    assert "\n" not in str(error.value)


def test_a_table_without_bytes_and_a_damaged_one(tmp_path):
    pq.write_table(pa.table({"image": [{"bytes": None, "path": "x"}]}), tmp_path / "x.parquet")
    with pytest.raises(UserError, match="no bytes of an image"):
        open_source("parquet", tmp_path / "x.parquet", 8)[0]
    nameless = [{"bytes": PICTURES[0], "path": None}]
    pq.write_table(pa.table({"image": nameless}), tmp_path / "z.parquet")
    (tmp_path / "l.csv").write_text("a.png,0\n")
    with pytest.raises(UserError, match="no names of its images"):
        open_source("parquet", tmp_path / "z.parquet", 8, labels=str(tmp_path / "l.csv"))
    path = table(tmp_path / "y.parquet", label=LABELS)
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(UserError, match="cannot be read as parquet"):
        open_source("parquet", path, 8)


# ---- packing -------------------------------------------------------------------------------------


def packed(src: Path, out: Path, *words: object) -> dict[str, bytes]:
    given = [src, out, "--resolution", 8, "--shard-size", 5, *words]
    prepare_data.main([str(word) for word in given])
    return {path.name: path.read_bytes() for path in out.glob("*.npy")}


def test_the_same_images_pack_alike_and_packing_goes_on(tmp_path):
    """Whatever holds them; what it is, is seen without --source."""
    expected = packed(unpacked(tmp_path / "f", EDM), tmp_path / "of-f", "--workers", 0)
    zipped(tmp_path / "x.zip", {name: EDM[name] for name in NAMES})
    (tmp_path / "l.csv").write_text("".join(f"{n},{i}\n" for n, i in zip(NAMES, LABELS)))
    table(tmp_path / "p/data/train-0.parquet", label=LABELS)
    shards(tmp_path / "t")
    given = {"x.zip": ["--labels", tmp_path / "l.csv"], "t": [], "p": ["--split", "train"]}
    for name, words in given.items():
        out, workers = tmp_path / f"of-{name}", 2 if name == "p" else 0
        assert packed(tmp_path / name, out, *words, "--workers", workers) == expected
        for file in ("shard-00001.json", "meta.json"):
            (out / file).unlink()
        assert packed(tmp_path / name, out, *words, "--workers", 0) == expected
    assert open_source("packed", tmp_path / "of-p").classes == list("abcde")
    with pytest.raises(UserError, match="begun with other labels"):
        packed(tmp_path / "x.zip", tmp_path / "of-x.zip", "--labels", "none")


def test_parquet_is_not_trained_on(tmp_path):
    path = table(tmp_path / "x.parquet", label=LABELS)
    words = ["data.source=parquet", f"data.path={path}", "data.resolution=8"]
    with pytest.raises(UserError, match="in its order only; pack it: python scripts/prepare_data"):
        open_training_data(tiny_config(*words))
    (tmp_path / "a").mkdir()
    zipped(tmp_path / "a/x.zip", EDM)
    words = ["data.source=zip", f"data.path={tmp_path}/a/x.zip", "data.labels=none"]
    assert open_training_data(tiny_config(*words)).num_classes == 1


# ---- what is not read ----------------------------------------------------------------------------

FOREIGN = {
    "data.mdb": "LMDB",
    "train-00000-of-01024": "TFRecord",
    "data_batch_1": "pickles",
    "train-images-idx3-ubyte": "IDX",
    "images.npz": "NumPy",
    "cars.mat": "MATLAB",
    "data-00000-of-00001.arrow": "Arrow.*to_parquet",
    "x.tar.gz": "compressed tars",
    "clip.mp4": "videos.*ffmpeg",
    "train.rec": "RecordIO",
    "x.beton": "FFCV",
    "shard.00000.mds": "streaming",
    "train.h5": "another layout",
}


@pytest.mark.parametrize("name", FOREIGN)
def test_what_is_not_read_is_called_what_it_is(tmp_path, name):
    for root in (tmp_path, tmp_path / "above"):
        inner = root / "data" if root.name == "above" else root
        inner.mkdir(parents=True, exist_ok=True)
        (inner / name).write_bytes(b"\x93\0x")
        with pytest.raises(UserError, match=FOREIGN[name]) as error:
            open_source("folder", root, 8)
        assert "\n" not in str(error.value)
        (inner / name).unlink()
    assert source_of(fill(tmp_path / "pictures", NAMES)) == "folder"


def test_remedies_for_files_in_the_place_of_a_folder(tmp_path):
    """A gzip archive was once called readable as a zip, and an .npz an archive to unpack."""
    np.savez(tmp_path / "a.npz", np.zeros(3))
    for path, words in ((tarred(tmp_path / "x.tgz", CLASSES, "w:gz"), "folder; unpack it"),
                        (tmp_path / "a.npz", "write their images as files")):  # fmt: skip
        with pytest.raises(UserError, match=words):
            open_source("folder", path, 8)


def test_a_table_in_an_archive_is_named(tmp_path):
    members = {f"images/{k}.png": PICTURES[k] for k in range(3)} | {"labels.csv": b"x"}
    notes = open_source("zip", zipped(tmp_path / "x.zip", members), 8).notes
    assert "unpack it and give data.labels=labels.csv" in notes[0]


def test_a_pickle_is_told_by_its_content(tmp_path):
    """CIFAR-100's files are called train and test."""
    (tmp_path / "train").write_bytes(pickle.dumps({b"data": b""}))
    with pytest.raises(UserError, match=r"train is a Python pickle\): write their images as files"):
        open_source("folder", tmp_path, 8)
