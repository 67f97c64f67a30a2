"""What a run may change when it goes on, and where the settings of a checkpoint are found.

python -m pytest tests/utils/config/test_resuming.py
"""

import json
from itertools import combinations
from pathlib import Path

import pytest

from models.checks.errors import UserError
from utils.config import Config, load_config, to_yaml
from utils.config.load import SETTINGS, recorded_config
from utils.config.resuming import (
    FREE,
    REPETITION,
    STARTING,
    STEERING,
    changed_settings,
    defining_settings,
    is_in,
    is_same_experiment,
    require_resumable,
)

LISTS = (FREE, STEERING, REPETITION, STARTING)


def test_every_pattern_names_settings_and_none_is_in_two_lists():
    for patterns in LISTS:
        assert not [p for p in patterns if not any(is_in(name, [p]) for name in SETTINGS)]
    for one, other in combinations(LISTS, 2):
        assert not [name for name in SETTINGS if is_in(name, one) and is_in(name, other)]
    assert is_same_experiment("run.seed") and not is_same_experiment("vae.optim.lr")
    assert not is_same_experiment("sit.qk_norm")


@pytest.mark.parametrize(
    "name", ["sit.depth", "run.seed", "run.batch_size", "run.precision", "ema.decay", "data.path"]
)
def test_what_defines_a_run_is_refused_by_name_with_both_values_unless_allowed(name):
    value = {"run.precision": "fp32", "ema.decay": "0.5", "sit.depth": "9"}.get(name, "4")
    old, new = Config(), load_config([], [f"{name}={value}"])
    with pytest.raises(UserError) as caught:
        require_resumable(old, new)
    before = changed_settings(old, new)[name][0]
    shown = "null" if before is None else str(before)
    assert all(x in str(caught.value) for x in (f"{name}={shown} (now {value})", "allow_change"))
    new = load_config([], [f"{name}={value}", f"run.allow_change=[{name}]"])
    assert set(require_resumable(old, new)) == {name, "run.allow_change"}
    assert require_resumable(new, new) == {}  # once it is recorded, it is no change


def test_what_is_free_or_steers_goes_on_and_is_returned():
    new = load_config(
        [], ["run.steps=7", "eval.num=9", "sit.optim.beta2=0.5", "run.skip_steps=[3]"]
    )
    names = ["run.steps", "run.skip_steps", "sit.optim.beta2", "eval.num"]
    assert list(require_resumable(Config(), new)) == names


def test_other_classes_are_refused_unless_allowed():
    new, allowed = Config(), load_config([], ["run.allow_change=[data.classes]"])
    for other, facts in (["a", "c"], ("'b'", "'c'")), (["b", "a"], ("'a'",)), (["a"], ("2", "1")):
        with pytest.raises(UserError, match=r"data\.classes") as caught:
            require_resumable(Config(), new, ["a", "b"], other)
        assert all(fact in str(caught.value) for fact in facts)
        assert "data.classes" in require_resumable(Config(), allowed, ["a", "b"], other)
    assert require_resumable(Config(), new, ["a", "b"], ["a", "b"]) == {}
    assert require_resumable(Config(), new, None, ["a"]) == {}


def test_other_images_or_labels_are_refused_unless_allowed():
    old = {"images_sha256": "12ab" * 16, "labels_sha256": "34cd" * 16}
    allowed = load_config([], ["run.allow_change=[data.content]"])
    for name in old:
        new = old | {name: "56ef" * 16}
        with pytest.raises(UserError, match=rf"data\.content={name} .* \(now 56ef56ef: other "):
            require_resumable(Config(), Config(), old_content=old, new_content=new)
        found = require_resumable(Config(), allowed, old_content=old, new_content=new)
        assert "data.content" in found
    for unknown in (None, {}, old, {"images_sha256": "12ab" * 16}):
        assert require_resumable(Config(), Config(), old_content=old, new_content=unknown) == {}
        assert require_resumable(Config(), Config(), old_content=unknown, new_content=old) == {}


def make_checkpoint(run: Path, state: dict) -> Path:
    folder = run / "checkpoints" / "0000002"
    folder.mkdir(parents=True)
    (folder / "state.json").write_text(json.dumps({"step": 2, "files": {}} | state))
    return folder


def test_a_checkpoint_alone_knows_its_settings_and_the_folder_those_that_are_free(tmp_path):
    words = ["run.name=0400", "sit.depth=9", "run.skip_steps=[1]", "run.steps=9"]
    then = load_config([], words)
    then.data.path = "/a/$b"
    now = load_config([], ["run.steps=12", "run.name=b"])
    folder = make_checkpoint(tmp_path, {"config": defining_settings(then)})
    alone = recorded_config(folder, now)
    expected = {"sit.depth", "run.skip_steps", "data.path"}
    assert alone is not None and set(changed_settings(alone, now)) == expected
    assert alone.data.path == "/a/$b"
    (tmp_path / "config.yaml").write_text(to_yaml(then))
    assert recorded_config(folder, now) == then
    # settings of another start, after which nothing was saved
    (tmp_path / "config.yaml").write_text(to_yaml(load_config([], ["sit.depth=8"])))
    recorded = recorded_config(folder, now)
    assert recorded is not None and recorded.sit.depth == 9
    (tmp_path / "config.yaml").write_text("run: [")
    assert recorded_config(folder, now) == alone


def test_a_checkpoint_of_an_older_version_has_the_settings_of_its_folder(tmp_path):
    folder, now = make_checkpoint(tmp_path, {}), Config()
    assert recorded_config(folder, now) is None
    (tmp_path / "config.yaml").write_text("disc: {alone_steps: 4}\nsit: {depth: 3}\n")
    recorded = recorded_config(folder, now)
    assert recorded is not None
    assert (recorded.disc.pretrain_steps, recorded.sit.depth) == (4, 3)
    (tmp_path / "config.yaml").write_text("run: [")
    with pytest.raises(UserError, match=r"config\.yaml"):
        recorded_config(folder, now)
