"""What can be asked of the evaluator, and in which words; imports no torch, so --help is quick."""

from dataclasses import dataclass
from pathlib import Path

from models.checks.errors import UserError
from utils.cli import expand_path

# how to name a feature network: `utils.evaluation.networks.load_features` reads these
FEATURES = "inception, dinov2, timm:NAME[@CKPT] or pixel"
# the published statistics of ImageNet, by resolution: files of ADM's evaluation suite
REFERENCES = {256: "VIRTUAL_imagenet256_labeled.npz", 512: "VIRTUAL_imagenet512.npz"}
# the weight files of published metrics
PUBLISHED = {
    "inception": {
        "name": "weights-inception-2015-12-05-6726825d.pth",
        "url": "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/"
        "weights-inception-2015-12-05-6726825d.pth",
        "sha256": "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2",
    },
    "dinov2": {
        "name": "dinov2_vitl14_pretrain.pth",
        "url": "https://dl.fbaipublicfiles.com/dinov2/dinov2_vitl14/dinov2_vitl14_pretrain.pth",
        "sha256": "d5383ea8f4877b2472eb973e0fd72d557c7da5d3611bd527ceeb1d7162cbf428",
    },
}

# arithmetic of the distances behind precision and recall: ADM's float16, or float32
PR_MODES = ("adm_fp16", "fp32")


@dataclass(frozen=True)
class Options:
    """How to evaluate. The defaults are those of paper tables."""

    # the feature network, named as in `FEATURES`
    features: str = "inception"
    # names of metrics, which features and reference must allow; None = the default ones they allow
    metrics: tuple[str, ...] | None = None
    # weight file of inception or dinov2; None = the published one, in torch's hub cache
    weights: str | None = None
    # its sha256, if it is not the published file
    weights_sha256: str | None = None
    # whether published weights that are missing may be downloaded
    download: bool = False
    # images per rank and batch
    batch_size: int = 64
    # threads of each rank that read images
    workers: int = 8
    # one of `PR_MODES`
    pr_mode: str = PR_MODES[0]
    # whether numbers get a standard error
    uncertainty: bool = False
    # folder in which the statistics of reference images are kept; None = keep none
    cache: str | Path | None = "~/.cache/repa_e/statistics"


def parse_features(spec: str) -> tuple[str, str, str | None]:
    """`timm:NAME@CKPT` => ("timm", NAME, CKPT); others => (spec, "", None). Else `UserError`.
    Whether timm has a network NAME is seen when it is loaded."""
    family, _, rest = spec.partition(":")
    name, _, checkpoint = rest.partition("@")
    if (family == "timm") != bool(name) or family not in (*PUBLISHED, "timm", "pixel"):
        raise UserError(f"--features {spec!r}: expected {FEATURES}")
    return family, name, expand_path(checkpoint) if checkpoint else None


def sampling_settings(record: dict | None) -> dict:
    """The settings in a record of sample_ddp.py; empty for anything else of the same name."""
    settings = record.get("settings", record) if isinstance(record, dict) else {}
    return settings if isinstance(settings, dict) and "solver" in settings else {}
