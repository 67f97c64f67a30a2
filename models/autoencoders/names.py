"""What else a published VAE is called, beside its short name."""

import os

from models.autoencoders.families import VAES, PublishedVAE
from models.weights.hub import repository

# repositories with the same weights under CompVis names, which came before the diffusers folders
FIRST_RELEASES = {f"REPA-E/{name}": name for name in ("e2e-sdvae", "e2e-invae", "e2e-vavae")}
FIRST_RELEASES |= {"REPA-E/sdvae": "sdvae", "REPA-E/vavae": "vavae"}
FIRST_RELEASES |= {
    "stabilityai/sd-vae-ft-mse-original": "sdvae",
    "stabilityai/sd-vae-ft-ema-original": "sdvae-ema",
}
REPOSITORIES = FIRST_RELEASES | {row.repo: name for name, row in VAES.items() if row.repo}
# what a VAE may be called, in lower case => its short name: that, its repository, or the last part
# of its repository's name
ALIASES = {repo.split("/")[-1].lower(): name for repo, name in REPOSITORIES.items()}
ALIASES |= {repo.lower(): name for repo, name in REPOSITORIES.items()}
ALIASES |= {name: name for name in VAES}


def short_name(spec: str) -> str:
    """The short name, key of `VAES`, of whatever a published VAE is called: "sdvae",
    "sd-vae-ft-mse", "stabilityai/sd-vae-ft-mse", the address of its page. Of another repository
    OWNER/NAME; anything else, and a file or folder of that name, as it is."""
    if spec in VAES or os.path.lexists(spec):
        return spec
    spec = repository(spec)
    return ALIASES.get(spec.lower(), spec)


def published_vae(spec: object) -> PublishedVAE | None:
    """The row of `VAES` that `spec` means; None if it means none."""
    return VAES.get(short_name(str(spec)))
