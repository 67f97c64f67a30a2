"""Whether a weight file is of the network asked for, by its tensors and the config beside it."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from models.backbones.table import EncoderSpec
from models.checks.errors import UserError, shown
from models.weights.configs import CONFIG, read_config

OPEN_CLIP_CONFIG = "open_clip_config.json"
# value of an activation function at 1 => transformers' name of it
ACTIVATIONS = {0.8413: "gelu", 0.8412: "gelu_pytorch_tanh", 0.8458: "quick_gelu", 0.7311: "silu"}
# what a config.json of transformers calls a trait
SETTINGS = {
    "width": "hidden_size",
    "blocks": "num_hidden_layers",
    "heads": "num_attention_heads",
    "patch": "patch_size",
    "registers": "num_register_tokens",
    "activation": "hidden_act",
}

# Name of a trait => its value; one that is not known is left out.
Traits = dict[str, Any]


def of_network(net: Any) -> Traits:
    """Those of timm's ViTs; of another network, none."""
    first = getattr(getattr(net, "patch_embed", None), "proj", None)
    blocks = getattr(net, "blocks", None)
    if not (isinstance(first, torch.nn.Conv2d) and isinstance(blocks, torch.nn.Sequential | list
            | torch.nn.ModuleList) and len(blocks)):  # fmt: skip
        return {}
    traits: Traits = {
        "width": first.out_channels,
        "blocks": len(blocks),
        "patch": first.kernel_size[0],
    }
    traits["registers"] = net.num_prefix_tokens - (net.cls_token is not None)
    attention, mlp = getattr(blocks[0], "attn", None), getattr(blocks[0], "mlp", None)
    if heads := getattr(attention, "num_heads", None):
        traits["heads"] = heads
    if act := getattr(mlp, "act", None):
        at_one = round(act(torch.ones(1, device="cpu")).item(), 4)
        traits["activation"] = ACTIVATIONS.get(at_one, "another")
    return traits


def of_state(state: Mapping[str, Tensor]) -> Traits:
    """Those that show in the shapes of a ViT's state dict, as `layouts.to_timm` gives it."""
    firsts = [value for value in state.values() if value.ndim == 4 and value.shape[1] == 3]
    numbers = [re.match(r"(?:.*\.)?(?:res)?blocks\.(\d+)\.", name) for name in state]
    tokens = [v for name, v in state.items() if re.search(r"(reg|register|storage)_tokens?$", name)]
    traits: Traits = {"registers": tokens[0].shape[1] if tokens else 0}
    if firsts:
        traits |= {"width": len(firsts[0]), "patch": firsts[0].shape[-1]}
    if any(numbers):
        traits["blocks"] = 1 + max(int(match[1]) for match in numbers if match)
    return traits


def of_config(config: Mapping) -> Traits:
    """Those that a config.json of transformers states."""
    vision = config.get("vision_config")
    vision = vision if isinstance(vision, dict) else config
    traits = {trait: vision.get(setting) for trait, setting in SETTINGS.items()}
    patch = traits["patch"]
    if isinstance(patch, list) and patch and all(side == patch[0] for side in patch):
        traits["patch"] = patch[0]
    if vision.get("use_swiglu_ffn"):  # its MLPs have another function than the config states
        traits["activation"] = None
    return {trait: value for trait, value in traits.items() if value is not None}


def require_same(found: Traits, net: Any, origin: object, name: str) -> None:
    """`UserError` that says what is different, if `found` are those of another network."""
    wanted = of_network(net)
    wrong = [t for t in wanted if t in found and found[t] != wanted[t]]
    if wrong:
        theirs, ours = (
            ", ".join(f"{trait} {shown(traits[trait]).strip(chr(39))}" for trait in wrong)
            for traits in (found, wanted)
        )
        raise UserError(
            f"{origin} is of another network than {name}: {theirs}, where {name} has {ours}; name "
            "the network that it is of, or give another file"
        )


def check_config(weights: Path, net: Any, spec: EncoderSpec, name: str) -> None:
    """`UserError` if a config of transformers, timm or open_clip beside a weight file says that it
    is of another network than `net`, which is the encoder `name`. What states none is ignored."""
    path, clip = weights.with_name(CONFIG), weights.with_name(OPEN_CLIP_CONFIG)
    config = read_config(path) if path.is_file() else {}
    if "architecture" in config:
        _check_timm(config, spec, path, name)
    elif "model_type" in config:
        kind = config["model_type"]
        if spec.model_types and kind not in spec.model_types:
            raise UserError(
                f"{path} says that the weights beside it are of {shown(kind)}, where {name} is "
                f"{spec.model_types[0]!r}: name the network that they are of, or give other weights"
            )
        require_same(of_config(config), net, path, name)
    elif clip.is_file():
        model = read_config(clip).get("model_cfg")
        if isinstance(model, dict) and of_network(net).get("activation") in ("gelu", "quick_gelu"):
            quick = model.get("quick_gelu") is True
            require_same({"activation": "quick_gelu" if quick else "gelu"}, net, clip, name)


def _check_timm(config: Mapping, spec: EncoderSpec, path: Path, name: str) -> None:
    """timm's config states an architecture. It has OpenAI's weights under two, as they are the
    same numbers, of which one runs them with the GELU that they were trained with."""
    stated, (wanted, _, tag) = str(config["architecture"]), spec.timm_name.partition(".")
    pretrained = config.get("pretrained_cfg")
    same_tag = isinstance(pretrained, dict) and pretrained.get("tag") == tag == "openai"
    if stated == wanted or (same_tag and stated == wanted.replace("quickgelu_", "")):
        return
    raise UserError(
        f"{path} says that the weights beside it are of timm:{shown(stated).strip(chr(39))}, where "
        f"{name} is timm:{wanted}: name the network that they are of, or give other weights"
    )
