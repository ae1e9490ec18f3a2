"""Rows that other library versions wrote: a sample of them is computed again before any is used.

Library versions are no part of an entry's key, or every patch release would throw the cache away; each shard
records them. Rows of this environment are used as they are. Of every other one whose rows are wanted, a few
are recomputed from their images. If they agree, all of its rows are used; if not, none: they count as missing
and are computed again beside the old ones. Nothing is moved or deleted, since of two environments that
disagree nobody knows which is right, and both may be using the cache. The answer is not written down: it
would be a second truth, and a sample takes a fraction of a second.
"""

import json
import logging
import os
import sys
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from tlcli.cache.entry import Entry
from tlcli.cache.key import RowKey, explain
from tlcli.data.dataset import Sample
from tlcli.features.batch import Array, to_tensor
from tlcli.features.extractor import Extractor
from tlcli.warned import warn

TOLERANCE = {"fp32": 1e-3, "bf16": 2e-2}
"""Largest relative difference of a row computed by other versions, by the less precise of the types that
computed and that store it."""
SAMPLE_ROWS = 8
WORKERS = 2

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Comparison:
    """Stored rows beside recomputed ones.

    Attributes:
        num_rows: Rows compared.
        largest_difference: The largest relative difference among them.
        tolerance: The largest that is accepted.
    """

    num_rows: int
    largest_difference: float
    tolerance: float

    @property
    def agrees(self) -> bool:
        """Return whether rows were compared and all are within the tolerance."""
        return self.num_rows > 0 and self.largest_difference <= self.tolerance


def relative_difference(new: Array, old: Array) -> float:
    """Return the norm of the difference of two rows in shares of the old one's norm; huge if not finite."""
    one, other = (to_tensor(row).double() for row in (new, old))
    difference = (one - other).norm() / other.norm().clamp_min(1e-12)
    return float(difference.nan_to_num(nan=sys.float_info.max))


def tolerance(extractor: Extractor) -> float:
    """Return the largest relative difference at which a row counts as the same."""
    return max(TOLERANCE[name] for name in (extractor.row_dtype, extractor.spec["compute"]["dtype"]))


def choose_sample(keys: Iterable[RowKey], wanted: Mapping[RowKey, Sample]) -> list[RowKey]:
    """Return a few of `keys`, always the same, with every type of file among them as far as that goes.

    Decoders change one format at a time.
    """
    turns: Counter[str] = Counter()
    order = []
    for key in sorted(keys):
        suffix = os.path.splitext(wanted[key].path)[1].lower()
        order.append((turns[suffix], key))
        turns[suffix] += 1
    return [key for _, key in sorted(order)[:SAMPLE_ROWS]]


def compare(
    extractor: Extractor, stored: Entry, keys: Iterable[RowKey], wanted: Mapping[RowKey, Sample]
) -> Comparison:
    """Recompute a few of the rows `keys` and compare them with the stored ones.

    Args:
        extractor: Computes rows now.
        stored: Gives the rows of the other environment alone.
        keys: Rows that it holds.
        wanted: The image of each.
    """
    chosen = choose_sample(keys, wanted)
    rows, missing = stored.read(chosen)
    old = {key: rows[place] for place, key in enumerate(chosen) if place not in missing}
    count, largest = 0, 0.0
    for batch in extractor.compute_items([(wanted[key], (key[1],)) for key in old], WORKERS):
        for key, _, row in batch.items():
            if key in old:  # else the file has changed since it was hashed
                count, largest = count + 1, max(largest, relative_difference(row, old[key]))
    return Comparison(count, largest, tolerance(extractor))


def log_decision(entry_key: str, env: str, own: str, num_rows: int, found: Comparison) -> None:
    """Log what a comparison decided.

    Args:
        entry_key: Key of the entry.
        env: Record of the other environment, canonical JSON.
        own: Record of this one.
        num_rows: Rows of the other one that are wanted.
        found: The comparison.
    """
    differs = "; ".join(explain(json.loads(env), json.loads(own)))
    text = (
        f"cache entry {entry_key[:12]}: {num_rows} rows were computed elsewhere ({differs}); of "
        f"{found.num_rows} computed again the largest relative difference is {found.largest_difference:.2g}"
    )
    if found.agrees:
        logger.info("%s, within %g: they are used", text, found.tolerance)
    else:
        text += f", more than {found.tolerance:g}: they are not used but computed again"
        warn("rows_differ", text)
