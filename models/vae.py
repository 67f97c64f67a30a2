"""Autoencoders: every VAE behind one small module, loaded from and saved as diffusers folders.

The networks are diffusers' own. What differs between their classes, and the table of published
VAEs, is in `models/autoencoders/families.py`.

x image in [-1, 1], (N, 3, H, W). z latent, (N, C, h, w), never scaled or shifted: the latent norm
normalises it.
"""

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from models.autoencoders.families import FAMILIES, VAES, config_of
from models.autoencoders.layouts import infer_config, is_compvis, to_diffusers
from models.checks.errors import UserError, same_letters, short, shown
from models.checks.file_kinds import what_is
from models.layers.autocast import at_least_float32
from models.weights.configs import CONFIG, WEIGHTS, arguments_for, read_config
from models.weights.loading import load_strictly, require_match
from models.weights.published import WeightFile
from models.weights.reading import read_state

if TYPE_CHECKING:  # diffusers takes seconds to import
    from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

# what a VAE may be called => its short name: that name, and the name of its repository
ALIASES = {row.repo.split("/")[-1]: name for name, row in VAES.items() if row.repo}
ALIASES |= {name: name for name in VAES}
QUOTE = "'"
STATE_FILES = (".pt", ".ckpt", ".pth", ".safetensors")


class VAE(nn.Module):
    """One diffusers autoencoder, `net`, and the adapter of its class, `family`.

    This module is what DDP wraps: its `forward` returns all that the losses need. Posterior and
    images are float32 also under autocast, and computed so (models/layers/).
    """

    net: Any  # one of diffusers' classes

    def __init__(self, net: Any):
        super().__init__()
        self.net = net
        self.family = FAMILIES[type(net).__name__]
        self.family.prepare(net)
        self._recompute_halves = False
        for name, parameter in net.named_parameters():
            # DDP waits for the gradient of every parameter that is trainable when it wraps
            if any(part in name for part in self.family.unused_parameters):
                parameter.requires_grad_(False)

    def forward(
        self, x: Tensor, noise: Tensor | None = None
    ) -> "tuple[DiagonalGaussianDistribution, Tensor, Tensor]":
        """x (N, 3, H, W) in [-1, 1], noise (N, C, h, w) ~ N(0, I) or None = drawn here
        => posterior, its sample z = mean + std * noise (N, C, h, w), and x_hat (N, 3, H, W)."""
        posterior = self.encode(x)
        z = posterior.sample() if noise is None else posterior.mean + posterior.std * noise
        return posterior, z, self.decode(z)

    def encode(self, x: Tensor) -> "DiagonalGaussianDistribution":
        """(N, 3, H, W) in [-1, 1] => posterior with mean, std (N, C, h, w), `kl()` (N,): float32,
        or float64 if x and the weights are."""
        from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

        return DiagonalGaussianDistribution(at_least_float32(self._run_half(self.family.encode, x)))

    def decode(self, z: Tensor) -> Tensor:
        """(N, C, h, w) => (N, 3, H, W) float32 (or float64) around [-1, 1], never clamped."""
        return at_least_float32(self._run_half(self.family.decode, z))

    def _run_half(self, half: Callable, x: Tensor) -> Tensor:
        if self._recompute_halves and torch.is_grad_enabled():
            return checkpoint(half, self.net, x, use_reentrant=False)
        return half(self.net, x)

    @property
    def latent_channels(self) -> int:
        return self.family.latent_channels(self.net.config)

    @property
    def downsample_factor(self) -> int:
        """Pixels of an image's side for one cell of the latent's."""
        return self.family.downsample_factor(self.net.config)

    def latent_shape(self, resolution: int) -> tuple[int, int, int]:
        """Image side in pixels => (C, h, w)."""
        side, rest = divmod(resolution, self.downsample_factor)
        if rest or side < 1:
            raise UserError(
                f"resolution {resolution} is not a multiple of the VAE's downsample factor "
                f"{self.downsample_factor}; take {max(side, 1) * self.downsample_factor}"
            )
        return self.latent_channels, side, side

    def latent_stats(self) -> tuple[Tensor, Tensor] | None:
        """Per-channel (mean, std) of the latents, each (C,) float32, if the config has them."""
        mean, std = self.net.config.get("latents_mean"), self.net.config.get("latents_std")
        if mean is None or std is None:
            return None
        return torch.tensor(mean, dtype=torch.float32), torch.tensor(std, dtype=torch.float32)

    def save(self, folder, latents_mean: Tensor | None = None, latents_std: Tensor | None = None):
        """Write a folder that `from_pretrained` of the diffusers class reads, with per-channel
        statistics (C,) of the latents in its config if they are given."""
        self.net.save_pretrained(folder)
        self.save_config(folder, latents_mean, latents_std)

    def save_config(
        self, folder, latents_mean: Tensor | None = None, latents_std: Tensor | None = None
    ):
        """What `save` writes, but for the weights."""
        self.net.save_config(folder)
        if latents_mean is None or latents_std is None:
            return
        # edited on disk: register_to_config would make this run's statistics those of later saves
        path = Path(folder) / CONFIG
        config = read_config(path)
        config["latents_mean"] = latents_mean.flatten().tolist()
        config["latents_std"] = latents_std.flatten().tolist()
        config |= self.family.saved_with_stats
        path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")

    def enable_gradient_checkpointing(self):
        """Recompute activations in the backward pass: block by block where the diffusers class
        supports that, else the encoder and the decoder each as a whole. Same gradients."""
        if self.net._supports_gradient_checkpointing:
            self.net.enable_gradient_checkpointing()
        else:
            self._recompute_halves = True


def build_vae(spec: str) -> VAE:
    """Randomly initialised VAE of a short name, or of the config of whatever else `load_vae` takes;
    inside `torch.device("meta")` it needs no memory."""
    vae = vae_from_config(_config(str(spec)), spec)
    # the Qwen class's default statistics belong to its published weights, not to random ones
    vae.net.register_to_config(latents_mean=None, latents_std=None)
    return vae


def vae_from_config(config: Mapping, origin) -> VAE:
    """Randomly initialised VAE of a diffusers config with `_class_name`; `origin` names the config
    in the `UserError` for a class that is no known VAE."""
    name = config.get("_class_name")
    if not isinstance(name, str) or name not in FAMILIES:
        known = " or ".join(FAMILIES)
        raise UserError(f"{origin} is a {shown(name).strip(QUOTE)}, not a VAE: expected {known}")
    with torch.device("cpu"):  # modules that torch 2.6 imports then compute with tensors
        import diffusers

        network = getattr(diffusers, name)
    return VAE(network.from_config(arguments_for(network, config, origin)))


def checked_config(config: Mapping, origin) -> Mapping:
    """The config of a file, if it describes a network that works; else `UserError`.

    diffusers checks next to nothing: a VAE is tried, on the meta device.
    """
    try:
        with torch.device("meta"):
            vae = vae_from_config(config, origin)
            side = 4 * vae.downsample_factor
            moments = vae.family.encode(vae.net, torch.zeros(1, 3, side, side))
            channels, *latent = vae.latent_shape(side)
            found = tuple(vae.family.decode(vae.net, torch.zeros(1, channels, *latent)).shape)
    except UserError:
        raise
    except Exception as error:  # whatever a wrong setting happens to meet inside diffusers
        raise UserError(f"config of {origin} describes no VAE ({short(error)})") from None
    if (*moments.shape, *found) != (1, 2 * channels, *latent, 1, 3, side, side) or not channels:
        raise UserError(
            f"config of {origin}: images (1, 3, {side}, {side}) become latents "
            f"{tuple(moments.shape)} and images {found}, expected (1, {2 * channels}, 4, 4) and "
            "the shape of the images"
        )
    stats = [config.get(name) for name in ("latents_mean", "latents_std")]
    if stats != [None, None]:
        mean, std = (value or () for value in stats)
        if not len(mean) == len(std) == channels or min(std) <= 0:
            raise UserError(
                f"config of {origin}: latents_mean and latents_std hold {len(mean)} and {len(std)} "
                f"numbers, expected {channels} each, and positive deviations"
            )
    return config


def load_vae(spec: str, weights: str | Path | None = "hub") -> VAE:
    """Load a VAE in float32.

    spec: a short name (key of `VAES`), hub id, diffusers folder (or one with `vae/` inside, such as
    a checkpoint), or CompVis-style .pt / .ckpt file.
    weights: "hub" = what `spec` stands for (random for tiny-*: none are published), None = random,
    or a diffusers folder or weight file to load in its place; that must have exactly the tensors of
    the architecture. Raises `UserError` for whatever cannot be found or does not fit.
    """
    spec = str(spec)
    file = vae_weight_file(spec, weights)
    if file is None:
        return build_vae(spec)
    path = file.fetch()
    state = to_diffusers(read_state(path))
    if not file.companions:  # a bare weight file: `spec` tells the architecture
        vae = build_vae(spec)
        load_strictly(vae.net, state, path, spec)
        return vae
    # not from_pretrained: it fills missing tensors with random numbers, and keeps half precision
    config = checked_config(read_config(path.with_name(CONFIG)), path.parent)
    with torch.device("meta"):  # before memory is taken for what the config asks for
        require_match(
            vae_from_config(config, path).net.state_dict(), state, path, "its config.json"
        )
        if weights != "hub" and spec in VAES:
            require_match(build_vae(spec).net.state_dict(), state, path, spec)
    vae = vae_from_config(config, path.parent)
    load_strictly(vae.net, state, path, "its config.json")
    return vae


def vae_weight_file(spec: str, weights: str | Path | None = "hub") -> WeightFile | None:
    """The file that `load_vae` will read, without reading it; None if the weights are random. For a
    diffusers folder, `companions` holds the config.json that is read with it."""
    spec = str(spec)
    if weights is None or (weights == "hub" and spec in VAES and not VAES[spec].repo):
        return None
    if weights == "hub":
        return _file_of(spec)
    path = Path(weights)
    if os.path.isdir(path):
        return _file_in(path)
    return WeightFile(f"weights of {spec}", path=path, setting="vae.weights={}")


def _file_of(spec: str) -> WeightFile:
    """The weights that `spec` itself names: in the hub, in a local folder, or a file."""
    path = Path(spec)
    if not spec.strip():  # as a path, this would be the current folder
        raise UserError("the name of the VAE is empty: give a short name, file, folder or hub id")
    if spec in VAES:
        return _hub_file(VAES[spec].repo, VAES[spec].subfolder)
    if os.path.isdir(path):
        return _file_in(path)
    if os.path.exists(path):
        return WeightFile("a VAE's weights", path=path)
    if spec.count("/") == 1 and path.suffix not in STATE_FILES and not spec.startswith((".", "/")):
        return _hub_file(spec, "", "vae")
    near = same_letters(spec, ALIASES)
    hint = f"did you mean {ALIASES[near]}?" if near else f"the short names are {', '.join(VAES)}"
    why = "" if what_is(path) == "absent" else f" (it is {what_is(path)})"
    raise UserError(f"no VAE {spec}{why}: not a short name, file, folder or hub id; {hint}")


def _hub_file(repo: str, *subfolders: str) -> WeightFile:
    return WeightFile(
        WEIGHTS, repo=repo, subfolders=subfolders, companions=(CONFIG,), setting="vae.weights={}"
    )


def _file_in(folder: Path) -> WeightFile:
    """The weights of a diffusers folder, or of `vae/` in it."""
    for place in (folder, folder / "vae"):
        if os.path.isfile(place / CONFIG):
            return WeightFile(
                WEIGHTS,
                path=place / WEIGHTS,
                companions=(CONFIG,),
                otherwise="save the VAE again with save_pretrained",
            )
    hint = "; of a run, name one of its checkpoints" if (folder / "checkpoints").is_dir() else ""
    raise UserError(
        f"{folder} is no diffusers VAE: no {CONFIG} in it, nor in {folder / 'vae'}{hint}"
    )


def _config(spec: str) -> dict:
    """diffusers config, with `_class_name`, of anything that `load_vae` takes as `spec`."""
    if spec in VAES:
        return config_of(spec)
    file = _file_of(spec)
    if file.companions:
        path = file.path.with_name(CONFIG) if file.path else None
        path = replace(file, name=CONFIG, companions=(), path=path).fetch()
        return dict(checked_config(read_config(path), path.parent))
    state = read_state(file.fetch())
    if not is_compvis(state):
        raise UserError(
            f"{file} has no CompVis key names, so its architecture is unknown: give a short name "
            f"and vae.weights={file}, or a diffusers folder"
        )
    return dict(checked_config(infer_config(to_diffusers(state), file), file))
