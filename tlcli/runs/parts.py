"""How a run's network computes: in the number types in which it was trained and measured, part by part."""

import dataclasses

from tlcli.features.extractor import Extractor
from tlcli.features.whole import whole_network
from tlcli.runs.run import Run

AS_TRAINED = "as in training"


def rows_extractor(run: Run, *, device: str = "auto", dtype: str = "auto") -> Extractor:
    """Return the extractor of the rows that a run's trained part takes, as training had it.

    Where a head alone was trained, or another number type is asked for, the rows are the features.

    Args:
        run: The run.
        device: Name of a device.
        dtype: auto (as in training, part by part), or fp32 or bf16 for the whole network.

    Raises:
        BackboneError: The run's network is missing or damaged.
        DeviceError: The device is not there.
    """
    backbone, facts = run.backbone(), run.facts
    if dtype != "auto":
        return Extractor(backbone, device=device, dtype=dtype)
    row_dtype = facts["options"].get("cache-dtype", "auto")
    name = facts["dtype"].get("prefix") or facts["dtype"]["name"]  # bf16 may have been refused by the network
    frozen = "all" if not run.trains_units else str(facts["backbone"]["num_frozen_units"])
    if frozen == "0":  # what is trained takes the images, which are not rounded
        row_dtype, name = "fp32", "fp32"
    found = Extractor(backbone, freeze=frozen, device=device, dtype=name, cache_dtype=row_dtype)
    found.dtype_choice = dataclasses.replace(found.dtype_choice, reason=AS_TRAINED)
    return found


def network_extractor(run: Run, *, device: str = "auto", dtype: str = "auto") -> Extractor:
    """Return the extractor of a run's features; see `rows_extractor`."""
    return features_extractor(rows_extractor(run, device=device, dtype=dtype))


def features_extractor(extractor: Extractor) -> Extractor:
    """Return the extractor of features of an extractor of rows, itself where these are the features."""
    return extractor if gives_features(extractor) else whole_network(extractor)[0]


def gives_features(extractor: Extractor) -> bool:
    """Return whether the rows of an extractor are the whole network's features."""
    return extractor.cut.node == "all"
