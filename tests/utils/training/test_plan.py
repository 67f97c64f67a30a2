"""The plan of a run: shapes that do not fit are refused before anything is loaded.

python -m pytest tests/utils/training/test_plan.py
"""

from pathlib import Path

import pytest

from models.errors import UserError
from tests.tiny import tiny_config
from utils.config import load_config
from utils.data.registry import open_source
from utils.training.plan import describe_run, print_plan

ROOT = Path(__file__).resolve().parents[3]


def test_the_networks_of_every_config_fit_together():
    """Described once for each combination of VAE, SiT, encoders and resolution in configs/."""
    distinct = {}
    for path in (ROOT / "configs").rglob("*.yaml"):
        c = load_config([path])
        encoders = tuple(c.encoder.names) if c.uses_encoder else ()
        shapes = (c.vae.name, *c.sit_shape().values(), encoders, c.data.resolution)
        distinct.setdefault(shapes, c)
    assert len(distinct) > 10
    for config in distinct.values():
        assert "parameters" in describe_run(config, None, ranks=8), config.run.name


SHAPES = {
    "encoder.grid=8": "the SiT has 4x4 tokens, the encoder 8x8",
    "sit.patch_size=3": "patch size 3 does not divide the 8x8 latents",
    "data.resolution=17": "not a multiple of the VAE's downsample factor",
    "disc.layers=3": "leaves no patch of a 16 px image",
    "encoder.names=[dinov9-b]": "unknown encoder dinov9-b: nearest is",
    "vae.name=sdvea": "did you mean sdvae",
}


@pytest.mark.parametrize("override", SHAPES)
def test_shapes_that_do_not_fit_are_refused_before_anything_is_loaded(override):
    source = open_source("digits", None, 16)
    with pytest.raises(UserError) as caught:
        describe_run(tiny_config(override), source, 1)
    assert SHAPES[override] in str(caught.value)


def test_the_plan_counts_what_a_run_will_be():
    source = open_source("digits", None, 16)
    figures = describe_run(tiny_config("run.accumulation=2"), source, ranks=2)
    assert figures["global batch"] == "8 = 2 per rank x 2 rank(s) x 2 micro-batch(es)"
    assert figures["steps per epoch"] == "224"
    assert (figures["tokens"], figures["latents"]) == ("4x4 = 16", "4x8x8")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.source=lmdb"], "data.source='lmdb': expected one of"),
        (["data.split=validation"], "split 'validation'"),
        (["eval.every=1", "eval.metrics=[kid]"], "'kid': expected some of fid"),
    ],
)
def test_a_dry_run_refuses_what_no_data_would_mend(overrides, message):
    with pytest.raises(UserError, match=message.replace("[", r"\[")):
        print_plan(tiny_config(*overrides))


def test_a_dry_run_without_the_data_says_so_at_its_end(tmp_path, capsys):
    print_plan(tiny_config("data.source=folder", f"data.path={tmp_path / 'absent'}"))
    assert "no such folder" in capsys.readouterr().out.splitlines()[-1]
