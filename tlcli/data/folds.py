"""Stratified, grouped cross-validation folds."""

from typing import Any

import numpy as np

IntArray = np.ndarray[Any, np.dtype[np.int64]]


def assign_folds(
    labels: IntArray, groups: IntArray, folds: int, seed: int
) -> tuple[np.ndarray[Any, Any], int]:
    """Divide rows into stratified folds that keep groups whole.

    A class that lies in one group only always trains: held out, nothing of it would be left to learn from.

    Args:
        labels: int [N].
        groups: int [N].
        folds: How many folds to make at most.
        seed: Changes which rows share a fold.

    Returns:
        The fold of each row, int64 [N] with -1 for rows that always train, and the number of folds (0 when no
        row can be held out).
    """
    _, group_of = np.unique(groups, return_inverse=True)
    num_groups = int(group_of.max()) + 1
    num_classes = int(labels.max()) + 1
    pairs = np.unique(np.stack([labels, group_of]), axis=1)
    groups_per_class = np.bincount(pairs[0], minlength=num_classes)
    num_folds = int(min(folds, groups_per_class.max()))
    result = np.full(len(labels), -1, dtype=np.int64)
    if num_folds < 2:
        return result, 0
    always = np.zeros(num_groups, dtype=bool)
    always[pairs[1][groups_per_class[pairs[0]] == 1]] = True
    sizes = np.bincount(group_of, minlength=num_groups)
    rng = np.random.default_rng(seed)
    order = rng.permutation(num_groups)
    fold_of = np.full(num_groups, -1, dtype=np.int64)
    filled = np.zeros((num_folds, num_classes))
    _place_groups(order[(sizes[order] > 1) & ~always[order]], (labels, group_of), filled, fold_of)
    single = np.zeros(num_groups, dtype=np.int64)
    single[group_of] = labels
    alone = order[(sizes[order] == 1) & ~always[order]]
    for label in np.unique(labels):
        members = alone[single[alone] == label]
        # Fill up the emptiest folds first; among equals start where the whole is emptiest.
        tie = np.argsort(np.argsort(filled.sum(1), kind="stable"), kind="stable")
        levels = filled[:, label][:, None] + np.arange(len(members))[None]
        places = np.lexsort((np.repeat(tie, len(members)), levels.reshape(-1)))[: len(members)]
        chosen = places // max(1, len(members))
        fold_of[members] = chosen
        filled[:, label] += np.bincount(chosen, minlength=num_folds)
    result = fold_of[group_of]
    return result, num_folds


def _place_groups(
    groups: np.ndarray[Any, Any],
    rows: tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]],
    filled: np.ndarray[Any, Any],
    fold_of: np.ndarray[Any, Any],
) -> None:
    """Put groups of several rows, large first, each where its classes are rarest; fills the last two."""
    labels, group_of = rows
    if not len(groups):
        return
    counts = {int(group): np.zeros(filled.shape[1]) for group in groups}
    inside = np.isin(group_of, groups)
    for label, group in zip(labels[inside], group_of[inside], strict=True):
        counts[int(group)][label] += 1
    totals = np.bincount(labels, minlength=filled.shape[1]).clip(1)
    for group in sorted(counts, key=lambda item: -counts[item].sum()):
        crowding = (filled * counts[group] / totals).sum(1)
        fold = int(np.lexsort((filled.sum(1), crowding))[0])
        filled[fold] += counts[group]
        fold_of[group] = fold
