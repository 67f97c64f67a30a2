"""The Inception Score, as the ADM suite has it, with a log-softmax: zero probabilities add none."""

import numpy as np
import torch


def inception_score(pool, weight, order=None, *, split_size: int) -> tuple[float, float]:
    """Mean and std over splits of exp(KL(p(y|x) || p(y))); pool (N, D), weight (K, D), no bias.
    Splits are `split_size` consecutive images, the last one may be shorter; `order` (N,) permutes
    the images first. Softmax in float64 through logs: a zero probability contributes zero."""
    pool, weight = torch.as_tensor(pool), torch.as_tensor(weight).float()
    pool = pool if order is None else pool[torch.as_tensor(order)]
    scores = []
    for rows in pool.split(split_size):
        log_p = (rows.to(weight) @ weight.T).double().log_softmax(1)
        p = log_p.exp()
        marginal = p.mean(0)
        kl = (p * log_p).sum(1).mean() - torch.xlogy(marginal, marginal).sum()
        scores.append(kl.exp().item())
    return float(np.mean(scores)), float(np.std(scores))
