"""Every layout of published weights gives the same features as the network that it was made of.

python -m pytest tests/models/backbones/test_layouts.py

Networks are cut to two narrow blocks with random weights. The layouts of
transformers are written in tests/published_encoders.py, as CI has no transformers.
"""

import json

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from models.backbones.files import weights_in
from models.backbones.loading import load_network
from models.backbones.table import ENCODERS
from models.checks.errors import UserError
from models.encoders import Encoder, load_encoder
from tests.published_encoders import (
    LAYOUTS,
    build,
    noisy,
    small,
    transformers_state,
    write_transformers,
)

GRID = 3


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def make(monkeypatch, name: str):
    """A small network of this encoder, whose input gives GRID x GRID tokens."""
    spec = small(monkeypatch, name, **({"mlp_ratio": 4} if name.endswith(("-g", "-h")) else {}))
    return build(spec, GRID * (14 if "patch14" in spec.timm_name else 16))


def load(net, name: str, weights) -> Encoder:
    """What `load_encoder` does with the weights, for the network that `net` is, too."""
    spec, side = ENCODERS[name], net.patch_embed.img_size[0]
    return Encoder(name, load_network(spec, weights_in(weights), net, name, side), spec, GRID)


def require_equal_features(net, encoder: Encoder) -> None:
    """Those of an encoder, and of `net`, whose weights it has loaded."""
    x = torch.rand(2, 3, encoder.side, encoder.side) * 2 - 1
    fed = ((x + 1) / 2 - encoder.mean) / encoder.std
    with torch.no_grad():
        tokens = net.forward_intermediates(
            fed, indices=1, norm=encoder.norm, output_fmt="NLC", intermediates_only=True
        )[0]
    assert tokens.std() > 0.1
    torch.testing.assert_close(encoder(x), tokens, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_folder_of_transformers(name, tmp_path, monkeypatch):
    net = make(monkeypatch, name)
    write_transformers(tmp_path, net, name)
    require_equal_features(net, load(net, name, tmp_path))


@pytest.mark.parametrize("kind", ["file", "bin", "shards", "half"])
def test_other_files_of_transformers(kind, tmp_path, monkeypatch):
    net, path = make(monkeypatch, "dinov2-s"), tmp_path
    state = transformers_state(net, "dinov2-s")
    if kind == "file":
        save_file(state, path := tmp_path / "any.name")
    elif kind == "bin":  # of Dinov2ForImageClassification
        state = {f"dinov2.{name}": value for name, value in state.items()}
        torch.save(state | {"classifier.weight": torch.ones(5, 96)}, path / "pytorch_model.bin")
    elif kind == "half":
        net.half().float()
        save_file({n: v.half() for n, v in state.items()}, path / "model.safetensors")
    else:
        shards = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
        places = {name: shards[i % 2] for i, name in enumerate(sorted(state))}
        for shard in shards:
            save_file({n: v for n, v in state.items() if places[n] == shard}, path / shard)
        index = {"metadata": {}, "weight_map": places}
        (path / "model.safetensors.index.json").write_text(json.dumps(index))
    require_equal_features(net, load_encoder("dinov2-s", path, 42, GRID))


def authors_state(net) -> dict:
    return {name: value.clone() for name, value in net.state_dict().items()}


def test_the_teacher_of_a_dino_training_and_its_backbone(tmp_path, monkeypatch):
    net = make(monkeypatch, "dinov1-s")
    teacher = {f"backbone.{k}": v for k, v in authors_state(net).items()}
    student = {f"module.{k}": torch.randn_like(v) for k, v in teacher.items()}
    head = {"head.mlp.0.weight": torch.ones(3, 3)}
    torch.save({"student": student | head, "teacher": teacher | head, "epoch": 5}, tmp_path / "a")
    require_equal_features(net, load(net, "dinov1-s", tmp_path / "a"))


@pytest.mark.parametrize("name", ["dinov2-reg-s", "dinov2-g"])
def test_a_training_of_dinov2_keeps_its_blocks_in_chunks(name, tmp_path, monkeypatch):
    net = make(monkeypatch, name)
    state = authors_state(net)
    if "reg_token" in state:
        at_cls = torch.randn(1, 1, 48)
        state["register_tokens"] = state.pop("reg_token")
        state["cls_token"] = state["cls_token"] - at_cls
        state["pos_embed"] = torch.cat([at_cls, state["pos_embed"]], dim=1)
    if name.endswith("g"):
        swaps = {".fc1.": ".w12.", ".fc2.": ".w3."}
        for old, new in swaps.items():
            state = {key.replace(old, new): value for key, value in state.items()}
    chunks = {
        key.replace("blocks.0.", "blocks.0.0.").replace("blocks.1.", "blocks.1.1."): value
        for key, value in state.items()
    }
    file = {f"backbone.{key}": value for key, value in chunks.items()}
    file |= {"backbone.mask_token": torch.ones(1, 48), "dino_head.mlp.0.weight": torch.ones(3, 3)}
    torch.save({"teacher": file}, tmp_path / "teacher_checkpoint.pth")
    require_equal_features(net, load(net, name, tmp_path / "teacher_checkpoint.pth"))


def test_mae_with_its_decoder(tmp_path, monkeypatch):
    net = make(monkeypatch, "mae-b")
    decoder = {
        "mask_token": torch.ones(1, 1, 8),
        "decoder_pos_embed": torch.ones(1, 10, 8),
        "decoder_embed.weight": torch.ones(8, 48),
        "decoder_blocks.0.norm1.weight": torch.ones(8),
        "decoder_norm.bias": torch.ones(8),
        "decoder_pred.bias": torch.ones(768),
    }
    torch.save({"model": authors_state(net) | decoder}, tmp_path / "full.pth")
    require_equal_features(net, load(net, "mae-b", tmp_path / "full.pth"))


class Named(nn.Module):
    """A module whose parameters have the names of a state dict."""

    def __init__(self, state: dict):
        super().__init__()
        inner: dict[str, dict] = {}
        for name, value in state.items():
            first, _, rest = name.partition(".")
            if rest:
                inner.setdefault(first, {})[rest] = value
            else:
                self.register_parameter(first, nn.Parameter(value, requires_grad=False))
        for first, values in inner.items():
            self.add_module(first, Named(values))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


CLIP_NAMES = {
    "patch_embed.proj": "conv1",
    "pos_embed": "positional_embedding",
    "cls_token": "class_embedding",
    "blocks.": "transformer.resblocks.",
    "norm_pre": "ln_pre",
    "norm1": "ln_1",
    "norm2": "ln_2",
    "attn.qkv.": "attn.in_proj_",
    "attn.proj": "attn.out_proj",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}


@pytest.mark.parametrize("archive", [True, False], ids=["torchscript", "open_clip"])
def test_clip_as_openai_publishes_it(archive, tmp_path, monkeypatch):
    """A TorchScript archive in half precision, or open_clip's state dict with the same names."""
    net = make(monkeypatch, "clip-l")
    net.load_state_dict({name: value.half() for name, value in net.state_dict().items()})
    state = {}
    for key, value in net.state_dict().items():
        value = {"pos_embed": value[0], "cls_token": value.flatten()}.get(key, value)
        key = "ln_post." + key[5:] if key.startswith("norm.") else key
        for ours, theirs in CLIP_NAMES.items():
            key = key.replace(ours, theirs)
        state[f"visual.{key}"] = value.half()
    state["visual.proj"] = torch.ones(48, 8)
    state["transformer.resblocks.0.ln_1.weight"] = torch.ones(8)
    state["positional_embedding"] = torch.ones(77, 8)
    if archive:
        torch.jit.script(Named(state)).save(str(tmp_path / "ViT-L-14.pt"))
    else:
        torch.save(state, tmp_path / "ViT-L-14.pt")
    require_equal_features(net, load(net, "clip-l", tmp_path / "ViT-L-14.pt"))


def test_a_bias_that_the_network_leaves_out_is_refused_unless_it_is_zero(tmp_path, monkeypatch):
    net = make(monkeypatch, "dinov3-s")
    state = write_transformers(tmp_path, net, "dinov3-s")
    bias = {f"layer.{i}.attention.{p}_proj.bias": torch.zeros(48) for i in (0, 1) for p in "qv"}
    save_file(state | bias, tmp_path / "model.safetensors")
    require_equal_features(net, load(net, "dinov3-s", tmp_path))
    bias["layer.1.attention.v_proj.bias"][7] = 0.5
    save_file(state | bias, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"blocks\.1\.attn\.qkv\.bias is not zero.*_qkvb variant"):
        load(net, "dinov3-s", tmp_path)


def test_two_encoders_in_a_file_of_which_none_is_preferred_are_refused(tmp_path, monkeypatch):
    net = make(monkeypatch, "dinov1-s")
    state = authors_state(net)
    other = {name: noisy_like(value) for name, value in state.items()}
    torch.save({"a": state, "b": other}, tmp_path / "two.pth")
    with pytest.raises(UserError, match=r"two\.pth holds several"):
        load(net, "dinov1-s", tmp_path / "two.pth")


def noisy_like(value: torch.Tensor) -> torch.Tensor:
    return noisy(nn.ParameterList([value.clone()]))[0].data
