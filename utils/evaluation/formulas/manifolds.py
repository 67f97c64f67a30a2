"""Precision and recall: which images lie within the manifold of another set."""

import torch
from torch import Tensor

from models.errors import UserError

# edge of ADM's blocks of distances: its test for float16 overflow is made for each such block
DISTANCE_BLOCK = 10_000


def precision_recall(real, fake, k: int, mode: str, block: int = DISTANCE_BLOCK):
    """Improved precision and recall (arXiv 1904.06991) of features (N, D), float32 => two floats.
    The manifold of a set is the union of balls around its points that reach to the k-th nearest
    neighbour. `mode` "adm_fp16" repeats the float16 distances of the ADM suite, whose ties widen
    the manifolds slightly in all published tables; "fp32" does not. Needs 12 * block^2 bytes."""
    real, fake = torch.as_tensor(real).float(), torch.as_tensor(fake).float()
    for name, feats in (("reference", real), ("samples", fake)):
        if len(feats) < k + 1:
            raise UserError(f"{len(feats)} images in the {name}: precision/recall with k = {k} "
                            f"needs at least {k + 1}; give more images")  # fmt: skip
    real_radii, fake_radii = (manifold_radii(feats, k, mode, block) for feats in (real, fake))
    real_inside = torch.zeros_like(real_radii, dtype=torch.bool)
    fake_inside = torch.zeros_like(fake_radii, dtype=torch.bool)
    for i in range(0, len(real), block):
        for j in range(0, len(fake), block):
            rows, cols = slice(i, i + block), slice(j, j + block)
            d = squared_distances(real[rows], fake[cols], mode)
            fake_inside[cols] |= (d <= real_radii[rows, None]).any(0)
            real_inside[rows] |= (d <= fake_radii[None, cols]).any(1)
    return fake_inside.double().mean().item(), real_inside.double().mean().item()


def manifold_radii(feats: Tensor, k: int, mode: str, block: int = DISTANCE_BLOCK) -> Tensor:
    """Squared distance of each point (N, D) to its k-th neighbour, itself not counted => (N,)."""
    radii = []
    for rows in feats.split(block):
        nearest = torch.full((len(rows), k + 1), torch.inf, device=feats.device)
        for cols in feats.split(block):
            d = squared_distances(rows, cols, mode)
            found = d.topk(min(k + 1, d.shape[1]), dim=1, largest=False).values
            nearest = torch.cat([nearest, found], 1).topk(k + 1, dim=1, largest=False).values
        radii.append(nearest[:, k])
    return torch.cat(radii)


def squared_distances(u: Tensor, v: Tensor, mode: str) -> Tensor:
    """Float32 (n, m) of u (n, D), v (m, D), in the arithmetic of `mode`. ADM casts to float16, with
    float32 for a whole block in which anything overflows."""
    assert mode in ("adm_fp16", "fp32"), mode
    if mode == "adm_fp16":
        # norms and products are rounded to float16, the sums inside each kept in float32 as on GPUs
        norm_u, norm_v = ((a.half() * a.half()).float().sum(1).half() for a in (u, v))
        d = (u.half().float() @ v.half().float().T).half()
        d.mul_(-2).add_(norm_u[:, None]).add_(norm_v).clamp_(min=0)
        if torch.isfinite(d).all():
            return d.float()
    gram = u @ v.T
    return gram.mul_(-2).add_(u.square().sum(1)[:, None]).add_(v.square().sum(1)).clamp_(min=0)
