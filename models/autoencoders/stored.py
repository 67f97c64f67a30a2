"""A VAE in a weight file of somebody: found among other networks, and under today's names.

A VAE stands bare in a file, below the names of wrappers and dictionaries, or in a single file with
the generator that was trained on its latents, which then tells how those are scaled.
"""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from models.autoencoders.families import FLUX, SD, SD35, SDXL
from models.autoencoders.layouts import to_diffusers
from models.autoencoders.others import refuse_tensors
from models.checks.errors import printable
from models.weights.finding import NotFound, each_tensor, find_state
from models.weights.loading import first_names
from models.weights.reading import read_plain, say_once

# the tensor that every VAE of this project has, under its old names, too
FIRST = "encoder.conv_in.weight"
# which one is taken of several VAEs in a file
PREFER = ("first_stage_model", "vae", "ema", "model_ema", "ema_model", "params_ema")
PARTS = ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.")
# A pattern for names of tensors beside the VAE => how the generator that has them scales latents of
# as many levels and channels. The first one that is found counts.
SCALES: tuple[tuple[str, tuple[int, int], Mapping | None], ...] = (
    (r"^edm_mean$", (4, 4), None),  # Playground 2.5: SDXL's names, another scale
    (r"^conditioner\.embedders\.", (4, 4), SDXL),
    (r"^cond_stage_model\.(model\.)?transformer\.", (4, 4), SD),
    (r"(^|\.)joint_blocks\.\d+\.", (4, 16), SD35),
    (r"(^|\.)double_blocks\.\d+\.", (4, 16), FLUX),
)
# width of the text that a U-Net attends to => the same, for a file without its text encoder
ATTENDED = re.compile(r"^model\.diffusion_model\..*\.attn2\.to_k\.weight$")
SCALES_OF_TEXT = {768: SD, 1024: SD, 2048: SDXL, 1280: SDXL}
# VAEs of equal shapes whose latents are scaled differently
ALIKE = {(4, 4): "sdvae or sdxl", (4, 16): "flux or sd3.5"}


def read_vae(path: Path, tell: Callable[[str], None] = say_once) -> tuple[dict[str, Tensor], dict]:
    """(tensors under diffusers' names, config entries for the scaling of the latents where the file
    shows it, else {}) of the VAE in a weight file.

    `tell` gets a line on what was taken, if it was not the whole file. Raises `UserError` for a
    file without a VAE, and for an autoencoder of another kind.
    """
    content = read_plain(path)
    try:
        found = find_state(content, (FIRST,), path, PREFER, "a VAE")
    except NotFound:
        refuse_tensors([name for _, name, _ in each_tensor(content)], path)
        raise
    refuse_tensors(found.state, path)
    state = {name: value for name, value in found.state.items() if name.startswith(PARTS)}
    left_out = sorted({name.split(".")[0] for name in found.state} - {p[:-1] for p in PARTS})
    rest = printable(f"{first_names(left_out, 6)} left out") if left_out else ""
    if how := "; ".join(filter(None, (found.where, rest))):
        tell(f"{path}: its VAE is taken ({how})")
    state = to_diffusers(state)
    return state, scaling_of(content, state)


def scaling_of(content: Any, state: Mapping[str, Tensor]) -> dict:
    """Config entries for the scaling of the latents of a VAE, `state`, by what stands beside it in
    the `content` of its file: {} where nothing is sure."""
    found = each_tensor(content)
    tensors = {name: value for _, name, value in found if isinstance(value, Tensor)}
    measured = tensors.get("scale_factor")  # latent-diffusion's scale_by_std
    if measured is not None and measured.numel() == 1 and measured.is_floating_point():
        return {"scaling_factor": float(measured), "shift_factor": None}
    shape = _shape(state)
    for pattern, fits, scale in SCALES:
        if any(re.search(pattern, name) for name in tensors):
            return dict(scale or {}) if fits == shape else {}
    attended = [value.shape for name, value in tensors.items() if ATTENDED.match(name)]
    widths = {shape[1] for shape in attended if len(shape) == 2}
    return dict(SCALES_OF_TEXT.get(min(widths, default=0), {})) if shape == (4, 4) else {}


def which_scaling(state: Mapping[str, Tensor], path: Path) -> str:
    """What to say of a VAE whose file does not show how its latents are scaled; "" if only one
    scaling is published for VAEs of its shape, or none."""
    names = ALIKE.get(_shape(state))
    if names is None:
        return ""
    return (
        f"{path}: its scaling_factor is left empty, as the file may be of {names}; "
        f"vae.name={names.split()[0]} vae.weights={path} would say which"
    )


def _shape(state: Mapping[str, Tensor]) -> tuple[int, int]:
    """Levels and latent channels of an AutoencoderKL."""
    down = {m[1] for name in state if (m := re.match(r"encoder\.down_blocks\.(\d+)\.", name))}
    first = state.get("decoder.conv_in.weight")
    return len(down), first.shape[1] if first is not None and first.ndim == 4 else 0
