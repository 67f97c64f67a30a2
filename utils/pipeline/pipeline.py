"""RepaePipeline: a checkpoint, a run, an exported folder or a repository of the hub as a pipeline.

    from utils.pipeline.pipeline import RepaePipeline

    pipe = RepaePipeline.from_pretrained("exps/NAME")
    images = pipe(["golden retriever", 360], guidance_scale=4.0).images

All arguments: docs/pipeline.md.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from models.checks.errors import UserError, shown
from models.sit import SiT, load_sit
from models.vae import load_vae
from utils.checkpoint import SIT_EMA, VAE_FOLDER
from utils.pipeline import standalone
from utils.pipeline.sources import pipeline_source, sit_source
from utils.precision import DTYPES
from utils.sampling.labels import names_by_label
from utils.sampling.load import open_checkpoint
from utils.sampling.locate import locate_checkpoint
from utils.sampling.settings import SamplingSettings
from utils.sealed import read_model_index

# what says whose code is to be run: here, that of this repository
OF_CODE = ("trust_remote_code", "custom_pipeline", "use_safetensors")
DTYPE = torch.dtype | Mapping[str, torch.dtype] | None


class RepaePipeline(standalone.RepaePipeline):
    """`standalone.RepaePipeline`, loaded strictly, by the code of this repository alone, whatever
    code lies beside the weights."""

    @classmethod
    def from_pretrained(  # pyright: ignore[reportIncompatibleMethodOverride]
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        torch_dtype: DTYPE = None,
        dtype: DTYPE = None,
        revision: str | None = None,
        **changes: Any,
    ) -> "RepaePipeline":
        """The pipeline of a checkpoint, of a run's newest one, of an exported folder, or of
        OWNER/NAME of the hub.

        torch_dtype, dtype: number format of the weights, one or by component ("sit_ema", "vae",
        "default"). changes: of the arguments of `__init__`, in place of those in the folder.
        Raises `UserError` if the folder is not whole, or a tensor is missing or too many.
        """
        given = str(pretrained_model_name_or_path)
        changes = {name: value for name, value in changes.items() if name not in OF_CODE}
        known = ("vae", "sit_ema", "path", "id2label", "solver")
        if unknown := sorted(changes.keys() - set(known)):
            raise UserError(f"from_pretrained knows no {unknown[0]}: expected {', '.join(known)}, "
                            "torch_dtype or revision")  # fmt: skip
        folder = locate_checkpoint(f"{given}@{revision}" if revision else given)
        checkpoint = open_checkpoint(folder, SamplingSettings())
        solver = read_model_index(folder).solver
        parts = {"path": checkpoint.settings.path, "id2label": names_by_label(checkpoint.names)}
        parts |= {"solver": solver} if solver else {}
        dtype = torch_dtype if dtype is None else dtype
        if "vae" not in changes:
            vae = load_vae(str(folder / VAE_FOLDER)).net
            parts["vae"] = cast_as_diffusers(vae.eval(), of_component(dtype, "vae"))
        if "sit_ema" not in changes:
            sit = without_projectors(load_sit(folder / SIT_EMA))
            parts["sit_ema"] = cast_as_diffusers(sit, of_component(dtype, "sit_ema"))
        return cls(**parts | changes)

    def code(self) -> dict[str, str]:
        return {standalone.PIPELINE_FILE: pipeline_source(), standalone.SIT_FILE: sit_source()}


def without_projectors(sit: SiT) -> SiT:
    """The projectors serve training alone; without them, the config describes what is left."""
    sit.projectors = nn.ModuleList()
    sit.register_to_config(encoder_dims=())
    return sit


def of_component(dtype: DTYPE, name: str) -> torch.dtype | None:
    found = dtype.get(name, dtype.get("default")) if isinstance(dtype, Mapping) else dtype
    parts = (SIT_EMA, VAE_FOLDER, "default")
    if isinstance(dtype, Mapping) and (unknown := [part for part in dtype if part not in parts]):
        text = f"expected {', '.join(parts)}"
        raise UserError(f"torch_dtype names no component {shown(unknown[0])}: {text}")
    if found is not None and found not in DTYPES.values():
        text = f"expected {', '.join(map(str, DTYPES.values()))}"
        raise UserError(f"torch_dtype={shown(found)}: {text}")
    return found


def cast_as_diffusers(net: Any, dtype: torch.dtype | None) -> Any:
    """Keep the weights in `dtype`, but for what the class keeps in float32; None = as they are."""
    kept = set(net._keep_in_fp32_modules or ())
    for name, module in net.named_modules():
        if dtype is not None and not kept & set(name.split(".")):
            for value in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
                value.data = value.data.to(dtype) if value.is_floating_point() else value.data
    return net
