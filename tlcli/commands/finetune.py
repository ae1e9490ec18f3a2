"""Data to run: features once, then the head or the network, then a run directory.

    collect -> plan -> compute features -> fit the head -> RunDirectory
                                        or train the network

Scenario feature-extraction freezes the whole backbone and trains a head on its features; freeze, full and
scratch train units of the backbone too.
"""

import dataclasses
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tlcli.advice.literature import scratch_warning
from tlcli.backbones.zoo import load_backbone
from tlcli.commands.evaluate import head_logits
from tlcli.config.commands import FinetuneConfig
from tlcli.config.fields import to_options
from tlcli.data.collection import Collection, collect, groups_of, labels_of
from tlcli.features.extractor import Extractor
from tlcli.features.outcome import Outcome
from tlcli.features.plan import (
    FeaturePlan,
    check_images,
    compute_features,
    make_extractor,
    plan_features,
    read_rows,
)
from tlcli.heads.choice import FittedHead
from tlcli.heads.fit import fit_head, held_out_scores, num_heads
from tlcli.heads.nested import HeldOut
from tlcli.machine import processes
from tlcli.machine.versions import versions
from tlcli.metrics.evaluation import (
    STORED_MISTAKES,
    Evaluation,
    headline,
    measure,
    no_better_than_majority,
)
from tlcli.metrics.intervals import share_interval
from tlcli.progress import Progress
from tlcli.runs.card import model_card
from tlcli.runs.continuing import check_data, check_options, goes_on, is_done
from tlcli.runs.directory import (
    RunDirectory,
    check_run_dir,
    default_run_dir,
    kept_runs,
    read_facts,
    run_to_continue,
)
from tlcli.runs.model_files import check_saving, save_model
from tlcli.runs.results import add_circumstances, write_evaluation
from tlcli.training.backbone import TrainedBackbone, train_backbone
from tlcli.training.checkpoints import Checkpoints
from tlcli.training.plan import TrainingPlan, check_packages, plan_training
from tlcli.warned import collected, warn


@dataclass(frozen=True)
class FinetunePlan:
    """What `finetune` will do.

    Attributes:
        config: With paths made absolute.
        collection: The images of train and val.
        extractor: The prefix, or the whole backbone where nothing is frozen.
        features: What computing the features takes; None where images are trained on directly.
        training: How the backbone's units are trained; None in scenario feature-extraction.
        run_dir: The run directory to write.
        started: time.perf_counter() when planning began.
        warnings: Given while it was planned, each `code` and `message`.
    """

    config: FinetuneConfig
    collection: Collection
    extractor: Extractor
    features: FeaturePlan | None
    training: TrainingPlan | None
    run_dir: Path
    started: float
    warnings: tuple[dict[str, str], ...] = ()

    @property
    def scenario(self) -> str:
        """Return the scenario."""
        return self.config.resolved_scenario()

    @property
    def notes(self) -> tuple[str, ...]:
        """Return what people should know beforehand."""
        return self.training.notes if self.training else ()

    def summary(self) -> dict[str, str]:
        """Return the plan for people."""
        facts = {"scenario": self.scenario}
        if self.features is not None:
            facts |= self.features.summary()
            if self.scenario in ("full", "scratch"):  # the rows are those of the probe: no unit stays frozen
                facts |= {
                    "backbone": self.extractor.backbone.name,
                    "computes on": self.extractor.device_reason,
                }
                rows = f"{facts.pop('features')}; {self.features.store.extractor.dtype_reason}"
                facts["probe"] = f"a linear head on the features of the network before training, {rows}"
        else:
            counts = ", ".join(f"{n:,} {name}" for name, n in self.collection.num_images().items() if n)
            facts["images"] = f"{counts} in {len(self.collection.dataset.class_names)} classes"
            facts["backbone"] = self.extractor.backbone.name
            facts["computes on"] = self.extractor.device_reason
        if self.training is not None:
            facts |= self.training.summary()
        else:
            facts["heads"] = self._heads()
        return {**facts, "run": str(self.run_dir)}

    def _heads(self) -> str:
        """Return which heads are tried, and how one is chosen."""
        config = self.config
        kind = " x ".join([config.kind, *map(str, config.hidden_sizes)]).replace(" x ", " ", 1)
        folds = f"cross-validation of up to {config.folds} folds inside train"
        count = num_heads(config)
        how = "measured" if count == 1 else f"at most {count} in one job, chosen"
        return f"{kind}, {how} by {folds}"

    def document(self) -> dict[str, Any]:
        """Return the plan for machines."""
        features = self.features.document() if self.features else {}
        trained = self.training.document() if self.training else {}
        return {"scenario": self.scenario, "run_path": str(self.run_dir),
                "num_images": self.collection.num_images(), **features, **trained,
                "warnings": list(self.warnings)}  # fmt: skip


@dataclass(frozen=True)
class Result:
    """A finished run.

    Attributes:
        run_path: Its directory.
        document: The result for --json.
        evaluation: The measured val split; None with --refit, or when val is empty.
        outcome: What became of the images.
    """

    run_path: Path
    document: dict[str, Any]
    evaluation: Evaluation | None
    outcome: Outcome


def finished(config: FinetuneConfig, progress: Progress) -> dict[str, Any] | None:
    """Return the result document of the finished run that --resume has nothing more to do for, or None.

    None too where there is no such run, it is unfinished, or more --epochs let it go on.

    Args:
        config: The options.
        progress: Told of every file that is hashed.

    Raises:
        UsageError: The run was made with other options or data.
        DataError: The run or the data cannot be read.
        StorageError: The directory cannot be looked at.
    """
    path = Path(config.output or "")
    if not (config.resume and (path / "run.json").is_file()):
        return None
    facts = read_facts(path, str(path))
    if not is_done(facts) or goes_on(config, facts):
        return None
    check_options(path, _absolute(config), facts)
    collection = _without_test(collect(config, config.num_workers, progress))
    names = list(collection.dataset.class_names)
    data = {"digest": collection.digest(), "num_images": collection.num_images()}
    check_data(path, facts, {"data": data, "class_names": names})
    for kept in kept_runs(path):
        warn("replaced_run_kept", f"the run that it replaced is still in {kept}")
    document = _document(path, facts, Outcome(entry_key=facts.get("cache_key")))
    document["features"]["images_skipped"] = facts["data"].get("bad", 0)
    return document


def plan_finetune(config: FinetuneConfig, progress: Progress, *, dry_run: bool = False) -> FinetunePlan:
    """Return what `finetune` will do.

    Args:
        config: The options.
        progress: Told of every file that is hashed.
        dry_run: The plan is not carried out; see `plan_training`.

    Raises:
        UsageError: Options contradict each other, or the output exists.
        DataError: The data cannot be used.
        BackboneError: The backbone cannot be loaded.
        StorageError: The features would not fit.
    """
    with collected() as warnings:
        plan = _plan(config, progress, dry_run)
        if plan.scenario == "scratch":
            warn("no_pretraining", scratch_warning())
        if warning := plan.extractor.backbone.license_warning:
            warn(warning.code, warning.message)
    return dataclasses.replace(plan, warnings=tuple(warnings))


def _plan(config: FinetuneConfig, progress: Progress, dry_run: bool) -> FinetunePlan:
    started = time.perf_counter()
    scenario = config.resolved_scenario()
    check_run_dir(config)
    if scenario != "feature-extraction":
        check_packages(config)
    workers = config.num_workers
    collection = _without_test(collect(config, workers, progress))
    config = _absolute(config)
    plan = None
    if scenario == "feature-extraction":
        extractor = make_extractor(load_backbone(config), dataclasses.replace(config, freeze="all"))
        features: FeaturePlan | None = plan_features(
            collection, extractor, cache=config.cache, workers=workers, max_bad=config.max_bad,
            max_bytes=config.cache_max_bytes,
        )  # fmt: skip
    else:
        plan = plan_training(config, collection, run_to_continue(config), dry_run=dry_run)
        extractor, features = plan.extractor, plan.features
    names = collection.dataset.class_names
    check_saving(extractor.backbone, len(names), linear=config.is_single_layer)
    if config.output:
        run_dir = Path(config.output)
    else:
        run_dir = default_run_dir(str(config.data), str(config.backbone), scenario)
    run_dir = processes.from_main(run_dir)  # what is there already must be looked at before it is written
    return FinetunePlan(config, collection, extractor, features, plan, run_dir, started)


def _absolute(config: FinetuneConfig) -> FinetuneConfig:
    """Return `config` with absolute paths, so that its config.yaml works from any folder."""
    paths_of = {"data": config.data, "weights": config.weights}
    changes = {key: str(Path(value).expanduser().absolute()) for key, value in paths_of.items() if value}
    kind, colon, place = str(config.backbone).partition(":")
    if colon and kind == "local-dir":
        changes["backbone"] = f"local-dir:{Path(place).expanduser().absolute()}"
    return dataclasses.replace(config, **changes)  # type: ignore[arg-type]


def _without_test(collection: Collection) -> Collection:
    """Return train and val: test images are not touched before `evaluate --split test`."""
    return collection.select([i for i, split in enumerate(collection.splits) if split != "test"])


def finetune(plan: FinetunePlan, progress: Progress) -> Result:
    """Train what a plan says and write the run.

    Raises:
        DataError: Too many images cannot be used, or a class lost all of its images.
        StorageError: The cache or the run directory cannot be written.
        Interrupted: A signal came while the backbone was trained; its state is saved.
    """
    config = plan.config
    write = processes.is_main()
    with (
        collected(plan.warnings) as warnings,
        RunDirectory(plan.run_dir, config, _facts(plan), resume=config.resume, write=write) as writer,
    ):
        outcome = _compute(plan, progress)
        collection = outcome.usable(plan.collection)
        trained_on = ("train", "val") if config.refit else ("train",)
        train = collection.select([i for i, split in enumerate(collection.splits) if split in trained_on])
        val = collection.select([i for i, split in enumerate(collection.splits) if split not in trained_on])
        started = time.perf_counter()
        if plan.training is not None:
            trained = train_backbone(plan.training, config, train, val, writer, progress)
            head, facts = trained.head, _trained_facts(plan, trained)
            logits = None if trained.logits is None else trained.logits.numpy()
        else:
            fitted, held = _fit(plan, train, progress, measured=bool(val.samples))
            head, facts = fitted.head, _fitted_facts(config, fitted, held, train)
            logits = head_logits(_planned(plan), val, fitted.head) if val.samples else None
            writer.write_lines("metrics.jsonl", _lines(fitted))
        part = "head" if plan.training is None else "training"
        seconds = {"features": outcome.seconds, part: time.perf_counter() - started}
        evaluation = None
        if logits is not None:
            names = collection.dataset.class_names
            evaluation = measure(
                logits, val, names, split="val", majority_class=_majority_class(train), worst=STORED_MISTAKES
            )
            add_circumstances(evaluation, val, plan.extractor)
            facts["metrics"] = {"val": headline(evaluation.document)}
            balanced = "balanced" in (config.class_weights, config.sampling)
            if warning := no_better_than_majority(evaluation.document, balanced=balanced):
                warn("below_majority", warning)
            if processes.is_main():
                write_evaluation(plan.run_dir, "val", evaluation)
        stored = save_model(writer, plan.extractor.backbone, head, collection.dataset.class_names)
        seconds["total"] = time.perf_counter() - plan.started
        facts["head"]["stored"] = stored
        facts |= {
            "data": {**_data_facts(plan, train), "bad": len(outcome.bad_images)},
            "trained_on": list(trained_on),
            "warnings": warnings,
            "seconds": {name: round(value, 3) for name, value in seconds.items()},
        }
        writer.write_text("README.md", model_card({**writer.facts, **facts}))
        writer.finish(facts)
    if processes.is_main():
        Checkpoints(plan.run_dir).clear()
    return Result(
        plan.run_dir, _document(plan.run_dir, {**_facts(plan), **facts}, outcome), evaluation, outcome
    )


def _document(run_dir: Path, facts: Mapping[str, Any], outcome: Outcome) -> dict[str, Any]:
    """Return the result for --json."""
    names = ("metrics", "head", "recipe", "training", "continued", "seconds")
    return {
        "run_path": str(run_dir),
        "scenario": facts["scenario"],
        **{name: facts[name] for name in names if name in facts},
        "features": outcome.document(),
        "num_images": facts["data"]["num_images"],
        "class_names": facts["class_names"],
        "warnings": facts.get("warnings", []),
    }


def _compute(plan: FinetunePlan, progress: Progress) -> Outcome:
    """Compute the rows of a plan; where there are none, look for images that cannot be used."""
    bad_images_path = plan.run_dir / "bad_images.csv"
    if plan.features is not None:
        return compute_features(plan.features, progress, bad_images_path=bad_images_path)
    return check_images(plan.collection, plan.config, progress, bad_images_path)


def _planned(plan: FinetunePlan) -> FeaturePlan:
    assert plan.features is not None  # scenario feature-extraction always has them
    return plan.features


def _fit(
    plan: FinetunePlan, train: Collection, progress: Progress, *, measured: bool
) -> tuple[FittedHead, HeldOut | None]:
    """Return the head, and what it is worth by cross-validation; of MLPs only where nothing else says it."""
    # Copies of an image, and images of one group, must not be divided by a fold.
    rows = read_rows(_planned(plan), train)
    fitted = fit_head(
        rows.float(), labels_of(train), len(train.dataset.class_names), plan.config,
        groups=groups_of(train), device=plan.extractor.device, progress=progress,
    )  # fmt: skip
    held = None
    if not (measured and plan.config.hidden_sizes):
        held = held_out_scores(fitted, plan.config, progress)
    return fitted.alone(), held


def _facts(plan: FinetunePlan) -> dict[str, Any]:
    """Return what is known before training, for run.json."""
    extractor, backbone = plan.extractor, plan.extractor.backbone
    facts: dict[str, Any] = {
        "versions": versions(),
        "scenario": plan.scenario,
        "backbone": {
            "name": backbone.name,
            "architecture": backbone.architecture,
            "arguments": backbone.arguments,
            "license": backbone.license,
            "source": backbone.origin,
            "pretrained": backbone.pretrained,
            "num_frozen_units": extractor.cut.num_frozen_units,
        },
        "preprocess": dataclasses.asdict(backbone.preprocess),
        "class_names": list(plan.collection.dataset.class_names),
        "data": _data_facts(plan, plan.collection),
        "device": {"name": str(extractor.device), "reason": extractor.device_choice.reason},
        "dtype": {
            "name": extractor.dtype_choice.name,
            "reason": extractor.dtype_reason,
            **extractor.number_types,
        },
        "cache_key": _cache_key(plan),
        "options": to_options(plan.config),
        "warnings": list(plan.warnings),
    }
    if plan.training is not None:
        if plan.training.continued is not None:
            facts["continued"] = plan.training.continued.document()
        facts["recipe"] = {
            **plan.training.recipe.document(),
            "augmentation": plan.training.policy.key_facts(),
            "num_views": plan.training.num_views,
            "amp": plan.training.compute.amp,
            "caching": None if plan.training.caching is None else plan.training.caching.document(),
        }
        if plan.scenario != "freeze":  # the network is trained and measured as it is, no prefix was prepared
            facts["dtype"] |= {"name": "fp32", "reason": "as it was trained"}
    return facts


def _cache_key(plan: FinetunePlan) -> str | None:
    return plan.features.store.entry.key if plan.features and plan.features.store.entry else None


def _data_facts(plan: FinetunePlan, train: Collection) -> dict[str, Any]:
    collection = plan.collection
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


def _fitted_facts(
    config: FinetuneConfig, fitted: FittedHead, held: HeldOut | None, train: Collection
) -> dict[str, Any]:
    """Return what a head on frozen features is; metrics are cross-validation's, until val is measured."""
    corrected = None
    if held is not None:
        interval = share_interval(held.correct, groups_of(train).numpy()[held.rows])
        corrected = {**held.document(), "interval": interval.document()}
    head = {
        "kind": config.kind,
        "chosen": fitted.chosen,
        "cv": {**fitted.cv, "corrected": corrected},
        "refit": config.refit,
        "selected_on": "train",
    }
    return {"head": head, "metrics": _cross_validation(corrected, train)}


def _trained_facts(plan: FinetunePlan, trained: TrainedBackbone) -> dict[str, Any]:
    """Return what a trained network is."""
    assert plan.training is not None
    recipe = plan.training.recipe
    publication = trained.publication
    selected_on = "val" if recipe.select_on_val else trained.selected_on
    training = {**trained.document(), "selected_on": selected_on}
    if plan.training.continued is not None:  # which began from the probe, if from one
        training["probe"] = plan.training.continued.training.get("probe")
    chosen: Mapping[str, Any] = {"lr": trained.result.lr, "epochs": training["epochs"]}
    if publication.published == "probe" and trained.probe is not None:
        chosen = {**trained.probe.chosen, **chosen}
    head = {
        "kind": "mlp" if plan.config.hidden_sizes else "linear",
        "chosen": chosen,
        "cv": None, "refit": False, "selected_on": selected_on,
    }  # fmt: skip
    return {"head": head, "training": training, "metrics": {"val": None}}


def _cross_validation(corrected: dict[str, Any] | None, train: Collection) -> dict[str, Any]:
    """Return the cross-validation estimate, which counts where val was trained on too or is empty."""
    if corrected is None:
        return {"val": None}
    majority = _majority_class(train)
    labels = [sample.label for sample in train.samples]
    return {
        "val": None,
        "cross_validation": {
            "top1_accuracy": corrected["top1_accuracy"],
            "interval": corrected["interval"],
            "num_images": corrected["num_samples"],
            "majority_baseline": labels.count(majority) / len(labels),
            "log_loss": corrected["log_loss"],
            "method": corrected["method"],
        },
    }


def _lines(fitted: FittedHead) -> list[dict[str, Any]]:
    return [{"kind": "head", **row} for row in fitted.table] + [
        {"kind": "epoch", **row} for row in fitted.curve
    ]
