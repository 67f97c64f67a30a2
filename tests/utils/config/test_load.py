"""Configs: every file loads, later settings win, old names still read, mistakes are one line.

python -m pytest tests/utils/config
"""

from pathlib import Path

import pytest
from omegaconf import OmegaConf

from models.errors import UserError
from utils.config import load_config, read_saved_config, to_yaml

ROOT = Path(__file__).resolve().parents[3]
CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))


def test_every_config_loads_and_opens_with_its_record():
    for path in CONFIGS:
        load_config([path])
        header = [line for line in path.read_text().splitlines() if line.startswith("#")]
        assert len(header) >= 3, path
        if path.name != "base.yaml":
            text = "\n".join(header)
            assert "expected" in text and "hardware" in text and path.stem in text, path
    assert len(CONFIGS) > 40


def test_later_files_and_overrides_win_and_scientific_numbers_are_numbers(tmp_path):
    (tmp_path / "base.yaml").write_text("run: {steps: 1, seed: 1}\nvae: {optim: {lr: 1e-3}}\n")
    (tmp_path / "a.yaml").write_text("base: base.yaml\nrun: {steps: 2}\n")
    (tmp_path / "b.yaml").write_text("run: {name: '007'}\n")
    c = load_config(
        [tmp_path / "a.yaml", tmp_path / "b.yaml"], ["run.steps=3", "sit.optim.lr=2e-5"]
    )
    assert (c.run.steps, c.run.seed, c.run.name) == (3, 1, "007")
    assert (c.vae.optim.lr, c.sit.optim.lr) == (1e-3, 2e-5)


def test_a_saved_config_loads_as_the_same(tmp_path):
    config = load_config([ROOT / "configs/quickstart.yaml"], ["run.seed=5", "vae.weights=null"])
    (tmp_path / "c.yaml").write_text(to_yaml(config))
    assert load_config([tmp_path / "c.yaml"]) == read_saved_config(tmp_path / "c.yaml") == config
    assert OmegaConf.load(tmp_path / "c.yaml").vae.weights is None


def test_a_renamed_setting_is_refused_with_its_new_name_and_read_from_an_old_run(tmp_path):
    (tmp_path / "config.yaml").write_text("disc: {alone_steps: 4}\nrun: {init_from: gone}\n")
    with pytest.raises(UserError, match=r"disc\.alone_steps is now called disc\.pretrain_steps"):
        load_config([tmp_path / "config.yaml"])
    with pytest.raises(UserError, match=r"now called disc\.pretrain_steps"):
        load_config([], ["disc.alone_steps=4"])
    saved = read_saved_config(tmp_path / "config.yaml")
    assert (saved.disc.pretrain_steps, saved.run.init_from) == (4, "gone")


@pytest.mark.parametrize(("flag", "weight"), [("true", 1.0), ("false", 0.0)])
def test_the_old_flag_of_the_diffusion_loss_reads_as_a_weight(tmp_path, flag, weight):
    path = tmp_path / "config.yaml"
    path.write_text(f"loss: {{diffusion: {{to_vae: {flag}}}}}\n")
    configs = [load_config([path]), read_saved_config(path)]
    configs.append(load_config([], ["loss.diffusion.vae=0.5", f"loss.diffusion.to_vae={flag}"][1:]))
    assert [c.loss.diffusion.vae for c in configs] == [weight] * 3
    # a later file or override wins, whichever of the two names each of them uses
    assert load_config([path], ["loss.diffusion.vae=0.1"]).loss.diffusion.vae == 0.1
    (tmp_path / "new.yaml").write_text("loss: {diffusion: {vae: 0.1}}\n")
    assert load_config([tmp_path / "new.yaml", path]).loss.diffusion.vae == weight


def test_a_missing_or_broken_file_is_one_line(tmp_path):
    broken = {
        "run: [1\n": "is not YAML",
        "- run\n": "is no config",
        "3\n": "is no config",
        "base: c.yaml\n": "its own base",
    }
    for text, message in broken.items():
        (tmp_path / "c.yaml").write_text(text)
        with pytest.raises(UserError, match=message) as caught:
            load_config([tmp_path / "c.yaml"])
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="no config at"):
        load_config([tmp_path / "absent.yaml"])


MISTAKES = {  # override: the key facts of its message, one override for each kind of mistake
    "run.step=3": ("run.step", "Did you mean: 'steps'"),
    "rnu.steps=1": ("rnu", "Did you mean: 'run'"),
    "run.steps=many": ("many", "Integer", "run.steps"),
    "run.precision=fp8": ("fp8", "bf16", "run.precision"),
    "preview.solver=rk4": ("rk4", "ode-ab2", "preview.solver"),
    "loss.diffusion.to_vae=0.5": ("to_vae=0.5", "loss.diffusion.vae"),
    "--proj-coeff=0.5": ("--proj-coeff=0.5", "write key=value"),
    "run.steps": ("run.steps", "write key=value"),
    "encoder.names=[a": ("encoder.names=[a", "YAML"),
}


@pytest.mark.parametrize("override", MISTAKES)
def test_a_mistake_in_an_override_is_one_line_with_what_to_write(override):
    with pytest.raises(UserError) as caught:
        load_config([], [override])
    assert all(fact in str(caught.value) for fact in MISTAKES[override]), str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_old_name_beside_the_new_one_is_refused():
    """Else one of the two would win without a word."""
    both = ["loss.diffusion.vae=0.1", "loss.diffusion.to_vae=true"]
    with pytest.raises(UserError, match=r"to_vae is the old name of loss\.diffusion\.vae"):
        load_config([], both)


@pytest.mark.parametrize(
    ("word", "message"),
    [("optim.lr=3", "Did you mean"), ("loss=1", "a section of settings"), ("--dryrun", "no flag")],
)
def test_a_mistake_is_answered_in_words(word, message):
    with pytest.raises(UserError, match=message):
        load_config([], [word])
