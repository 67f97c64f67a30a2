"""What a user may name as a checkpoint: a folder, a run, a repository of the hub.

python -m pytest tests/utils/sampling/test_locate.py
"""

import json
import os
from pathlib import Path

import pytest
from huggingface_hub import constants, errors

from models.checks.errors import UserError
from utils.checkpoint import Checkpoints
from utils.sampling import locate
from utils.sampling.locate import (
    list_checkpoints,
    locate_checkpoint,
    locate_vae,
    locate_vae_spec,
)

WEIGHTS = "diffusion_pytorch_model.safetensors"


def fill(folder: Path, *parts: str) -> Path:
    """Something with the files of a checkpoint; nothing here reads what is in them."""
    for part in parts:
        (folder / part).mkdir(parents=True)
        (folder / part / "config.json").write_text('{"_class_name": "AutoencoderKL"}')
        (folder / part / WEIGHTS).write_text(part)
    return folder


@pytest.fixture
def run(tmp_path) -> Path:
    """A run with the checkpoints of steps 2 and 4, and half a one of step 6."""
    for step in (2, 4, 6):
        write = lambda draft: fill(draft, "vae", "sit_ema") and None  # noqa: E731
        Checkpoints(tmp_path / "exps/a").save(step, write, {})
    newest = tmp_path / "exps/a/checkpoints/0000006"
    (newest / "vae" / WEIGHTS).write_text("cut")
    return tmp_path / "exps/a"


def test_a_run_is_its_newest_whole_checkpoint_said_in_a_line(run, capsys, monkeypatch):
    expected = run / "checkpoints/0000004"
    monkeypatch.setenv("HOME", str(run.parent))
    for given in (run, f"{run}/", run / "checkpoints", "~/a"):
        assert locate_checkpoint(given) == expected
        said = capsys.readouterr().out
        assert "0000006: vae/" in said and f"newest whole checkpoint, {expected}" in said
    assert locate_vae(run) == expected and locate_vae_spec(str(run)) == str(expected)
    capsys.readouterr()
    assert locate_checkpoint(expected) == expected and not capsys.readouterr().out


def test_other_words_for_a_vae_stay_as_they_are():
    for spec in ("sdvae", "stabilityai/sd-vae-ft-mse", "no/such/file.pt"):
        assert locate_vae_spec(spec) == spec


def test_the_list_of_a_run(run):
    head, *rows, remark = list_checkpoints(run).splitlines()
    assert head.split() == ["step", "EMA", "size", "date", "checkpoint"]
    assert [row.split()[0] for row in rows] == ["2", "4", "6"]
    assert "files are there" in remark  # and not read: that of step 6 is not whole
    assert all(row.split()[1] == "yes" for row in rows)
    with pytest.raises(UserError, match=r"is no run \(a folder without checkpoints/\)"):
        list_checkpoints(run.parent)


def test_a_folder_that_is_none_says_what_it_is(run, tmp_path):
    vae = fill(tmp_path / "b", "vae")
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun/config.yaml").touch()
    assert "has saved no checkpoint yet: wait for one" in list_checkpoints(tmp_path / "begun")
    (tmp_path / "empty/checkpoints").mkdir(parents=True)
    (tmp_path / "file").write_text("x")
    (tmp_path / "0400000.pt").write_bytes(b"PK\3\4 0400000/data.pkl")
    (tmp_path / "repa/checkpoints").mkdir(parents=True)
    (tmp_path / "repa/checkpoints/0400000.pt").touch()
    (tmp_path / "accelerate").mkdir()
    (tmp_path / "accelerate/model.safetensors").touch()
    fill(tmp_path / "pipeline", "transformer", "vae")
    for given, words in {
        run.parent: "name one of the runs in it: a",
        vae: "it is a VAE alone",
        run / "checkpoints/0000004/sit_ema": f"the checkpoint around it, {run}/checkpoints/0000004",
        run / "checkpoints/0000004/vae" / WEIGHTS: f"around it, {run}/checkpoints/0000004",
        tmp_path / "pipeline": "run scripts/import_official.py",
        tmp_path / "empty": "holds no whole checkpoint yet",
        tmp_path / "begun": "it is a run that has saved no checkpoint yet: wait for one",
        tmp_path / "file": "it is a text file",
        tmp_path / "0400000.pt": "it is a PyTorch file; run scripts/import_official.py",
        tmp_path / "repa": "of another implementation: run scripts/import_official.py",
        tmp_path / "accelerate": "run scripts/import_official.py",
        tmp_path / "absent": "no such folder",
        run.parent / "abc": "no such folder",  # and not a repository of somebody called exps
    }.items():
        with pytest.raises(UserError, match=words) as caught:
            locate_checkpoint(given)
        assert "\n" not in str(caught.value)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A cache of the hub with a repository of a pipeline, and no network."""
    repo = tmp_path / "hub/models--me--pipeline"
    commit = "a" * 40
    folder = fill(repo / "snapshots" / commit, "vae", "sit_ema")
    (folder / "model_index.json").write_text(json.dumps({"path": "linear"}))
    (repo / "refs").mkdir()
    for name in ("main", "v1"):
        (repo / "refs" / name).write_text(commit)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub._snapshot_download.constants.HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    return folder


def test_a_repository_of_the_hub_is_its_copy_here(hub, capsys):
    for given in ("me/pipeline", Path("me/pipeline"), "me/pipeline@v1"):
        assert locate_checkpoint(given) == hub
        assert f"{given} of the hub: {hub}" in capsys.readouterr().out
    assert locate_vae_spec("me/pipeline@v1") == str(hub)
    (hub / "vae" / WEIGHTS).unlink()
    with pytest.raises(UserError, match=r"vae/diffusion.*or was not downloaded: .*hf download"):
        locate_checkpoint("me/pipeline")
    os.rename(hub / "sit_ema", hub / "unet")
    with pytest.raises(UserError, match="of the hub has no vae/ and sit_ema/"):
        locate_checkpoint("me/pipeline")


def test_without_a_network_the_remedy_is_a_command(hub):
    with pytest.raises(UserError, match=r"HF_HUB_OFFLINE is set.*`hf download me/other --local-d"):
        locate_checkpoint("me/other")
    with pytest.raises(UserError, match="--revision v2 --local-dir DIR` where there is a network"):
        locate_checkpoint("me/pipeline@v2")


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (errors.GatedRepoError, "ask for access on https://huggingface.co/me/x, then run `hf auth"),
        (errors.RepositoryNotFoundError, "no such repository on the hub, or a private one"),
        (errors.RevisionNotFoundError, "no branch, tag or commit v9"),
        (OSError, r"not to be had from the hub \(OSError"),
    ],
)
def test_what_the_hub_refuses_is_one_true_line(error, words, monkeypatch, tmp_path):
    def refuse(*_, **__):
        raise error.__new__(error)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(locate.huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(UserError, match=words):
        locate_checkpoint("me/x@v9")


def test_only_configs_weights_and_the_readme_are_asked_for(monkeypatch, tmp_path):
    asked = []

    def download(repo, revision, allow_patterns):
        asked.extend(allow_patterns)
        return str(folder)

    folder = fill(tmp_path / "copy", "vae", "sit_ema")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(locate.huggingface_hub, "snapshot_download", download)
    assert locate_checkpoint("me/x") == folder
    assert not any("*" in name for name in asked)
    assert {Path(name).suffix for name in asked} == {".json", ".safetensors", ".md"}
