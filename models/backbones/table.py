"""The table of encoders: a new encoder is a row. Imports neither torch nor timm."""

from dataclasses import dataclass, field
from functools import partial

IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
OPENAI = {
    "mean": (0.48145466, 0.4578275, 0.40821073),
    "std": (0.26862954, 0.26130258, 0.27577711),
}
HALF = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}


@dataclass(frozen=True)
class EncoderSpec:
    """What a short name stands for: a timm network, and how it is fed and read."""

    # name in timm, with the tag of its weights
    timm_name: str
    # mean and std of each colour channel, for images in [0, 1]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    # whether the network's final norm is applied to the patch tokens
    norm: bool = True
    # what a config.json of transformers calls the family; () = not known
    model_types: tuple[str, ...] = ()
    # where the authors publish the weights, if timm does not
    url: str = ""
    # further arguments of timm.create_model
    kwargs: dict = field(default_factory=dict)
    # of a CNN, the stage with so many input pixels per cell is used; None = the last stage
    stride: int | None = None


# One line for each group of authors: what all their networks have in common.
# Mean and std are those that the network was trained with, as timm states them (iREPA feeds
# ImageNet's to SigLIP 2). The final norm follows REPA (arXiv 2410.06940): its MAE and CLIP targets
# are outputs of the last block without it, as are those of PE in iREPA (arXiv 2512.10794).
_DINOV1 = partial(EncoderSpec, **IMAGENET, model_types=("vit",))
_DINOV2 = partial(EncoderSpec, **IMAGENET, model_types=("dinov2",))
_REGISTERS = partial(EncoderSpec, **IMAGENET, model_types=("dinov2_with_registers",))
_DINOV3 = partial(EncoderSpec, **IMAGENET, model_types=("dinov3_vit",))
_MAE = partial(EncoderSpec, **IMAGENET, norm=False, model_types=("vit_mae",))
_CLIP = partial(EncoderSpec, **OPENAI, norm=False, model_types=("clip", "clip_vision_model"))
_IJEPA = partial(EncoderSpec, **IMAGENET, model_types=("ijepa",))
# the GELU of its authors' JAX code is the tanh approximation, which timm has in so400m alone
_SIGLIP2 = partial(
    EncoderSpec,
    **HALF,
    model_types=("siglip", "siglip_vision_model"),
    kwargs={"act_layer": "gelu_tanh"},
)
_PE = partial(EncoderSpec, **HALF, norm=False)
_MOCO = partial(EncoderSpec, **IMAGENET, url="https://github.com/facebookresearch/moco-v3")

ENCODERS = {
    "dinov2-s": _DINOV2("vit_small_patch14_dinov2.lvd142m"),
    "dinov2-b": _DINOV2("vit_base_patch14_dinov2.lvd142m"),
    "dinov2-l": _DINOV2("vit_large_patch14_dinov2.lvd142m"),
    "dinov2-g": _DINOV2("vit_giant_patch14_dinov2.lvd142m"),
    "dinov2-reg-s": _REGISTERS("vit_small_patch14_reg4_dinov2.lvd142m"),
    "dinov2-reg-b": _REGISTERS("vit_base_patch14_reg4_dinov2.lvd142m"),
    "dinov2-reg-l": _REGISTERS("vit_large_patch14_reg4_dinov2.lvd142m"),
    "dinov2-reg-g": _REGISTERS("vit_giant_patch14_reg4_dinov2.lvd142m"),
    "dinov1-s": _DINOV1("vit_small_patch16_224.dino"),
    "dinov1-b": _DINOV1("vit_base_patch16_224.dino"),
    "dinov3-s": _DINOV3("vit_small_patch16_dinov3.lvd1689m"),
    "dinov3-b": _DINOV3("vit_base_patch16_dinov3.lvd1689m"),
    "dinov3-l": _DINOV3("vit_large_patch16_dinov3.lvd1689m"),
    "dinov3-h": _DINOV3("vit_huge_plus_patch16_dinov3.lvd1689m"),
    "mae-b": _MAE("vit_base_patch16_224.mae"),
    "mae-l": _MAE("vit_large_patch16_224.mae"),
    "mae-h": _MAE("vit_huge_patch14_224.mae"),
    "clip-l": _CLIP("vit_large_patch14_clip_quickgelu_224.openai"),
    "ijepa-h": _IJEPA("vit_huge_patch14_gap_224.in1k_ijepa"),
    "ijepa-h-22k": _IJEPA("vit_huge_patch14_gap_224.in22k_ijepa"),
    "siglip2-b": _SIGLIP2("vit_base_patch16_siglip_256.v2_webli"),
    "siglip2-l": _SIGLIP2("vit_large_patch16_siglip_256.v2_webli"),
    "siglip2-so400m": _SIGLIP2("vit_so400m_patch16_siglip_256.v2_webli"),
    "pe-core-b": _PE("vit_pe_core_base_patch16_224.fb"),
    "pe-core-l": _PE("vit_pe_core_large_patch14_336.fb"),
    "pe-spatial-b": _PE("vit_pe_spatial_base_patch16_512.fb"),
    "pe-spatial-l": _PE("vit_pe_spatial_large_patch14_448.fb"),
    "mocov3-s": _MOCO("vit_small_patch16_224", kwargs={"num_heads": 12}),
    "mocov3-b": _MOCO("vit_base_patch16_224"),
    "mocov3-l": _MOCO("vit_large_patch16_224"),
}
