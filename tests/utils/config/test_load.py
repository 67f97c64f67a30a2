"""Configs: every file loads, later settings win, old names still read, mistakes are one line.

python -m pytest tests/utils/config
"""

import os
from itertools import pairwise
from operator import attrgetter
from pathlib import Path

import pytest
import yaml

from models.checks.errors import UserError
from utils.config import Config, load_config, read_saved_config, to_yaml
from utils.config.schema import all_settings

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
    saved = yaml.safe_load((tmp_path / "c.yaml").read_text())  # as any YAML library reads it
    assert saved["vae"]["weights"] is None and saved["vae"]["optim"]["lr"] == 2e-3


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
    "run.step=3": ("run.step", "Did you mean: 'run.steps'"),
    "rnu.steps=1": ("rnu.steps", "Did you mean: 'run.steps'"),
    "run.steps=many": ("run.steps=many", "whole number"),
    "run.precision=fp8": ("fp8", "bf16", "run.precision"),
    "preview.solver=rk4": ("rk4", "ode-ab2", "preview.solver"),
    "loss.diffusion.to_vae=0.5": ("to_vae=0.5", "loss.diffusion.vae"),
    "--proj-coeff=0.5": ("--proj-coeff=0.5", "write key=value"),
    "run.steps": ("run.steps", "write key=value"),
    "encoder.names=[a": ("encoder.names=[a", "YAML"),
    "encoder.names=a": ("encoder.names=[a]", "a list"),
    "encoder.weights=null": ("encoder.weights=[]", "a list"),
    "encoder.names=[null]": ("encoder.names[0]=null", "none"),
    "encoder.names=[[a]]": ("encoder.names[0]", "a single value"),
    "run.lr=1": ("run.lr", "'vae.optim.lr' or 'sit.optim.lr'"),
    "batch_size=1": ("batch_size", "'run.batch_size'"),
    "configs/quickstart.yaml": ("configs/quickstart.yaml", "--config"),
    "base=configs/quickstart.yaml": ("base=", "--config"),
    "--run.steps=3": ("write run.steps=3",),
    "run.tf32=yes": ("run.tf32=yes", "true or false"),
    "run.steps=1.5": ("run.steps=1.5", "whole number"),
    "run.steps=0x10": ("run.steps=0x10", "whole number"),
    "run.steps=1:30": ("run.steps=1:30", "whole number"),
    "run.steps=null": ("run.steps=null", "whole number"),
    "run.steps=": ("run.steps=", "no value"),
    "run.init_from=": ("run.init_from=null", "no value"),
    "run.name=null": ("run.name=null", "cannot be none"),
    "run.name=a\n": ("run.name", "control characters"),
    "run.name=a\0b": ("run.name", "control characters"),
    "run.name=\udcff": ("run.name", "UTF-8"),
    "vae.optim.lr=1e999": ("vae.optim.lr", "finite"),
    "data.path=~": ("data.path=~", "$HOME", "null"),
    "data.path=$NOT_SET/a": ("data.path", "$NOT_SET"),
    "data.path=~nobody-here/a": ("data.path", "home folder"),
    f"data.path={'a' * 300}": ("data.path", "too long"),
    f"encoder.names={'[' * 9000}": ("encoder.names", "nested"),
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


WORDS = ["0400", "1.10", "1e3", "yes", "on", "2024-01-01", "12:30:45", "0x10", "a=b", "${x}", "[a]"]
WORDS += ["{a: 1}", "# a", "'a'", "*a", "&a", "true", "é", "-", "=", "!!int 3"]


@pytest.mark.parametrize("word", WORDS)
def test_a_text_is_what_stands_behind_the_sign_and_stays_so_when_it_is_saved(word, tmp_path):
    config = load_config([], [f"run.name={word}", f"eval.metrics=['{word}']".replace("''", "'")])
    assert config.run.name == word
    (tmp_path / "c.yaml").write_text(to_yaml(config))
    assert read_saved_config(tmp_path / "c.yaml") == config


def test_a_file_has_the_same_words_and_quotes_make_a_text(tmp_path):
    path = tmp_path / "c.yaml"
    text = "run: {name: 0400, steps: 1e3, seed: 0o17, out: 'null', trackers: [on, 1.10]}"
    path.write_text(
        text.replace("0o17", "017") + "\nencoder: {names: [2024-01-01]}\ndata: {path: }\n"
    )
    config = load_config([path], ["run.trackers=[]", "vae.optim.lr=1e-4", "run.batch_size=1_024"])
    assert (config.run.name, config.run.steps, config.run.seed) == ("0400", 1000, 17)
    assert (config.run.out, config.encoder.names) == ("null", ["2024-01-01"])
    assert (config.data.path, config.vae.optim.lr) == (None, 1e-4)
    assert config.run.batch_size == 1024


@pytest.mark.parametrize("word", ["null", "None", "none", "NULL"])
def test_none_is_none_where_a_setting_may_be_none(word):
    config = load_config(
        [], [f"vae.weights={word}", f"sit.depth={word}", f"encoder.weights=[{word}]"]
    )
    assert (config.vae.weights, config.sit.depth, config.encoder.weights) == (None, None, [None])


PATHS = {
    "run.out": "{}",
    "run.resume": "{}",
    "data.path": "{}",
    "vae.name": "{}",
    "vae.weights": "{}",
    "disc.weights": "{}",
    "encoder.weights": "['{}']",
    "loss.reg.lpips_weights": "{}",
    "loss.reg.perceptual_net": "timm:resnet@{}",
    "eval.reference": "folder:{}@256",
    "eval.weights": "{}",
    "eval.features": "timm:resnet@{}",
}


@pytest.mark.parametrize("name", PATHS)
def test_home_and_variables_are_expanded_in_every_path(name, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("SCRATCH_OF_TEST", str(tmp_path))
    section, _, last = name.rpartition(".")
    expected = PATHS[name].format(tmp_path / "a").strip("[]'")
    for written in ("~/a", "$HOME/a", "${HOME}/a", "$SCRATCH_OF_TEST/a"):
        config = load_config([], [f"{name}={PATHS[name].format(written)}"])
        value = getattr(attrgetter(section)(config), last)
        assert value == ([expected] if name == "encoder.weights" else expected)
    assert "data.latents" not in PATHS  # needs vae.train=false
    words = ["data.latents=~/a", "vae.train=false"]
    assert load_config([], words).data.latents == str(tmp_path / "a")


def test_every_setting_that_names_a_path_is_marked():
    marked = {name for name, declared, _ in all_settings(Config()) if "path" in declared.metadata}
    assert marked == {*PATHS, "data.labels", "data.latents", "run.init_from"}


def test_a_saved_path_is_not_expanded_again(tmp_path):
    (tmp_path / "c.yaml").write_text("data: {path: /a/$HOME/b}\n")
    assert read_saved_config(tmp_path / "c.yaml").data.path == "/a/$HOME/b"


BILLION = "".join(f"{b}: &{b} [{','.join([f'*{a}'] * 9)}]\n" for a, b in pairwise("abcdefghi"))
FILES = {  # content: what the message names
    "run: {steps: 1}\nrun: {seed: 1}": "run stands there twice",
    "run: {steps: 1, steps: 2}": "run.steps stands there twice",
    "": "is empty",
    "# nothing\n": "is empty",
    "run: 3": "run is a section",
    "run: {steps: {a: 1}}": "run.steps=a mapping",
    "run:\n\tsteps: 3": "line 2",
    "run: {steps: 1}\n---\nrun: {seed: 1}": "another document",
    "run: {name: !!python/object/apply:os.system ['touch gone']}": "names a type",
    "run: {name: !!str 0400}": "names a type",
    "a: &a [x]\n" + BILLION: "no setting is called 'a'",
    "run: &r {x: *r}": "run.x",
    "[" * 100_000: "nested",
    "{a: " * 100_000: "nested",
    "base: [a]": "base=a list",
    "base: 3": "does not exist",
    "base: absent.yaml": "absent.yaml",
    "base: ..": "no regular file",
    "1: 2": "called '1'",
    "? [a]\n: 3": "a list",
    "run: {steps: 1" + " " * 2**20 + "}": "bytes",
    b"\xff\xfer\0u\0n\0": "UTF-8",
    b"run: {name: \xe9}": "UTF-8",
    b"PK\x03\x04\0\0": "YAML",
    bytes(range(256)): "UTF-8",
}


@pytest.mark.parametrize("content", FILES, ids=lambda content: str(content)[:30])
def test_a_file_that_is_no_config_is_one_line_that_says_why(content, tmp_path):
    path = tmp_path / "c.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError) as caught:
        load_config([path])
    assert FILES[content] in str(caught.value) and "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500


def test_what_is_no_regular_file_is_not_opened(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "loop").symlink_to("loop")
    for name in ("fifo", "loop", ".", "a\0b", "x" * 300):
        with pytest.raises(UserError):
            load_config([tmp_path / name])


def test_bases_may_be_many_but_no_circle_and_a_mark_in_front_is_no_mistake(tmp_path):
    for i in range(300):
        (tmp_path / f"{i}.yaml").write_text(f"base: {i + 1}.yaml\n")
    (tmp_path / "300.yaml").write_bytes(b"\xef\xbb\xbfrun: {steps: 12}\n")
    assert load_config([tmp_path / "0.yaml"]).run.steps == 12
    (tmp_path / "300.yaml").write_text("base: 7.yaml\n")
    with pytest.raises(UserError, match="its own base"):
        load_config([tmp_path / "0.yaml"])
