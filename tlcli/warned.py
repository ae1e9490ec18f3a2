"""Warnings with a code: the one way the library and the command line give them.

`warn` logs on the `tlcli` loggers with the code in the record. The command line prints it on stderr and puts
it into the `warnings` of its document; `finetune` stores those of a run in run.json; whoever uses the library
takes them with `collected`. docs/json.md has the table of codes, which a test compares with CODES.
"""

import contextlib
import logging
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

logger = logging.getLogger(__name__)

CODES = {
    # data
    "ignored_files": "files that look like images, or rows that name them, were left out",
    "empty_class_folder": "a folder where classes are holds no images, so no class is made of it",
    "similar_class_names": "names of classes differ only in case, spaces, leading zeros or Unicode form",
    "conflicting_labels": "the same image is in more than one class",
    "leakage": "the same image is in more than one split, so what is measured on it is memory",
    "images_skipped": "images cannot be used and are left out; their names and reasons are told with it",
    "odd_format": "a few images have another format than the rest, such as a placeholder",
    "odd_size": "a few images have another size than the rest",
    "duplicates": "the same image is there more than once, in one class and split",
    "tiny_class": "a class has very few training images",
    "imbalance": "some classes have many times the images of others",
    "missing_in_val": "a class has no val image",
    "blank_images": "images are of a single colour",
    "unmeasured_class": "the split that is measured has no image of a class",
    # backbone and weights
    "licence_unknown": "the licence of the pretrained weights is not known",
    "licence_non_commercial": "the licence of the pretrained weights excludes commercial use",
    "unseen_pixels": "the network never looks at the last rows or columns of images of this size",
    "damaged_download": "a downloaded file is not used because its content does not match its hash",
    "averaged_weights": "the weights file holds averaged (EMA) and raw weights; one of them was chosen",
    "adapted_channels": "the weights are for images of other channels; the first layer was adapted",
    "resampled_weights": "the weights are for another image size; a tensor was resampled",
    "missing_tensors": "the weights file lacks tensors of the network, which keep their initial values",
    "surplus_tensors": "the weights file holds tensors inside the network that it does not have",
    # cache
    "damaged_shard": "a damaged shard of the cache was moved away or is ignored; its rows are computed again",
    "rows_not_kept": "finished rows could not be stored in the cache",
    "rows_lost": "cached rows were damaged or gone and are computed again",
    "rows_differ": "cached rows of another machine or version differ from those computed here; not used",
    # training
    "no_pretraining": "training from scratch gives up what pretraining learnt",
    "head_stopped_short": "the optimiser of the chosen head stopped before it had converged",
    "unmeasured_head": "too few images to hold any out: the head's hyperparameters are defaults",
    "constant_features": "all training images have the same features",
    "one_class": "all training images are of one class",
    "penalty_at_edge": "the chosen head has the smallest or largest l2 that was tried",
    "checkpoint_skipped": "a damaged checkpoint is skipped",
    "below_probe": "the trained network does worse than the linear probe it started from",
    "below_earlier": "a run that went on does worse than before",
    "not_better_than_probe": "the trained network's gain over its probe may be chance",
    "nothing_selected": "there were no images to compare the trained network with its probe on",
    "below_majority": "what is published does no better than always naming the most frequent class",
    "continued_elsewhere": "a run goes on with another device, number type or recipe; results may differ",
    "stopping": "a signal came; training stops after the present step",
    # runs
    "replaced_run_kept": "the run that was to be replaced is kept beside the new one",
    "replaced_run_left": "the run that was replaced could not be removed",
    "trained_on_split": "the run was trained on the split that is measured",
    "selected_on_split": "the run's epoch was chosen on the split that is measured",
    "figures_kept": "a split was measured otherwise than its stored figures, which are kept",
    "thumbnails_missing": "mistakes are shown without their image because it is gone",
}  # fmt: skip
"""Every code and what it means. A code is never given another meaning."""


class Warned(NamedTuple):
    """A warning.

    Attributes:
        code: One of CODES.
        message: What a person reads, without "warning: ".
    """

    code: str
    message: str

    def document(self) -> dict[str, str]:
        """Return the warning for --json and run.json."""
        check_code(self.code)
        return {"code": self.code, "message": self.message}


_collectors: list[list[dict[str, str]]] = []


def warn(code: str, message: str) -> None:
    """Give a warning.

    Args:
        code: One of CODES.
        message: What a person reads; it is not a format.

    Raises:
        ValueError: There is no such code.
    """
    found = Warned(code, message).document()
    for collector in _collectors:
        add(collector, [found])
    logger.warning("%s", message, extra={"code": code})


def check_code(code: str) -> None:
    """Refuse a code without a meaning.

    Raises:
        ValueError: It is not in CODES.
    """
    if code not in CODES:
        raise ValueError(f"{code!r} is not a code of a warning; give it a meaning in {__name__}.CODES")


@contextlib.contextmanager
def collected(known: Iterable[Mapping[str, str]] = ()) -> Iterator[list[dict[str, str]]]:
    """Collect what is warned of inside the block, whatever the loggers let through.

    Args:
        known: Warnings given before, which come first.

    Yields:
        A list that grows: `code` and `message` of each warning, in order, equal ones once.
    """
    found = add([], map(dict, known))
    _collectors.append(found)
    try:
        yield found
    finally:
        # By identity: an equal list may be that of another block.
        _collectors[:] = [collector for collector in _collectors if collector is not found]


def add(known: list[dict[str, str]], more: Iterable[dict[str, str]]) -> list[dict[str, str]]:
    """Append to `known` the warnings of `more` that are not in it, and return it."""
    for item in more:
        if item not in known:
            known.append(item)
    return known
