"""State dicts of AutoencoderKL under older key names => those of diffusers, and their config.

Two older dialects exist: CompVis/latent-diffusion (`encoder.down.0.block.1.conv1.weight`; also what
the REPA-E authors first published), and diffusers before 0.18, whose attention layers were called
`query`, `key`, `value`, `proj_attn` (stabilityai/sd-vae-ft-mse is still stored so).
diffusers' own CompVis converter drops per-level attention, hence cannot read f16d32: this one can.
"""

import re
from collections.abc import Mapping

from torch import Tensor

from models.autoencoders.families import ARCHITECTURES
from models.checks.errors import UserError

# (pattern, replacement), applied in this order; `up` is separate because its levels count backwards
COMPVIS = [
    (r"\.down\.(\d+)\.block\.", r".down_blocks.\1.resnets."),
    (r"\.down\.(\d+)\.attn\.", r".down_blocks.\1.attentions."),
    (r"\.down\.(\d+)\.downsample\.", r".down_blocks.\1.downsamplers.0."),
    (r"\.up_blocks\.(\d+)\.block\.", r".up_blocks.\1.resnets."),
    (r"\.up_blocks\.(\d+)\.attn\.", r".up_blocks.\1.attentions."),
    (r"\.up_blocks\.(\d+)\.upsample\.", r".up_blocks.\1.upsamplers.0."),
    (r"\.mid\.block_1\.", r".mid_block.resnets.0."),
    (r"\.mid\.block_2\.", r".mid_block.resnets.1."),
    (r"\.mid\.attn_1\.", r".mid_block.attentions.0."),
    (r"\.nin_shortcut\.", r".conv_shortcut."),
    (r"\.norm_out\.", r".conv_norm_out."),
    (r"(attentions\.\d+)\.norm\.", r"\1.group_norm."),
    (r"(attentions\.\d+)\.([qkv])\.", r"\1.to_\2."),
    (r"(attentions\.\d+)\.proj_out\.", r"\1.to_out.0."),
]

OLD_DIFFUSERS = [
    (r"(attentions\.\d+)\.query\.", r"\1.to_q."),
    (r"(attentions\.\d+)\.key\.", r"\1.to_k."),
    (r"(attentions\.\d+)\.value\.", r"\1.to_v."),
    (r"(attentions\.\d+)\.proj_attn\.", r"\1.to_out.0."),
]

PUBLISHED_GROUPS = 32  # norm groups of every published file whose names are read here

# CompVis attention is made of 1x1 convolutions, diffusers' of linear layers with the same numbers
ATTENTION_MATRIX = re.compile(r"attentions\.\d+\.to_(q|k|v|out\.0)\.weight$")


def to_diffusers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Any dialect => today's diffusers keys (those are left alone). Keys it does not know pass
    through, so that a strict load reports them."""
    if not any(key.startswith(("encoder.down.", "decoder.up.")) for key in state):
        return {_rename(key, OLD_DIFFUSERS): value for key, value in state.items()}
    levels = max(
        _count(state, r"encoder\.down\.(\d{1,3})\."), _count(state, r"decoder\.up\.(\d{1,3})\.")
    )
    converted = {}
    for key, value in state.items():
        key = re.sub(r"\.up\.(\d{1,3})\.", lambda m: f".up_blocks.{levels - 1 - int(m[1])}.", key)
        key = _rename(key, COMPVIS)
        if ATTENTION_MATRIX.search(key) and value.ndim == 4:
            value = value[:, :, 0, 0]
        converted[key] = value
    return converted


def _rename(key: str, rules: list[tuple[str, str]]) -> str:
    for pattern, replacement in rules:
        key = re.sub(pattern, replacement, key)
    return key


def infer_config(state: Mapping[str, Tensor], origin) -> dict:
    """Config of the AutoencoderKL that holds these diffusers-named weights, without the scaling of
    its latents, which shows in no shape.

    Raises `UserError` where `origin` is not such an autoencoder.
    """

    def size(key: str, axis: int) -> int:
        if key not in state:
            raise UserError(
                f"{origin} is no AutoencoderKL: it has no {key} (a diffusers name); give a "
                f"diffusers folder, or a short name with vae.weights={origin}"
            )
        if axis >= state[key].ndim:
            raise UserError(f"{origin}: {key} has the shape {tuple(state[key].shape)} of no VAE")
        return state[key].shape[axis]

    def attends(part: str) -> list[bool]:  # level by level; MAR's encoder does, its decoder not
        key = f"{part}.{{}}.attentions.0.to_q.weight"
        return [key.format(i) in state for i in range(levels)]

    levels = _count(state, r"encoder\.down_blocks\.(\d{1,3})\.")
    conv = "encoder.down_blocks.{}.resnets.0.conv2.weight"
    down, up = attends("encoder.down_blocks"), attends("decoder.up_blocks")
    config = {
        "_class_name": "AutoencoderKL",
        "block_out_channels": tuple(size(conv.format(i), 0) for i in range(max(levels, 1))),
        "down_block_types": ["AttnDownEncoderBlock2D" if a else "DownEncoderBlock2D" for a in down],
        "up_block_types": ["AttnUpDecoderBlock2D" if a else "UpDecoderBlock2D" for a in up],
        "layers_per_block": _count(state, r"encoder\.down_blocks\.0\.resnets\.(\d{1,3})\."),
        "latent_channels": size("decoder.conv_in.weight", 1),
        "use_quant_conv": "quant_conv.weight" in state,
        "use_post_quant_conv": "post_quant_conv.weight" in state,
        "mid_block_add_attention": "encoder.mid_block.attentions.0.to_q.weight" in state,
        "sample_size": 256,
        "scaling_factor": None,
        "shift_factor": None,
    }
    return config | {"norm_num_groups": _norm_groups(config, origin)}


def _norm_groups(config: Mapping, origin) -> int:
    """Number of norm groups in an AutoencoderKL of this config: no shape shows it. It is that of
    the table for an architecture of the table, else as in every published file."""
    for known in ARCHITECTURES.values():
        if all(config.get(k) == v for k, v in known.items() if k != "norm_num_groups"):
            return known["norm_num_groups"]
    channels = config["block_out_channels"]
    if odd := [c for c in channels if c % PUBLISHED_GROUPS]:
        raise UserError(
            f"{origin}: {PUBLISHED_GROUPS} norm groups, as in every published file, do not divide "
            f"{odd[0]} channels: give a diffusers folder, whose config names the number of groups"
        )
    return PUBLISHED_GROUPS


def _count(state: Mapping[str, Tensor], pattern: str) -> int:
    """1 + the largest index that `pattern` finds among the keys; 0 if it finds none."""
    return 1 + max((int(m[1]) for key in state if (m := re.match(pattern, key))), default=-1)
