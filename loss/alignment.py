"""Representation alignment (REPA, arXiv 2410.06940, Eq. 8): SiT tokens against an encoder's."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from models.layers.autocast import at_least_float32


def alignment_loss(
    projected: Sequence[torch.Tensor], feats: Sequence[torch.Tensor]
) -> torch.Tensor:
    """The SiT's projected tokens and the encoders' features, for each encoder (N, T, D_enc) of both
    => negative cosine similarity, mean over tokens, images and encoders.

    -1: all tokens point the same way as their feature; 1: the opposite way. Normalised in float32:
    norms in half precision are a known source of NaN after 70K to 160K steps.
    """
    assert len(projected) == len(feats) > 0, (len(projected), len(feats))
    return -torch.stack([_cosine(h, f) for h, f in zip(projected, feats)]).mean()


def _cosine(h: torch.Tensor, f: torch.Tensor) -> torch.Tensor:
    assert h.shape == f.shape, (h.shape, f.shape)
    h, f = (F.normalize(at_least_float32(tokens), dim=-1) for tokens in (h, f))
    return (h * f).sum(dim=-1).mean()


def spatial_normalize(feats: torch.Tensor, alpha: float) -> torch.Tensor:
    """Encoder features (N, T, D) => (feats - alpha * mean) / std, mean and std over the tokens of
    an image: iREPA (arXiv 2512.10794), whose alpha is 0.6.

    It takes away what all patches of an image share and keeps how they differ.
    """
    f = at_least_float32(feats)
    mean, std = f.mean(dim=1, keepdim=True), f.std(dim=1, keepdim=True)
    return (f - alpha * mean) / (std + 1e-6)
