"""Autoencoders: every published VAE behind one small module, loaded and saved as diffusers folders.

`x` image in [-1, 1], (N, 3, H, W). `z` latent, (N, C, h, w), never scaled or shifted: the latent
norm normalises it. The networks are diffusers' `AutoencoderKL` and `AutoencoderKLQwenImage`.
"""

import json
from collections.abc import Callable, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import NamedTuple

import torch
from diffusers import AutoencoderKL, AutoencoderKLQwenImage
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from huggingface_hub import hf_hub_download, hf_hub_url
from huggingface_hub.constants import HF_HUB_CACHE
from huggingface_hub.errors import EntryNotFoundError, RemoteEntryNotFoundError
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from models.errors import UserError
from models.vae_keys import infer_config, is_compvis, read_state, require_match, to_diffusers
from models.wanted import Wanted, cached_file

CLASSES = {cls.__name__: cls for cls in (AutoencoderKL, AutoencoderKLQwenImage)}
WEIGHTS = "diffusion_pytorch_model.safetensors"
FILES = ("config.json", WEIGHTS)
STATE_FILES = (".pt", ".ckpt", ".pth", ".safetensors")


def _kl(channels, latent: int, *, attn=False, quant=True, tiny=False, mid=True) -> dict:
    """Configuration of an AutoencoderKL; `attn`: attention at the coarsest level also outside the
    middle block, as in CompVis f16; `tiny`: for tests and the quickstart."""
    down, up = ["DownEncoderBlock2D"] * len(channels), ["UpDecoderBlock2D"] * len(channels)
    if attn:
        down[-1], up[0] = "AttnDownEncoderBlock2D", "AttnUpDecoderBlock2D"
    return {
        "_class_name": "AutoencoderKL",
        "block_out_channels": channels,
        "down_block_types": down,
        "up_block_types": up,
        "latent_channels": latent,
        "layers_per_block": 1 if tiny else 2,
        "norm_num_groups": 8 if tiny else 32,
        "use_quant_conv": quant,
        "use_post_quant_conv": quant,
        "mid_block_add_attention": mid,
        "sample_size": 256,  # the class default 32 would make tiling, once enabled, act on 64 px
    }


def _qwen(base: int, mult: list[int], num_res_blocks: int) -> dict:
    return {
        "_class_name": "AutoencoderKLQwenImage",
        "base_dim": base,
        "z_dim": 16,
        "dim_mult": mult,
        "num_res_blocks": num_res_blocks,
        "temperal_downsample": [False, True, True],
    }


# fmt: off
ARCHITECTURES = {
    "f8d4":   _kl((128, 256, 512, 512), 4),
    "f8d16":  _kl((128, 256, 512, 512), 16, quant=False),
    "f16d32": _kl((128, 128, 256, 256, 512), 32, attn=True),
    "qwen":   _qwen(96, [1, 2, 4, 4], 2),
    "tiny-f2d4":   _kl((32, 64), 4, tiny=True, mid=False),
    "tiny-f8d4":   _kl((8, 8, 16, 16), 4, tiny=True),
    "tiny-f8d16":  _kl((8, 8, 16, 16), 16, quant=False, tiny=True),
    "tiny-f16d32": _kl((8, 8, 8, 8, 16), 32, attn=True, tiny=True),
    "tiny-qwen":   _qwen(8, [1, 1, 2, 2], 1),
}


class Row(NamedTuple):
    architecture: str
    hub: str | None = None        # None: no published weights
    subfolder: str = ""           # of the hub repository
    scaling: float | None = None  # scaling_factor, shift_factor of the published config, for weight
    shift: float | None = None    # files without a config; training uses neither


VAES = {
    "sdvae":         Row("f8d4",   "stabilityai/sd-vae-ft-mse",              "",    0.18215),
    "sdvae-ema":     Row("f8d4",   "stabilityai/sd-vae-ft-ema",              "",    0.18215),
    "invae":         Row("f16d32", "REPA-E/invae"),
    "vavae":         Row("f16d32", "REPA-E/vavae-hf"),
    "flux":          Row("f8d16",  "black-forest-labs/FLUX.1-dev",           "vae", 0.3611, 0.1159),
    "sd3.5":         Row("f8d16",  "stabilityai/stable-diffusion-3.5-large", "vae", 1.5305, 0.0609),
    "qwenimage":     Row("qwen",   "Qwen/Qwen-Image",                        "vae"),
    "e2e-sdvae":     Row("f8d4",   "REPA-E/e2e-sdvae-hf",                    "",    0.18215),
    "e2e-invae":     Row("f16d32", "REPA-E/e2e-invae-hf"),
    "e2e-vavae":     Row("f16d32", "REPA-E/e2e-vavae-hf"),
    "e2e-flux":      Row("f8d16",  "REPA-E/e2e-flux-vae",                    "",    0.3611, 0.1159),
    "e2e-sd3.5":     Row("f8d16",  "REPA-E/e2e-sd3.5-vae",                   "",    1.5305, 0.0609),
    "e2e-qwenimage": Row("qwen",   "REPA-E/e2e-qwenimage-vae"),
    "tiny-f2d4":     Row("tiny-f2d4"),
    "tiny-f8d4":     Row("tiny-f8d4"),
    "tiny-f8d16":    Row("tiny-f8d16"),
    "tiny-f16d32":   Row("tiny-f16d32"),
    "tiny-qwen":     Row("tiny-qwen"),
}
# fmt: on


class VAE(nn.Module):
    """One diffusers autoencoder as `net`. This module is what DDP wraps: its `forward` returns all
    that the losses need. Posterior and images are float32 also under autocast."""

    def __init__(self, net: AutoencoderKL | AutoencoderKLQwenImage):
        super().__init__()
        self.net = net
        self.has_frames = isinstance(net, AutoencoderKLQwenImage)
        self._checkpoint_halves = False
        for name, parameter in net.named_parameters():
            # the Qwen VAE's temporal resampling never runs on a single frame, and DDP waits for
            # the gradient of every parameter that is trainable when it wraps
            if "time_conv" in name:
                parameter.requires_grad_(False)

    def forward(
        self, x: Tensor, noise: Tensor | None = None
    ) -> tuple[DiagonalGaussianDistribution, Tensor, Tensor]:
        """x (N, 3, H, W) in [-1, 1], noise (N, C, h, w) ~ N(0, I) or None = drawn here
        => posterior, its sample z = mean + std * noise (N, C, h, w), and x_hat (N, 3, H, W)."""
        posterior = self.encode(x)
        z = posterior.sample() if noise is None else posterior.mean + posterior.std * noise
        return posterior, z, self.decode(z)

    def encode(self, x: Tensor) -> DiagonalGaussianDistribution:
        """(N, 3, H, W) in [-1, 1] => posterior with float32 mean, std (N, C, h, w), `kl()` (N,)."""
        return DiagonalGaussianDistribution(self._run(self._moments, x).float())

    def decode(self, z: Tensor) -> Tensor:
        """(N, C, h, w) => (N, 3, H, W) float32 around [-1, 1], never clamped: the Qwen class's own
        `decode` clamps, which stops the gradient wherever a pixel saturates."""
        return self._run(self._pixels, z).float()

    def _moments(self, x: Tensor) -> Tensor:
        h = self.net.encoder(x)
        return self.net.quant_conv(h) if self.net.quant_conv is not None else h

    def _pixels(self, z: Tensor) -> Tensor:
        h = self.net.post_quant_conv(z) if self.net.post_quant_conv is not None else z
        return self.net.decoder(h)

    def _run(self, half: Callable, x: Tensor) -> Tensor:
        """Run one half of the network on a 4-D tensor: adds the Qwen frame axis and removes it."""
        x = x.unsqueeze(2) if self.has_frames else x
        if self._checkpoint_halves and torch.is_grad_enabled():
            h = checkpoint(half, x, use_reentrant=False)
        else:
            h = half(x)
        return h.squeeze(2) if self.has_frames else h

    @property
    def latent_channels(self) -> int:
        return self.net.config["z_dim" if self.has_frames else "latent_channels"]

    @property
    def downsample_factor(self) -> int:
        if self.has_frames:
            return 2 ** len(self.net.config.temperal_downsample)
        return 2 ** (len(self.net.config.block_out_channels) - 1)

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
        """Write a folder that plain diffusers `from_pretrained` reads. With per-channel statistics
        (C,), scaling_factor 1 and shift_factor 0 go beside them, so that pipelines which multiply
        both (SDXL) agree with those which know the statistics only."""
        self.net.save_pretrained(folder)
        if latents_mean is None or latents_std is None:
            return
        # edited on disk: register_to_config would make this run's statistics those of later saves
        path = Path(folder) / "config.json"
        config = json.loads(path.read_text())
        config["latents_mean"] = latents_mean.flatten().tolist()
        config["latents_std"] = latents_std.flatten().tolist()
        if not self.has_frames:
            config.update(scaling_factor=1.0, shift_factor=0.0)
        path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")

    def enable_gradient_checkpointing(self):
        """Recompute activations in backward: per block, or per half of a Qwen VAE (its class
        supports none itself). Same gradients."""
        if self.has_frames:
            self._checkpoint_halves = True
        else:
            self.net.enable_gradient_checkpointing()


def build_vae(spec: str) -> VAE:
    """Randomly initialised VAE of a short name, or of the config of whatever else `load_vae` takes;
    inside `torch.device("meta")` it needs no memory."""
    net = _new(_config(str(spec)), spec)
    # the Qwen class's default statistics belong to its published weights, not to random ones
    net.register_to_config(latents_mean=None, latents_std=None)
    return VAE(net)


def load_vae(spec: str, weights: str | Path | None = "hub") -> VAE:
    """Load a VAE in float32.

    spec: a short name (key of `VAES`), hub id, diffusers folder (or one with `vae/` inside, such as
    a checkpoint), or CompVis-style .pt / .ckpt file.
    weights: "hub" = what `spec` stands for (random for tiny-*: none are published), None = random,
    or a diffusers folder or weight file to load in its place; that must have exactly the tensors of
    the architecture. Raises `UserError` for whatever cannot be found or does not fit.
    """
    spec = str(spec)
    if _is_random(spec, weights):
        return build_vae(spec)
    path = _locate(spec) if weights == "hub" else Path(weights)
    if path.is_dir():
        vae = VAE(_load_folder(_local_folder(path)))
        if weights != "hub" and spec in VAES:
            with torch.device("meta"):
                expected = build_vae(spec).net.state_dict()
            require_match(expected, vae.net.state_dict(), path, spec)
        return vae
    path = _existing(path, spec)
    vae = build_vae(spec)
    _load_strict(vae.net, to_diffusers(read_state(path)), path, spec)
    return vae


def wanted_vae(spec: str, weights: str | Path | None = "hub") -> Wanted | None:
    """What `load_vae` will read, without reading it; None if the weights are random."""
    spec = str(spec)
    if _is_random(spec, weights):
        return None
    place = _place(spec) if weights == "hub" else Path(weights)
    if isinstance(place, Path):
        path = _weights_in(_local_folder(place)) if place.is_dir() else _existing(place, spec)
        return Wanted(str(path), path)
    repo, subfolders = place
    for subfolder in subfolders:
        copies = [cached_file(repo, f"{subfolder}/{f}".strip("/")) for f in FILES]
        if all(copies):
            return Wanted(f"{WEIGHTS} of {repo}", copies[-1])
    url = hf_hub_url(repo, WEIGHTS, subfolder=subfolders[0] or None)
    return Wanted(f"{WEIGHTS} of {repo}", None, url, _remedy(repo))


def _is_random(spec: str, weights: str | Path | None) -> bool:
    return weights is None or (weights == "hub" and spec in VAES and VAES[spec].hub is None)


def _existing(path: Path, spec: str) -> Path:
    if not path.is_file():
        raise UserError(f"vae.weights={path}: no such file or folder; expected weights of {spec}")
    return path


def _new(config: Mapping, origin) -> AutoencoderKL | AutoencoderKLQwenImage:
    """The network that a diffusers config describes, randomly initialised."""
    class_name = config.get("_class_name")
    if class_name not in CLASSES:
        raise UserError(f"{origin} is a {class_name}, not a VAE: expected {' or '.join(CLASSES)}")
    return CLASSES[class_name].from_config(dict(config))


def _load_folder(folder: Path) -> AutoencoderKL | AutoencoderKLQwenImage:
    # not from_pretrained: it fills missing tensors with random numbers, and keeps half precision
    net = _new(json.loads((folder / "config.json").read_text()), folder)
    weights = _weights_in(folder)
    _load_strict(net, to_diffusers(read_state(weights)), weights, "its config.json")
    return net


def _weights_in(folder: Path) -> Path:
    if not (folder / WEIGHTS).is_file():
        raise UserError(f"{folder} holds no {WEIGHTS}: save it again with save_pretrained")
    return folder / WEIGHTS


def _load_strict(net: nn.Module, state: Mapping[str, Tensor], origin, what: str) -> None:
    require_match(net.state_dict(), state, origin, what)
    net.load_state_dict(state, strict=True)


def _config(spec: str) -> dict:
    """diffusers config, with `_class_name`, of anything that `load_vae` takes."""
    if spec in VAES:
        row = VAES[spec]
        scalars = {"scaling_factor": row.scaling, "shift_factor": row.shift} if row.scaling else {}
        return ARCHITECTURES[row.architecture] | scalars
    path = _locate(spec, ("config.json",))
    if path.is_dir():
        return json.loads((path / "config.json").read_text())
    state = read_state(path)
    if not is_compvis(state):
        raise UserError(
            f"{path} has no CompVis key names, so its architecture is unknown: give a short name "
            f"and vae.weights={path}, or a diffusers folder"
        )
    return infer_config(to_diffusers(state), path)


def _locate(spec: str, files: tuple[str, ...] = FILES) -> Path:
    """Local folder or file that `spec` names; of a hub repository, a local copy of `files`."""
    place = _place(spec)
    return place if isinstance(place, Path) else _hub_folder(*place, files)


def _place(spec: str) -> Path | tuple[str, tuple[str, ...]]:
    """What `spec` names: a local folder or file, or a hub repository and the subfolders to try."""
    if spec in VAES and VAES[spec].hub:
        return VAES[spec].hub, (VAES[spec].subfolder,)
    path = Path(spec)
    if path.exists():
        return _local_folder(path) if path.is_dir() else path
    if spec.count("/") == 1 and path.suffix not in STATE_FILES and not spec.startswith((".", "/")):
        return spec, ("", "vae")
    near = get_close_matches(spec, VAES, n=1)
    hint = f"did you mean {near[0]}?" if near else f"the short names are {', '.join(VAES)}"
    raise UserError(f"no VAE {spec}: not a short name, file, folder or hub id; {hint}")


def _local_folder(path: Path) -> Path:
    for folder in (path, path / "vae"):
        if (folder / "config.json").is_file():
            return folder
    raise UserError(f"{path} is no diffusers VAE: no config.json in it, nor in {path / 'vae'}")


def _hub_folder(repo: str, subfolders: tuple[str, ...], files: tuple[str, ...]) -> Path:
    """Cached or downloaded copy of the first of `subfolders` that exists in a hub repository."""

    def cached(subfolder: str) -> bool:
        return cached_file(repo, f"{subfolder}/config.json".strip("/")) is not None

    reason = ""
    # cached ones first: without a network, each look at the hub is half a minute of retries
    for subfolder in sorted(subfolders, key=cached, reverse=True):
        try:
            copies = [hf_hub_download(repo, file, subfolder=subfolder or None) for file in files]
            return Path(copies[0]).parent
        except (EntryNotFoundError, OSError, ValueError) as error:
            reason = type(error).__name__
            if not isinstance(error, RemoteEntryNotFoundError):
                break  # no network, no such repository, no access: the next would fail alike
    raise UserError(
        f"{' and '.join(files)} of {repo} not found ({reason}): looked on the hub and in "
        f"{HF_HUB_CACHE}; {_remedy(repo)}"
    )


def _remedy(repo: str) -> str:
    return (
        f"run `hf download {repo} --local-dir DIR` where there is a network, then set "
        "vae.weights=DIR"
    )
