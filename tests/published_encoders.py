"""Encoders with random weights under the key names of their publishers.

The layouts are written from the published key names, without any code of `models.backbones`.
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import save_file

from models.backbones.table import ENCODERS, EncoderSpec

# Name in timm => name in transformers, of what is in no block and of what is in block {}.
_BERT = {  # ViT, ViTMAE, I-JEPA
    "patch_embed.proj": "embeddings.patch_embeddings.projection",
    "pos_embed": "embeddings.position_embeddings",
    "cls_token": "embeddings.cls_token",
    "norm": "layernorm",
    "blocks.{}.norm1": "encoder.layer.{}.layernorm_before",
    "blocks.{}.norm2": "encoder.layer.{}.layernorm_after",
    "blocks.{}.attn.q": "encoder.layer.{}.attention.attention.query",
    "blocks.{}.attn.k": "encoder.layer.{}.attention.attention.key",
    "blocks.{}.attn.v": "encoder.layer.{}.attention.attention.value",
    "blocks.{}.attn.proj": "encoder.layer.{}.attention.output.dense",
    "blocks.{}.mlp.fc1": "encoder.layer.{}.intermediate.dense",
    "blocks.{}.mlp.fc2": "encoder.layer.{}.output.dense",
}
_DINOV2 = _BERT | {
    "reg_token": "embeddings.register_tokens",
    "blocks.{}.norm1": "encoder.layer.{}.norm1",
    "blocks.{}.norm2": "encoder.layer.{}.norm2",
    "blocks.{}.ls1.gamma": "encoder.layer.{}.layer_scale1.lambda1",
    "blocks.{}.ls2.gamma": "encoder.layer.{}.layer_scale2.lambda1",
    "blocks.{}.mlp.fc1": "encoder.layer.{}.mlp.fc1",
    "blocks.{}.mlp.fc2": "encoder.layer.{}.mlp.fc2",
}
_DINOV2_GATED = _DINOV2 | {
    "blocks.{}.mlp.fc1": "encoder.layer.{}.mlp.weights_in",
    "blocks.{}.mlp.fc2": "encoder.layer.{}.mlp.weights_out",
}
_DINOV3 = {
    "patch_embed.proj": "embeddings.patch_embeddings",
    "cls_token": "embeddings.cls_token",
    "reg_token": "embeddings.register_tokens",
    "norm": "norm",
    "blocks.{}.norm1": "layer.{}.norm1",
    "blocks.{}.norm2": "layer.{}.norm2",
    "blocks.{}.gamma_1": "layer.{}.layer_scale1.lambda1",
    "blocks.{}.gamma_2": "layer.{}.layer_scale2.lambda1",
    "blocks.{}.attn.q": "layer.{}.attention.q_proj",
    "blocks.{}.attn.k": "layer.{}.attention.k_proj",
    "blocks.{}.attn.v": "layer.{}.attention.v_proj",
    "blocks.{}.attn.q_bias": "layer.{}.attention.q_proj.bias",
    "blocks.{}.attn.v_bias": "layer.{}.attention.v_proj.bias",
    "blocks.{}.attn.proj": "layer.{}.attention.o_proj",
    "blocks.{}.mlp.fc1": "layer.{}.mlp.up_proj",
    "blocks.{}.mlp.fc2": "layer.{}.mlp.down_proj",
    "blocks.{}.mlp.fc1_g": "layer.{}.mlp.gate_proj",
    "blocks.{}.mlp.fc1_x": "layer.{}.mlp.up_proj",
}
_CLIP = {  # CLIP and SigLIP
    "patch_embed.proj": "vision_model.embeddings.patch_embedding",
    "pos_embed": "vision_model.embeddings.position_embedding.weight",
    "cls_token": "vision_model.embeddings.class_embedding",
    "norm_pre": "vision_model.pre_layrnorm",
    "norm": "vision_model.post_layernorm",
    "blocks.{}.norm1": "vision_model.encoder.layers.{}.layer_norm1",
    "blocks.{}.norm2": "vision_model.encoder.layers.{}.layer_norm2",
    "blocks.{}.attn.q": "vision_model.encoder.layers.{}.self_attn.q_proj",
    "blocks.{}.attn.k": "vision_model.encoder.layers.{}.self_attn.k_proj",
    "blocks.{}.attn.v": "vision_model.encoder.layers.{}.self_attn.v_proj",
    "blocks.{}.attn.proj": "vision_model.encoder.layers.{}.self_attn.out_proj",
    "blocks.{}.mlp.fc1": "vision_model.encoder.layers.{}.mlp.fc1",
    "blocks.{}.mlp.fc2": "vision_model.encoder.layers.{}.mlp.fc2",
    "attn_pool.latent": "vision_model.head.probe",
    "attn_pool.in_proj_weight": "vision_model.head.attention.in_proj_weight",
    "attn_pool.in_proj_bias": "vision_model.head.attention.in_proj_bias",
    "attn_pool.proj": "vision_model.head.attention.out_proj",
    "attn_pool.norm": "vision_model.head.layernorm",
    "attn_pool.mlp.fc1": "vision_model.head.mlp.fc1",
    "attn_pool.mlp.fc2": "vision_model.head.mlp.fc2",
}
# Encoder => its names in transformers, its `model_type`, and what else such a file holds.
LAYOUTS: dict[str, tuple[dict, str, dict]] = {
    "dinov1-s": (_BERT, "vit", {"pooler.dense.weight": torch.ones(3, 3)}),
    "mae-b": (_BERT, "vit_mae", {"decoder.mask_token": torch.ones(1, 1, 8)}),
    "ijepa-h": (_BERT, "ijepa", {}),
    "dinov2-s": (_DINOV2, "dinov2", {"embeddings.mask_token": torch.ones(1, 48)}),
    "dinov2-g": (_DINOV2_GATED, "dinov2", {}),
    "dinov2-reg-s": (_DINOV2, "dinov2_with_registers", {}),
    "dinov3-s": (_DINOV3, "dinov3_vit", {"embeddings.mask_token": torch.ones(1, 1, 48)}),
    "dinov3-h": (_DINOV3, "dinov3_vit", {}),
    "clip-l": (
        *(_CLIP, "clip"),
        {"text_model.encoder.layers.0.layer_norm1.weight": torch.ones(3),
         "visual_projection.weight": torch.ones(3, 3), "logit_scale": torch.ones(())},
    ),
    "siglip2-b": (_CLIP, "siglip", {"logit_bias": torch.ones(1)}),
}  # fmt: skip
SMALL = {"depth": 2, "embed_dim": 48, "num_heads": 3}


def noisy(net: Any) -> Any:
    """Random weights in which norms, biases, layer scales and tokens matter too."""
    with torch.no_grad():
        for parameter in net.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    return net.eval()


def small(monkeypatch, name: str, **kwargs) -> EncoderSpec:
    """Cut a row of the table to a network of two narrow blocks, which leaves the code path."""
    row = ENCODERS[name]
    monkeypatch.setitem(ENCODERS, name, replace(row, kwargs=row.kwargs | SMALL | kwargs))
    return ENCODERS[name]


def build(spec: EncoderSpec, side: int) -> Any:
    """The network of a row for images of `side` pixels, as its authors have it."""
    return noisy(timm.create_model(spec.timm_name, num_classes=0, img_size=side, **spec.kwargs))


def transformers_state(net: Any, name: str) -> dict[str, torch.Tensor]:
    """The weights of a timm network in the layout in which transformers saves this encoder."""
    names, _, others = LAYOUTS[name]
    state = {}
    for key, value in _parted(net).items():
        words = key.split(".")
        number = words[1] if words[0] == "blocks" else ""
        module = ".".join(["blocks", "{}", *words[2:]]) if number else key
        whole, (short, _, part) = module in names, module.rpartition(".")
        target = names[module] if whole else f"{names[short]}.{part}"
        state[target.format(number)] = value.clone()
    prefix = {"mae-b": "vit."}.get(name, "")
    return {f"{prefix}{key}": value for key, value in state.items()} | others


def _parted(net: Any) -> dict[str, torch.Tensor]:
    """timm's state dict with query, key and value apart, in the shapes of transformers."""
    found = {}
    for key, value in net.state_dict().items():
        if ".attn.qkv." in key:
            for part, tensor in zip("qkv", value.chunk(3)):
                found[key.replace(".qkv.", f".{part}.")] = tensor
        elif key.startswith("attn_pool.q."):
            both = torch.cat([value, net.state_dict()[key.replace(".q.", ".kv.")]])
            found["attn_pool.in_proj_" + key.rpartition(".")[2]] = both
        elif not key.startswith("attn_pool.kv."):
            found[key] = value
    if (
        found.get("reg_token") is not None and "pos_embed" in found
    ):  # the class token has a position, too
        at_cls = torch.randn(1, 1, found["pos_embed"].shape[2])
        found["cls_token"] = found["cls_token"] - at_cls
        found["pos_embed"] = torch.cat([at_cls, found["pos_embed"]], dim=1)
    if hasattr(net, "norm_pre") and hasattr(net.norm_pre, "weight"):  # CLIP
        found["cls_token"] = found["cls_token"].flatten()
    return found


def transformers_config(net: Any, name: str) -> dict:
    """The config.json that transformers writes beside these weights, as far as it matters."""
    _, kind, _ = LAYOUTS[name]
    traits = {
        "hidden_size": net.embed_dim,
        "num_hidden_layers": len(net.blocks),
        "num_attention_heads": net.blocks[0].attn.num_heads,
        "patch_size": net.patch_embed.patch_size[0],
        "hidden_act": {"clip-l": "quick_gelu", "siglip2-b": "gelu_pytorch_tanh",
                       "dinov3-h": "silu"}.get(name, "gelu"),
    }  # fmt: skip
    if "reg" in name or "dinov3" in name:
        traits["num_register_tokens"] = 4
    if name == "dinov2-g":
        traits["use_swiglu_ffn"] = True
    if kind in ("clip", "siglip"):
        traits = {"vision_config": traits, "text_config": {"hidden_size": 8}}
    return {"model_type": kind, **traits}


def write_transformers(folder: Path, net: Any, name: str, **config) -> dict[str, torch.Tensor]:
    """The folder that transformers saves; `config` changes the traits in its config.json."""
    folder.mkdir(exist_ok=True)
    state, found = transformers_state(net, name), transformers_config(net, name)
    found.get("vision_config", found).update(config)
    (folder / "config.json").write_text(json.dumps(found))
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    return state
