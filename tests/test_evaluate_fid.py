"""The script as a user runs it: flags, tables, records, refusals, two ranks."""

import json
import math

import numpy as np
import pytest
import timm
import torch
import torchvision
from safetensors.torch import save_file

import evaluate_fid
from models.checks.errors import UserError
from models.vae import load_vae
from tests.tiny import run_script
from tests.utils.evaluation.toy_network import sampling_record
from utils import cli


@pytest.fixture
def run(tmp_path, capsys):
    """Call main with flags and a cache of its own => (record or None, what was printed)."""

    def call(*flags, out=True):
        extra = ["--out", str(tmp_path / "out.json")] if out else []
        evaluate_fid.main([*map(str, flags), "--cache", str(tmp_path / "cache"), *extra])
        text = capsys.readouterr().out
        record = json.loads((tmp_path / "out.json").read_text()) if out else None
        return record, text

    return call


@pytest.fixture
def judge(tmp_path):
    """A timm checkpoint as the quickstart's: random, which is enough here."""
    torch.manual_seed(0)
    path = tmp_path / "classifier.safetensors"
    save_file(timm.create_model("test_resnet", num_classes=10).state_dict(), path)
    return f"timm:test_resnet@{path}"


@pytest.fixture
def samples(tmp_path):
    """60 pictures as sample_ddp.py leaves them."""
    rng = np.random.Generator(np.random.PCG64(0))
    np.savez(tmp_path / "s.npz", rng.integers(0, 256, (60, 16, 16, 3), dtype=np.uint8))
    settings = {"solver": "sde", "steps": 250, "cfg_scale": 1.5, "uint8": "truncate",
                "class_balanced": True}  # fmt: skip
    (tmp_path / "s.json").write_text(json.dumps(sampling_record(60, **settings)))
    return tmp_path / "s.npz"


def test_digits_quickstart_prints_the_table_and_writes_the_record(run, samples, judge):
    record, text = run("--samples", samples, "--reference", "digits:test@16", "--features", judge)
    (name,) = [name for name in record["metrics"] if name.startswith("FD[")]
    assert name.startswith("FD[timm:test_resnet@classifier.safetensors#")
    assert record["details"][name]["times_floor"] > 2
    assert f"{record['details'][name]['times_floor']:.2f} x floor" in text
    assert record["comparable_to_papers"] is False
    assert record["samples"]["uint8_rule"] == "truncate"
    assert record["samples"]["label_sampling"] == "balanced"
    assert record["samples"]["record"]["settings"]["steps"] == 250
    assert "sde" in text
    assert "labels balanced" in text


def test_the_record_has_every_fact(run, samples):
    record, _ = run("--samples", samples, "--reference", "digits@16", "--features", "pixel",
                    "--pr-mode", "fp32", "--metrics", "fid,recall")  # fmt: skip
    assert set(record) == {
        "metrics", "details", "comparable_to_papers", "not_comparable_because", "comparability",
        "warnings", "n", "samples", "reference", "features", "protocol", "ranks", "versions",
    }  # fmt: skip
    assert set(record["metrics"]) == {"FD[pixel12]", "recall[pixel12]"}
    assert record["protocol"]["precision_recall"]["mode"] == "fp32"
    assert record["n"] == record["samples"]["n"] == 60
    assert record["reference"]["n"] == 1797
    assert len(record["samples"]["content_sha256"]) == 64
    assert all(math.isfinite(value) for value in record["metrics"].values())


def test_vae_mode_measures_reconstructions(run):
    flags = ("--vae", "tiny-f8d4", "--data", "digits:test", "--resolution", "32", "--num", "40")
    record, text = run(*flags, "--features", "pixel", "--batch-size", "16")
    assert set(record["metrics"]) == {"rFD[pixel12]", "PSNR", "SSIM", "latent_mean", "latent_std",
                                      "spatial_variance", "total_variation"}  # fmt: skip
    lines = text.splitlines()
    assert "lpips" not in text.lower()  # nobody has asked for it
    start = lines.index("images     digits:test@32, 40 of 359 evenly spaced  n=40  32x32")
    assert lines[start + 1] == "vae        tiny-f8d4, random weights"
    assert lines[start + 2] == "latents    mode of the posterior"
    assert len(record["metrics"]["latent_mean"]) == 4
    assert record["protocol"]["posterior"] == "mode"
    assert "gaussian" in record["protocol"]["ssim"].lower()
    assert record["n"] == 40
    assert record["details"]["rFD[pixel12]"]["times_floor"] > 1


@pytest.mark.slow
def test_lpips_is_measured_when_it_is_asked_for(run, tmp_path):
    torch.manual_seed(0)
    torch.save(torchvision.models.vgg16(num_classes=1).state_dict(), tmp_path / "vgg.pth")
    flags = ("--vae", "tiny-f8d4", "--data", "digits:test@32", "--num", "4")
    record, _ = run(*flags, "--metrics", "lpips,psnr", "--lpips-weights", tmp_path / "vgg.pth")
    assert set(record["metrics"]) == {"LPIPS", "PSNR"}
    assert 0 < record["metrics"]["LPIPS"] < 1
    assert record["features"] is None


def test_vae_metrics_do_not_depend_on_the_batch_size_and_sampling_is_keyed_by_index(tmp_path):
    torch.manual_seed(0)
    load_vae("tiny-f8d4", None).save(tmp_path / "vae")
    found = {}
    for posterior in ("mode", "sample"):
        for size in (8, 5):
            out = tmp_path / "o.json"
            evaluate_fid.main(
                ["--vae", str(tmp_path / "vae"), "--data", "digits:test@16", "--num", "16",
                 "--metrics", "psnr,ssim,latents", "--posterior", posterior,
                 "--batch-size", str(size), "--out", str(out)]
            )  # fmt: skip
            found[posterior, size] = json.loads(out.read_text())["metrics"]
        for name, value in found[posterior, 8].items():
            assert found[posterior, 5][name] == pytest.approx(value, rel=1e-4, abs=1e-6)
    assert found["mode", 8] != found["sample", 8]


def test_dry_run_needs_no_file_and_says_what_is_missing(run):
    _, text = run("--samples", "absent.npz", "--reference", "VIRTUAL.npz", "--dry-run", out=False)
    assert "absent.npz  (no such file yet)" in text
    assert "weights-inception-2015-12-05-6726825d.pth" in text
    _, text = run("--vae", "sdvae", "--data", "packed:/data@256", "--dry-run", out=False)
    assert "sdvae" in text


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "either --samples"),
        (["--samples", "a", "--vae", "sdvae"], "either --samples"),
        (["--vae", "sdvae"], "needs --data"),
        (["--samples", "a.npz", "--out", "a.json"], "own record"),
        (["--samples", "a.npz", "--posterior", "sample"], "--posterior does not go with"),
        (["--samples", "a.npz", "--resolution", "32"], "--resolution does not go with"),
        (["--vae", "tiny-f8d4", "--data", "digits@32", "--pr-mode", "fp32"], "--pr-mode does not"),
        (["--samples", "a.npz", "--features", "clip"], "expected inception, dinov2"),
        (["--samples", "a.npz", "--metrics", "kids"], "'kids': expected some of fid"),
        (["--samples", "a.npz", "--batch-size", "0"], "batch-size.*whole number"),
        (["--vae", "tiny-f8d4", "--data", "digits@32", "--metrics", "fid"], "some of rfid"),
        (["--vae", "tiny-f8d4", "--data", "digits@12", "--metrics", "psnr"], "downsample factor"),
        (["--vae", "tiny-f8d4", "--data", "digits@32", "--num", "0"], "--num.*whole number"),
        (["--samples", "absent.npz", "--reference", "digits", "--features", "pixel"], "no such"),
    ],
)
def test_mistakes_in_the_flags_are_refused(flags, message):
    with pytest.raises(UserError, match=message):
        evaluate_fid.main(flags)


HELD = {
    "{samples}.json": "is a JSON file",
    "{folder}": "no images in",
    "/dev/null": "is a device",
    "{text}": "is a text file",
    "{small}": "expected the same size",
    "{statistics}": "swapped",
}


@pytest.mark.parametrize("dry_run", [[], ["--dry-run"]])
@pytest.mark.parametrize("held", HELD)
def test_what_is_there_and_wrong_is_refused_also_by_a_dry_run(held, dry_run, samples, tmp_path):
    small, statistics = tmp_path / "small.npy", tmp_path / "statistics.npz"
    np.save(small, np.zeros((4, 8, 8, 3), np.uint8))
    np.savez(statistics, mu=np.zeros(2048), sigma=np.eye(2048))
    (tmp_path / "folder").mkdir()
    (tmp_path / "text.npz").write_text("hello")
    samples.with_suffix(".json").rename(f"{samples}.json")  # no longer the record beside it
    places = {"samples": samples, "folder": tmp_path / "folder", "text": tmp_path / "text.npz"}
    given = held.format(**places, small=small, statistics=statistics)
    before = sorted(tmp_path.rglob("*"))
    flags = ["--features", "pixel", "--cache", "none", *dry_run]
    with pytest.raises(UserError, match=HELD[held]):
        evaluate_fid.main(["--samples", given, "--reference", str(samples), *flags])
    assert sorted(tmp_path.rglob("*")) == before


def test_folders_without_a_name_are_read(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="no images in"):
        evaluate_fid.main(["--samples", ".", "--reference", "digits", "--features", "pixel"])


def test_a_mistake_ends_in_one_line_and_exit_code_2(samples, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    flags = ["--samples", str(samples), "--reference", str(samples)]
    with pytest.raises(SystemExit) as end:
        cli.run(lambda: evaluate_fid.main(flags))
    assert end.value.code == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.strip()]
    assert line.startswith("error: weights-inception-2015-12-05-6726825d.pth not found")
    assert "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2" in line


def test_dry_run_and_help_import_no_torch():
    code = """
import contextlib, io, sys
import evaluate_fid
for flags in (["--help"], ["--samples", "a.npz", "--reference", "digits", "--dry-run"]):
    with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()):
        evaluate_fid.main(flags)
assert "torch" not in sys.modules
"""
    done = run_script("-c", code)
    assert done.returncode == 0, done.stderr


def on_ranks(ranks: int, out, *flags) -> dict:
    """The record of a run under `accelerate launch`."""
    done = run_script("evaluate_fid.py", *map(str, flags), "--out", str(out), ranks=ranks)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("not comparable to papers") == 1
    record = json.loads(out.read_text())
    assert record["ranks"] == ranks
    return record


@pytest.mark.slow
def test_two_ranks_give_the_numbers_of_one(run, samples, judge, one_thread, tmp_path):
    flags = ("--samples", samples, "--reference", "digits:test@16", "--features", judge,
             "--batch-size", "16")  # fmt: skip
    alone, _ = run(*flags)
    for cache in ("computed now", "hit"):
        both = on_ranks(2, tmp_path / "two.json", *flags, "--cache", tmp_path / "two")
        assert both["reference"]["cache"] == cache
        assert both["metrics"] == pytest.approx(alone["metrics"], rel=1e-5)
        assert both["samples"] == alone["samples"]


@pytest.mark.slow
def test_two_ranks_reconstruct_as_one(run, one_thread, tmp_path):
    torch.manual_seed(0)
    load_vae("tiny-f8d4", None).save(tmp_path / "vae")
    flags = ("--vae", tmp_path / "vae", "--data", "digits:test@16", "--num", "41", "--features",
             "pixel", "--posterior", "sample", "--batch-size", "16")  # fmt: skip
    alone, _ = run(*flags)
    both = on_ranks(2, tmp_path / "two.json", *flags)
    for name, value in alone["metrics"].items():
        assert both["metrics"][name] == pytest.approx(value, rel=1e-4, abs=1e-6), name
