"""Other people's names of the encoders: of the hub, torch.hub, OpenAI, REPA, and timm itself."""

import os

from models.backbones.table import ENCODERS
from models.checks.errors import UserError, same_letters
from models.weights.hub import repository

# Of its publishers, first the repository of the hub if there is one; last REPA's `--enc-type`.
PUBLISHED = {
    "dinov1-s": ("facebook/dino-vits16", "dino_vits16", "dinov1-vit-s"),
    "dinov1-b": ("facebook/dino-vitb16", "dino_vitb16", "dinov1-vit-b"),
    "dinov2-s": ("facebook/dinov2-small", "dinov2_vits14", "dinov2-vit-s"),
    "dinov2-b": ("facebook/dinov2-base", "dinov2_vitb14", "dinov2-vit-b"),
    "dinov2-l": ("facebook/dinov2-large", "dinov2_vitl14", "dinov2-vit-l"),
    "dinov2-g": ("facebook/dinov2-giant", "dinov2_vitg14", "dinov2-vit-g"),
    "dinov2-reg-s": (
        *("facebook/dinov2-with-registers-small", "dinov2_vits14_reg", "dinov2reg-vit-s"),
    ),
    "dinov2-reg-b": (
        *("facebook/dinov2-with-registers-base", "dinov2_vitb14_reg", "dinov2reg-vit-b"),
    ),
    "dinov2-reg-l": (
        *("facebook/dinov2-with-registers-large", "dinov2_vitl14_reg", "dinov2reg-vit-l"),
    ),
    "dinov2-reg-g": (
        *("facebook/dinov2-with-registers-giant", "dinov2_vitg14_reg", "dinov2reg-vit-g"),
    ),
    "dinov3-s": ("facebook/dinov3-vits16-pretrain-lvd1689m", "dinov3_vits16", "dinov3-vit-s"),
    "dinov3-b": ("facebook/dinov3-vitb16-pretrain-lvd1689m", "dinov3_vitb16", "dinov3-vit-b"),
    "dinov3-l": ("facebook/dinov3-vitl16-pretrain-lvd1689m", "dinov3_vitl16", "dinov3-vit-l"),
    "dinov3-h": ("facebook/dinov3-vith16plus-pretrain-lvd1689m", "dinov3_vith16plus"),
    "mae-b": ("mae_pretrain_vit_base", "mae_vit_base_patch16", "mae-vit-b"),
    "mae-l": ("mae_pretrain_vit_large", "mae_vit_large_patch16", "mae-vit-l"),
    "mae-h": ("mae_pretrain_vit_huge", "mae_vit_huge_patch14", "mae-vit-h"),
    "clip-l": ("openai/clip-vit-large-patch14", "ViT-L/14", "clip-vit-L"),
    "ijepa-h": ("facebook/ijepa_vith14_1k", "jepa-vit-h"),
    "ijepa-h-22k": ("facebook/ijepa_vith14_22k",),
    "siglip2-b": ("google/siglip2-base-patch16-256",),
    "siglip2-l": ("google/siglip2-large-patch16-256",),
    "siglip2-so400m": ("google/siglip2-so400m-patch16-256",),
    "pe-core-b": ("facebook/PE-Core-B16-224", "PE-Core-B16-224"),
    "pe-core-l": ("facebook/PE-Core-L14-336", "PE-Core-L14-336"),
    "pe-spatial-b": ("facebook/PE-Spatial-B16-512", "PE-Spatial-B16-512"),
    "pe-spatial-l": ("facebook/PE-Spatial-L14-448", "PE-Spatial-L14-448"),
    "mocov3-s": ("mocov3-vit-s",),
    "mocov3-b": ("mocov3-vit-b",),
    "mocov3-l": ("mocov3-vit-l",),
}
# timm's names, bare and on the hub; a row with a `url` has other weights than timm's of that name
_TIMM = {name: spec.timm_name for name, spec in ENCODERS.items() if not spec.url}
_SHORT = {
    other.casefold(): short
    for short, others in PUBLISHED.items()
    for other in (
        *(*others, others[0].rpartition("/")[2]),
        *([_TIMM[short], f"timm/{_TIMM[short]}"] if short in _TIMM else []),
    )
}
# Its repositories hold the networks of the paper's pictures, trained on pixels as they are.
OTHER_MAE = "facebook/vit-mae-"


def canonical(name: str) -> str:
    """The key of `ENCODERS` that a published name stands for, in any case of its letters, or the
    address of its page; every other name as it is."""
    return _SHORT.get(repository(name).casefold(), name)


def unknown_encoder(name: str) -> UserError:
    """What is wrong with a name that is neither in the table nor one of timm's."""
    if name.casefold().startswith(OTHER_MAE):
        return UserError(
            f"{name} holds the weights of MAE's pictures, trained without normalised pixels, and "
            "not those of mae_pretrain_vit_*.pth, which REPA aligns with: name mae-b, mae-l or "
            "mae-h, with the folder of the repository as its weights if you mean these"
        )
    if os.path.exists(name):
        return UserError(
            f"encoder {name} is a path: name the network, e.g. encoder.names=[dinov2-b], and give "
            f"the file or folder as its weights, e.g. encoder.weights=[{name}]"
        )
    others = [other for names in PUBLISHED.values() for other in names]
    near = same_letters(name, [*ENCODERS, *others])
    hint = f"nearest is {canonical(near)}" if near else f"the names are {', '.join(ENCODERS)}"
    return UserError(f"unknown encoder {name}: {hint}; any timm network is timm:NAME")
