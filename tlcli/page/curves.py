"""Curves of a run: the grid of heads, and the epochs."""

import heapq
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from tlcli.page import figures
from tlcli.page.facts import training_of, value_text

BEST_HEADS = 8


# ---- curves of the training -------------------------------------------------------------------------------


def training_figures(lines: Sequence[Mapping[str, Any]], run: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return (title, SVG) of the grid of heads, or of the epochs."""
    head, trained = run["head"], training_of(run) or {}
    heads = [line for line in lines if line.get("kind") == "head" and "l2" in line and "scaling" in line]
    epochs = [line for line in lines if "epoch" in line]
    found = []
    for key, title in (("cv_top1_accuracy", "accuracy"), ("cv_log_loss", "log loss")):
        if drawn := _grid_lines(heads, key):
            svg = figures.curves(
                drawn,
                x_label="l2 penalty",
                y_label=f"cross-validation {title}",
                log_x=True,
                mark=chosen_head(head),
            )
            found.append((f"Heads: cross-validation {title} by l2 and scaling", svg))
    best, probe = trained.get("best_epoch"), trained.get("probe")
    for word, title, chosen in (
        ("accuracy", "accuracy", "val accuracy"),
        ("loss", "loss", "val log loss"),
        ("lr", "learning rate", None),
    ):
        if drawn := _epoch_lines(epochs, word):
            svg = figures.curves(
                drawn,
                x_label="epoch",
                y_label=title,
                mark=(chosen, float(best)) if chosen and best else None,
                level=("linear probe, val", float(probe)) if word == "accuracy" and probe else None,
            )
            found.append((f"Training: {title} by epoch", svg))
    return found


def best_heads(lines: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Return the best heads of the grid by cross-validation log loss: column names and rows of text."""
    heads = [line for line in lines if line.get("kind") == "head" and _finite(line.get("cv_log_loss"))]
    best = heapq.nsmallest(BEST_HEADS, heads, key=lambda head: head["cv_log_loss"])
    keys = [key for key in dict.fromkeys(key for head in best for key in head) if key != "kind"]
    names = [key.replace("cv_", "").replace("_", " ") for key in keys]
    return names, [[value_text(head.get(key)) for key in keys] for head in best]


def chosen_head(head: Mapping[str, Any]) -> tuple[str, float] | None:
    """Return the scaling and l2 of the chosen head, or None for a head without them."""
    chosen = head.get("chosen") or {}
    return (str(chosen["scaling"]), float(chosen["l2"])) if {"scaling", "l2"} <= set(chosen) else None


def _grid_lines(heads: Sequence[Mapping[str, Any]], key: str) -> dict[str, list[tuple[float, float]]]:
    lines = defaultdict(list)
    for head in heads:
        if _finite(head.get(key)):
            lines[str(head["scaling"])].append((float(head["l2"]), float(head[key])))
    return dict(lines)


def _epoch_lines(epochs: Sequence[Mapping[str, Any]], word: str) -> dict[str, list[tuple[float, float]]]:
    """Return a line for every value of the epochs whose name ends in `word`."""
    lines = defaultdict(list)
    for epoch in epochs:
        for key, value in epoch.items():
            if key.endswith(word) and _finite(value):
                lines[key.replace("_", " ")].append((float(epoch["epoch"]), float(value)))
    return dict(lines)


def _finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)
