"""A fast stand-in for a feature network, and for the record beside samples."""

import torch

from utils.evaluation.images.beside import hash_settings
from utils.evaluation.networks import FeatureNet


def sampling_record(num: int, **settings) -> dict:
    """What sample_ddp.py writes beside `num` samples, as far as the evaluator reads it."""
    settings = {"solver": "sde", "num_samples": num} | settings
    return {"settings": settings, "settings_sha256": hash_settings(settings)}


def toy_net(dim: int = 8, published: bool = False, family: str = "inception") -> FeatureNet:
    """Both features from the image: its first 2 * `dim` pixels, averaged over the colours."""

    def forward(x):
        flat = x.float().flatten(2).mean(1) / 255
        return {"pool": flat[:, :dim], "spatial": flat[:, dim : 2 * dim]}

    return FeatureNet(family, "toy", published, {"dim": dim}, torch.device("cpu"), forward,
                      10 * torch.eye(dim))  # fmt: skip
