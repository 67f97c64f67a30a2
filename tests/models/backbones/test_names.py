"""Published names of encoders are understood wherever one is named.

python -m pytest tests/models/backbones/test_names.py
"""

import pytest
import timm

from models.backbones.names import PUBLISHED, canonical, unknown_encoder
from models.backbones.table import ENCODERS
from models.encoders import encoder_weight_file
from models.lpips import perceptual_weight_file
from models.weights.published import WeightFile
from scripts.cache_latents import parse_args
from tests.tiny import tiny_config

EXAMPLES = {
    "facebook/dinov2-base": "dinov2-b",
    "dinov2_vitb14": "dinov2-b",
    "dinov2-vit-b": "dinov2-b",
    "facebook/dinov2-with-registers-giant": "dinov2-reg-g",
    "dinov2_vitb14_reg": "dinov2-reg-b",
    "dinov2reg-vit-b": "dinov2-reg-b",
    "vit_base_patch14_dinov2.lvd142m": "dinov2-b",
    "timm/vit_base_patch14_dinov2.lvd142m": "dinov2-b",
    "facebook/dinov3-vitb16-pretrain-lvd1689m": "dinov3-b",
    "facebook/dinov3-vith16plus-pretrain-lvd1689m": "dinov3-h",
    "facebook/dino-vitb16": "dinov1-b",
    "dino_vits16": "dinov1-s",
    "openai/clip-vit-large-patch14": "clip-l",
    "ViT-L/14": "clip-l",
    "clip-vit-L": "clip-l",
    "mae-vit-l": "mae-l",
    "jepa-vit-h": "ijepa-h",
    "facebook/ijepa_vith14_1k": "ijepa-h",
    "mocov3-vit-b": "mocov3-b",
    "google/siglip2-so400m-patch16-256": "siglip2-so400m",
    "FACEBOOK/DINOv2-Base": "dinov2-b",
    "dinov3-vitb16-pretrain-lvd1689m": "dinov3-b",
    "https://huggingface.co/facebook/dinov2-base/tree/main": "dinov2-b",
    "hf-hub:timm/vit_base_patch14_dinov2.lvd142m": "dinov2-b",
}


@pytest.mark.parametrize("name", EXAMPLES)
def test_published_names(name):
    assert canonical(name) == EXAMPLES[name]


def test_short_names_and_what_is_no_name_stay_as_they_are():
    for name in (
        *ENCODERS,
        "timm:vit_base_patch14_dinov2.lvd142m",
        "dinov4-b",
        "vit_base_patch16_224",
    ):
        assert canonical(name) == name


def test_every_encoder_has_names_and_no_name_is_that_of_two():
    names = [name.casefold() for others in PUBLISHED.values() for name in others]
    assert PUBLISHED.keys() == ENCODERS.keys() and len(names) == len(set(names))
    pretrained = timm.list_pretrained()
    assert all(spec.url or spec.timm_name in pretrained for spec in ENCODERS.values())


def test_settings_take_them_and_hold_the_short_name():
    words = ("encoder.names=[facebook/dinov2-base,ViT-L/14]", "encoder.weights=[random,random]")
    assert tiny_config(*words).encoder.names == ["dinov2-b", "clip-l"]
    words = ["--vae", "sdvae", "--data", "digits", "--out", "c", "--encoders", "dinov2_vitb14"]
    assert parse_args(words).encoders == ["dinov2-b"]
    ours, theirs = (perceptual_weight_file(name) for name in ("dinov2-s", "facebook/dinov2-small"))
    assert ours.repo == theirs.repo == "timm/vit_small_patch14_dinov2.lvd142m"


def test_weights_that_transformers_has_in_the_cache_are_taken(monkeypatch):
    """timm's come first; with none in the cache they are what is downloaded."""
    cache = {("facebook/dinov2-base", "model.safetensors"), ("facebook/dinov2-base", "config.json")}

    def find(repo, name):
        return f"/cache/{repo}/{name}" if (repo, name) in cache else None

    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", find)
    assert encoder_weight_file("dinov2-b").repo == "facebook/dinov2-base"
    assert encoder_weight_file("dinov2-l").repo == "timm/vit_large_patch14_dinov2.lvd142m"
    cache.add(("timm/vit_base_patch14_dinov2.lvd142m", "model.safetensors"))
    assert encoder_weight_file("dinov2-b").repo == "timm/vit_base_patch14_dinov2.lvd142m"
    cache.add(("facebook/dinov2-large", "model.safetensors"))  # without its config
    assert encoder_weight_file("dinov2-l") == WeightFile(
        "model.safetensors", repo="timm/vit_large_patch14_dinov2.lvd142m",
        setting="encoder.weights={}",
    )  # fmt: skip


def test_the_hub_has_other_maes_and_a_path_is_no_name(tmp_path):
    text = str(unknown_encoder("facebook/vit-mae-base"))
    assert "without normalised pixels" in text and "name mae-b" in text
    text = str(unknown_encoder(str(tmp_path)))
    assert "is a path: name the network" in text and f"encoder.weights=[{tmp_path}]" in text
    assert "nearest is clip-l" in str(unknown_encoder("ViT-L-14"))
