"""A file of another network is refused by name, by its tensors or by the config beside it.

python -m pytest tests/models/backbones/test_matching.py
"""

import json

import pytest
import torch
from safetensors.torch import save_file

from models.backbones.files import weights_in
from models.backbones.loading import load_network, network_on_meta
from models.backbones.matching import check_config, of_network
from models.backbones.table import ENCODERS
from models.checks.errors import UserError
from tests.published_encoders import build, small, write_transformers


def refused(action, *words: str) -> str:
    """The message, of one line, which holds these words."""
    with pytest.raises(UserError) as caught:
        action()
    text = str(caught.value)
    assert "\n" not in text and len(text) < 700
    assert all(word in text for word in words), text
    return text


def folder_of(name: str, tmp_path, monkeypatch, **config):
    spec = small(monkeypatch, name)
    side = 48 if "patch16" in spec.timm_name else 42
    write_transformers(tmp_path, build(spec, side), name, **config)
    return tmp_path


def load(name: str, folder):
    """What `load_encoder` does with the weights."""
    spec = ENCODERS[name]
    return load_network(spec, weights_in(folder), network_on_meta(spec), name)


@pytest.mark.parametrize(
    ("given", "asked", "words"),
    [
        ("dinov2-reg-s", "dinov2-s", ("'dinov2_with_registers', where dinov2-s is 'dinov2'",)),
        ("dinov2-s", "dinov2-reg-s", ("'dinov2', where dinov2-reg-s is 'dinov2_with_registers'",)),
        ("dinov1-s", "mae-b", ("'vit', where mae-b is 'vit_mae'",)),
    ],
)
def test_the_folder_of_another_family(given, asked, words, tmp_path, monkeypatch):
    folder = folder_of(given, tmp_path, monkeypatch)
    small(monkeypatch, asked)
    refused(lambda: load(asked, folder), "config.json says", *words)


@pytest.mark.parametrize(
    ("traits", "words"),
    [
        ({"num_attention_heads": 6}, "heads 6, where clip-l has heads 3"),
        ({"hidden_act": "gelu"}, "activation gelu, where clip-l has activation quick_gelu"),
        ({"patch_size": 16, "hidden_size": 64}, "width 64, patch 16, where clip-l has width 48"),
        ({"num_hidden_layers": "many"}, "blocks many, where clip-l has blocks 2"),
        ({"patch_size": [[14], {}]}, "patch [[14], {}], where clip-l has patch 14"),
    ],
)
def test_a_config_that_shows_what_the_shapes_do_not(traits, words, tmp_path, monkeypatch):
    """LAION's CLIP has the shapes of OpenAI's, and another activation."""
    folder = folder_of("clip-l", tmp_path, monkeypatch, **traits)
    refused(lambda: load("clip-l", folder / "model.safetensors"), words)


@pytest.mark.parametrize(("given", "asked", "words"), [
    ("dinov2-reg-s", "dinov2-s", "registers 4, where dinov2-s has registers 0"),
    ("dinov2-s", "dinov2-reg-s", "registers 0, where dinov2-reg-s has registers 4"),
    ("dinov2-s", "dinov1-s", "patch 14, where dinov1-s has patch 16"),
])  # fmt: skip
def test_tensors_without_a_config(given, asked, words, tmp_path, monkeypatch):
    folder = folder_of(given, tmp_path, monkeypatch)
    (folder / "config.json").unlink()
    small(monkeypatch, asked)
    refused(lambda: load(asked, folder), f"another network than {asked}", words)


def test_depth_and_width_of_a_file_are_named(tmp_path, monkeypatch):
    folder = folder_of("dinov2-s", tmp_path, monkeypatch)
    (folder / "config.json").unlink()
    small(monkeypatch, "dinov2-s", depth=3, embed_dim=96)
    words = "width 48, blocks 2, where dinov2-s has width 96, blocks 3"
    refused(lambda: load("dinov2-s", folder), words)


def check(tmp_path, name: str, file: str, config: dict) -> None:
    spec = ENCODERS[name]
    (tmp_path / file).write_text(json.dumps(config))
    check_config(tmp_path / "weights", network_on_meta(spec), spec, name)


def test_configs_of_timm_and_open_clip(tmp_path, monkeypatch):
    for name in ("clip-l", "dinov2-s"):
        small(monkeypatch, name)
    openai = {"tag": "openai"}
    clip = "vit_large_patch14_clip_quickgelu_224"
    check(tmp_path, "clip-l", "config.json", {"architecture": clip})
    same = {"architecture": clip.replace("quickgelu_", ""), "pretrained_cfg": openai}
    check(tmp_path, "clip-l", "config.json", same)
    other = same | {"pretrained_cfg": {"tag": "laion2b"}}
    refused(lambda: check(tmp_path, "clip-l", "config.json", other), "where clip-l is timm:vit_l")
    registers = {"architecture": "vit_small_patch14_reg4_dinov2"}
    refused(
        lambda: check(tmp_path, "dinov2-s", "config.json", registers), "timm:vit_small_patch14_r"
    )
    (tmp_path / "config.json").unlink()
    quick = {"model_cfg": {"quick_gelu": True}}
    check(tmp_path, "clip-l", "open_clip_config.json", quick)
    plain = {"model_cfg": {"vision_cfg": {"width": 48}}}
    refused(lambda: check(tmp_path, "clip-l", "open_clip_config.json", plain), "activation gelu")


def test_other_files_beside_the_weights_say_nothing(tmp_path, monkeypatch):
    small(monkeypatch, "dinov2-s")
    for config in ({}, {"_class_name": "AutoencoderKL"}, {"model_type": "dinov2"}):
        check(tmp_path, "dinov2-s", "config.json", config)
    net = network_on_meta(ENCODERS["dinov2-s"])
    assert of_network(net) == {
        **{"width": 48, "blocks": 2, "patch": 14, "registers": 0, "heads": 3},
        "activation": "gelu",
    }
    assert of_network(torch.nn.Linear(2, 2)) == {}


def test_folders_without_one_weight_file(tmp_path, monkeypatch):
    small(monkeypatch, "dinov2-s")

    def load_it():
        load("dinov2-s", tmp_path)

    refused(load_it, "is a folder without model.safetensors", "it holds nothing")
    (tmp_path / "README.md").write_text("")
    refused(load_it, "it holds README.md; name the file")
    for name in ("a.pth", "b.pth"):
        save_file({"x": torch.ones(1)}, tmp_path / name)
    refused(load_it, "it holds a.pth, b.pth; name the file")
    (tmp_path / "b.pth").unlink()
    snapshot = tmp_path / "models--facebook--dinov2-small" / "snapshots" / "ed25f3a3"
    snapshot.mkdir(parents=True)
    (snapshot / "pytorch_model.bin").write_bytes(b"")
    assert weights_in(snapshot.parents[1]) == snapshot / "pytorch_model.bin"
    refused(load_it, "a.pth do not fit dinov2-s")
