"""Data to run: features once, then the head, then a run directory.

    collect -> plan -> compute_features -> fit_head -> RunWriter

Scenario 1, feature extraction: the whole backbone is frozen and a head is trained on its features.
"""

import dataclasses
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tlcli import metrics, paths
from tlcli.backbones.zoo import load_backbone
from tlcli.config import FinetuneConfig, to_options
from tlcli.data.collection import Collection, collect
from tlcli.errors import UsageError
from tlcli.evaluate import STORED_MISTAKES, Evaluation, headline, logits_of, measure, usable, write_evaluation
from tlcli.extract import (
    FeaturePlan,
    compute_features,
    features_document,
    make_extractor,
    plan_features,
    read_rows,
)
from tlcli.features import Features
from tlcli.heads import FittedHead, fit_head
from tlcli.progress import Progress
from tlcli.runs import RunWriter, check_output, default_run_dir, model_card

SCENARIO = "feature-extraction"


@dataclass(frozen=True)
class FinetunePlan:
    """What `finetune` will do.

    Attributes:
        config: With paths made absolute.
        features: What computing the features takes.
        run_dir: The run directory to write.
        started: time.perf_counter() when planning began.
    """

    config: FinetuneConfig
    features: FeaturePlan
    run_dir: Path
    started: float

    def facts(self) -> dict[str, str]:
        """Return the plan for people."""
        hidden = self.config.hidden_sizes()
        head = f"mlp {' x '.join(map(str, hidden))}" if hidden else "linear, 48 in one job"
        return {
            **self.features.facts(),
            "heads": f"{head}, chosen by {self.config.folds}-fold cross-validation inside train",
            "run": str(self.run_dir),
        }

    def document(self) -> dict[str, Any]:
        """Return the plan for machines."""
        return {"scenario": SCENARIO, "run_path": str(self.run_dir), **self.features.document()}


@dataclass(frozen=True)
class Result:
    """A finished run.

    Attributes:
        run_path: Its directory.
        document: The result for --json.
        evaluation: The measured val split; None with --refit, or when val is empty.
        features: What became of the images.
    """

    run_path: Path
    document: dict[str, Any]
    evaluation: Evaluation | None
    features: Features


def plan_finetune(config: FinetuneConfig, progress: Progress) -> FinetunePlan:
    """Return what `finetune` will do.

    Raises:
        UsageError: Options contradict each other, or the output exists.
        DataError: The data cannot be used.
        BackboneError: The backbone cannot be loaded.
        StorageError: The features would not fit.
    """
    started = time.perf_counter()
    _check_scenario(config)
    check_output(config)
    workers = config.workers or paths.default_workers()
    collection = _without_test(collect(config, workers, progress))
    config = _absolute(config)
    extractor = make_extractor(load_backbone(config), config)
    plan = plan_features(collection, extractor, cache=config.cache, workers=workers, max_bad=config.max_bad)
    run_dir = (
        Path(config.output)
        if config.output
        else default_run_dir(str(config.data), str(config.backbone), SCENARIO)
    )
    return FinetunePlan(config, plan, run_dir, started)


def _absolute(config: FinetuneConfig) -> FinetuneConfig:
    """Return `config` with absolute paths, so that its config.yaml works from any folder."""
    paths_of = {"data": config.data, "weights": config.weights}
    changes = {key: str(Path(value).expanduser().absolute()) for key, value in paths_of.items() if value}
    kind, colon, place = str(config.backbone).partition(":")
    if colon and kind == "local-dir":
        changes["backbone"] = f"local-dir:{Path(place).expanduser().absolute()}"
    return dataclasses.replace(config, **changes)  # type: ignore[arg-type]


def _check_scenario(config: FinetuneConfig) -> None:
    """Refuse what this version cannot train, and contradictions."""
    freeze = "all" if config.freeze is None else config.freeze.strip().lower()
    if freeze != "all":
        other = (
            "contradicts --scenario feature-extraction" if config.scenario else "trains part of the backbone"
        )
        raise UsageError(
            f"--freeze {config.freeze} {other}; this version trains heads on a frozen backbone.",
            hint="Leave --freeze out, or use --freeze all. `tlcli extract --freeze K` caches unit K's rows.",
        )


def _without_test(collection: Collection) -> Collection:
    """Return train and val: test images are not touched before `evaluate --split test`."""
    return collection.select([i for i, split in enumerate(collection.splits) if split != "test"])


def finetune(plan: FinetunePlan, progress: Progress) -> Result:
    """Train the heads of a plan and write the run.

    Raises:
        DataError: Too many images cannot be used, or a class lost all of its images.
        StorageError: The cache or the run directory cannot be written.
    """
    config, extractor = plan.config, plan.features.store.extractor
    with RunWriter(plan.run_dir, config, _facts(plan)) as writer:
        features = compute_features(plan.features, progress, bad_images_path=plan.run_dir / "bad_images.csv")
        collection = usable(plan.features.collection, features)
        trained_on = ("train", "val") if config.refit else ("train",)
        train = collection.select([i for i, split in enumerate(collection.splits) if split in trained_on])
        fitted = _fit(plan, train, progress)
        val = collection.select([i for i, split in enumerate(collection.splits) if split not in trained_on])
        evaluation = None
        if val.samples:
            names = collection.dataset.class_names
            logits = logits_of(plan.features, val, fitted.head)
            evaluation = measure(
                logits, val, names, split="val", majority_class=_majority_class(train), worst=STORED_MISTAKES
            )
            write_evaluation(plan.run_dir, "val", evaluation)
        stored = writer.save_model(extractor.backbone, fitted.head, collection.dataset.class_names)
        writer.write_lines("metrics.jsonl", _lines(fitted))
        found = _metrics(fitted, evaluation, train)
        seconds = {
            "features": round(features.seconds, 3),
            "head": round(fitted.seconds, 3),
            "total": round(time.perf_counter() - plan.started, 3),
        }
        facts = {
            "data": {**_data_facts(plan, train), "bad": len(features.bad_images)},
            "head": {**_head_facts(config, fitted), "stored": stored},
            "trained_on": list(trained_on),
            "metrics": found,
            "seconds": seconds,
        }
        writer.write_text("README.md", model_card({**writer.facts, **facts}))
        writer.finish(facts)
    document = {
        "run_path": str(plan.run_dir),
        "scenario": SCENARIO,
        "metrics": found,
        "head": facts["head"],
        "features": features_document(features),
        "num_images": plan.features.collection.num_images(),
        "class_names": list(plan.features.collection.dataset.class_names),
        "seconds": seconds,
    }
    return Result(plan.run_dir, document, evaluation, features)


def _fit(plan: FinetunePlan, train: Collection, progress: Progress) -> FittedHead:
    keys = [found.sha256 or "" for found in train.fingerprints]
    rows = read_rows(plan.features, train)
    labels = torch.tensor([sample.label for sample in train.samples])
    # Copies of an image, and images of one group, must not be divided by a fold.
    numbers: dict[str, int] = {}
    groups = [
        numbers.setdefault(f"group {sample.group}" if sample.group else key, len(numbers))
        for sample, key in zip(train.samples, keys, strict=True)
    ]
    return fit_head(
        rows.float(), labels, len(train.dataset.class_names), plan.config,
        groups=torch.tensor(groups), device=plan.features.store.extractor.device, progress=progress,
    )  # fmt: skip


def _facts(plan: FinetunePlan) -> dict[str, Any]:
    """Return what is known before training, for run.json."""
    extractor = plan.features.store.extractor
    backbone = extractor.backbone
    return {
        "scenario": SCENARIO,
        "backbone": {
            "name": backbone.name,
            "architecture": backbone.architecture,
            "arguments": backbone.arguments,
            "license": backbone.license,
            "source": backbone.source,
            "pretrained": backbone.pretrained,
            "num_frozen_units": extractor.cut.num_frozen_units,
        },
        "preprocess": dataclasses.asdict(backbone.preprocess),
        "class_names": list(plan.features.collection.dataset.class_names),
        "data": _data_facts(plan, plan.features.collection),
        "device": {"name": str(extractor.device), "reason": extractor.device_choice.reason},
        "dtype": {"name": extractor.dtype_choice.name, "reason": extractor.dtype_choice.reason},
        "cache_key": plan.features.store.entry.key if plan.features.store.entry else None,
        "options": to_options(plan.config),
    }


def _data_facts(plan: FinetunePlan, train: Collection) -> dict[str, Any]:
    collection = plan.features.collection
    return {
        "path": plan.config.data,
        "kind": collection.dataset.kind,
        "digest": collection.digest(),
        "num_images": collection.num_images(),
        "ignored": dict(collection.dataset.ignored),
        "majority_class": _majority_class(train),
    }


def _majority_class(train: Collection) -> int:
    """Return the most frequent class of train; the first of several."""
    counts = Counter(
        s.label for s, split in zip(train.samples, train.splits, strict=True) if split == "train"
    )
    return min(range(len(train.dataset.class_names)), key=lambda label: (-counts[label], label))


def _head_facts(config: FinetuneConfig, fitted: FittedHead) -> dict[str, Any]:
    kind = "mlp" if config.hidden_sizes() else "linear"
    return {
        "kind": kind,
        "chosen": fitted.chosen,
        "cv": fitted.cv,
        "refit": config.refit,
        "selected_on": "train",
    }


def _metrics(fitted: FittedHead, evaluation: Evaluation | None, train: Collection) -> dict[str, Any]:
    """Return the score that counts: val, or after a refit the cross-validation estimate."""
    if evaluation is not None:
        return {"val": headline(evaluation.document)}
    cv = fitted.cv
    if not cv.get("num_samples"):
        return {"val": None}
    total, accuracy = cv["num_samples"], cv["top1_accuracy"]
    majority = _majority_class(train)
    labels = [sample.label for sample in train.samples]
    return {
        "val": None,
        "cross_validation": {
            "top1_accuracy": accuracy,
            "interval": metrics.wilson_interval(round(accuracy * total), total).as_dict(),
            "num_images": total,
            "majority_baseline": labels.count(majority) / len(labels),
        },
    }


def _lines(fitted: FittedHead) -> list[dict[str, Any]]:
    return [{"kind": "head", **row} for row in fitted.table] + [
        {"kind": "epoch", **row} for row in fitted.curve
    ]
