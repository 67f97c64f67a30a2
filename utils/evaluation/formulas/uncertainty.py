"""How much a number would move if the samples were drawn again: its standard error.

A jackknife over `GROUPS` groups: the number is computed again without each of the groups, and the
standard deviation of the results times sqrt(G - 1) is the standard error for all N images. What
depends on N alone, as the bias of a Frechet distance, is the same in all results and drops out. The
reference counts as fixed: it is the same for the runs that are compared.

Groups are interleaved (image i is in group i mod G), and G is prime: samples whose labels come in
turn, or sorted, are then split evenly, class by class, as they were drawn. A Frechet distance is
partly a sum of squares of small deviations, of whose variance a jackknife sees twice as much: the
standard error is right where the distance is much above its value for equal distributions, and up
to sqrt(2) too large near that. In simulations (features in classes, D 32 to 96, N / D 1 to 250) it
was 1.1 to 1.55 times the spread over 80 to 250 draws; three disjoint thirds gave 1.1 to 2.4 times.
"""

from collections.abc import Sequence

import numpy as np

from utils.evaluation.formulas.frechet import Statistics, frechet_between

GROUPS = 13


def jackknife(without: Sequence[float] | np.ndarray) -> float:
    """Standard error of a number from its values without each group (G,)."""
    values = np.asarray(without, np.float64)
    return float(np.sqrt((len(values) - 1) * values.var()))


def group_of(n: int, groups: int = GROUPS) -> np.ndarray:
    """The group of each of n images: (n,) int."""
    return np.arange(n) % groups


def frechet_error(reference: Statistics, samples: Statistics) -> float:
    """Standard error of a Frechet distance; `samples.groups` are needed."""
    number = range(len(samples.groups))
    return jackknife([frechet_between(reference, without_group(samples, i)) for i in number])


def without_group(all_images: Statistics, number: int) -> Statistics:
    """Statistics of all images but those of one group: from the moments, which are exact, and with
    the rows if they were kept."""
    group = all_images.groups[number]
    assert all_images.n is not None and group.n is not None
    n, shift = all_images.n - group.n, group.mean - all_images.mean
    moved = -shift * group.n / n
    scatter = (all_images.n - 1) * all_images.cov - (group.n - 1) * group.cov
    scatter -= group.n * np.outer(shift, shift) + n * np.outer(moved, moved)
    rows = all_images.rows
    if rows is not None:
        rows = rows[group_of(all_images.n, len(all_images.groups)) != number]
    return Statistics(n, all_images.mean + moved, scatter / (n - 1), rows)


def share_error(share: float, n: int) -> float:
    """Standard error of the share of n points that lie in a manifold, taken as independent, with
    two points more inside and outside (Agresti and Coull): no share is certain. It was
    0.9 to 1.3 times the spread of precision over 60 draws of the samples, and 0.8 to 1.2 times that
    of recall with the n of the smaller set (D 8 to 64, 200 to 3,000 points)."""
    share = (share * n + 2) / (n + 4)
    return float(np.sqrt(share * (1 - share) / (n + 4)))
