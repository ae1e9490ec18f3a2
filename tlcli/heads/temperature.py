"""One number that makes probabilities of scores: the temperature at which held-out rows are likeliest."""

from torch import Tensor

FIT_ELEMENTS = 4_000_000  # scores that a temperature is fitted to at most: one number needs no more
STEPS = 60
TOLERANCE = 1e-3  # relative, of the temperature


def fit_temperature(scores: Tensor, labels: Tensor, row_weights: Tensor, offset: Tensor) -> float:
    """Return the temperature T > 0 for which softmax(scores / T + offset) has the smallest log loss.

    The loss is convex in 1 / T; Newton's steps, kept inside a bracket. The labels are smoothed by 1 / (N + 2)
    as in Platt's scaling (1999): a few rows that are all right would ask for a temperature of 0 otherwise.
    Source: Guo et al. 2017.

    Args:
        scores: fp32 [N, C] of rows that the scores were not fitted to, N >= 1.
        labels: int64 [N].
        row_weights: fp32 [N].
        offset: fp32 [C], what does not depend on the temperature.
    """
    smoothing = 1.0 / (len(scores) + 2)
    stride = max(1, scores.numel() // FIT_ELEMENTS)
    scores, labels = scores[::stride], labels[::stride]
    weights = row_weights[::stride] / row_weights[::stride].sum()
    scores = scores - scores.mean(1, keepdim=True)  # so that the smoothed part of the targets scores 0
    spread = float((weights * scores.square().mean(1)).sum()) ** 0.5
    if not spread > 1e-9:
        return 1.0  # no row tells classes apart; any temperature gives the same
    scores = scores / spread
    wanted = (1.0 - smoothing) * scores.gather(1, labels[:, None])[:, 0]
    factor: float = 1.0
    low, high = 0.0, float("inf")
    for _ in range(STEPS):
        shares = (factor * scores + offset).softmax(1)
        found = (shares * scores).sum(1)
        slope = float((weights * (found - wanted)).sum())
        curvature = float((weights * ((shares * scores.square()).sum(1) - found.square())).sum())
        low, high = (factor, high) if slope < 0 else (low, factor)
        following = factor - slope / max(curvature, 1e-12)
        if not low < following < high:
            following = 0.5 * (low + high) if high < float("inf") else 4.0 * factor
        following = min(max(following, 0.1 * factor, 1e-6), 10.0 * factor)
        if abs(following - factor) <= TOLERANCE * factor:
            break
        factor = following
    return float(spread / factor)
