"""Encoders' weights under the key names of their publishers, turned into names that timm reads.

timm reads its own names, and by itself those of DINOv2, DINOv3, OpenAI's CLIP and PE (`visual.*`).
What it does not read is turned here: transformers' names of ViT (DINO), ViTMAE, I-JEPA, DINOv2,
DINOv3, CLIP and SigLIP, the chunks of blocks in DINOv2's training, and MAE with its decoder.
"""

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from models.checks.errors import UserError

# Keys that tell an encoder in a file, see `models.weights.finding.find_state`: of the authors and
# timm; of transformers' ViTs, DINOv3, CLIP and SigLIP; of OpenAI's CLIP and PE.
KNOWN: tuple[str | tuple[str, ...], ...] = (
    "patch_embed.proj.weight",
    "embeddings.patch_embeddings.projection.weight",
    "embeddings.patch_embeddings.weight",
    "embeddings.patch_embedding.weight",
    ("conv1.weight", "class_embedding", "ln_pre.weight"),
)
# Of several networks in one file: the teacher of DINO, I-JEPA's encoder (as REPA takes it) and not
# its target, MoCo-v3's base and not its momentum network, a moving average and not what it follows.
PREFER = ("teacher", "encoder", "base_encoder", "state_dict_ema", "model_ema", "ema")

# transformers' name of a module => that of timm or the authors; inside of a block below
OUTSIDE = {
    "embeddings.cls_token": "cls_token",
    "embeddings.class_embedding": "cls_token",
    "embeddings.mask_token": "mask_token",
    "embeddings.register_tokens": "register_tokens",
    "embeddings.position_embeddings": "pos_embed",
    "embeddings.position_embedding.weight": "pos_embed",
    "embeddings.patch_embeddings.projection": "patch_embed.proj",
    "embeddings.patch_embeddings": "patch_embed.proj",
    "embeddings.patch_embedding": "patch_embed.proj",
    "pre_layrnorm": "norm_pre",
    "layernorm": "norm",
    "post_layernorm": "norm",
    "norm": "norm",
    # the pooling of SigLIP
    "head.probe": "attn_pool.latent",
    "head.attention.out_proj": "attn_pool.proj",
    "head.layernorm": "attn_pool.norm",
    "head.mlp.fc1": "attn_pool.mlp.fc1",
    "head.mlp.fc2": "attn_pool.mlp.fc2",
}
IN_BLOCK = {
    "norm1": "norm1",
    "norm2": "norm2",
    "layernorm_before": "norm1",
    "layernorm_after": "norm2",
    "layer_norm1": "norm1",
    "layer_norm2": "norm2",
    **{f"attention.attention.{part}": part for part in ("query", "key", "value")},
    **{f"{where}.{part[0]}_proj": part
       for where in ("attention", "self_attn") for part in ("query", "key", "value")},
    "attention.output.dense": "attn.proj",
    "attention.o_proj": "attn.proj",
    "self_attn.out_proj": "attn.proj",
    "layer_scale1.lambda1": "ls1.gamma",
    "layer_scale2.lambda1": "ls2.gamma",
    "intermediate.dense": "mlp.fc1",
    "output.dense": "mlp.fc2",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
    "mlp.up_proj": "mlp.fc1",
    "mlp.down_proj": "mlp.fc2",
    # with a gate, in DINOv2's and in DINOv3's names
    "mlp.weights_in": "mlp.w12",
    "mlp.weights_out": "mlp.w3",
}  # fmt: skip
GATED = {"mlp.gate_proj": "mlp.w1", "mlp.up_proj": "mlp.w2", "mlp.down_proj": "mlp.w3"}
BLOCK = re.compile(r"(?:model\.)?(?:encoder\.)?layers?\.(\d+)\.(.+)")
# beside the encoder: heads, the pooling of ViT, MAE's decoder, what is no weight
LEFT_OUT = re.compile(
    r"(pooler|classifier|decoder\w*)\.|decoder_pos_embed$|embeddings\.position_ids$"
    r"|.*\.(bias_mask|periods)$"
)


def to_timm(state: Mapping[str, Tensor], net: Any) -> dict[str, Tensor]:
    """A published state dict under names that timm reads for `net`; unknown names stay as they are.
    `UserError` for biases that `net` leaves out."""
    with_decoder = "decoder_pos_embed" in state
    state = {name: value for name, value in state.items() if not LEFT_OUT.match(name)}
    if with_decoder:  # of MAE; timm would take the file for DINOv2's
        state.pop("mask_token", None)
    if any(name.startswith("embeddings.") for name in state):
        state = _from_transformers(state)
    if "class_embedding" in state:  # OpenAI's names, which timm knows by this prefix
        return {f"visual.{name}": value for name, value in state.items()}
    # DINOv2's training keeps its blocks in chunks: blocks.CHUNK.BLOCK
    state = {re.sub(r"^blocks\.\d+\.(\d+\.)", r"blocks.\1", k): v for k, v in state.items()}
    if "storage_tokens" in state:
        _require_no_qkv_bias(state, net)
    elif "register_tokens" in state or "blocks.0.mlp.w12.weight" in state:
        state.setdefault("mask_token", torch.empty(0))  # by which timm knows DINOv2's names
    return state


def _from_transformers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """transformers' names => those of the authors, or timm's where the two are the same."""
    is_dinov3 = "embeddings.patch_embeddings.weight" in state
    in_block = IN_BLOCK | (GATED if any(".gate_proj." in name for name in state) else {})
    found = {}
    for name, value in state.items():
        module, part = _split(name)
        if match := BLOCK.match(module):
            number, module = match.groups()
            found[_join(f"blocks.{number}.{in_block.get(module, module)}", part)] = value
        else:
            found[_join(OUTSIDE.get(module, module), part)] = value
    if is_dinov3 and "register_tokens" in found:
        found["storage_tokens"] = found.pop("register_tokens")
    if "cls_token" in found:
        found["cls_token"] = found["cls_token"].reshape(1, 1, -1)
    if "pos_embed" in found and found["pos_embed"].ndim == 2:
        found["pos_embed"] = found["pos_embed"][None]
    return _split_pooling(_join_qkv(found))


def _split(name: str) -> tuple[str, str]:
    """Module and parameter; a name that is in a table as a whole is all module."""
    module, _, part = name.rpartition(".")
    whole = name in OUTSIDE or part not in ("weight", "bias")
    return (name, "") if whole else (module, part)


def _join(module: str, part: str) -> str:
    return f"{module}.{part}" if part else module


def _join_qkv(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Query, key and value of each block in one tensor; DINOv3's key has no bias, which is 0."""
    for name in [name for name in state if re.fullmatch(r"blocks\.\d+\.query\.\w+", name)]:
        block, _, part = name.rsplit(".", 2)
        names = [f"{block}.{which}.{part}" for which in ("query", "key", "value")]
        zero = torch.zeros_like(state[name]) if part == "bias" else None
        parts = [state.pop(n, zero) for n in names]
        if all(p is not None for p in parts):
            state[f"{block}.attn.qkv.{part}"] = torch.cat(parts)  # pyright: ignore
    return state


def _split_pooling(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The one projection of SigLIP's pooling as timm has it: query, and key with value."""
    for part in ("weight", "bias"):
        name = f"head.attention.in_proj_{part}"
        if name in state:
            query, key, value = state.pop(name).chunk(3)
            state[f"attn_pool.q.{part}"] = query
            state[f"attn_pool.kv.{part}"] = torch.cat([key, value])
    return state


def _require_no_qkv_bias(state: Mapping[str, Tensor], net: Any) -> None:
    """timm's DINOv3 has no qkv bias, as the published one is zero, and drops that of a file."""
    if any(name.endswith("q_bias") for name, _ in net.named_parameters()):
        return
    for key in (k for k in state if k.endswith("qkv.bias")):
        query, _, value = state[key].chunk(3)
        if query.any() or value.any():
            raise UserError(
                f"{key} is not zero, but this network has no such bias: take the _qkvb variant, "
                "e.g. encoder.names=[timm:vit_base_patch16_dinov3_qkvb]"
            )
