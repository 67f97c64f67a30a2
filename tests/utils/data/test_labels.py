"""Where the classes come from: every layout of a file of labels, dataset.json, data.labels."""

import json

import numpy as np
import pytest

from models.checks.errors import UserError
from tests.utils.data.pictures import fill
from utils.data.labels import read_labels
from utils.data.registry import open_source

NAMES = [f"{k // 4:05d}/img{k:08d}.png" for k in range(12)]
LABELS = [k * 7 % 5 for k in range(12)]
PAIRS = [[name, label] for name, label in zip(NAMES, LABELS)]
BASENAMES = [name.split("/")[1][:-4] for name in NAMES]


def lines(separator: str, names=NAMES, head: str = "") -> str:
    return head + "".join(f"{n}{separator}{label}\n" for n, label in zip(names, LABELS))


SAME = {
    "pairs": {"labels": PAIRS},
    "mapping": {"labels": dict(PAIRS)},
    "plain mapping": dict(PAIRS),
    "pairs alone": PAIRS,
    "one-hot": {"labels": [[n, [float(i == label) for i in range(5)]] for n, label in PAIRS]},
    "whole floats": {"labels": [[n, float(label)] for n, label in PAIRS]},
    "numbers as texts": {"labels": [[n, str(label)] for n, label in PAIRS]},
    "more than the images": {"labels": [*PAIRS, ["other/x.png", 99]]},
    "backslashes": {"labels": [[n.replace("/", "\\"), label] for n, label in PAIRS]},
    "folders in front": {"labels": [[f"images/{n}", label] for n, label in PAIRS]},
    "folders left out": {"labels": [[n.split("/")[1], label] for n, label in PAIRS]},
    "another ending": {"labels": [[n[:-3] + "jpg", label] for n, label in PAIRS]},
    "objects": [{"label": label, "x": 0, "file_name": n} for n, label in PAIRS],
    "jsonl": "\n".join(json.dumps({"file_name": n, "label": label}) for n, label in PAIRS),
    "csv": lines(","),
    "csv with a header": lines(",", head="file_name,label\n"),
    "csv with an unknown header": lines(",", BASENAMES, "photo,kind\n"),
    "csv with more columns": "n,path,class\n" + "".join(f"0,{n},{i}\n" for n, i in PAIRS),
    "csv of spreadsheets": "\ufeff" + lines(";", head="Image;Label\r\n"),
    "csv, labels first": "".join(f"{label},{n}\n" for n, label in PAIRS),
    "tsv": lines("\t"),
    "text": lines(" "),
    "absolute paths": lines(" ", [f"/data/imagenet/{n}" for n in NAMES]),
}


@pytest.mark.parametrize("layout", SAME)
def test_every_layout_gives_the_same_labels(layout):
    content = SAME[layout]
    text = content if isinstance(content, str) else json.dumps(content)
    found = read_labels(text.encode(), "FILE", NAMES)
    assert found.labels.tolist() == LABELS and found.classes == list("01234")
    utf16 = read_labels(text.encode("utf-16"), "FILE", NAMES)
    assert utf16.labels.tolist() == LABELS


WRONG = {
    "an image without": (json.dumps(PAIRS[:-1]), r"no label for 00002/img00000011\.png \(1 such"),
    "several ones": ('[["00000/img00000000.png", [1, 1, 0]]]', "expected 0"),
    "negative": (lines(",").replace(",3", ",-3"), "expected 0"),
    "no value": (lines(",").replace(",3", ","), "label '' of"),
    "names and numbers": (lines(",").replace(",3", ",cat"), "as numbers, or all as names"),
    "two labels": (lines(",") + f"{NAMES[1]},3\n", "two labels of"),
    "unknown columns": ("a,b,c\n1,2,3\n", "columns a, b, c: expected one file_name"),
    "several numbers": ("a.png -1 1 1\nb.png 1 1 -1\n", "several numbers for a.png: -1 1 1"),
    "captions": ('{"file_name": "a.png", "text": "a cat"}\n' * 2, "columns file_name, text"),
    "ragged": (lines(",") + "x\n", "row 13 has 1 columns"),
    "COCO": ('{"images": [], "annotations": []}', "COCO.*csv"),
    "names of the classes": ('{"0": ["n01440764", "tench"]}', "expected"),
    "too few lines": ("1\n2\n", "2 labels without names, for 12 images"),
    "damaged": ('{"labels": [', "no valid JSON"),
    "empty": ("\n", "empty"),
}


@pytest.mark.parametrize("what", WRONG)
def test_labels_that_do_not_fit_are_refused(what):
    text, words = WRONG[what]
    with pytest.raises(UserError, match=words) as error:
        read_labels(text.encode(), "FILE", NAMES)
    assert str(error.value).startswith("FILE") and "\n" not in str(error.value)


def test_two_images_of_one_name_need_their_folders():
    """The file's names lack the folders, so that a label could be of either image."""
    with pytest.raises(UserError, match=r"no label for b/1\.png"):
        read_labels(b"1.png,0\n2.png,1", "FILE", ["a/1.png", "b/1.png", "b/2.png"])
    found = read_labels(b"x/a/1.png,0\nx/b/1.png,1", "FILE", ["b/1.png", "a/1.png"])
    assert found.labels.tolist() == [1, 0]


def test_names_of_classes_are_numbered_in_natural_order():
    text = "a.png class10\nb.png class2\nc.png class10"
    found = read_labels(text.encode(), "FILE", ["a.png", "b.png", "c.png"])
    assert found.classes == ["class2", "class10"] and found.labels.tolist() == [1, 0, 1]


def test_names_of_several_words():
    """ "a.png red" was once the name, found without its ending, and "rose" the label."""
    found = read_labels(b"a.png red rose\nb c.png white rose", "FILE", ["a.png", "b c.png"])
    assert found.classes == ["red rose", "white rose"] and found.labels.tolist() == [0, 1]


def test_the_validation_list_of_imagenet():
    """Line n is image n, also where images are missing; of others, as many lines as images."""
    names = [f"ILSVRC2012_val_{k:08d}.JPEG" for k in (3, 1, 2)]
    found = read_labels(b"n03\nn01\nn02\nn03\n", "FILE", names)
    assert [found.classes[i] for i in found.labels] == ["n02", "n03", "n01"]
    found = read_labels(b"490\n361\n171\n", "FILE", names)
    assert [found.classes[i] for i in found.labels] == ["171", "490", "361"]
    assert "devkit" in found.notes[0]
    found = read_labels(b"1\n0\n", "FILE", ["10.png", "9.png"])
    assert found.labels.tolist() == [0, 1]
    text = b"ImageId,PredictionString\n" + b"".join(
        b"ILSVRC2012_val_%08d,n0%d 1 2 3 4 n0%d 5 6 7 8\n" % (k, k, k) for k in (1, 2, 3)
    )
    assert read_labels(text, "FILE", names).classes == ["n01", "n02", "n03"]


def test_numbers_of_images_are_no_silent_labels():
    text = "".join(f"{k} {name}\n" for k, name in enumerate(NAMES))  # as images.txt of CUB
    found = read_labels(text.encode(), "FILE", NAMES)
    assert any("every image is a class" in note for note in found.notes)


# ---- where the labels of a folder are looked for -------------------------------------------------


def labels_of(root, **given):
    source = open_source("folder", root, 8, **given)
    return [source.classes[i] for i in source.labels], " ".join(source.notes)


EXPECTED = [str(label) for label in LABELS]


def test_dataset_json_is_found_in_below_and_beside_the_folder(tmp_path):
    images = fill(tmp_path / "data/images", NAMES)
    (tmp_path / "data/vae-sd/00000").mkdir(parents=True)  # as REPA's preprocessing leaves it
    np.save(tmp_path / "data/vae-sd/00000/img-mean-std-00000000.npy", np.zeros(2))
    for file in ("images/dataset.json", "dataset.json"):
        (tmp_path / "data" / file).write_text(json.dumps({"labels": PAIRS}))
        for root in (images, tmp_path / "data"):
            found, notes = labels_of(root)
            assert found == EXPECTED and f"data/{file}, not the folders" in notes, (file, root)
        (tmp_path / "data" / file).unlink()
    (tmp_path / "data/dataset.json").write_text(json.dumps({"labels": PAIRS[:-1]}))
    with pytest.raises(UserError, match="1 such of 12"):  # it is of these images, but incomplete
        labels_of(images)
    (tmp_path / "data/dataset.json").write_text('{"labels": [["x.png", 1]]}')
    assert "look like storage" in labels_of(images)[1]  # it is of others


def test_storage_folders_are_said_and_the_switch_is_named(tmp_path):
    fill(tmp_path, NAMES)
    _, notes = labels_of(tmp_path)
    assert "00000 .. 00002 look like storage" in notes and "data.labels=none" in notes
    found, notes = labels_of(tmp_path, labels="folder")
    assert set(found) == {"00000", "00001", "00002"} and not notes
    assert set(labels_of(tmp_path, labels="none")[0]) == {"."}
    (tmp_path / "classes.csv").write_text(lines(","))
    assert f"data.labels={tmp_path}/classes.csv" in labels_of(tmp_path)[1]
    assert labels_of(tmp_path, labels=str(tmp_path / "classes.csv")) == (EXPECTED, "")
    inner = (tmp_path / "classes.csv").rename(tmp_path / "00002" / "classes.csv")
    (tmp_path / "a.heic").touch()  # the root is listed first
    notes = labels_of(tmp_path, labels=str(inner))[1]
    assert "ignored: 1 .heic" in notes and ".csv" not in notes


def test_data_labels_overrules_dataset_json(tmp_path):
    fill(tmp_path, NAMES)
    (tmp_path / "dataset.json").write_text("damaged")
    with pytest.raises(UserError, match=r"dataset\.json"):
        labels_of(tmp_path)
    assert len(set(labels_of(tmp_path, labels="folder")[0])) == 3
    fill(tmp_path, ["stray.png"])
    with pytest.raises(UserError, match=r"beside class folders.*data\.labels=none"):
        labels_of(tmp_path, labels="folder")
    assert len(labels_of(tmp_path, labels="none")[0]) == 13


def test_a_file_of_labels_that_is_none_is_called_what_it_is(tmp_path):
    fill(tmp_path, NAMES)
    np.save(tmp_path / "labels.npy", LABELS)
    (tmp_path / "empty").write_text("")
    (tmp_path / "latin.csv").write_bytes("a.png,caf\u00e9".encode("latin-1"))
    words = {"absent": "no such file.*folder, none", "labels.npy": "NumPy", "empty": "empty file"}
    words |= {"latin.csv": "no text in UTF-8"}
    for name, expected in {**words, "00000": "a folder"}.items():
        with pytest.raises(UserError, match=rf"{name}.*{expected}"):
            labels_of(tmp_path, labels=str(tmp_path / name))
    with pytest.raises(UserError, match=r"data\.labels=none: the source digits has labels"):
        open_source("digits", None, 8, labels="none")
