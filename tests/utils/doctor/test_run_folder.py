"""The run's folder: what a run continues from, what has been changed, room for its checkpoints.

python -m pytest tests/utils/doctor/test_run_folder.py
"""

import re
from pathlib import Path

import pytest

from tests.tiny import tiny_config, train_here
from utils.checkpoint import Checkpoints
from utils.doctor import run_folder
from utils.doctor.run_folder import changed_settings, kept_checkpoints


@pytest.mark.slow
def test_resume_says_where_a_run_continues_and_what_has_changed(quick, tmp_path):
    out = tmp_path / "out"
    assert train_here(out, "run.steps=2") == 0
    found = quick()
    assert not found.failed and "step 2 of 4" in found.only("resume")[1]
    assert found.only("vae")[1].startswith(str(out / "tiny" / "checkpoints" / "0000002"))
    status, text = quick("run.steps=2").only("resume")
    assert status == "warn" and "raise run.steps" in text
    found = quick("sit.optim.lr=0.5")
    (_, (status, text)) = found["resume"]
    assert not found.failed and status == "warn" and "sit.optim.lr=0.001 (now 0.5)" in text
    found = quick("sit.hidden_size=64")
    assert found.failed and "sit.hidden_size=32 (now 64)" in found["resume"][-1][1]
    found = quick("sit.hidden_size=64", "run.allow_change=[sit.hidden_size]")
    assert found.failed and "do not fit this config" in found.only("tokens")[1]
    found = quick("run.resume=never")
    assert found.failed and "choose another run.name" in found.only("resume")[1]
    found = quick("run.name=new", f"run.init_from={out}/tiny/checkpoints/0000002")
    assert not found.failed and "a new run in" in found.only("resume")[1]


def test_a_config_of_an_older_version_is_compared_under_the_new_names(tmp_path):
    config = tiny_config(f"run.out={tmp_path}", "disc.pretrain_steps=2", "sit.depth=2")
    config.run_dir.mkdir()
    old = "disc: {alone_steps: 2}\nsit: {depth: 3}\nloss: {diffusion: {to_vae: false}}\n"
    (config.run_dir / "config.yaml").write_text(old)
    changed = changed_settings(config)
    assert "sit.depth=3 (now 2)" in changed
    assert not any("pretrain_steps" in line or "loss.diffusion" in line for line in changed)


@pytest.mark.parametrize("changes", [(2, 3, 0, 11), (2, 3, 6, 13), (3, 10, 5, 20), (1, 50, 0, 20)])
def test_the_number_of_checkpoints_is_what_a_run_keeps(changes, tmp_path):
    names = ("keep_last", "save_every", "milestone_every", "steps")
    c = tiny_config(*(f"run.{name}={value}" for name, value in zip(names, changes)))
    run, kept = c.run, Checkpoints(tmp_path, c.run.keep_last, c.run.milestone_every)
    for step in range(1, run.steps + 1):
        if step % run.save_every == 0 or step == run.steps:
            kept.save(step, lambda folder: None, {})
    assert kept_checkpoints(c) == len(list(kept.folder.iterdir()))


def test_a_full_disk_fails_and_the_advice_lowers_the_need(quick, monkeypatch):
    words = ("run.steps=8", "run.milestone_every=0")
    text = quick(*words, "run.keep_last=3").only("disk")[1]
    each = float(re.search(r"3 \+ 1 checkpoints of ([\d.]+) MiB", text).group(1))
    room = int(3.5 * each * 2**20)
    monkeypatch.setattr(run_folder, "free_disk", lambda path: (Path("/"), room))
    status, text = quick(*words, "run.keep_last=3").only("disk")
    assert status == "FAIL" and "lower run.keep_last=3" in text
    assert quick(*words, "run.keep_last=2").only("disk")[0] == "ok"
