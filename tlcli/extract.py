"""Fill the feature cache with the rows of a data set, and export them on request.

Planning and doing are two steps: `plan_extract` says what will be computed and how long it should take,
`extract` does it. `finetune` and `evaluate` begin with the same two steps.
"""

import csv
import json
import logging
import os
import threading
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tlcli import paths, processes
from tlcli.backbones.zoo import Backbone, load_backbone
from tlcli.cache import files
from tlcli.cache.store import parse_size
from tlcli.config import ExtractConfig
from tlcli.data.audit import require_usable
from tlcli.data.augment import AugmentPolicy, resolve_policy
from tlcli.data.collection import Collection, collect
from tlcli.data.decode import BadImage
from tlcli.data.listing import spreadsheet_cell
from tlcli.errors import CheckFailed, StorageError, UsageError
from tlcli.feature_store import FeatureStore
from tlcli.features import Extractor, Features, Views, to_numpy
from tlcli.option_groups import CacheMode
from tlcli.progress import Progress, Silent

logger = logging.getLogger(__name__)

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
    results: list[Features] = field(default_factory=list)

    @property
    def rows_to_reuse(self) -> int:
        """Return the rows that need not be computed: there already, or those of a copy."""
        return sum(map(len, views_of(self.collection, self.num_views))) - self.rows_to_compute

    def facts(self) -> dict[str, str]:
        """Return the plan for people."""
        counts = self.collection.num_images()
        extractor = self.store.extractor
        shape = "x".join(str(size) for size in extractor.cut.row_shape)
        rows = f"{shape} {extractor.row_dtype}: {self.rows_to_reuse:,} cached, "
        rows += f"{self.rows_to_compute:,} to compute"
        if self.rows_to_compute:
            rows += f" ({files.size_text(self.new_bytes)}, about {self.predicted_seconds:.0f} s)"
        policy = extractor.views.policy if extractor.views else None
        views = {}
        if policy and self.num_views > 1:
            kind = f"{policy.name}: {policy.describe()}; {policy.reason}"
            views = {"views": f"{self.num_views} of each training image ({kind})"}
        return {
            "images": ", ".join(f"{count:,} {split}" for split, count in counts.items() if count)
            + f" in {len(self.collection.dataset.class_names)} classes"
            + f" ({files.size_text(self.collection.num_bytes)})",
            "backbone": f"{extractor.backbone.name}, {extractor.cut.num_frozen_units} units frozen",
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
    seconds = extractor.predicted_seconds(todo, workers) if count >= TRIAL_ROWS else count * 0.05
    seconds /= processes.world_size() if store.entry is not None else 1
    new_bytes = stored * extractor.row_bytes
    return FeaturePlan(collection, store, workers, max_bad, num_views, count, new_bytes, seconds)


def compute_features(
    plan: FeaturePlan, progress: Progress, *, bad_images_path: Path | None = None, to_train: bool = True
) -> Features:
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
    features = plan.store.fill(
        collection.samples,
        collection.fingerprints,
        workers=plan.workers,
        progress=progress,
        views=views_of(collection, plan.num_views),
        together=True,
        stop=lambda num_bad: num_bad > plan.max_bad * total,
    )
    plan.results.append(features)
    if features.bad_images:
        if bad_images_path is not None and processes.is_main():
            write_bad_images(bad_images_path, features.bad_images)
        where = f" ({bad_images_path})" if bad_images_path else ""
        logger.warning(
            "%d of %d images cannot be used and are skipped%s", len(features.bad_images), total, where
        )
    require_usable(
        collection.dataset, collection.splits, features.bad_images, max_bad=plan.max_bad, to_train=to_train
    )
    _warn_odd_formats(collection)
    if features.differing:
        raise CheckFailed(
            f"{len(features.differing)} of {features.rows_reused} stored rows are not what was recomputed, "
            f"the first of {features.differing[0]!r}; the largest relative difference is "
            f"{features.largest_difference:.3g}.",
            document={
                **plan.document(),
                "features": features_document(features),
                "largest_difference": features.largest_difference,
                "differing": features.differing,
            },
            hint=f"Delete the entry's rows: tlcli cache show {features.entry_key} names its folder.",
        )
    return features


def features_document(features: Features) -> dict[str, Any]:
    """Return the counts of a computation for --json."""
    return {
        "rows_reused": features.rows_reused,
        "rows_computed": features.rows_computed,
        "images_skipped": len(features.bad_images),
        "cache_key": features.entry_key,
        "seconds": round(features.seconds, 3),
    }


def summary(features: Features) -> str:
    """Return the counts of a computation for people."""
    rate = f" at {features.rows_computed / features.seconds:,.0f} rows/s" if features.rows_computed else ""
    return (
        f"reused {features.rows_reused:,}, computed {features.rows_computed:,}{rate}, "
        f"skipped {len(features.bad_images):,}"
    )


def plan_extract(config: ExtractConfig, progress: Progress) -> FeaturePlan:
    """Return what `extract` will do.

    Raises:
        UsageError: The output exists, or an option cannot be used.
        DataError: The data cannot be used.
        BackboneError: The backbone cannot be loaded.
        StorageError: The rows would not fit.
    """
    if config.output and Path(config.output).exists() and not config.overwrite:
        raise UsageError(f"Output {config.output!r} exists.", hint="Choose another name, or add --overwrite.")
    if config.output and (Path(config.output).is_dir() or not Path(config.output).absolute().parent.is_dir()):
        raise UsageError(
            f"Output {config.output!r} cannot be written: expected the name of a file in an existing folder.",
            hint="Make the folder first, or choose another name.",
        )
    workers = config.workers or paths.default_workers()
    collection = collect(config, workers, progress)
    num_views = config.views or 1
    policy = None
    if num_views > 1:
        policy = resolve_policy(config, collection.num_images()["train"])
        if policy.is_none:
            raise UsageError(
                f"--views {num_views} with --augment none would store the same row {num_views} times.",
                hint="Leave --views out, or choose an --augment preset.",
            )
    extractor = make_extractor(load_backbone(config), config, policy=policy)
    return plan_features(
        collection, extractor, cache=config.cache, workers=workers, max_bad=config.max_bad,
        num_views=num_views, max_bytes=parse_size(config.cache_max_size),
    )  # fmt: skip


def make_extractor(
    backbone: Backbone, config: Any, *, node: str | None = None, policy: AugmentPolicy | None = None
) -> Extractor:
    """Return the extractor that the feature options of `config` ask for.

    Args:
        backbone: From `load_backbone`.
        config: With the fields of FeatureOptions and, for a policy, those of AugmentOptions.
        node: Name of an earlier operation to cut at; see `cut_at`.
        policy: How views from 1 on are made; None where view 0 is all there is.
    """
    return Extractor(
        backbone,
        freeze=config.freeze,
        device=config.device,
        dtype=config.dtype,
        cache_dtype=config.cache_dtype,
        node=node,
        views=Views(policy, config.view_seed) if policy is not None else None,
    )


def extract(config: ExtractConfig, plan: FeaturePlan, progress: Progress) -> Features:
    """Compute the missing rows of a plan and write the export that `config` asks for.

    Raises:
        As `compute_features`; StorageError also when the export cannot be written.
    """
    output = Path(config.output) if config.output else None
    bad_images_path = (output.parent if output else Path()) / "bad_images.csv"
    if plan.store.entry is None and not processes.is_main():
        return Features()  # rows in memory are of use to the process that exports them alone
    features = compute_features(plan, progress, bad_images_path=bad_images_path)
    if output and processes.is_main():
        export(plan, features.bad_images, output)
    return features


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
        logger.warning("%d cached rows were damaged or gone; they are computed again", len(missing))
        again = collection.select(missing)
        found = plan.store.fill(
            again.samples, again.fingerprints, workers=plan.workers, progress=Silent(),
            views=[(views[place],) for place in missing] if views else None,
        )  # fmt: skip
        with _COUNTING:
            for features in plan.results[-1:]:
                changed = min(found.rows_computed, features.rows_reused)
                features.rows_reused -= changed
                features.rows_computed += changed
        rows, missing = plan.store.read(keys, views)
    if missing:
        raise StorageError("The cache changes while it is read.", hint="Run the same command again.")
    return rows


def export(plan: FeaturePlan, bad_images: Sequence[BadImage], output: Path) -> None:
    """Write the plain rows of a collection with file names, labels and splits, in the order of the names.

    Only view 0, with or without --views: one row an image is what other programs expect, and the other views
    are tlcli's own augmentation, which it reads from the cache.

    safetensors: `features` [n, *row_shape], `labels` int64 [n] (-1 unknown), with JSON lists `files`,
    `class_names` and `splits` in the metadata. npz: the same as arrays (bf16 rows as float32). csv: a line an
    image: file, label, split, then the values of a row.
    """
    bad = {image.name for image in bad_images}
    kept = [index for index, sample in enumerate(plan.collection.samples) if sample.name not in bad]
    collection = plan.collection.select(kept)
    rows = read_rows(plan, collection)
    names = [sample.name for sample in collection.samples]
    labels = np.array([-1 if s.label is None else s.label for s in collection.samples], np.int64)
    class_names = list(collection.dataset.class_names)
    temporary = output.with_name(f".{output.name}.{os.getpid()}.tmp")
    try:
        if output.suffix == ".csv":
            _export_csv(temporary, rows, names, [class_names[label] for label in labels], collection.splits)
        elif output.suffix == ".npz":
            values = rows.float().numpy()
            splits = np.array(collection.splits)
            with temporary.open("wb") as file:
                np.savez(file, features=values, labels=labels, files=np.array(names),
                         splits=splits, class_names=np.array(class_names))  # fmt: skip
        else:
            from safetensors.torch import save_file

            metadata = {"files": names, "class_names": class_names, "splits": collection.splits}
            tensors = {"features": rows, "labels": torch.from_numpy(labels)}
            save_file(tensors, temporary, {key: json.dumps(value) for key, value in metadata.items()})
            os.chmod(temporary, 0o666 & ~_umask())  # safetensors writes 0600 whatever the umask
        os.replace(temporary, output)
    finally:
        temporary.unlink(missing_ok=True)


def _export_csv(
    path: Path, rows: torch.Tensor, names: Sequence[str], labels: Sequence[str], splits: Sequence[str]
) -> None:
    flat = rows.float().flatten(1)
    with path.open("w", newline="", encoding="utf-8", errors="surrogateescape") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["file", "label", "split", *(f"feature_{i}" for i in range(flat.shape[1]))])
        for name, label, split, row in zip(names, labels, splits, to_numpy(flat), strict=True):
            writer.writerow(
                [spreadsheet_cell(name), spreadsheet_cell(label), split, *(f"{value:.9g}" for value in row)]
            )


def write_bad_images(path: Path, bad_images: Sequence[BadImage]) -> None:
    """Write the skipped images as CSV: file (as `spreadsheet_cell` has it), reason."""
    with path.open("w", newline="", encoding="utf-8", errors="surrogateescape") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["file", "reason"])
        writer.writerows((spreadsheet_cell(image.name), image.reason) for image in bad_images)


def _warn_odd_formats(collection: Collection) -> None:
    """Name the few images of another format than the rest: often a placeholder for a missing image."""
    suffixes = Counter(Path(sample.name).suffix.lower() for sample in collection.samples)
    if len(suffixes) < 2:
        return
    (usual, count), *_ = suffixes.most_common(1)
    odd = [sample.name for sample in collection.samples if Path(sample.name).suffix.lower() in RARE_FORMATS]
    if usual not in RARE_FORMATS and odd and count >= 20 * len(odd):
        logger.warning(
            "%d of %d images differ in format from the rest, such as %r: `tlcli data check` looks closer",
            len(odd), len(collection.samples), odd[0],
        )  # fmt: skip


RARE_FORMATS = {".gif", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm", ".pbm"}


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
