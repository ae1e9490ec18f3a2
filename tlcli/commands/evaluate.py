"""Measure a run on a split: accuracy with its interval, per class, calibration, and the worst mistakes."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tlcli.config.backbone import CacheMode
from tlcli.config.commands import EvaluateConfig
from tlcli.config.data import DataOptions
from tlcli.config.fields import from_options
from tlcli.data.collection import Collection, collect
from tlcli.errors import DataError, StorageError, UsageError
from tlcli.features.extractor import Extractor
from tlcli.features.feature_store import FeatureStore
from tlcli.features.outcome import Outcome
from tlcli.features.plan import FeaturePlan, compute_features, plan_features, read_rows
from tlcli.heads.head import Head
from tlcli.metrics.evaluation import STORED_MISTAKES, Evaluation, measure
from tlcli.progress import Progress
from tlcli.runs.parts import features_extractor, gives_features, rows_extractor
from tlcli.runs.results import add_circumstances, why_kept, write_evaluation
from tlcli.runs.run import Run, open_run
from tlcli.training.inputs import RowInputs
from tlcli.training.measure import network_features
from tlcli.warned import warn


def plan_evaluate(config: EvaluateConfig, progress: Progress) -> tuple[Run, FeaturePlan]:
    """Return the run and what computing the features of the split will take.

    Raises:
        UsageError: No run was named, or a gate is asked of a split the run was trained on.
        DataError: The run or its data cannot be used, or the split is empty.
        StorageError: The rows would not fit.
    """
    run = open_run(config.run)
    config = _own_data_unnamed(config, run)
    if config.split in run.facts["trained_on"] and config.data is None and config.min_accuracy is not None:
        raise UsageError(
            f"The run was trained on {config.split} as well; a gate on it would measure nothing.",
            hint="Use --split test, other DATA, or a run without --refit.",
        )
    if config.data is None:
        if config.split in run.facts["trained_on"]:
            text = f"the run was trained on {config.split}: this shows what it remembers, not how good it is"
            warn("trained_on_split", text)
        elif config.split == _selected_on(run):
            text = f"the run's epoch was chosen on {config.split}, so its accuracy there flatters it a little"
            warn("selected_on_split", text)
    workers = config.num_workers
    collection = _split_of(config, run, workers, progress)
    rows = rows_extractor(run, device=config.device, dtype=config.dtype)
    return run, _planned(config, run, rows, collection)


def _planned(config: EvaluateConfig, run: Run, rows: Extractor, collection: Collection) -> FeaturePlan:
    """Return what computing takes: from rows at the cut where training left all of them in the cache."""

    def planned(extractor: Extractor, cache: CacheMode) -> FeaturePlan:
        return plan_features(
            collection, extractor, cache=cache, workers=config.num_workers, max_bad=config.max_bad,
            max_bytes=config.cache_max_bytes,
        )  # fmt: skip

    if not run.trains_units:
        return planned(rows, config.cache)
    if not gives_features(rows) and config.cache in {"auto", "always"} and _are_cached(rows, collection):
        return planned(rows, "auto")
    # A trained network's features serve this run alone: they are kept only when asked.
    return planned(features_extractor(rows), "never" if config.cache == "auto" else config.cache)


def _are_cached(extractor: Extractor, collection: Collection) -> bool:
    """Return whether all rows are in the cache; a cache that cannot be used has none."""
    if not extractor.cut.num_frozen_units:
        return False
    try:
        return not FeatureStore(extractor).missing(collection.samples, collection.fingerprints)
    except StorageError:
        return False


def _selected_on(run: Run) -> str | None:
    """Return the split that chose the epoch of a trained run, or None."""
    found: str | None = (run.facts.get("training") or {}).get("selected_on")
    return found


def _own_data_unnamed(config: EvaluateConfig, run: Run) -> EvaluateConfig:
    """Return `config` without DATA where that is the run's own: measured whole it would include train."""
    own = Path(run.facts["data"]["path"])
    given = Path(config.data or "").expanduser()
    if config.data is not None and given.exists() and own.exists() and given.samefile(own):
        return dataclasses.replace(config, data=None)
    return config


def _split_of(config: EvaluateConfig, run: Run, workers: int, progress: Progress) -> Collection:
    stored = json.loads(json.dumps(run.facts["options"]))
    options = from_options(DataOptions, stored)
    options = dataclasses.replace(
        options,
        data=config.data or run.facts["data"]["path"],
        limit_per_class=None,
        max_bad=config.max_bad,
        allow_outside_root=config.allow_outside_root or options.allow_outside_root,
    )
    try:
        collection = collect(options, workers, progress, class_names=run.class_names)
    except DataError as error:
        if config.data is None:
            error.hint = (
                f"The run was trained on {options.data}; give DATA if it has moved. {error.hint or ''}"
            )
        raise
    whole = config.data is not None and not collection.named_splits
    kept = [i for i, split in enumerate(collection.splits) if whole or split == config.split]
    if not kept:
        counts = ", ".join(f"{count} {name}" for name, count in collection.num_images().items())
        raise DataError(
            f"{options.data!r} has no {config.split} images (it has {counts}).",
            hint="Choose another --split, or give DATA that has this one.",
        )
    return collection.select(kept)


def evaluate(
    run: Run, plan: FeaturePlan, config: EvaluateConfig, progress: Progress
) -> tuple[Evaluation, Outcome]:
    """Measure the split of a plan; with the run's own data the result is also stored in the run.

    Raises:
        DataError: Too many images cannot be used.
    """
    config = _own_data_unnamed(config, run)
    outcome = compute_features(plan, progress, to_train=False)
    collection = outcome.usable(plan.collection)
    logits = head_logits(plan, collection, run.head())
    evaluation = measure(
        logits,
        collection,
        run.class_names,
        split=config.split,
        majority_class=run.facts["data"]["majority_class"],
        worst=max(config.worst, STORED_MISTAKES),
    )
    chosen_here = config.data is None and config.split == _selected_on(run)
    in_training = config.split in run.facts["trained_on"]
    evaluation.document["selected_on"] = "train" if in_training else config.split if chosen_here else None
    evaluation.document["num_skipped"] = len(outcome.bad_images)
    add_circumstances(evaluation, collection, plan.store.extractor)
    if config.data is None and not _stored(run, config.split, evaluation):
        evaluation.document["stored"] = False
    return evaluation, outcome


def _stored(run: Run, split: str, evaluation: Evaluation) -> bool:
    """Store an evaluation in its run; return whether that was done."""
    if reason := why_kept(run.path, split, evaluation.document, run.facts):
        path = run.path / f"evaluation-{split}.json"
        warn("figures_kept", f"{path} is kept: {reason}; remove the file to store this one")
        return False
    try:
        write_evaluation(run.path, split, evaluation)
    except StorageError:  # a read-only run can be measured all the same
        return False
    return True


def head_logits(plan: FeaturePlan, collection: Collection, head: Head) -> np.ndarray[Any, Any]:
    """Return the fp32 logits [n, C] of usable images of a plan.

    Raises:
        StorageError: Rows vanish from the cache again and again.
    """
    features = _features(plan, collection)
    with torch.inference_mode():
        return head.logits(features).numpy()


def _features(plan: FeaturePlan, collection: Collection) -> Tensor:
    """Return the features, fp32 [n, D]; of a trained network maybe from rows at the cut."""
    extractor = plan.store.extractor
    if gives_features(extractor):
        return read_rows(plan, collection).float()

    def read(indices: Sequence[int], views: Sequence[int]) -> Tensor:
        return read_rows(plan, collection.select(indices), views)

    keys = [found.sha256 or "" for found in collection.fingerprints]
    inputs = RowInputs(read, keys, num_views=1, seed=0, device=extractor.device)
    return network_features(extractor, inputs, workers=plan.workers)
