"""Autoencoders: every VAE behind one small module, loaded from and saved as diffusers folders.

The networks are diffusers' own. What differs between their classes, and the table of published
VAEs, is in `models/autoencoders/families.py`.

x image in [-1, 1], (N, 3, H, W). z latent, (N, C, h, w), never scaled or shifted: the latent norm
normalises it.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from models.autoencoders.families import ARCHITECTURES, FAMILIES, VAES, config_of
from models.autoencoders.layouts import infer_config
from models.autoencoders.names import short_name
from models.autoencoders.others import refuse_class
from models.autoencoders.places import file_of, vae_weight_file
from models.autoencoders.stored import read_vae, which_scaling
from models.checks.errors import UserError, short
from models.layers.autocast import at_least_float32
from models.weights.configs import CONFIG, arguments_for, read_config
from models.weights.loading import load_strictly, require_match

__all__ = ["VAE", "build_vae", "load_vae", "vae_from_config", "vae_from_state", "vae_weight_file"]

if TYPE_CHECKING:  # diffusers takes seconds to import
    from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution


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
    vae = vae_from_config(_config(short_name(str(spec))), spec)
    # the Qwen class's default statistics belong to its published weights, not to random ones
    vae.net.register_to_config(latents_mean=None, latents_std=None)
    return vae


def vae_from_config(config: Mapping, origin) -> VAE:
    """Randomly initialised VAE of a diffusers config with `_class_name`; `origin` names the config
    in the `UserError` for a class that is no known VAE."""
    refuse_class(config, origin)
    with torch.device("cpu"):  # modules that torch 2.6 imports then compute with tensors
        import diffusers

        network = getattr(diffusers, config["_class_name"])
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

    spec: what a published VAE is called (short name or repository), hub id, diffusers folder (or
    one with `vae/` inside, such as a checkpoint), or a weight file with a VAE in it (`read_vae`).
    weights: "hub" = what `spec` stands for (random for tiny-*: none are published), None = random,
    or a diffusers folder or weight file to load in its place; that must have exactly the tensors of
    the architecture. Raises `UserError` for whatever cannot be found or does not fit.
    """
    spec = short_name(str(spec))
    file = vae_weight_file(spec, weights)
    if file is None:
        return build_vae(spec)
    path = file.fetch()
    state, scaling = read_vae(path)
    if not file.companions:  # a weight file, alone
        if weights == "hub":
            if not scaling and (line := which_scaling(state, path)):
                print(line)
            return vae_from_state(state, path, scaling)
        vae = build_vae(spec)
        load_strictly(vae.net, state, path, spec)
        vae.net.register_to_config(**scaling)
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


def vae_from_state(state: Mapping[str, Tensor], origin, scaling: Mapping | None = None) -> VAE:
    """The VAE whose tensors, under diffusers' names, are these; `scaling` goes into its config.
    `UserError`, naming `origin`, where they are no VAE."""
    config = checked_config(_config_of_state(state, origin) | dict(scaling or {}), origin)
    with torch.device("meta"):
        vae = vae_from_config(config, origin)
    require_match(vae.net.state_dict(), state, origin, "the VAE that its shapes describe")
    load_strictly(vae.net.to_empty(device="cpu"), state, origin, "the VAE that its shapes describe")
    return vae


def _config_of_state(state: Mapping[str, Tensor], origin) -> dict:
    """diffusers config of the VAE with these tensors, without statistics of its latents."""
    shapes = {name: value.shape for name, value in state.items()}
    for name, config in ARCHITECTURES.items():
        # of this class, shapes show too little
        if config["_class_name"] != "AutoencoderKL" and _shapes(name) == shapes:
            return config | {"latents_mean": None, "latents_std": None}
    return infer_config(state, origin)


@cache
def _shapes(architecture: str) -> dict[str, torch.Size]:
    with torch.device("meta"):
        net = vae_from_config(ARCHITECTURES[architecture], architecture).net
    return {name: value.shape for name, value in net.state_dict().items()}


def _config(spec: str) -> dict:
    """diffusers config, with `_class_name`, of anything that `load_vae` takes as `spec`."""
    if spec in VAES:
        return config_of(spec)
    file = file_of(spec)
    if file.companions:
        path = file.path.with_name(CONFIG) if file.path else None
        path = replace(file, name=CONFIG, companions=(), path=path).fetch()
        return dict(checked_config(read_config(path), path.parent))
    with torch.device("cpu"):  # where the network is to be on the meta device, the file is not
        state, scaling = read_vae(file.fetch(), lambda line: None)
    return dict(checked_config(_config_of_state(state, file) | scaling, file))
