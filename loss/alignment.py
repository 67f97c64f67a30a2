"""Representation alignment (REPA, arXiv 2410.06940, Eq. 8): SiT tokens against frozen-encoder tokens."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F


def alignment_loss(hs: Sequence[torch.Tensor], feats: Sequence[torch.Tensor]) -> torch.Tensor:
    """Projected tokens and encoder features, a (N, T, D_enc) pair for each encoder => scalar in [-1, 1].

    Negative cosine similarity, mean over tokens, images and encoders; -1 is perfect. Normalised in
    float32: half-precision norms are a known source of NaN after 70K to 160K steps.
    """
    assert len(hs) == len(feats) > 0, (len(hs), len(feats))
    return -torch.stack([_cosine(h, f) for h, f in zip(hs, feats)]).mean()


def _cosine(h: torch.Tensor, f: torch.Tensor) -> torch.Tensor:
    assert h.shape == f.shape, (h.shape, f.shape)
    h, f = F.normalize(h.float(), dim=-1), F.normalize(f.float(), dim=-1)
    return (h * f).sum(dim=-1).mean()


def spatial_normalize(feats: torch.Tensor, alpha: float) -> torch.Tensor:
    """(N, T, D) => (f - alpha * mean over tokens) / std over tokens: iREPA (arXiv 2512.10794), whose
    alpha is 0.6. Takes away what all patches of an image share and keeps its spatial structure."""
    f = feats.float()
    mean, std = f.mean(dim=1, keepdim=True), f.std(dim=1, keepdim=True)
    return (f - alpha * mean) / (std + 1e-6)
