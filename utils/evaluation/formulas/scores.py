"""The Inception Score and the Kernel Inception Distance, and what their standard errors need.

The score is that of the ADM suite, with a log-softmax: zero probabilities add none. The distance is
that of Binkowski et al. (arXiv 1801.01401), its subsets drawn as torch-fidelity draws them.
"""

from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from utils.evaluation.formulas.uncertainty import GROUPS, group_of


def inception_score(pool, weight, order=None, *, split_size: int) -> tuple[float, float]:
    """Mean and std over splits of exp(KL(p(y|x) || p(y))); pool (N, D), weight (K, D), no bias.
    Splits are `split_size` consecutive images, the last one may be shorter; `order` (N,) permutes
    the images first. Softmax in float64 through logs: a zero probability contributes zero."""
    pool = torch.as_tensor(pool)
    pool = pool if order is None else pool[torch.as_tensor(order)]
    scores = []
    for p, negative_entropy in _predictions(pool, weight, split_size):
        scores.append(_score(p.mean(0), negative_entropy.mean()).item())
    return float(np.mean(scores)), float(np.std(scores))


def inception_score_without(pool, weight, *, split_size: int) -> np.ndarray:
    """The score without each of the groups of a jackknife, the splits unchanged => (G,)."""
    pool = torch.as_tensor(pool)
    members = _members(np.arange(len(pool)), pool.device)
    scores = []
    for of_group, (p, negative_entropy) in zip(
        members.split(split_size), _predictions(pool, weight, split_size)
    ):
        n = (len(p) - of_group.sum(0))[:, None]
        marginal = (p.sum(0) - of_group.T @ p) / n
        scores.append(_score(marginal, (negative_entropy.sum() - negative_entropy @ of_group)
                             / n[:, 0]))  # fmt: skip
    # a split of fewer images than groups may vanish with a group
    return torch.stack(scores).nanmean(0).cpu().numpy()


def _predictions(pool: Tensor, weight, split_size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Of each split: p(y|x) (n, K) and sum_y p log p (n,), float64."""
    weight = torch.as_tensor(weight).float()
    for rows in pool.split(split_size):
        log_p = (rows.to(weight) @ weight.T).double().log_softmax(1)
        p = log_p.exp()
        yield p, (p * log_p).sum(1)


def _score(marginal: Tensor, negative_entropy: Tensor) -> Tensor:
    """exp of the mutual information, from p(y) (..., K) and the mean of sum_y p log p (...)."""
    return (negative_entropy - torch.xlogy(marginal, marginal).sum(-1)).exp()


def _members(indices: np.ndarray, device: torch.device) -> Tensor:
    """(n, G) float64: 1 where an image of that index is in the group."""
    group = torch.from_numpy(group_of(int(indices.max()) + 1)[indices])
    return F.one_hot(group, GROUPS).double().to(device)


def kid_of_subsets(
    samples: Tensor, reference: Tensor, *, subsets: int, size: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Unbiased squared MMD with the kernel (x.y / D + 1)^3 of features (N, D) and (M, D), in
    float64, of each of `subsets` pairs of random subsets of `size` images => (S,); and the mean
    over the subsets without each of the groups of a jackknife of the samples => (G,)."""
    draw = np.random.RandomState(seed)  # the generator of torch-fidelity, for equal subsets
    values, without = [], []
    for _ in range(subsets):
        chosen = draw.choice(len(samples), size, replace=False)
        x = samples[torch.from_numpy(chosen)].double()
        y = reference[torch.from_numpy(draw.choice(len(reference), size, replace=False))].double()
        of_x, of_y, across = _kernel(x, x), _kernel(y, y), _kernel(x, y).mean(1)
        of_x.fill_diagonal_(0)
        within_y = (of_y.sum() - of_y.trace()) / (size * (size - 1))
        group = _members(chosen, x.device)
        n, to_all = size - group.sum(0), of_x.sum(1)
        pairs = to_all.sum() - 2 * to_all @ group + ((of_x @ group) * group).sum(0)
        left = pairs / (n * (n - 1)) + within_y - 2 * (across.sum() - across @ group) / n
        without.append(left.cpu().numpy())
        value = to_all.sum() / (size * (size - 1)) + within_y - 2 * across.mean()
        values.append(value.item())
    return np.array(values), np.nanmean(without, 0)


def _kernel(x: Tensor, y: Tensor) -> Tensor:
    return (x @ y.T / x.shape[1] + 1) ** 3
