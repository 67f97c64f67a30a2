"""RepaePipeline as an exported folder has it: all that sampling needs, and no loading.

scripts/export_pipeline.py writes this file, with what it imports of this repository, as the
pipeline.py of the folder. Here, `utils.pipeline.pipeline.RepaePipeline` is the one to use.

N images, C latent channels, h w latent grid, H W image.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline, ImagePipelineOutput
from PIL import Image
from torch import nn

from loss.interpolant import PATHS
from models.checks.errors import UserError, shown
from utils.data.images import pm1_to_u8
from utils.pipeline.arguments import check_call, check_names, classes_of, one_of
from utils.pipeline.seeds import noise_of, seeds_of
from utils.precision import DTYPES, autocast, effective_precision, tf32_inside
from utils.samplers import GUIDANCE_INTERVAL, SOLVERS, sample
from utils.sampling.images import split_evenly
from utils.sampling.settings import BATCH_SIZE, BLOCK, DECODE_BATCH_SIZE

OUTPUT_TYPES = ("pil", "np", "pt", "latent")


class Interrupted(Exception):
    """Ends the sampling of a batch, with its latents as they are."""

    def __init__(self, latents: torch.Tensor):
        super().__init__()
        self.latents = latents


class RepaePipeline(DiffusionPipeline):
    """Class-conditional images of a SiT and a VAE.

    vae: the diffusers autoencoder. sit_ema: the SiT. path: interpolant that the SiT was trained on,
    "linear" or "cosine". id2label: names of the classes by their label in text, as far as they are
    known; synonyms with commas between them. solver: the one that calls take unless told otherwise.

    The pictures are those of `sample_ddp.py` for the same seed and labels.
    """

    config: Any
    vae: Any
    sit_ema: Any
    model_cpu_offload_seq = "sit_ema->vae"
    _callback_tensor_inputs = ("latents",)
    _interrupt = False
    _num_timesteps = 0

    # without types: diffusers 0.35 fails on postponed annotations here
    def __init__(self, vae, sit_ema, path=PATHS[0], id2label=None, solver="ode-ab2"):
        super().__init__()
        one_of("path", path, PATHS)
        one_of("solver", solver, SOLVERS)
        check_names(id2label)
        for name, net in (("vae", vae), ("sit_ema", sit_ema)):
            if not isinstance(net, nn.Module):
                raise UserError(f"{name}={shown(net)}: expected a network; leave it out")
        self.register_modules(vae=vae, sit_ema=sit_ema)
        self.register_to_config(path=path, id2label=id2label, solver=solver)

    @torch.no_grad()
    def __call__(
        self,
        class_labels: int | str | Sequence[int | str],
        guidance_scale: float = 1.0,
        *,
        num_inference_steps: int = 50,
        solver: str | None = None,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        guidance_interval: tuple[float, float] = GUIDANCE_INTERVAL,
        timestep_shift: float = 1.0,
        precision: str | None = None,
        batch_size: int = BATCH_SIZE,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[..., dict[str, Any]] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> ImagePipelineOutput | tuple:
        """One image for each of `class_labels`: labels, or names of classes, one or several.

        guidance_scale: of classifier-free guidance, 1 = none; it acts at the times of
            `guidance_interval`, 0 = data, 1 = noise.
        solver, num_inference_steps: see utils/samplers.py. timestep_shift: above 1, more steps near
            the noise.
        generator: a fresh `torch.Generator().manual_seed(s)` gives the images 0, 1, ... of seed s;
            one that was used draws a new seed. A list: image 0 of each. None: a random seed, drawn
            from torch's own generator.
        precision: "bf16", "fp16" or "fp32", of the SiT; None: that of half weights, else bf16, and
            fp32 on a CPU without it. The VAE decodes in the number format of its weights.
        batch_size: images at a time, at most 100; they are 64 or fewer in `sample_ddp.py`.
        output_type: "pil", "np" (N, H, W, 3) uint8, "pt" (N, 3, H, W) uint8, or "latent"
            (N, C, h, w) float32, as the VAE decodes them.
        callback_on_step_end: called as `callback(pipe, step, time, {"latents": x})` after each step
            of each batch, with the state x (n, C, h, w), normalised, at that time; the latents that
            it returns replace x. `pipe._interrupt = True` ends the call with what there is.

        Returns an `ImagePipelineOutput`, or (images,) without `return_dict`.
        Raises `UserError`, which is a ValueError, for what cannot be.
        """
        solver = self.config.solver if solver is None else solver
        numbers = {"guidance_scale": guidance_scale, "num_inference_steps": num_inference_steps}
        numbers |= {"timestep_shift": timestep_shift, "batch_size": batch_size}
        check_call(solver, guidance_interval, numbers)
        one_of("output_type", output_type, OUTPUT_TYPES)
        self._check_guidance(guidance_scale)
        look_on = self._observer(callback_on_step_end, callback_on_step_end_tensor_inputs)
        y = classes_of(class_labels, self.config.id2label, self.sit_ema.config.num_classes)
        how = {"precision": self._precision(precision), "path": self.config.path}
        how |= {"solver": solver, "steps": num_inference_steps, "shift": timestep_shift}
        how |= {"cfg_scale": guidance_scale, "guidance": tuple(guidance_interval)}
        seeds = seeds_of(generator, len(y))

        self._interrupt, self._num_timesteps = False, num_inference_steps
        batches, found = batches_of_blocks(len(y), batch_size), []
        bar: Any = self.progress_bar(total=len(batches) * num_inference_steps)  # type: ignore
        with bar, tf32_inside(False):
            how["on_step"] = lambda *state: (bar.update(), look_on(*state))[1]
            for batch in batches:
                latents = self._draw_latents(y, seeds, batch, **how)
                found.append(latents if output_type == "latent" else self._decode(latents).cpu())
                if self._interrupt:
                    break
        self.maybe_free_model_hooks()
        images = as_output(torch.cat(found), output_type)
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _draw_latents(
        self, y: list[int], seeds: int | list[int], batch: range, precision: str, **how: Any
    ) -> torch.Tensor:
        """(n, C, h, w) float32 of the images `batch`, as the VAE decodes them. y, seeds: of all
        images; how: arguments of `utils.samplers.sample`."""
        noise = noise_of(seeds, batch, self._execution_device)
        labels = torch.tensor(y[batch.start : batch.stop], device=self._execution_device)
        shape = (self.sit_ema.config.in_channels, *[self.sit_ema.config.input_size] * 2)
        with autocast(self._execution_device, precision):
            try:
                z_n = sample(self.sit_ema, noise.start(*shape), labels, generator=noise, **how)
            except Interrupted as stop:
                z_n = stop.latents.float()
        latents = self.sit_ema.denormalize(z_n)
        if not latents.isfinite().all():
            which = f"images {batch.start}..{batch.stop - 1} are not finite"
            raise UserError(f"{which}: try precision='fp32', or other weights")
        return latents

    def _decode(self, latents: torch.Tensor) -> torch.Tensor:
        """(n, C, h, w) => (n, 3, H, W) uint8, by the VAE's own `decode`, so that its tiling and
        slicing and the offloading of diffusers work."""
        parts, video = [], "temperal_downsample" in self.vae.config  # diffusers' spelling
        for part in split_evenly(range(len(latents)), DECODE_BATCH_SIZE):
            z = latents[part.start : part.stop].to(self.vae.dtype)
            x = self.vae.decode(z.unsqueeze(2) if video else z).sample
            parts.append(pm1_to_u8(x.squeeze(2) if video else x))
        return torch.cat(parts)

    def _observer(self, callback: Callable | None, inputs: Sequence[str]) -> Callable:
        """What is called after each step of a solver, for `utils.samplers.sample`."""
        inputs = getattr(callback, "tensor_inputs", inputs)  # of diffusers' PipelineCallback
        known, several = self._callback_tensor_inputs, isinstance(inputs, list | tuple)
        if not several or any(name not in known for name in inputs):
            text = f"callback_on_step_end_tensor_inputs={shown(inputs)}"
            raise UserError(f"{text}: expected ['latents'] or []")
        if callback is not None and not callable(callback):
            text = "expected a function of the pipeline, a step, a time and tensors"
            raise UserError(f"callback_on_step_end={shown(callback)}: {text}")

        def look_on(step: int, time: float, x: torch.Tensor) -> torch.Tensor:
            kept = {"latents": x} if inputs else {}
            kept = (callback(self, step, time, kept) if callback else None) or {}
            new = kept.get("latents", x) if isinstance(kept, Mapping) else None
            if not isinstance(new, torch.Tensor) or new.shape != x.shape:
                text = f"returned latents that are not {tuple(x.shape)}"
                raise UserError(f"callback_on_step_end {text}: expected a dictionary with such")
            if self._interrupt:
                raise Interrupted(new)
            return new.to(x)

        return look_on

    def _check_guidance(self, scale: float) -> None:
        if scale != 1 and not self.sit_ema.config.class_dropout_prob:
            text = f"guidance_scale={scale}: this SiT was trained without a null label"
            raise UserError(f"{text}; leave it 1")

    def _precision(self, asked: str | None) -> str:
        """The key of `DTYPES` in which the SiT computes."""
        if asked is not None:
            one_of("precision", asked, DTYPES)
        weights = next(self.sit_ema.parameters()).dtype
        own = next((n for n, d in DTYPES.items() if d == weights and n != "fp32"), None)
        if own is None:
            return effective_precision(asked or "bf16", self._execution_device)
        if asked not in (None, own):
            text = f"precision={asked!r}: the weights of the SiT are {own}"
            raise UserError(f"{text}: leave it out, or load them in float32")
        return own

    @property
    def interrupt(self) -> bool:
        return self._interrupt

    @property
    def num_timesteps(self) -> int:
        """Steps of the call that is going on, or was the last."""
        return self._num_timesteps

    def save_pretrained(self, save_directory, safe_serialization: bool = True, **kwargs) -> None:
        """Write a folder that `DiffusionPipeline.from_pretrained` loads, given trust_remote_code:
        weights, configs, and the code of the SiT and of this class."""
        if not safe_serialization:
            raise UserError("safe_serialization=False: only safetensors are written; leave it out")
        for name in ("variant", "max_shard_size"):
            if kwargs.get(name) is not None:
                text = "each network is written as one file with the plain name; leave it out"
                raise UserError(f"{name}={shown(kwargs[name])}: {text}")
        if Path(save_directory).is_file():
            raise UserError(f"{save_directory} is a file: name a folder")
        super().save_pretrained(save_directory, **kwargs)

    def save_config(self, save_directory, push_to_hub: bool = False, **kwargs) -> None:
        """Write model_index.json, and the code beside the weights; `save_pretrained` calls it."""
        if push_to_hub:
            raise UserError(
                "push_to_hub: a config alone is no pipeline; give it to save_pretrained"
            )
        super().save_config(save_directory, **kwargs)
        folder = Path(save_directory)
        path = folder / self.config_name
        index = json.loads(path.read_text(encoding="utf-8")) | code_of_index(type(self).__name__)
        index.pop("_name_or_path", None)  # where this was loaded from is nobody's business
        path.write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        for name, source in self.code().items():
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text(source, encoding="utf-8")

    def code(self) -> dict[str, str]:
        """The code that goes with the weights, by its place in the folder."""
        sit = getattr(self.sit_ema, "_orig_mod", self.sit_ema)  # without torch.compile
        files = {PIPELINE_FILE: __file__, SIT_FILE: sys.modules[type(sit).__module__].__file__}
        return {name: Path(str(f)).read_text(encoding="utf-8") for name, f in files.items()}


PIPELINE_FILE, SIT_FILE = "pipeline.py", "sit_ema/sit.py"


def code_of_index(name: str) -> dict[str, list[str]]:
    """What model_index.json says of a folder's code: of the pipeline's class, and of the SiT's."""
    return {"_class_name": ["pipeline", name], "sit_ema": ["sit", "SiT"]}


def batches_of_blocks(num: int, batch_size: int) -> list[range]:
    """The batches in which `sample_ddp.py` makes `num` images: floating-point sums are rounded in
    another order in batches of another size."""
    blocks = [range(start, min(start + BLOCK, num)) for start in range(0, num, BLOCK)]
    return [batch for block in blocks for batch in split_evenly(block, batch_size)]


def as_output(images: torch.Tensor, output_type: str) -> Any:
    """(N, 3, H, W) uint8 as the call was asked for them; latents as they are."""
    if output_type in ("latent", "pt"):
        return images
    arrays = images.permute(0, 2, 3, 1).contiguous().numpy()
    return [Image.fromarray(array) for array in arrays] if output_type == "pil" else arrays
