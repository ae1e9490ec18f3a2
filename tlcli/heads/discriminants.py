"""Linear classifiers that follow from sums alone: ridge, linear discriminants and nearest class means.

Each gives scores x W' + b of the rows that the sums were taken of (about zero, not about the shift). What
makes log loss of the scores is temperature.py.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from tlcli.heads.sums import Sums

REFINED_SHARE = 8  # from so many dimensions a class, a factorisation in fp32 with refinement is faster
REFINEMENTS = 4
RESIDUAL = 1e-7  # relative, at which a refined solution is good
SMALLEST_JITTER = 1e-12  # of the mean variance, added where a matrix without penalty is singular


@dataclass(frozen=True)
class Scorer:
    """Scores of rows x: weight x + bias.

    Attributes:
        weight: fp64 [C, D].
        bias: fp64 [C].
    """

    weight: Tensor
    bias: Tensor


class Ridge:
    """Least squares on one-hot targets with an l2 penalty, the bias not penalised.

    The objective is half the mean squared error, rows weighted, plus l2 / 2 times the squared weights: what
    scikit-learn's `Ridge(alpha=l2 * N)` minimises on 0 and 1. Its `RidgeClassifier` has targets -1 and 1, and
    twice these scores less 1 as decision values. Source: Hoerl and Kennard 1970.
    """

    def __init__(self, sums: Sums) -> None:
        """Prepare for several penalties.

        Args:
            sums: Of the training rows, with products.
        """
        self.share = sums.weights / sums.weights.sum()
        self.centre = sums.shift + sums.mean
        self.matrix = sums.covariance()
        self.right = (sums.sums - sums.weights[:, None] * sums.mean) / sums.weights.sum()

    def at(self, l2: float) -> Scorer:
        """Return the scores, which estimate the probabilities of the classes, for one penalty."""
        weight = _solve(self.matrix, l2, self.right)
        return Scorer(weight, self.share - weight @ self.centre)


class Discriminants:
    """Linear discriminant analysis: classes are normal with one covariance, which is shrunk.

    The covariance within classes, S, becomes (1 - s) S + s v I, where v is the mean variance of a feature
    within classes and s = l2 / (1 + l2): as scikit-learn's `LinearDiscriminantAnalysis(solver="lsqr",
    shrinkage=s)`. Priors are the classes' weights. Sources: Fisher 1936; Ledoit and Wolf 2004 for the target.
    """

    def __init__(self, sums: Sums, width: int) -> None:
        """Prepare for several penalties.

        Args:
            sums: Of the training rows, with products.
            width: Features that the variance is spread over: more than the sums have where rows were
                rotated into the space that they span.
        """
        self.log_prior = (sums.weights / sums.weights.sum()).clamp_min(1e-300).log()
        self.centre = sums.shift + sums.mean
        self.means = sums.class_means - sums.mean
        self.matrix = sums.covariance_within()
        self.variance = float(self.matrix.trace()) / width
        if not self.variance > 1e-12 * float(sums.covariance().trace()) / width:
            self.variance = 1.0  # classes of equal rows: all that is left are the distances of the means

    def at(self, l2: float) -> Scorer:
        """Return the log posteriors, but for what all classes share, for one penalty."""
        weight = _solve(self.matrix, l2 * self.variance, self.means) * (1.0 + l2)
        bias = self.log_prior - 0.5 * (weight * self.means).sum(1)
        return Scorer(weight, bias - weight @ self.centre)


def nearest_means(sums: Sums) -> Scorer:
    """Return minus half the squared distances to the class means, but for what all classes share.

    Source: Rocchio 1971; scikit-learn's `NearestCentroid`.

    Args:
        sums: Of the training rows; products are not needed.
    """
    centre = sums.shift + sums.mean
    means = sums.class_means - sums.mean
    return Scorer(means, -0.5 * means.square().sum(1) - means @ centre)


def nearest_directions(sums: Sums) -> Scorer:
    """Return the cosines between rows of norm 1 and the class means.

    Args:
        sums: Of training rows of norm 1; products are not needed.
    """
    means = sums.class_means + sums.shift
    weight = torch.nn.functional.normalize(means, dim=1)
    return Scorer(weight, torch.zeros_like(weight[:, 0]))


def _solve(matrix: Tensor, penalty: float, right: Tensor) -> Tensor:
    """Return right (matrix + penalty I)^-1 for a symmetric matrix, not negative, fp64 [C, D]."""
    if len(right) * REFINED_SHARE < len(matrix):
        refined = _solve_refined(matrix, penalty, right)
        if refined is not None:
            return refined
    mean = float(matrix.diagonal().mean())
    added, jitter = penalty, SMALLEST_JITTER * mean if mean > 0 else 1.0
    while True:
        penalised = matrix.clone()
        penalised.diagonal().add_(added)
        factor, failed = torch.linalg.cholesky_ex(penalised)
        if not bool(failed):
            return torch.cholesky_solve(right.T, factor).T
        added, jitter = penalty + jitter, jitter * 100


def _solve_refined(matrix: Tensor, penalty: float, right: Tensor) -> Tensor | None:
    """Return what `_solve` does from a factorisation in fp32, refined in fp64; None where that fails.

    Each step solves for what the last one left. Source: Wilkinson 1963; Higham 2002, section 12.
    """
    low = matrix.float()
    low.diagonal().add_(penalty)
    factor, failed = torch.linalg.cholesky_ex(low)
    if bool(failed):
        return None
    found, rest = torch.zeros_like(right), right
    wanted = RESIDUAL * float(torch.linalg.vector_norm(right))
    for _ in range(REFINEMENTS):
        found = found + torch.cholesky_solve(rest.float().T, factor).T
        rest = right - found @ matrix - penalty * found
        if float(torch.linalg.vector_norm(rest)) <= wanted:
            return found
    return None
