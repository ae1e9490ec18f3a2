"""Fill the feature cache with the rows of a data set, and export them on request."""

import logging
from pathlib import Path

from tlcli.backbones.zoo import load_backbone
from tlcli.config.commands import ExtractConfig
from tlcli.data.augment import resolve_policy
from tlcli.data.collection import collect
from tlcli.errors import UsageError
from tlcli.features.export import export
from tlcli.features.outcome import Outcome
from tlcli.features.plan import FeaturePlan, compute_features, make_extractor, plan_features
from tlcli.features.views import Views
from tlcli.machine import processes
from tlcli.progress import Progress

logger = logging.getLogger(__name__)


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
    workers = config.num_workers
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
    views = Views(policy, config.view_seed) if policy is not None else None
    extractor = make_extractor(load_backbone(config), config, views=views)
    return plan_features(
        collection, extractor, cache=config.cache, workers=workers, max_bad=config.max_bad,
        num_views=num_views, max_bytes=config.cache_max_bytes,
    )  # fmt: skip


def extract(config: ExtractConfig, plan: FeaturePlan, progress: Progress) -> Outcome:
    """Compute the missing rows of a plan and write the export that `config` asks for.

    Raises:
        As `compute_features`; StorageError also when the export cannot be written.
    """
    output = Path(config.output) if config.output else None
    bad_images_path = (output.parent if output else Path()) / "bad_images.csv"
    if plan.store.entry is None and not processes.is_main():
        return Outcome()  # rows in memory are of use to the process that exports them alone
    outcome = compute_features(plan, progress, bad_images_path=bad_images_path)
    if output and processes.is_main():
        export(plan, outcome, output)
    return outcome
