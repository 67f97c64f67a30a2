"""The plan of a run: whatever would stop it later is refused before anything is loaded or written.

python -m pytest tests/utils/training/test_plan.py
"""

import os
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from models.checks.errors import UserError
from models.vae import build_vae
from tests.tiny import tiny_config, train_here
from utils.config import load_config
from utils.run_lock import RunLock
from utils.training.plan import check_run, describe_run, print_plan

ROOT = Path(__file__).resolve().parents[3]
PIXEL = ("eval.every=2", "eval.features=pixel", "eval.num=8")


def check(tmp_path, *overrides, ranks: int = 1, **how):
    return check_run(tiny_config(f"run.out={tmp_path / 'out'}", *overrides), ranks, **how)


@pytest.fixture
def things(tmp_path):
    """One of each kind of thing that a path can name by mistake."""
    root = tmp_path / "things"
    (root / "folder").mkdir(parents=True)
    (root / "empty").touch()
    (root / "text").write_text("hello")
    with zipfile.ZipFile(root / "zip", "w") as archive:
        archive.writestr("a", "b")
    torch.save({"a": torch.zeros(2)}, root / "file.pt")
    os.mkfifo(root / "fifo")
    (root / "loop").symlink_to(root / "loop")
    return root


KINDS = ("absent", "folder", "empty", "text", "zip", "file.pt", "fifo", "loop")


@pytest.mark.slow
def test_the_networks_of_every_config_fit_together(tmp_path):
    """Described once for each combination of VAE, SiT, encoders and resolution in configs/."""
    distinct = {}
    for path in (ROOT / "configs").rglob("*.yaml"):
        c = load_config([path], [f"run.out={tmp_path}"])
        encoders = tuple(c.encoder.names) if c.uses_encoder else ()
        shapes = (c.vae.name, *c.sit_shape().values(), encoders, c.data.resolution)
        distinct.setdefault(shapes, c)
    assert len(distinct) > 10
    for config in distinct.values():
        # weights that a config names are made by an earlier command
        config.encoder.weights, config.eval.every = [], 0
        config.loss.reg.perceptual = 0
        if config.vae.weights != "hub":
            config.vae.weights = None
        plan = check_run(config, 8, assume_data=True)
        assert "parameters" in describe_run(config, plan, 8), config.run.name


SHAPES = {
    "encoder.grid=8": "the SiT has 4x4 tokens, the encoder 8x8",
    "sit.patch_size=3": "patch size 3 does not divide the 8x8 latents",
    "data.resolution=17": "not a multiple of the VAE's downsample factor",
    "disc.layers=3": "leaves no patch of a 16 px image",
    "encoder.names=[dinov9-b]": "dinov9-b",
    "vae.name=sdvea": "did you mean sdvae",
    "run.batch_size=1798": "1,797 images",
    "run.accumulation=3": "multiple of 3",
    "data.num_classes=7": "the data has 10",
    "data.split=tset": "data.split=tset: the source digits has all, train, test",
    "data.source=imagefolder": "data.source=imagefolder: expected one of",
    "data.source=folder": "data.path",
    "encoder.names=[timm:test_resnet/x]": "stride is 'x'",
    "eval.metrics=[nope]": "nope",  # also without evaluations
    "eval.features=vgg": "vgg",
    "data.resolution=8 encoder.grid=2 disc.layers=1 loss.reg.lpips=1": "LPIPS",
}


@pytest.mark.parametrize("overrides", SHAPES)
def test_what_does_not_fit_is_refused_and_nothing_is_written(overrides, tmp_path):
    """By the one validation, hence also by a dry run: wrong data are not assumed."""
    for assume in (False, True):
        with pytest.raises(UserError) as caught:
            check(tmp_path, *overrides.split(), assume_data=assume)
        assert SHAPES[overrides] in str(caught.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "setting",
    ["vae.weights={}", "vae.name={}", "disc.weights={}", "encoder.weights=[{}]", "run.resume={}",
     "run.init_from={}", "loss.reg.lpips=1 loss.reg.lpips_weights={}", "run.out={}"],
)  # fmt: skip
@pytest.mark.slow
def test_a_path_that_names_something_else_is_refused(kind, setting, things, tmp_path):
    """In one line that names it; a FIFO is never waited for."""
    if setting == "run.out={}" and kind in ("absent", "folder"):
        return  # a folder for runs
    words = setting.format(things / kind).split()
    with pytest.raises(UserError) as caught:
        check(tmp_path, *words)
    assert str(things / kind) in str(caught.value)


@pytest.mark.parametrize("kind", KINDS)
def test_data_that_are_absent_may_be_assumed_but_nothing_else(kind, things, tmp_path, capsys):
    for source in ("folder", "packed"):
        words = (f"data.source={source}", f"data.path={things / kind}")
        with pytest.raises(UserError):
            check(tmp_path, *words)
        if kind == "absent":
            print_plan(tiny_config(*words, f"run.out={tmp_path / 'out'}"))
            assert str(things / kind) in capsys.readouterr().out.split("parameters")[1]
        else:
            with pytest.raises(UserError, match=kind if kind != "loop" else "loop"):
                check(tmp_path, *words, assume_data=True)


UNREADABLE = {
    "text": lambda path: path.write_text("hello"),
    "eps": lambda path: path.write_text("%!PS-Adobe-3.0 EPSF-3.0"),
    "loop": lambda path: path.symlink_to(path.name),
    "empty": lambda path: path.touch(),
}


@pytest.mark.parametrize("kind", UNREADABLE)
def test_data_none_of_which_can_be_read_are_refused_at_the_start(kind, tmp_path):
    images = tmp_path / "images"
    images.mkdir()
    for i in range(8):
        UNREADABLE[kind](images / f"{i}.png")
    (images / "0.png").unlink()
    (images / "0.png").write_text("")  # a loop is no image file by its name
    words = (f"data.path={images}", "data.source=folder", "run.batch_size=1")
    for assume in (False, True):
        with pytest.raises(UserError, match=r"\.png"):
            check(tmp_path, *words, assume_data=assume)
    pixels = np.zeros((16, 16, 3), np.uint8)
    Image.fromarray(pixels).save(images / "00.png")  # the first one
    assert check(tmp_path, *words)


UNREAD = {
    "disc.weights=x loss.reg.gan=0": "disc.weights",
    "loss.reg.lpips_weights=x": "loss.reg.lpips_weights",
    "eval.weights=x": "eval.weights",
    "loss.align.sit=0 loss.align.vae=0": "encoder.weights",
}


@pytest.mark.parametrize("overrides", UNREAD)
def test_a_file_that_is_named_and_not_read_is_said(overrides, tmp_path):
    (note,) = check(tmp_path, *overrides.split()).notes
    assert UNREAD[overrides] in note
    assert not check(tmp_path).notes


EVALUATIONS = {
    "eval.num=1": "at least 2",
    "eval.num=3 eval.metrics=[precision]": "at least 4",
    "eval.metrics=[kids]": "kids",
    "eval.metrics=[sfid]": "sfid",
    "eval.features=pixl": "pixl",
    "eval.features=timm:test_resnet@/absent": "/absent",
    "eval.weights=x": "weights",
    "eval.reference=digits@32": "32x32",
    "eval.reference=digits:tset": "tset",
    "eval.reference=/absent.npz": "/absent.npz",
    "eval.reference=/absent": "/absent",
}


@pytest.mark.parametrize("overrides", EVALUATIONS)
def test_an_impossible_evaluation_is_refused_at_the_start(overrides, tmp_path):
    with pytest.raises(UserError) as caught:
        check(tmp_path, *PIXEL, *overrides.split())
    assert EVALUATIONS[overrides] in str(caught.value) and "eval.every=0" in str(caught.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", KINDS)
def test_a_reference_that_is_something_else_is_named(kind, things, tmp_path):
    with pytest.raises(UserError) as caught:
        check(tmp_path, *PIXEL, f"eval.reference={things / kind}")
    assert str(things / kind) in str(caught.value)


def test_too_many_reference_images_for_single_comparisons(tmp_path, monkeypatch):
    monkeypatch.setattr("utils.evaluation.reference.MAX_ROWS", 1000)
    assert check(tmp_path, *PIXEL)
    with pytest.raises(UserError, match="at most 1000"):
        check(tmp_path, *PIXEL, "eval.metrics=[recall]")


def test_a_refused_run_leaves_no_folder_and_a_dry_run_exits_as_it_does(tmp_path, capsys):
    for word in ("eval.num=1", "run.batch_size=1798", "disc.weights=/absent"):
        words = (*PIXEL, word) if "eval" in word else (word,)
        assert train_here(tmp_path, *words) == train_here(tmp_path, *words, "--dry-run") == 2
        lines = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
        assert len(lines) == 2 and lines[0] == lines[1]
    assert not list(tmp_path.iterdir())


def test_weights_of_another_architecture_are_refused_by_their_header(tmp_path):
    build_vae("tiny-f8d4").save(tmp_path / "vae")
    save_file({"main.0.weight": torch.zeros(1)}, tmp_path / "disc.safetensors")
    for word in (f"vae.weights={tmp_path}/vae/diffusion_pytorch_model.safetensors",
                 f"disc.weights={tmp_path}/disc.safetensors"):  # fmt: skip
        with pytest.raises(UserError, match="do not fit"):
            check(tmp_path, word)


@pytest.mark.slow
def test_a_checkpoint_is_described_and_must_fit(tmp_path, capsys):
    """The VAE that will be used is named, wherever it comes from."""
    assert train_here(tmp_path, "run.steps=2") == 0
    own = tmp_path / "tiny" / "checkpoints" / "0000002"
    capsys.readouterr()
    assert train_here(tmp_path, "--dry-run") == 0
    said = capsys.readouterr().out
    assert f"{own}, step 2" in said and f"that of {own}" in said
    more = ("run.name=next", f"run.init_from={own}")
    assert train_here(tmp_path, *more, "--dry-run") == 0
    assert f"that of {own}" in capsys.readouterr().out
    assert train_here(tmp_path, *more, "sit.hidden_size=64", "--dry-run") == 2
    assert "sit.hidden_size=32" in capsys.readouterr().err
    assert train_here(tmp_path, "sit.hidden_size=64", "--dry-run") == 2
    assert "sit.hidden_size" in capsys.readouterr().err
    assert not (tmp_path / "next").exists()


def test_the_plan_counts_what_a_run_will_be_and_warns_of_a_single_class(tmp_path):
    c = tiny_config(f"run.out={tmp_path}", "run.accumulation=2")
    figures = describe_run(c, check_run(c, 2), 2)
    assert figures["global batch"] == "8 = 2 per rank x 2 rank(s) x 2 micro-batch(es)"
    assert figures["steps per epoch"] == "224"
    assert (figures["tokens"], figures["latents"]) == ("4x4 = 16", "4x8x8")
    assert figures["images"].startswith("1,797 of 16 px") and figures["output"] == str(c.run_dir)
    assert figures["classes"].startswith("10: 0, 1, 2") and figures["precision"] == "fp32"
    assert figures["device"].endswith(", 2 ranks") and figures["begins with"] == "a new run"
    (tmp_path / "flat").mkdir()
    for i in range(8):
        Image.fromarray(np.zeros((16, 16, 3), np.uint8)).save(tmp_path / "flat" / f"{i}.png")
    plan = check(tmp_path, "data.source=folder", f"data.path={tmp_path / 'flat'}")
    assert any("one class" in note for note in plan.notes)


@pytest.mark.slow
def test_an_evaluation_that_fails_later_is_left_out_and_the_run_goes_on(tmp_path, capsys):
    """Its reference is deleted while the run trains."""
    reference = tmp_path / "reference.npz"
    np.savez(reference, np.random.default_rng(0).integers(0, 256, (9, 16, 16, 3), np.uint8))
    words = (*PIXEL, "eval.steps=2", f"eval.reference={reference}", "run.steps=2")
    with pytest.MonkeyPatch.context() as patch:
        from utils.training import online_evaluation

        sample = online_evaluation.OnlineEvaluation.sample

        def sample_then_delete(*args):
            reference.unlink(missing_ok=True)
            return sample(*args)

        patch.setattr(online_evaluation.OnlineEvaluation, "sample", sample_then_delete)
        assert train_here(tmp_path, *words) == 0
    assert "reference.npz" in capsys.readouterr().err
    assert (tmp_path / "tiny" / "checkpoints" / "0000002").is_dir()


def test_a_dry_run_is_refused_where_another_run_writes(tmp_path, capsys):
    with RunLock(tmp_path / "tiny") as lock:
        lock.acquire()
        assert train_here(tmp_path, "--dry-run") == 2
        assert str(tmp_path / "tiny") in capsys.readouterr().err
    assert train_here(tmp_path, "--dry-run") == 0
    assert not (tmp_path / "tiny").exists()
