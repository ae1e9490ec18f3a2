"""Where the frozen work is cached when only part of a backbone is trained, decided from measured costs.

    caching at a place   once, missing rows:  read, decode, augment, prefix up to the place, write
                         each epoch:          read the row, the frozen rest up to the cut, the trained part
    recomputing          each epoch:          read, decode, augment, prefix up to the cut, the trained part

A place is the cut, or an operation before it where fewer numbers cross: rows of early layers are large, and
what fits neither the disk nor the memory that caches it is read slowly. cost_trial.py times the parts on a
few of the user's images, `choose_place` is plain arithmetic on the result.
"""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tlcli.backbones.compute import Compute
from tlcli.data.collection import Collection
from tlcli.features.cost_trial import CUT, RECOMPUTE, CachePlace, CachingCosts, Trial, measure_costs
from tlcli.features.earlier import EarlierRows, earlier_rows, rows_at
from tlcli.features.extractor import Extractor
from tlcli.features.feature_store import FeatureStore
from tlcli.machine import processes
from tlcli.wording import size_text

FEW_IMAGES = 200  # fewer are not worth measuring: either side takes seconds
UNDECIDED = "undecided"  # in a plan that is not carried out
TIE = 0.05  # within it, the side that needs less disk is taken
VALIDATION_SHARE = 1 / 3  # of a training step: no backward pass


@dataclass(frozen=True)
class Option:
    """One way to train, with the seconds it takes and the bytes it writes.

    Attributes:
        where: As in CachingDecision.
        fill_seconds: Before the first epoch.
        train_seconds: All epochs.
        new_bytes: Written to the cache.
        fits: Whether the disk has room for them.
    """

    where: str
    fill_seconds: float
    train_seconds: float
    new_bytes: int
    fits: bool = True

    @property
    def seconds(self) -> float:
        """Return the seconds from the beginning to the last epoch."""
        return self.fill_seconds + self.train_seconds


@dataclass(frozen=True)
class CachingDecision:
    """Where the frozen work is cached.

    Attributes:
        where: "cut", the name of an earlier operation for `rows_at`, "recompute" or "undecided".
        reason: Why, with the numbers, for people.
        options: Every way that was compared, the chosen one first; empty when nothing was measured.
        costs: What they were computed from; None when nothing was measured.
    """

    where: str
    reason: str
    options: tuple[Option, ...] = ()
    costs: CachingCosts | None = None

    @property
    def node(self) -> str | None:
        """Return the name of an earlier operation; None where rows are not kept at one."""
        return None if self.where in {CUT, RECOMPUTE, UNDECIDED} else self.where

    def document(self) -> dict[str, Any]:
        """Return the decision and its numbers for machines."""
        costs = dataclasses.asdict(self.costs) if self.costs else None
        options = [{**dataclasses.asdict(option), "seconds": option.seconds} for option in self.options]
        return {
            "where": self.where, "reason": self.reason, "options": _rounded(options), "costs": _rounded(costs)
        }  # fmt: skip


def _rounded(value: Any) -> Any:
    """Return plain data with floats to four digits."""
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    return [_rounded(item) for item in value] if isinstance(value, list | tuple) else value


# ---- the decision ----------------------------------------------------------------------------------------


def choose_place(costs: CachingCosts) -> CachingDecision:
    """Return the quickest way; of ways within `TIE` of it, the one that writes least."""
    options = [*(cached(costs, place) for place in costs.places), recomputed(costs)]
    possible = [option for option in options if option.fits]
    quickest = min(option.seconds for option in possible)
    near = [option for option in possible if option.seconds <= (1 + TIE) * quickest]
    best = min(near, key=lambda option: (option.new_bytes, option.seconds))
    others = [option for option in options if option is not best]
    return CachingDecision(best.where, _reason(best, others), (best, *others), costs)


def cached(costs: CachingCosts, place: CachePlace) -> Option:
    """Return what caching at a place takes."""
    rows = place.rows_to_compute
    images = rows / costs.num_views  # one that is decoded gives all of its views
    loading = (images * costs.load_seconds + rows * costs.view_seconds) / costs.workers
    fill = _together(costs, loading, rows * place.prefix_seconds) + rows * place.write_seconds
    passes = costs.epochs * (costs.num_train + costs.num_val)
    rest = passes * place.rest_seconds / (1 if costs.overlap else costs.workers)
    loading = passes * place.read_seconds / costs.workers
    train = _together(costs, loading, rest + _steps(costs), device_is_whole=True)
    new_bytes = rows * place.row_bytes
    return Option(place.where, fill, train, new_bytes, fits=new_bytes <= costs.free_bytes)


def recomputed(costs: CachingCosts) -> Option:
    """Return what computing everything anew in each epoch takes."""
    passes = costs.epochs * (costs.num_train + costs.num_val)
    loading = passes * (costs.load_seconds + costs.view_seconds) / costs.workers
    prefix = passes * costs.prefix_seconds / (1 if costs.overlap else costs.workers)
    train = _together(costs, loading, prefix + _steps(costs), device_is_whole=True)
    return Option(RECOMPUTE, 0.0, train, 0)


def _together(
    costs: CachingCosts, loading: float, computing: float, *, device_is_whole: bool = False
) -> float:
    """Return the seconds of loading and computing: side by side with a GPU, in turns on a CPU's cores."""
    if costs.overlap:
        return max(loading, computing)
    return loading + (computing if device_is_whole else computing / costs.workers)


def _steps(costs: CachingCosts) -> float:
    """Return the seconds of the trained part, which every way takes alike."""
    return costs.epochs * costs.step_seconds * (costs.num_train + VALIDATION_SHARE * costs.num_val)


def _reason(best: Option, others: Sequence[Option]) -> str:
    def place(option: Option) -> str:
        names = {CUT: "at the cut", "input": "the decoded images"}
        return "caching " + names.get(option.where, f"at {option.where}")

    def told(option: Option) -> str:
        if option.where == RECOMPUTE:
            return f"recomputing would take {option.seconds:,.0f} s"
        if not option.fits:
            return f"{place(option)} needs {size_text(option.new_bytes)}, more than is free"
        return f"{place(option)} would take {option.seconds:,.0f} s ({size_text(option.new_bytes)})"

    if best.where == RECOMPUTE:
        text = f"recomputing in each epoch: {best.seconds:,.0f} s"
    else:
        text = f"{place(best)}: {best.fill_seconds:,.0f} s to fill + {best.train_seconds:,.0f} s reading and "
        text += f"training ({size_text(best.new_bytes)})"
    return ", ".join([text, *(told(option) for option in others)])


def decide(
    extractor: Extractor,
    collection: Collection,
    *,
    epochs: int,
    num_views: int,
    workers: int,
    compute: Compute | None = None,
    max_bytes: int | None = None,
) -> CachingDecision:
    """Return where to cache the frozen work of a training, from a measurement of a few seconds.

    Of several processes rank 0 measures, and all get its answer.

    Args:
        extractor: Cut where the trained units begin.
        collection: Training and validation images.
        epochs: Passes over them, the probe's included.
        num_views: Views of each training image that a cache would hold.
        workers: Threads.
        compute: How the trained part computes; None is fp32 in channels-last memory.
        max_bytes: Size that the cache must not grow beyond; None is no limit.

    Raises:
        StorageError: The cache's folder cannot be read or trusted.
    """
    found = None
    if processes.is_main():
        splits = collection.splits
        views = [range(num_views if split == "train" else 1) for split in splits]
        if is_measured(collection):
            earlier, trial = earlier_rows(extractor), Trial(extractor, compute or Compute())
            costs = measure_costs(trial, collection, views, workers, max_bytes, earlier)
            found = _possible(extractor, dataclasses.replace(costs, epochs=epochs), earlier)
        else:
            store = FeatureStore(extractor, max_bytes=max_bytes)
            rows = store.num_new(collection.fingerprints, views)
            fits = rows * extractor.row_bytes <= store.cache.free_bytes()
            found = _unmeasured(rows if fits else math.inf, len(splits), epochs)
    decision = processes.from_main(found)
    assert decision is not None
    return decision


def is_measured(collection: Collection) -> bool:
    """Return whether `decide` times a few batches and writes trial rows: not for so few images."""
    return len(collection.splits) >= FEW_IMAGES


def _unmeasured(rows: float, num_images: int, epochs: int) -> CachingDecision:
    """Return the side with fewer rows to compute, for a few images."""
    where = CUT if rows <= epochs * num_images else RECOMPUTE
    name = "caching at the cut" if where == CUT else "recomputing in each epoch"
    return CachingDecision(where, f"{name}: {num_images} images are too few to measure what is quicker")


def _possible(extractor: Extractor, costs: CachingCosts, earlier: Sequence[EarlierRows]) -> CachingDecision:
    """Return the best way that trains on the very rows at the cut."""
    decision = choose_place(costs)
    while decision.node is not None and rows_at(extractor, decision.node, earlier) is None:
        places = tuple(place for place in costs.places if place.where != decision.where)
        costs = dataclasses.replace(costs, places=places)
        decision = choose_place(costs)
    return decision
