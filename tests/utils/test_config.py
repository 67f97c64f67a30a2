"""Configuration: every file loads, every field is read, every mistake is one line.

python -m pytest tests/utils/test_config.py
"""

import re
from dataclasses import fields, is_dataclass
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from models.errors import UserError
from tests.tiny import tiny_config
from utils.build import describe
from utils.config import Config, load_config, per_rank_batch, to_yaml
from utils.data import open_source

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))


def leaves(cls, prefix=()):
    """Dotted paths of all fields."""
    for f in fields(cls):
        nested = f.default_factory() if callable(f.default_factory) else None
        if is_dataclass(nested):
            yield from leaves(type(nested), (*prefix, f.name))
        else:
            yield (*prefix, f.name)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: str(p.relative_to(ROOT / "configs")))
def test_every_config_loads_and_its_networks_fit_together(path):
    config = load_config([path])
    figures = describe(config, None, ranks=8)
    assert "parameters" in figures


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: str(p.relative_to(ROOT / "configs")))
def test_every_config_opens_with_its_record(path):
    header = [line for line in path.read_text().splitlines() if line.startswith("#")]
    assert len(header) >= 3
    if path.name != "base.yaml":
        text = "\n".join(header)
        assert "expected" in text and "hardware" in text and path.stem in text


@pytest.mark.parametrize("path", leaves(Config), ids=".".join)
def test_every_field_is_read_somewhere(path):
    """As an attribute of its name, outside the file that declares it (or in its derived values)."""
    sources = [p for d in ("utils", "loss", "models") for p in (ROOT / d).glob("*.py")]
    text = "\n".join(p.read_text() for p in [*sources, *ROOT.glob("*.py")])
    declared = re.compile(rf"^    {path[-1]}: ", re.M)
    uses = re.findall(rf"\.{path[-1]}\b", declared.sub("", text))
    shape = ("depth", "hidden_size", "num_heads", "patch_size")  # read by name in sit_shape
    assert uses or (path[0] == "sit" and path[1] in shape), ".".join(path)


def test_defaults_are_the_published_recipe():
    c = Config()
    assert (c.run.steps, c.run.batch_size, c.ema.decay) == (400_000, 256, 0.9999)
    assert (c.loss.align.sit, c.loss.align.vae, c.loss.align.depth) == (0.5, 1.5, 8)
    reg = c.loss.reg
    assert (reg.pixel, reg.pixel_kind, reg.lpips, reg.kl, reg.gan) == (1.0, "l1", 1.0, 1e-6, 0.1)
    for optim in (c.vae.optim, c.sit.optim, c.disc.optim):
        assert (optim.lr, optim.beta1, optim.beta2, optim.eps) == (1e-4, 0.9, 0.999, 1e-8)
        assert (optim.weight_decay, optim.clip, optim.warmup_steps) == (0.0, 1.0, 0)
    assert not c.data.hflip and c.run.precision == "bf16"


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
    config = tiny_config("run.seed=5", "vae.weights=null")
    (tmp_path / "c.yaml").write_text(to_yaml(config))
    assert load_config([tmp_path / "c.yaml"]) == config
    assert OmegaConf.load(tmp_path / "c.yaml").vae.weights is None


MISTAKES = {
    "run.step=3": "Did you mean: 'steps'",
    "run.steps=many": "run.steps",
    "run.precision=fp8": "fp8",
    "run.steps=0": "run.steps=0 must be at least 1",
    "sit.size=SiT-M/2": "sit.size=SiT-M/2: choose one of SiT-S/1",
    "loss.align.depth=4": "loss.align.depth=4 must lie in 1..3",
    "loss.align.sit=0": "set loss.align.vae=0 too",
    "encoder.names=[]": "needs an encoder",
    "encoder.weights=[a,b]": "2 entries for 1",
    "sit.num_heads=3": "must be a multiple of 4 x sit.num_heads=3",
    "ema.decay=1": "ema.decay=1",
    "vae.train=false": "random weights",
    "--proj-coeff=0.5": "is no override: write key=value",
    "run.steps": "is no override",
    "run.trackers=[comet]": "choose from tensorboard, wandb",
    "foo=1": "foo",
    "rnu.steps=1": "Did you mean: 'run'",
    "encoder.names=[a": "as YAML",
    "sit.num_heads=0": "must all be at least 1",
    "preview.steps=0": "preview.steps=0 must be at least 1",
    "eval.metrics=[foo]": "eval.metrics: foo unknown",
    "data.workers=-1": "data.workers=-1",
    "sit.class_dropout_prob=2": "sit.class_dropout_prob=2",
    "latent_norm.stats_images=0": "latent_norm.stats_images=0",
}


@pytest.mark.parametrize("override", MISTAKES)
def test_a_mistake_names_the_value_and_the_remedy_in_one_line(override):
    with pytest.raises(UserError) as caught:
        tiny_config(override)
    assert MISTAKES[override] in str(caught.value)
    assert "\n" not in str(caught.value)


SHAPES = {
    "encoder.grid=8": "the SiT has 4x4 tokens, the encoder 8x8",
    "sit.patch_size=3": "patch size 3 does not divide the 8x8 latents",
    "data.resolution=17": "not a multiple of the VAE's downsample factor",
    "disc.layers=3": "leaves no patch of a 16 px image",
    "encoder.names=[dinov9-b]": "unknown encoder dinov9-b: nearest is",
    "vae.name=sdvea": "did you mean sdvae",
}


@pytest.mark.parametrize("override", SHAPES)
def test_shapes_that_do_not_meet_are_refused_before_anything_is_loaded(override):
    source = open_source("digits", None, 16)
    with pytest.raises(UserError) as caught:
        describe(tiny_config(override), source, 1)
    assert SHAPES[override] in str(caught.value)


def test_the_batch_must_split_over_ranks_and_micro_batches():
    assert per_rank_batch(tiny_config("run.accumulation=2"), ranks=2) == 4
    with pytest.raises(UserError, match="make it a multiple of 6"):
        per_rank_batch(tiny_config("run.accumulation=3"), ranks=2)


def test_a_missing_or_broken_file_is_one_line(tmp_path):
    with pytest.raises(UserError, match="no config at"):
        load_config([tmp_path / "absent.yaml"])
    (tmp_path / "broken.yaml").write_text("run: [1\n")
    with pytest.raises(UserError, match="is not YAML"):
        load_config([tmp_path / "broken.yaml"])


def test_the_plan_counts_what_a_run_will_be():
    figures = describe(tiny_config("run.accumulation=2"), open_source("digits", None, 16), ranks=2)
    assert figures["global batch"] == "8 = 2 per rank x 2 rank(s) x 2 micro-batch(es)"
    assert figures["steps per epoch"] == "224"
    assert (figures["tokens"], figures["latents"]) == ("4x4 = 16", "4x8x8")
    assert figures["images/s"] == "unknown until measured"
