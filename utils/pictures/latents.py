"""Latents of several VAEs side by side: the pictures of `visualize_latents.py latents`.

M images a basis is fitted on, N images shown, C latent channels.
"""

from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from models.checks.errors import UserError
from models.vae import VAE, build_vae, load_vae
from utils.data.base import Source
from utils.data.images import pm1_to_u8, u8_to_pm1
from utils.distributed import default_device
from utils.evaluation.formulas.pictures import LatentStatistics
from utils.pictures.grid import Row, name_of
from utils.pictures.pca import Basis, fit_basis, to_rows
from utils.sampling.locate import locate_vae_spec

CHUNK = 16  # images encoded at a time


class Encoded(NamedTuple):
    """What one VAE made of the images."""

    label: str
    z: Tensor  # (N, C, h, w) float32 of the images shown
    fit: Tensor  # (M, C, h, w) of those that a basis is fitted on
    x_hat_u8: Tensor | None  # (N, 3, H, W) reconstructions; None if not asked for


def latent_rows(
    source: Source, vaes: list[str], num: int, fit: int, basis: str, reconstructions: bool
) -> list[Row]:
    """A row of `num` images, then for each VAE of `vaes` ("[LABEL=]SPEC") one of its latents'
    colours and, if asked for, one of its reconstructions. Figures are printed.

    basis: own, shared or first, see `choose_bases`; `fit` images are encoded for it. Raises
    `UserError` for VAEs that cannot be loaded or compared.
    """
    specs = [split_label(word) for word in vaes]
    specs = [(label, locate_vae_spec(spec)) for label, spec in specs]
    check_channels(specs, source.resolution, basis)
    encoded = [encode(*spec, source, num, fit, reconstructions) for spec in specs]
    images = torch.stack([source[i][0] for i in spread(len(source), num)])
    rows = [Row("images", [f"{source.resolution} px"], images)]
    for e, its_basis in zip(encoded, choose_bases([e.fit for e in encoded], basis)):
        shape = " x ".join(map(str, e.z.shape[1:]))
        shares = its_basis.explained(to_rows(e.fit)).tolist()
        print(f"{e.label}: {len(e.fit)} latents of {shape}")
        print_figures(e.fit, shares)
        percent = " + ".join(f"{100 * share:.0f}" for share in shares)
        rows.append(Row(e.label, [shape, f"{percent} %"], its_basis.colours(e.z)))
        if e.x_hat_u8 is not None:
            rows.append(Row(e.label, ["reconstruction"], e.x_hat_u8))
    return rows


def split_label(word: str) -> tuple[str, str]:
    """[LABEL=]SPEC => label, spec. A `=` in the name of a file or folder makes no label."""
    label, _, spec = word.partition("=")
    if label and spec and not Path(word).exists():
        return label, spec
    return " ".join(name_of(Path(word))), word


def check_channels(specs: list[tuple[str, str]], resolution: int, basis: str) -> None:
    """Raise `UserError` before anything is encoded."""
    with torch.device("meta"):
        channels = [build_vae(spec).latent_shape(resolution)[0] for _, spec in specs]
    if basis != "own" and len(set(channels)) > 1:
        found = ", ".join(f"{label} {c}" for (label, _), c in zip(specs, channels))
        text = f"--basis {basis} needs VAEs of equally many latent channels, not {found}"
        raise UserError(f"{text}: take --basis own, or draw them apart")


def spread(total: int, num: int) -> list[int]:
    """Indices of `num` of `total` images at equal distances; all if there are fewer."""
    num = min(num, total)
    return [i * total // num for i in range(num)]


@torch.no_grad()
def encode(label: str, spec: str, source: Source, num: int, fit: int, decode: bool) -> Encoded:
    """Posterior means by one VAE, and with `decode` its reconstructions, on the CPU."""
    vae = load_vae(spec).eval().to(default_device())
    z, z_fit = (_posterior_means(vae, source, count) for count in (num, fit))
    if not (z.isfinite().all() and z_fit.isfinite().all()):
        raise UserError(f"--vae {spec}: its latents are not finite; take other weights")
    x_hat_u8 = None
    if decode:
        chunks = z.to(default_device()).split(CHUNK)
        x_hat_u8 = torch.cat([pm1_to_u8(vae.decode(some)).cpu() for some in chunks])
    return Encoded(label, z, z_fit, x_hat_u8)


def _posterior_means(vae: VAE, source: Source, num: int) -> Tensor:
    """(num, C, h, w) float32 on the CPU."""
    means, indices = [], spread(len(source), num)
    for k in range(0, len(indices), CHUNK):
        x_u8 = torch.stack([source[i][0] for i in indices[k : k + CHUNK]])
        means.append(vae.encode(u8_to_pm1(x_u8).to(default_device())).mean.cpu())
    return torch.cat(means)


def choose_bases(fits: list[Tensor], kind: str) -> list[Basis]:
    """One basis for each VAE, given its latents (M, C, h, w). own: fitted on its own latents;
    shared: on all VAEs' latents together; first: on those of the first VAE."""
    if kind == "own":
        return [fit_basis(to_rows(z)) for z in fits]
    rows = to_rows(fits[0]) if kind == "first" else torch.cat([to_rows(z) for z in fits])
    return [fit_basis(rows)] * len(fits)


def print_figures(z: Tensor, shares: list[float]) -> None:
    """Explained variance, and the two scalars of the paper's Table 10 for latents (M, C, h, w).
    The latter scale with the latents: hence once more without their scale."""
    each = " + ".join(f"{share:.1%}" for share in shares)
    print(f"  variance explained by the three axes: {each} = {sum(shares):.1%}")
    std = to_rows(z).std(0, correction=0).clamp(min=1e-12).view(1, -1, 1, 1)
    for what, some in (("as they are", z), ("channels divided by their std", z / std)):
        statistics = LatentStatistics(z.shape[1])
        statistics.add(some)
        found = statistics.result()
        variance, variation = found["spatial_variance"], found["total_variation"]
        print(f"  spatial variance {variance:.4g}, total variation {variation:.4g} ({what})")
