"""Features as a file for other programs: .safetensors, .npz or .csv."""

import csv
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from tlcli.data.listing import spreadsheet_cell
from tlcli.features.batch import to_numpy
from tlcli.features.outcome import Outcome
from tlcli.features.plan import FeaturePlan, read_rows
from tlcli.machine import files


def export(plan: FeaturePlan, outcome: Outcome, output: Path) -> None:
    """Write the plain rows of a collection with file names, labels and splits, in the order of the names.

    Only view 0, with or without --views: one row an image is what other programs expect, and the other views
    are tlcli's own augmentation, which it reads from the cache.

    safetensors: `features` [n, *row_shape], `labels` int64 [n] (-1 unknown), with JSON lists `files`,
    `class_names` and `splits` in the metadata. npz: the same as arrays (bf16 rows as float32). csv: a line an
    image: file, label, split, then the values of a row.

    Args:
        plan: Whose features were computed.
        outcome: What `compute_features` gave.
        output: The file; its name's ending chooses the format.

    Raises:
        StorageError: The disk refuses, or rows are lost from the cache.
    """
    collection = outcome.usable(plan.collection)
    rows = read_rows(plan, collection)
    names = [sample.name for sample in collection.samples]
    labels = np.array([-1 if s.label is None else s.label for s in collection.samples], np.int64)
    class_names = list(collection.dataset.class_names)
    with (
        files.storage_errors("write", output, hint=files.OUTPUT_HINT),
        files.published(output) as temporary,
    ):
        if output.suffix == ".csv":
            _export_csv(temporary, rows, names, [class_names[label] for label in labels], collection.splits)
        elif output.suffix == ".npz":
            values = rows.float().numpy()
            splits = np.array(collection.splits)
            with temporary.open("wb") as file:
                np.savez(file, features=values, labels=labels, files=np.array(names),
                         splits=splits, class_names=np.array(class_names))  # fmt: skip
        else:
            metadata = {"files": names, "class_names": class_names, "splits": collection.splits}
            tensors = {"features": rows, "labels": torch.from_numpy(labels)}
            _export_safetensors(temporary, tensors, {key: json.dumps(v) for key, v in metadata.items()})


def _export_safetensors(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        save_file(tensors, path, metadata)
    except SafetensorError as error:  # it has an exception of its own for a disk that refuses
        raise OSError(str(error)) from error


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
