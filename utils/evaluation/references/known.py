"""Published files of reference statistics: by their sha256, and by what their names tell.

A hash proves which file it is. A name proves nothing, and is only ever quoted as a name.
"""

import re
from dataclasses import dataclass

TF1 = "TF1 bilinear"  # of the Inception graph of 2015: no half-pixel centres, no antialias
HALF_PIXEL = "half-pixel bilinear"  # torch's, in pytorch-fid
UNKNOWN = "unknown"


@dataclass(frozen=True)
class Published:
    """A file that somebody has published, and whose hash is known here."""

    name: str
    made_by: str
    # how images were brought to the 299 x 299 pixels of Inception
    resized_by: str
    # images behind mean and covariance; None = not known
    n: int | None
    # side of the images in pixels
    resolution: int
    # whether the tables of ADM, DiT, SiT, REPA and REPA-E were measured against it
    of_adm_suite: bool
    # where the hash can be looked up
    source: str


KNOWN = {
    "b32732719497e42660a9affb4a966068cba0855ac449b82015e34ec376d20758": Published(
        "VIRTUAL_imagenet256_labeled.npz", "the ADM evaluation suite", TF1, 1_281_167, 256, True,
        "Git LFS pointer in github.com/ruizegao/efficient-dit at 7431e92; of 2,037,122,530 bytes",
    ),
    "925e8b5b4ced42137f9847f97a63250a2bd59b70f33f3f356e03453d0775f1ac": Published(
        "imagenet_256_fid_stats.npz", "iMF, with JAX on a TPU", UNKNOWN, None, 256, False,
        "huggingface.co/datasets/nanovisionx/nanogen-evals-stats at 0227134",
    ),
}  # fmt: skip

# what the name of a file without further marks says: pattern => who made it, what resized
NAMED = {
    r"adm_in\d+_stats": ("MAR, from mu and sigma of the ADM suite's file", TF1),
    r"jit_in\d+_stats": ("JiT, for torch-fidelity", UNKNOWN),
    r"imagenet_\d+_fid_stats": ("iMF, with JAX on a TPU", UNKNOWN),
    r".+_clean_.+": ("clean-fid, mode clean", "PIL bicubic"),
    r".+_legacy_pytorch_.+": ("clean-fid, mode legacy_pytorch", HALF_PIXEL),
    r".+_legacy_tensorflow_.+": ("clean-fid, mode legacy_tensorflow", TF1),
}


def named(stem: str) -> tuple[str, str] | None:
    """Who made a file of this name, and what resized its images, if it is what its name says."""
    return next((said for name, said in NAMED.items() if re.fullmatch(name, stem)), None)
