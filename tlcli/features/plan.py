"""What computing the features of a collection takes, doing it, and reading the rows.

Planning and doing are two steps: `plan_features` says what will be computed and about how long it takes,
`compute_features` does it.
"""

import itertools
import threading
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from tlcli.backbones.backbone import Backbone
from tlcli.backbones.work import saved_text
from tlcli.config.backbone import CacheMode, FeatureOptions
from tlcli.config.commands import FinetuneConfig
from tlcli.data.audit import examine, require_usable
from tlcli.data.collection import Collection
from tlcli.data.image_files import BadImage
from tlcli.errors import CheckFailed, StorageError
from tlcli.features.batch import Item, groups
from tlcli.features.extractor import Extractor
from tlcli.features.feature_store import FeatureStore
from tlcli.features.outcome import Outcome, write_bad_images
from tlcli.features.views import Views
from tlcli.machine import processes
from tlcli.progress import Progress, Silent
from tlcli.warned import warn
from tlcli.wording import counted, size_text

_COUNTING = threading.Lock()  # for counts that several threads correct
TRIAL_ROWS = 64  # fewer missing rows are not worth a trial to predict their time


@dataclass(frozen=True)
class FeaturePlan:
    """What computing the features of a collection will take.

    Attributes:
        collection: The images.
        store: Where the rows go, with the extractor that computes what is missing.
        workers: Threads.
        max_bad: Share of bad images above which the work stops.
        num_views: Views of each training image; every other image has view 0 alone.
        rows_to_compute: Rows that are not there yet.
        new_bytes: Bytes the cache will grow by.
        predicted_seconds: About how long computing will take.
        results: What `compute_features` found; `read_rows` corrects the last when cached rows prove damaged.
    """

    collection: Collection
    store: FeatureStore
    workers: int
    max_bad: float
    num_views: int
    rows_to_compute: int
    new_bytes: int
    predicted_seconds: float
    results: list[Outcome] = field(default_factory=list)

    @property
    def rows_to_reuse(self) -> int:
        """Return the rows that need not be computed: there already, or those of a copy."""
        return sum(map(len, views_of(self.collection, self.num_views))) - self.rows_to_compute

    def summary(self) -> dict[str, str]:
        """Return the plan for people."""
        counts = self.collection.num_images()
        extractor = self.store.extractor
        shape = "x".join(str(size) for size in extractor.cut.row_shape)
        rows = f"{shape} {extractor.row_dtype}: {self.rows_to_reuse:,} cached, "
        rows += f"{self.rows_to_compute:,} to compute"
        if self.rows_to_compute:
            how = " by a trial" if self.rows_to_compute >= TRIAL_ROWS else ""
            rows += f" ({size_text(self.new_bytes)}, about {self.predicted_seconds:.0f} s{how})"
        saved = extractor.cut.saved
        cut = saved_text(saved, extractor.cut.num_frozen_units) if saved else None
        policy = extractor.views.policy if extractor.views else None
        frozen = counted(extractor.cut.num_frozen_units, "unit")
        views = {}
        if policy and self.num_views > 1:
            kind = f"{policy.name}: {policy.describe()}; {policy.reason}"
            views = {"views": f"{self.num_views} of each training image ({kind})"}
        return {
            "images": ", ".join(f"{count:,} {split}" for split, count in counts.items() if count)
            + f" in {len(self.collection.dataset.class_names)} classes"
            + f" ({size_text(self.collection.num_bytes)})",
            "backbone": f"{extractor.backbone.name}, {frozen} frozen",
            **({"cut": cut} if cut else {}),
            **views,
            "features": rows,
            "computes on": extractor.reason,
        }  # fmt: skip

    def document(self) -> dict[str, Any]:
        """Return the plan for machines."""
        return {
            "num_images": self.collection.num_images(),
            "num_views": self.num_views,
            "num_classes": len(self.collection.dataset.class_names),
            "data_bytes": self.collection.num_bytes,
            "num_frozen_units": self.store.extractor.cut.num_frozen_units,
            "row_shape": list(self.store.extractor.cut.row_shape),
            "row_dtype": self.store.extractor.row_dtype,
            "saved_share": 1.0 if (saved := self.store.extractor.cut.saved) is None else saved.share,
            "rows_to_reuse": self.rows_to_reuse,
            "rows_to_compute": self.rows_to_compute,
            "new_bytes": self.new_bytes,
            "predicted_seconds": round(self.predicted_seconds, 1),
            "cache_key": self.store.entry.key if self.store.entry else None,
            "views_cache_key": self.store.views_entry.key if self.store.views_entry else None,
        }


def views_of(collection: Collection, num_views: int) -> list[range]:
    """Return the views of each image: all of them for training, view 0 for measuring."""
    return [range(num_views if split == "train" else 1) for split in collection.splits]


def plan_features(
    collection: Collection,
    extractor: Extractor,
    *,
    cache: CacheMode,
    workers: int,
    max_bad: float,
    num_views: int = 1,
    max_bytes: int | None = None,
) -> FeaturePlan:
    """Return what computing the missing rows will take; refuses what cannot fit.

    Args:
        collection: The images.
        extractor: With an augmentation if there is more than one view.
        cache: Mode of the cache.
        workers: Threads.
        max_bad: Share of bad images above which the work stops.
        num_views: Views of each training image, view 0 among them; other images have view 0 alone.
        max_bytes: Size that the cache must not grow beyond; None is no limit.

    Raises:
        StorageError: Too little space, or the cache cannot be written or trusted.
        ResourceError: With --cache never, too little memory.
    """
    store = FeatureStore(extractor, cache, max_bytes=max_bytes)
    views = views_of(collection, num_views)
    todo = store.missing(collection.samples, collection.fingerprints, views)
    stored = store.num_new(collection.fingerprints, views)
    store.check_space(stored, write=False)
    count = sum(len(wanted) for _, wanted in todo)
    seconds = predicted_seconds(extractor, todo, workers) if count >= TRIAL_ROWS else count * 0.05
    seconds /= processes.world_size() if store.entry is not None else 1
    new_bytes = stored * extractor.row_bytes
    return FeaturePlan(collection, store, workers, max_bad, num_views, count, new_bytes, seconds)


def predicted_seconds(extractor: Extractor, items: Sequence[Item], workers: int) -> float:
    """Return about how long the rows of `items` will take, from a trial of a few batches."""
    lanes = min(workers, 4)
    few = [item for group in itertools.islice(groups(items, extractor.batch_size), lanes) for item in group]
    if not few:
        return 0.0
    started = time.perf_counter()
    for _ in extractor.compute_items(few, lanes):
        pass
    share = sum(len(views) for _, views in items) / sum(len(views) for _, views in few)
    return (time.perf_counter() - started) * share * lanes / workers


def compute_features(
    plan: FeaturePlan, progress: Progress, *, bad_images_path: Path | None = None, to_train: bool = True
) -> Outcome:
    """Compute the missing rows of a plan; of several processes each computes its share.

    Args:
        plan: From `plan_features`.
        progress: Told of every row.
        bad_images_path: Where to list the images that were skipped, if any were; CSV of file and reason.
        to_train: Whether every class must keep a training image.

    Raises:
        DataError: More than `max_bad` of the images cannot be used, or a class lost all of them.
        StorageError: The cache cannot take the rows.
        CheckFailed: With --cache verify, stored rows are not what was recomputed.
    """
    collection = plan.collection
    total = len(collection.samples)
    outcome = plan.store.fill(
        collection.samples,
        collection.fingerprints,
        workers=plan.workers,
        progress=progress,
        views=views_of(collection, plan.num_views),
        together=True,
        stop=lambda num_bad: num_bad > plan.max_bad * total,
    )
    plan.results.append(outcome)
    if outcome.bad_images:
        if bad_images_path is not None and processes.is_main():
            write_bad_images(bad_images_path, outcome.bad_images)
        where = f" ({bad_images_path})" if bad_images_path else ""
        text = f"{len(outcome.bad_images)} of {total} images cannot be used and are skipped{where}"
        warn("images_skipped", text)
    require_usable(
        collection.dataset, collection.splits, outcome.bad_images, max_bad=plan.max_bad, to_train=to_train
    )
    _warn_odd_formats(collection)
    if outcome.differing:
        raise CheckFailed(
            f"{len(outcome.differing)} of {outcome.rows_reused} stored rows are not what was recomputed, "
            f"the first of {outcome.differing[0]!r}; the largest relative difference is "
            f"{outcome.largest_difference:.3g}.",
            document={
                **plan.document(),
                "features": outcome.document(),
                "largest_difference": outcome.largest_difference,
                "differing": outcome.differing,
            },
            hint=f"Delete the entry's rows: tlcli cache show {outcome.entry_key} names its folder.",
        )
    return outcome


def make_extractor(backbone: Backbone, options: FeatureOptions, *, views: Views | None = None) -> Extractor:
    """Return the extractor that feature options ask for.

    Args:
        backbone: From `load_backbone`.
        options: Device, types, and how many units are frozen.
        views: How views from 1 on are made; None where view 0 is all there is.
    """
    return Extractor(
        backbone,
        freeze=options.freeze,
        device=options.device,
        dtype=options.dtype,
        cache_dtype=options.cache_dtype,
        views=views,
    )


def read_rows(plan: FeaturePlan, collection: Collection, views: Sequence[int] | None = None) -> torch.Tensor:
    """Return the rows of images of a plan, computing again those that were damaged or pruned meanwhile.

    Several threads may call it at once.

    Args:
        plan: Whose features were computed.
        collection: Usable images of it.
        views: The view wanted of each image; None is view 0.

    Returns:
        float32 or bfloat16 [n, *row_shape], in the order of the collection.

    Raises:
        StorageError: Rows are lost a second time.
    """
    keys = [found.sha256 or "" for found in collection.fingerprints]
    rows, missing = plan.store.read(keys, views)
    if missing:
        warn("rows_lost", f"{len(missing)} cached rows were damaged or gone; they are computed again")
        again = collection.select(missing)
        found = plan.store.fill(
            again.samples, again.fingerprints, workers=plan.workers, progress=Silent(),
            views=[(views[place],) for place in missing] if views else None,
        )  # fmt: skip
        with _COUNTING:
            for outcome in plan.results[-1:]:
                changed = min(found.rows_computed, outcome.rows_reused)
                outcome.rows_reused -= changed
                outcome.rows_computed += changed
        rows, missing = plan.store.read(keys, views)
    if missing:
        raise StorageError("The cache changes while it is read.", hint="Run the same command again.")
    return rows


def _warn_odd_formats(collection: Collection) -> None:
    """Name the few images of another format than the rest: often a placeholder for a missing image."""
    suffixes = Counter(Path(sample.name).suffix.lower() for sample in collection.samples)
    if len(suffixes) < 2:
        return
    (usual, count), *_ = suffixes.most_common(1)
    odd = [sample.name for sample in collection.samples if Path(sample.name).suffix.lower() in RARE_FORMATS]
    if usual not in RARE_FORMATS and odd and count >= 20 * len(odd):
        warn(
            "odd_format",
            f"{len(odd)} of {len(collection.samples)} images differ in format from the rest, such as "
            f"{odd[0]!r}: `tlcli data check` looks closer",
        )


RARE_FORMATS = {".gif", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm", ".pbm"}


# ---- before training ------------------------------------------------------------------------------------


def check_images(
    collection: Collection, config: FinetuneConfig, progress: Progress, bad_images_path: Path
) -> Outcome:
    """Decode every image once, where no rows are computed that would show the bad ones.

    Raises:
        DataError: More than --max-bad of the images cannot be used, or a class lost all of them.
    """
    workers = config.num_workers
    examined = examine(collection.samples, workers, progress)
    progress.finish()
    bad = [
        BadImage(sample.name, sample.path, item.reason)
        for sample, item in zip(collection.samples, examined, strict=True)
        if item.reason
    ]
    if bad:
        write_bad_images(bad_images_path, bad)
        text = f"{len(bad)} of {len(collection.samples)} images cannot be used and are skipped"
        warn("images_skipped", f"{text} ({bad_images_path})")
    require_usable(collection.dataset, collection.splits, bad, max_bad=config.max_bad)
    return Outcome(bad_images=bad)
