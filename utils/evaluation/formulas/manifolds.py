"""Precision and recall (arXiv 1904.06991): which images lie within the manifold of another set.

The manifold of a set is the union of balls around its points that reach to the k-th nearest
neighbour. Squared distances are taken as |u|^2 - 2 u.v + |v|^2 in one of two arithmetics:

fp32      float32
adm_fp16  that of the ADM suite under TensorFlow on a CPU: float16, whose ties widen the manifolds.
          Every step is rounded to float16. u.v is summed in float32, |u|^2 in float16 and in the
          order of Eigen (`squared_norms`). A block of 10,000 x 10,000 distances of which one is not
          finite is computed in float32 instead.

On tight clusters the order of the sums moves precision and recall by 0.01 to 0.02. Published tables
come from GPUs, on which TensorFlow adds in another, undocumented order; this one can be checked.
The order inside u.v depends on the machine's caches there and is not followed: 1 to 25 in 10,000
distances differ by one step of float16. Of 132 sets of up to 499 images none had other numbers for
it; of one with 10,400, one image did (recall 0.83577 and 0.83587).
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from models.checks.errors import UserError

# edge of ADM's blocks of distances: float16 or float32 is decided for each such block
ADM_BLOCK = 10_000
# memory for the distances that exist at a time, and what a pair of points takes of it, in bytes
BUDGET, PAIR_BYTES = 2**30, 20
# Eigen's sum of float16: values in a packet, packets that are summed side by side, and the length
# above which a sum is split into two (200 packets)
PACKET, SIDE_BY_SIDE, LEAF = 8, 4, 1600
# squared norms below this have finite float16 distances: (|u| + |v|)^2 is half of the greatest one
SURELY_FINITE = 2.0**13


def precision_recall(real, fake, k: int, mode: str, block: int = ADM_BLOCK) -> tuple[float, float]:
    """Share of `fake` (M, D) in the manifold of `real` (N, D), and of `real` in that of `fake`;
    float32 features. `UserError` for k points or fewer."""
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
            for part, d in block_distances(real[rows], fake[cols], mode):
                fake_inside[cols] |= (d <= real_radii[rows][part, None]).any(0)
                real_inside[rows][part] |= (d <= fake_radii[None, cols]).any(1)
    return fake_inside.double().mean().item(), real_inside.double().mean().item()


def manifold_radii(feats: Tensor, k: int, mode: str, block: int = ADM_BLOCK) -> Tensor:
    """Squared distance of each point (N, D) to its k-th neighbour, itself not counted => (N,)."""
    nearest = torch.full((len(feats), k + 1), torch.inf, device=feats.device)
    for rows, found in zip(feats.split(block), nearest.split(block)):
        for cols in feats.split(block):
            for part, d in block_distances(rows, cols, mode):
                of_block = d.topk(min(k + 1, d.shape[1]), dim=1, largest=False).values
                both = torch.cat([found[part], of_block], 1)
                found[part] = both.topk(k + 1, dim=1, largest=False).values
    return nearest[:, k]


def block_distances(u: Tensor, v: Tensor, mode: str) -> Iterator[tuple[slice, Tensor]]:
    """Squared distances of u (n, D) and v (m, D), which are one block of ADM's, in the arithmetic
    of `mode`: (rows of u, float32 (rows, m)), as many rows at a time as `BUDGET` allows."""
    assert mode in ("adm_fp16", "fp32"), mode
    yield from _distances(u, v, mode == "adm_fp16" and not _overflows(u, v))


def _overflows(u: Tensor, v: Tensor) -> bool:
    """Whether a float16 distance of the block is not finite."""
    norms = torch.cat([squared_norms(u.half()), squared_norms(v.half())])
    if not torch.isfinite(norms).all():
        return True
    if norms.max() < SURELY_FINITE:
        return False
    return not all(torch.isfinite(d).all() for _, d in _distances(u, v, half=True))


def _distances(u: Tensor, v: Tensor, half: bool) -> Iterator[tuple[slice, Tensor]]:
    if half:
        u, v = u.half(), v.half()
    norm_u, norm_v = squared_norms(u), squared_norms(v)
    # float32 products of float16 are exact, and so only their sum is rounded
    u, v, dtype = u.float(), v.float(), norm_u.dtype
    rows = max(1, BUDGET // (PAIR_BYTES * len(v)))
    for start in range(0, len(u), rows):
        part = slice(start, start + rows)
        d = (u[part] @ v.T).to(dtype).mul_(-2)
        yield part, d.add_(norm_u[part, None]).add_(norm_v).clamp_(min=0).float()


def squared_norms(x: Tensor) -> Tensor:
    """Sum of the squares of each row (n, D) => (n,), in the dtype of `x`. Float16 is summed as
    Eigen does: see `_eigen_sum`."""
    squares = x.square()
    return _eigen_sum(squares) if x.dtype == torch.float16 else squares.sum(1)


def _eigen_sum(x: Tensor) -> Tensor:
    """Sums of float16 rows (n, D) in the order of Eigen's reductions with packets of 8, which is
    that of AVX and AVX2 (TensorFlow's wheels): every partial sum is rounded to float16, but the
    8 values of the last packet are summed in float32. D is at most 1600 or a multiple of 8."""
    n, dim = x.shape
    if dim > LEAF:
        left = -(-dim // (2 * PACKET)) * PACKET
        return _eigen_sum(x[:, :left]) + _eigen_sum(x[:, left:])
    wide = dim // (PACKET * SIDE_BY_SIDE) * PACKET * SIDE_BY_SIDE
    sums = x.new_zeros(n, SIDE_BY_SIDE, PACKET)
    for each in x[:, :wide].reshape(n, -1, SIDE_BY_SIDE, PACKET).unbind(1):
        sums += each
    packet = sums[:, 0] + sums[:, 1] + sums[:, 2] + sums[:, 3]
    for each in x[:, wide : dim // PACKET * PACKET].reshape(n, -1, PACKET).unbind(1):
        packet += each
    rest = x.new_zeros(n)
    for each in x[:, dim // PACKET * PACKET :].unbind(1):
        rest += each
    pairs = packet.float().view(n, 2, 4).sum(1)
    pairs = pairs[:, :2] + pairs[:, 2:]
    return rest + (pairs[:, 0] + pairs[:, 1]).half()
