"""Settings: all numbers have a range, each kind of invalid setting is named with its remedy.

python -m pytest tests/utils/config
"""

import math

import pytest

from models.checks.errors import UserError
from utils.config import Config, load_config, per_rank_batch
from utils.config.schema import OptimConfig, all_settings
from utils.config.validate import config_errors


def section_and_field(config, name):
    *sections, last = name.split(".")
    for section in sections:
        config = getattr(config, section)
    return config, last


def test_every_number_has_a_range_that_its_default_meets():
    """True and false aside, what is a number in the schema is checked."""
    for name, declared, value in all_settings(Config()):
        numeric = declared.type in (int, float, int | None, float | None, list[int])
        assert numeric == ("range" in declared.metadata), name
        if numeric and value not in (None, []):
            assert value in declared.metadata["range"], name


def test_every_number_out_of_range_is_named_with_its_value_and_the_range():
    for name, declared, _ in all_settings(Config()):
        allowed = declared.metadata.get("range")
        if allowed is None:
            continue
        outside = [-1, 2] if allowed.below == 1 or allowed.at_most == 1 else [-1]
        outside += [0] if 0 not in allowed else []
        outside += [math.nan, math.inf] if declared.type is float else []
        outside += [10**12] if allowed.at_most < 2**62 else []
        for value in outside:
            config = Config()
            section, last = section_and_field(config, name)
            setattr(section, last, [value] if declared.type == list[int] else value)
            (message,) = config_errors(config)
            assert f"{name}={value} must be" in message and str(allowed) in message, message
            assert ("finite, " in message) == (not math.isfinite(value))


def test_all_errors_are_reported_at_once_in_the_order_of_the_schema():
    with pytest.raises(UserError) as caught:
        load_config([], ["loss.reg.kl=-1", "run.seed=-1", "sit.depth=0"])
    found = [part.split("=")[0] for part in str(caught.value).split("; ")]
    assert found == ["run.seed", "sit.depth", "loss.reg.kl"]


INVALID = {  # overrides of the defaults: the key facts of the message, one for each check
    "sit.size=SiT-M/2": ("SiT-M/2", "SiT-S/1"),
    "preview.solver=sde preview.steps=1": ("preview.steps=1", "at least 2"),
    "run.trackers=[comet]": ("comet", "tensorboard, wandb"),
    "run.init_new=[classes]": ("run.init_new=[classes]", "run.init_from, which is null"),
    "run.init_new=[head]": ("projectors, classes, pos_embed, disc",),
    "run.init_from=configs": ("run.init_from=configs", "sit/config.json"),
    "run.allow_change=[lr]": ("lr", "vae.optim.lr"),
    "run.allow_change=[vae.weights]": ("vae.weights", "start"),
    "run.name=../..": ("run.name=../..", "run.out"),
    "run.name=/tmp/a": ("run.name=/tmp/a", "run.out"),
    "run.name=..": ("run.name='..'", "folder"),
    "run.out=README.md/exps": ("run.out=README.md/exps", "no folder"),
    "sit.num_heads=7": ("sit.hidden_size=1152", "multiple of 4 x sit.num_heads=7"),
    "data.latents=cache": ("data.latents=cache", "vae.train=false"),
    "data.depth_range=[9,3]": ("data.depth_range=[9,3]", "lower one first"),
    "data.depth_range=[9]": ("data.depth_range=[9]", "two values"),
    "vae.train=false vae.weights=null": ("vae.weights=null", "set vae.weights, or vae.train=true"),
    "vae.train=false loss.diffusion.vae=0.1": ("loss.diffusion.vae=0.1", "trained"),
    "disc.norm=group disc.channels=12": ("disc.channels=12", "multiple of 8"),
    "disc.pretrain_steps=2 loss.reg.gan=0": ("disc.pretrain_steps=2", "loss.reg.gan above 0"),
    "disc.pretrain_steps=4 run.steps=4": ("disc.pretrain_steps=4", "run.steps=4"),
    "encoder.cached=true": ("encoder.cached=true", "data.latents"),
    "encoder.weights=[a,b]": ("2 entries for 1", "encoder.names"),
    "encoder.names=[]": ("loss.align.sit=0.5", "encoder.names"),
    "loss.align.sit=0": ("loss.align.vae=1.5", "set loss.align.vae=0"),
    "loss.align.depth=29": ("loss.align.depth=29", "at most 28"),
    "sit.class_dropout_prob=0 eval.every=1 eval.cfg_scale=2": ("eval.cfg_scale=2", "null label"),
}


@pytest.mark.parametrize("overrides", INVALID)
def test_an_invalid_setting_is_named_with_its_value_and_what_to_change(overrides):
    with pytest.raises(UserError) as caught:
        load_config([], overrides.split())
    assert all(fact in str(caught.value) for fact in INVALID[overrides]), str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_origin_that_is_no_checkpoint_is_told_what_to_name(tmp_path):
    newest = tmp_path / "exps/a/checkpoints/0000004"
    newest.mkdir(parents=True)
    (tmp_path / "pipeline/sit_ema").mkdir(parents=True)
    for part in ("0000008/sit", "0000008/vae", "accelerate"):
        (tmp_path / part).mkdir(parents=True)
    (tmp_path / "0000008/sit/config.json").touch()
    (tmp_path / "accelerate/model.safetensors").touch()
    (tmp_path / "published.pt").write_bytes(b"PK\3\4 0400000/data.pkl")
    (tmp_path / "page.pt").write_text("<!DOCTYPE html>")
    for origin, words in {
        newest.parents[1]: "holds no whole checkpoint yet",
        tmp_path / "published.pt": "it is a PyTorch file; run scripts/import_official.py",
        tmp_path / "accelerate": "it has no sit/config.json; run scripts/import_official.py",
        tmp_path / "page.pt": "it is an HTML page; name a run",
        tmp_path / "0000008/vae": f"name the checkpoint around it, {tmp_path}/0000008",
        tmp_path / "0000008/sit/config.json": "name the checkpoint around it",
        tmp_path / "pipeline": "an exported pipeline has no raw weights to train on",
        tmp_path / "absent": "no such folder; name a run",
    }.items():
        with pytest.raises(UserError, match=words):
            load_config([], [f"run.init_from={origin}"])


def test_what_is_not_used_is_not_checked():
    """A guidance scale without previews, and an alignment depth without alignment."""
    load_config([], ["sit.class_dropout_prob=0", "preview.every=0", "preview.cfg_scale=2"])
    load_config([], ["loss.align.sit=0", "loss.align.vae=0", "loss.align.depth=99"])


def test_the_batch_must_split_over_ranks_and_micro_batches():
    config = load_config([], ["run.batch_size=8", "run.accumulation=2"])
    assert per_rank_batch(config, ranks=2) == 4
    with pytest.raises(UserError, match="make it a multiple of 6"):
        per_rank_batch(config, ranks=3)


def test_defaults_are_the_published_recipe():
    c = Config()
    assert (c.run.steps, c.run.batch_size, c.ema.decay) == (400_000, 256, 0.9999)
    assert (c.loss.align.sit, c.loss.align.vae, c.loss.align.depth) == (0.5, 1.5, 8)
    assert (c.loss.diffusion.vae, c.loss.diffusion.path) == (0.0, "linear")
    reg = c.loss.reg
    assert (reg.pixel, reg.pixel_kind, reg.lpips, reg.kl, reg.gan) == (1.0, "l1", 1.0, 1e-6, 0.1)
    for optim in (c.vae.optim, c.sit.optim, c.disc.optim):
        assert optim == OptimConfig(1e-4, 0.9, 0.999, 1e-8, 0.0, 1.0, 0)
    assert not c.data.hflip and c.run.precision == "bf16"
