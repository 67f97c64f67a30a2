"""Anybody's images: any folder, one class, no labels. Training and sampling through the scripts.

python -m pytest tests/test_own_data.py        (CPU)
"""

import json
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest
from PIL import Image

import sample_ddp
from models.checks.errors import UserError
from models.sit import SiT
from scripts import prepare_data, train_classifier
from tests.test_readme import WALK, words
from tests.tiny import ROOT, run_here, tiny_config, train, train_here
from utils import cli
from utils.data.base import cautions
from utils.data.registry import open_source
from utils.sealed import _hash_of_state
from utils.training.plan import check_run
from utils.training.tracking import read_metrics


def images(folder: Path, num: int, seed: int = 0) -> Path:
    """Photographs' troubles: other sizes and shapes, grey, alpha, an upper-case extension."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    for i in range(num):
        height, width = rng.integers(16, 40, 2)
        shape = [(height, width, 3), (height, width), (height, width, 4)][i % 3]
        image = Image.fromarray(rng.integers(0, 256, shape, "u1"))
        image.save(folder / f"{i}.{'PNG' if i % 2 else 'png'}")
    return folder


def flat(root: Path) -> tuple[str, ...]:
    return "data.source=folder", f"data.path={images(root, 10)}"


def one_class_folder(root: Path) -> tuple[str, ...]:
    images(root / "cats", 10)
    return "data.source=folder", f"data.path={root}"


def three_classes(root: Path) -> tuple[str, ...]:
    """Of different sizes, one with subfolders and a space in its name."""
    images(root / "cats", 6)
    images(root / "dogs and wolves" / "dogs", 2)
    images(root / "dogs and wolves" / "wolves", 1)
    images(root / "10", 3)
    return "data.source=folder", f"data.path={root}", "data.num_classes=3"


def packed_flat(root: Path) -> tuple[str, ...]:
    given = [images(root / "src", 10), root / "out", "--resolution", 16, "--workers", 0]
    prepare_data.main([str(word) for word in given])
    return "data.source=packed", f"data.path={root / 'out'}"


def hdf5_without_labels(root: Path) -> tuple[str, ...]:
    """The official layout, where dataset.json has no labels."""
    paths = sorted(images(root / "src", 10).iterdir())
    with h5py.File(root / "images.h5", "w") as file:
        for path in paths:
            file[path.name] = np.frombuffer(path.read_bytes(), dtype="u1")
    (root / "images_h5.json").write_text(json.dumps([path.name for path in paths]))
    (root / "dataset.json").write_text(json.dumps({"labels": None}))
    return "data.source=hdf5", f"data.path={root}"


CASES = {flat: 1, one_class_folder: 1, three_classes: 3, packed_flat: 1, hdf5_without_labels: 1}


# as `three_classes`, without labels
LONG = (flat, one_class_folder, packed_flat, hdf5_without_labels)


@pytest.mark.parametrize(
    "make", [pytest.param(m, marks=[pytest.mark.slow] if m in LONG else []) for m in CASES]
)
def test_own_data_trains_and_samples(make: Callable, tmp_path, monkeypatch):
    """Joint training with previews, guidance and an evaluation, then images of the checkpoint."""
    monkeypatch.setenv("HOME", str(tmp_path))  # where statistics of a reference are kept
    settings = make(tmp_path / "data")
    pictures = ("preview.every=4", "preview.num=4", "preview.steps=2", "preview.cfg_scale=2")
    numbers = ("eval.every=4", "eval.num=8", "eval.features=pixel", "eval.steps=2")
    assert train_here(tmp_path, *settings, *pictures, *numbers) == 0
    run = tmp_path / "tiny"
    rows = read_metrics(run / "metrics.jsonl")
    losses = [row["loss/sit/diffusion"] for row in rows if "loss/sit/diffusion" in row]
    assert any("eval/FD-8[pixel12]" in row for row in rows) and len(losses) == 2
    assert np.isfinite(losses).all() and (run / "samples" / "0000004.png").is_file()
    checkpoint = run / "checkpoints" / "0000004"
    sit = SiT.from_pretrained(checkpoint / "sit_ema")
    assert (sit.config.num_classes, sit.null_label) == (CASES[make], CASES[make])
    samples, labels = sample(checkpoint, tmp_path / "s.npz", monkeypatch, "--cfg-scale", "1.5")
    assert samples.shape == (6, 16, 16, 3) and samples.std() > 0
    assert sorted(set(labels)) == list(range(CASES[make]))


def sample(checkpoint: Path, out: Path, monkeypatch, *flags: str) -> tuple[np.ndarray, list[int]]:
    """Six images of `sample_ddp.py`, as many of each class, and their labels."""
    words = ["--checkpoint", checkpoint, "--out", out, "--num-samples", 6, "--class-balanced"]
    words += ["--solver", "ode-euler", "--steps", 2, "--precision", "fp32", *flags]
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setattr(sys, "argv", ["sample_ddp.py", *map(str, words)])
    with pytest.raises(SystemExit) as end:
        cli.run(sample_ddp.main)
    assert not end.value.code
    with np.load(out) as file:
        return file["arr_0"], np.load(out.with_suffix(".labels.npy")).tolist()


def test_no_null_label_trains_and_samples_without_guidance(tmp_path, monkeypatch):
    settings = flat(tmp_path / "data")
    assert train_here(tmp_path, *settings, "sit.class_dropout_prob=0") == 0
    checkpoint = tmp_path / "tiny" / "checkpoints" / "0000004"
    assert SiT.from_pretrained(checkpoint / "sit_ema").null_label is None
    samples, labels = sample(checkpoint, tmp_path / "s.npz", monkeypatch)
    assert samples.shape == (6, 16, 16, 3) and set(labels) == {0}


def test_more_classes_than_the_checkpoint_knows_are_refused(tmp_path, capsys):
    """A fourth class that appears between two starts would be the null label."""
    settings = three_classes(tmp_path / "data")[:2]
    assert train_here(tmp_path, *settings, "run.steps=2") == 0
    images(tmp_path / "data" / "zebras", 3)
    capsys.readouterr()
    assert train_here(tmp_path, *settings) == 2
    error = capsys.readouterr().err
    assert "data.classes" in error


def test_a_run_does_not_go_on_with_other_images_without_a_word(tmp_path):
    """Pictures that took the place of others: refused, or said where that is allowed. Of a
    checkpoint that does not know its images, it is said that nothing is compared."""
    settings = (f"run.out={tmp_path}", *flat(tmp_path / "data"), "run.steps=1")
    assert train_here(tmp_path, *settings) == 0
    state_file = tmp_path / "tiny" / "checkpoints" / "0000001" / "state.json"
    state = json.loads(state_file.read_text())
    assert {*state["content"]} == {"images_sha256", "labels_sha256"}
    notes = check_run(tiny_config(*settings), 1).notes
    assert not [n for n in notes if "data.content" in n or "not compared" in n]

    picture = min((tmp_path / "data").rglob("*.png"))
    Image.fromarray(255 - np.asarray(Image.open(picture))).save(picture)
    with pytest.raises(UserError, match=r"data\.content=images_sha256 .* \(now ") as error:
        check_run(tiny_config(*settings), 1)
    assert "\n" not in str(error.value) and "run.allow_change=[data.content]" in str(error.value)
    check_run(tiny_config(*settings), 1, assume_data=True)  # a dry run, which reads no image
    allowed = tiny_config(*settings, "run.allow_change=[data.content]")
    assert any("since it was saved: data.content=" in n for n in check_run(allowed, 1).notes)

    del state["content"]
    state_file.write_text(json.dumps(state | {"sha256": _hash_of_state(state)}))
    notes = check_run(tiny_config(*settings), 1).notes
    assert any("0000001 has no hash of its images: they are not compared" in n for n in notes)


def broken(root: Path, names: tuple[str, ...]) -> tuple[str, ...]:
    settings = flat(root)
    for name in names:
        (root / name).write_bytes(b"broken")
    return settings


@pytest.mark.slow
def test_a_run_goes_on_over_broken_images(tmp_path, capfd, monkeypatch):
    """Each is named once, also where the latents are measured, and in previews and evaluations; a
    run that goes on from the middle sees the same images."""
    monkeypatch.setenv("HOME", str(tmp_path))
    settings = broken(tmp_path / "data", ("1.PNG", "4.png"))
    settings += ("latent_norm.stats_images=10",)
    settings += ("preview.every=4", "preview.num=10", "preview.steps=2")
    settings += ("eval.every=4", "eval.num=8", "eval.features=pixel", "eval.steps=2")
    assert train_here(tmp_path, *settings) == 0
    printed = capfd.readouterr().err
    assert all(printed.count(f"{name} cannot be read") == 1 for name in ("1.PNG", "4.png"))
    assert train_here(tmp_path / "b", *settings, "run.steps=2", "data.workers=1") == 0
    assert train_here(tmp_path / "b", *settings) == 0
    rows = [read_metrics(out / "tiny" / "metrics.jsonl") for out in (tmp_path, tmp_path / "b")]
    losses = [[r["loss/sit/diffusion"] for r in run if "loss/sit/diffusion" in r] for run in rows]
    assert losses[0] == losses[1] and len(losses[0]) == 2


@pytest.mark.parametrize("most", [0, 1])
def test_too_many_broken_images_end_a_run_after_a_save(tmp_path, capsys, most):
    settings = broken(tmp_path / "data", ("1.PNG", "4.png"))
    settings += ("latent_norm.stats_images=1", f"data.max_bad_images={most}", "run.save_every=4")
    assert train_here(tmp_path, *settings) == 2
    error = capsys.readouterr().err
    assert f"data.max_bad_images={most}" in error and "Traceback" not in error
    assert [*(tmp_path / "tiny" / "checkpoints").glob("000000[1-3]")]


@pytest.mark.slow
def test_one_rank_that_meets_too_many_broken_images_ends_both(tmp_path):
    settings = broken(tmp_path / "data", ("1.PNG", "4.png"))
    settings += ("latent_norm.stats_images=1", "data.max_bad_images=0", "run.save_every=4")
    done = train(tmp_path, *settings, "run.steps=4", ranks=2)
    assert "exitcode: 2" in done.stderr and done.stderr.count("Traceback (most") <= 1  # torchrun's
    assert done.stderr.count("more than data.max_bad_images=0") == 1
    assert [*(tmp_path / "tiny" / "checkpoints").glob("000000[1-4]")]


# ---- docs/own-data.md ----------------------------------------------------------------------------

# What makes each command of the page small.
SMALL_RUN = ["run.batch_size=8", "sit.depth=4"]
SMALL = {
    "prepare_data": ["--workers", 0],
    "train_classifier": ["--steps", 2, "--batch-size", 8],
    "doctor": SMALL_RUN,
    "train_repae": [*SMALL_RUN, "run.steps=2", "preview.steps=2", "preview.num=4"],
    "sample_ddp": ["--num-samples", 6, "--solver", "ode-euler", "--steps", 2],
}


@pytest.mark.slow
def test_the_page_leads_from_a_folder_to_a_report_on_a_cpu(tmp_path, monkeypatch, capsys):
    """Its commands in their order, with fewer steps, in a folder with nothing else in it."""
    for k, name in enumerate(["cats", "dogs", "birds"]):
        images(tmp_path / "pictures" / name, 12, seed=k)
    (tmp_path / "pictures" / "dogs" / "broken.png").write_bytes(b"broken")
    monkeypatch.setenv("HOME", str(tmp_path))  # where statistics of a reference are kept
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.chdir(tmp_path)
    done = []
    for command in WALK:
        script, *given = (w.replace("configs/", f"{ROOT}/configs/") for w in words(command))
        assert not run_here(script, *given, *SMALL.get(Path(script).stem, [])), command
        done.append(Path(script).stem)
        printed = capsys.readouterr().out
        assert done[-1] != "doctor" or "0 failed" in printed, printed
    assert done[0] == "prepare_data" and {"sample_ddp", "evaluate_fid", "report"} <= {*done}
    assert "2 skipped" not in printed and (tmp_path / "samples" / "nearest.png").is_file()
    page = (tmp_path / "exps" / "own-cpu" / "report.html").read_text()
    assert "own-cpu" in page and (tmp_path / "my-pipeline" / "model_index.json").is_file()


# ---- folders that are not what they should be ----------------------------------------------------


def noted(root: Path) -> str:
    """What is said of a folder: the error, or the cautions."""
    try:
        return " ".join(cautions(open_source("folder", root, 8, words=cli.FLAGS)))
    except UserError as error:
        return str(error)


LEVELS = {
    # folders with images => the folder that is given, and what is to be given instead
    ("train", "val"): (".", "--path {root}/train"),
    ("train/a", "train/b", "val/a"): (".", "--path {root}/train"),
    ("train2017", "val2017"): (".", "--path {root}/train2017"),
    ("a", "b"): ("a", "give --path {root}"),
    ("images", "masks"): (".", "--path {root}/images"),
    ("set/pictures/a", "set/pictures/b"): (".", "--path {root}/set/pictures"),
    ("x/y/z/a", "x/y/z/b"): ("x", "--path {root}/x/y/z"),
    ("cats", "dogs"): (".", ""),
    ("train", "val/"): ("train", "one class"),
}


@pytest.mark.parametrize("folders", LEVELS)
def test_a_folder_on_another_level_is_named(tmp_path, folders):
    for k, folder in enumerate(folders):
        images(tmp_path / folder, 2, seed=k)
    given, expected = LEVELS[folders]
    text, expected = noted(tmp_path / given), expected.format(root=tmp_path)
    assert expected in text and (expected or not text), text


def test_images_beside_their_labels(tmp_path):
    images(tmp_path / "images", 2)
    (tmp_path / "labels").mkdir()
    (tmp_path / "labels" / "0.txt").write_text("x")
    assert f"give the only folder with images, --path {tmp_path}/images" in noted(tmp_path)


def test_pictures_of_other_kinds_are_to_be_converted(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "1.heic").write_bytes(b"")
    remedy = "convert its 1 other pictures to PNG (first a/1.heic)"
    assert noted(tmp_path).endswith(f"also in subfolders; {remedy}")
    images(tmp_path / "b", 2)
    assert f"class folder {tmp_path}/a holds no images; {remedy}" in noted(tmp_path)


# ---- messages in the words of the program that is run --------------------------------------------

WRONG = {
    "scripts/prepare_data.py {root}/none {root}/out": "SRC {root}/none: no such folder",
    "scripts/prepare_data.py {root}/a/0.png {root}/out": "with --source folder",
    "scripts/prepare_data.py {root} {root}-out --source hdf5": "--source folder",
    "scripts/prepare_data.py {root} {root}-out --source digits": "--source digits holds pixels",
    "scripts/vae_stats.py tiny-f2d4 --data folder --path {root}/none": "--path {root}/none: no",
    "scripts/vae_stats.py tiny-f2d4 --data folder": "needs --path DIR",
    "scripts/vae_stats.py tiny-f2d4 --data packed --path {root}": "--data folder",
    "scripts/vae_stats.py tiny-f2d4 --data digits --split val": "--split val: the source digits",
    "scripts/vae_stats.py tiny-f2d4 --data packed --path {root}-packed --resolution 32": (
        "--resolution 32 is asked for; give --resolution 16"
    ),
    "scripts/cache_latents.py --vae tiny-f2d4 --data folder --path {root}/no --out {root}-c": (
        "--path {root}/no: no such folder"
    ),
    "scripts/train_classifier.py --data folder --path {root}/no --out {root}-c.safetensors": (
        "--path {root}/no: no such folder"
    ),
    # a folder that nothing would have read, and digits in its place
    "scripts/train_classifier.py --path {root} --out {root}-c.safetensors": (
        "--path {root}: --data digits reads no folder; leave it out, or give the --data"
    ),
    "scripts/train_classifier.py --data folder --path {root} --test-split test --out "
    "{root}-c.safetensors": "--test-split test: the source folder has all",
    "scripts/train_classifier.py --train-split val --out {root}-c.safetensors": "--train-split val",
    "scripts/cache_latents.py --vae tiny-f2d4 --data folder --path {root} --out {root}/c": (
        "error: --out {root}/c lies inside the input {root}: choose another place"
    ),
    "scripts/prepare_data.py {root} {root}/out": "error: OUT {root}/out lies inside the input",
    "scripts/prepare_data.py {root} {root}-out --resolution 9999": "--resolution 9999: expected 1",
    "evaluate_fid.py --vae tiny-f2d4 --data digits:train@16 --split test": (
        "--split test: digits:train@16 asks for another part; leave one of them out"
    ),
    "evaluate_fid.py --vae tiny-f2d4 --data folder:{root}@16 --split test": (
        "--split test: the source folder has all"
    ),
    "evaluate_fid.py --vae tiny-f2d4 --data folder:{root}/no": "folder:{root}/no: no such folder",
    "evaluate_fid.py --vae tiny-f2d4 --data packed:{root}-packed@32": "@32 is asked for; give @16",
    "evaluate_fid.py --vae tiny-f2d4 --data packed:{root}-packed --resolution 32": (
        "--resolution 32: packed:{root}-packed holds images of 16 px"
    ),
}


@pytest.fixture(scope="module")
def two_classes(tmp_path_factory) -> Path:
    """root/a, root/b, and the same packed at 16 px in root-packed."""
    root = tmp_path_factory.mktemp("data") / "root"
    for k, name in enumerate("ab"):
        images(root / name, 6, seed=k)
    given = [root, f"{root}-packed", "--resolution", 16, "--workers", 0]
    prepare_data.main([str(word) for word in given])
    return root


@pytest.mark.parametrize("command", WRONG)
def test_a_mistake_is_told_in_the_words_of_the_program(command, two_classes, capsys):
    script, *given = command.format(root=two_classes).split()
    assert run_here(script, *given) == 2
    error = capsys.readouterr().err
    assert WRONG[command].format(root=two_classes) in error and error.count("\n") == 1
    assert "data.source" not in error and "data.path" not in error, error


def test_packed_data_need_no_resolution(two_classes, tmp_path, capsys):
    packed = f"{two_classes}-packed"
    assert open_source("packed", packed).resolution == 16
    given = ["tiny-f2d4", "--data", "packed", "--path", packed, "--out", tmp_path / "s.json"]
    assert not run_here("scripts/vae_stats.py", *given)
    assert json.loads((tmp_path / "s.json").read_text())["resolution"] == 16
    given = ["--vae", "tiny-f2d4", "--data", "packed", "--path", packed, "--workers", 0]
    assert not run_here("scripts/cache_latents.py", *given, "--out", tmp_path / "cache")
    assert json.loads((tmp_path / "cache" / "meta.json").read_text())["resolution"] == 16
    capsys.readouterr()


# ---- a classifier of own data --------------------------------------------------------------------


def classify(out: Path, *words) -> int:
    small = ["--network", "test_byobnet", "--size", 16, "--steps", 2, "--batch-size", 4]
    return run_here("scripts/train_classifier.py", *small, "--out", out, *words)


def test_a_classifier_of_packed_data_holds_out_a_part_of_each_class(two_classes, tmp_path, capsys):
    where = ["--data", "packed", "--path", f"{two_classes}-packed"]
    assert not classify(tmp_path / "a.safetensors", *where, "--holdout", 0.3)
    assert "of 4 held-out images" in capsys.readouterr().out  # 2 of 6 in each of 2 classes
    args = train_classifier.parse_args([*where, "--out", str(tmp_path / "a.safetensors")])
    train, test = train_classifier.open_splits(args)
    again = train_classifier.open_splits(args)
    assert (train.indices, test.indices) == (again[0].indices, again[1].indices)
    assert sorted([*train.indices, *test.indices]) == list(range(12))
    assert np.bincount(test.labels()).tolist() == [1, 1] and train.source.resolution == 16


def test_shards_without_parts_are_held_out_from(two_classes, tmp_path):
    """The default was once a part called train, which such files do not have."""
    (tmp_path / "tars").mkdir()
    with tarfile.open(tmp_path / "tars/0.tar", "w") as file:
        file.add(two_classes, "x")
    given = ["--data", "tar", "--path", f"{tmp_path}/tars", "--out", f"{tmp_path}/a.safetensors"]
    train, test = train_classifier.open_splits(train_classifier.parse_args(given))
    assert len(train.indices) + len(test.indices) == len(train.source) == 12


def test_what_cannot_be_classified_is_one_line(two_classes, tmp_path, capsys):
    out = tmp_path / "a.safetensors"
    for k, name in enumerate("abc"):
        images(tmp_path / "single" / name, 1, seed=k)
    wrong = {
        ("folder", two_classes / "a"): "all images are one class",
        ("folder", tmp_path / "single"): "class a has less than two images, and so have 2 other",
    }
    for (kind, path), expected in wrong.items():
        assert classify(out, "--data", kind, "--path", path) == 2
        error = capsys.readouterr().err
        assert expected in error and error.count("\n") == 1
    splits = ["--train-split", "all", "--test-split", "test"]
    assert classify(out, *splits) == 2
    assert "359 of the 359 images that are to be held out" in capsys.readouterr().err
    assert classify(out, "--holdout", 0.2, "--test-split", "test") == 2
    assert "give one of them" in capsys.readouterr().err and not out.exists()
