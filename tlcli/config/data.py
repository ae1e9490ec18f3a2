"""Options of the data: where images are, how they are split, how training images are varied."""

from dataclasses import dataclass
from typing import Literal

from tlcli.config.fields import Options, argument, option

Split = Literal["train", "val", "test"]


# ---- groups of options, shared by commands ----------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class DataOptions(Options):
    """Where the images are and how they are split."""

    data: str | None = argument(
        None, "Folder of images (a folder a class, or train/val/test above them), or a CSV/TSV file.", "DATA"
    )
    filename_column: str = option("filename", "CSV column that holds the path, relative to the CSV file.")
    label_column: str = option("label", "CSV column that holds the class.")
    split_column: str = option("split", "CSV column that holds train, val or test; may be absent.")
    group_column: str = option("group", "CSV column of groups that must not be divided by a split.")
    val_fraction: float = option(
        0.2,
        "Share of the training images held out as val when no val split is given.",
        minimum=0.01,
        maximum=0.9,
    )
    test_fraction: float = option(
        0.0,
        "Share of the training images held out as test, for a figure that nothing was chosen on.",
        minimum=0.0,
        maximum=0.9,
    )
    split_seed: int = option(0, "Changes which images the content hash sends to val.", minimum=0)
    limit_per_class: int | None = option(
        None,
        "Use at most N training images of each class (lowest content hash first): few-shot.",
        metavar="N",
        minimum=1,
    )
    max_bad: float = option(
        0.01, "Share of unreadable images above which the run stops.", minimum=0.0, maximum=1.0
    )
    allow_outside_root: bool = option(False, "Let a CSV or a link name files outside the data folder.")


Augment = Literal["auto", "none", "light", "medium", "strong", "randaugment", "trivialaugment"]


@dataclass(frozen=True, kw_only=True)
class AugmentOptions(Options):
    """How training images are varied. A preset sets every value; an option given beside it wins."""

    augment: Augment = option(
        "auto",
        "Preset: none, light (crop), medium (crop, mirror, rotation, light), strong (RandAugment, erasing), "
        "randaugment, trivialaugment; auto goes by data-set size. More when train accuracy runs away from "
        "val; see `tlcli data preview`.",
    )
    views: int | None = option(
        None,
        "Versions of each image in the cache: the plain one and V - 1 augmented ones; an epoch draws one per "
        "image. 4 unless given, 1 without augmentation and in extract. More when the network overfits.",
        metavar="V",
        minimum=1,
        maximum=1000,
    )
    view_seed: int = option(
        0, "Seed of the augmented views, so that runs of several --seed share them.", minimum=0
    )
    mirror: float | None = option(
        None, "Probability of a left-right mirror; 0 for letters, digits and signs.", minimum=0.0, maximum=1.0
    )
    crop_scale: float | None = option(
        None,
        "Smallest random crop, in share of the area that evaluation shows, 1 is off; lower when objects "
        "differ in size.",
        minimum=0.05,
        maximum=1.0,
    )
    rotate: float | None = option(
        None,
        "Largest rotation in degrees; 180 where there is no up, as in micrographs.",
        minimum=0.0,
        maximum=180.0,
    )
    shear: float | None = option(
        None, "Largest shear in degrees; try 10 for handwriting.", minimum=0.0, maximum=60.0
    )
    warp: float | None = option(
        None,
        "Local elastic warp: standard deviation of the shift, in share of the image side; try 0.02 for "
        "handwriting and tissue.",
        minimum=0.0,
        maximum=0.2,
    )
    brightness: float | None = option(
        None, "Largest relative change of brightness; try 0.2 when lighting varies.", minimum=0.0, maximum=1.0
    )
    contrast: float | None = option(
        None, "Largest relative change of contrast; try 0.2 when cameras vary.", minimum=0.0, maximum=1.0
    )
    saturation: float | None = option(
        None,
        "Largest relative change of saturation; 0 where colour decides the class.",
        minimum=0.0,
        maximum=1.0,
    )
    hue: float | None = option(
        None,
        "Largest shift of hue in turns of the colour wheel; try 0.02 when white balance varies.",
        minimum=0.0,
        maximum=0.5,
    )
    pca_color: float | None = option(
        None,
        "Standard deviation of AlexNet's colour shift along the principal components of ImageNet's "
        "colours; 0.1 there.",
        minimum=0.0,
        maximum=1.0,
    )
    erase: float | None = option(
        None,
        "Probability of erasing a random rectangle; try 0.25 when objects are often covered.",
        minimum=0.0,
        maximum=1.0,
    )
    magnitude: int | None = option(
        None, "Strength of RandAugment, 0 to 30; 9 is usual, 0 is off.", minimum=0, maximum=30
    )
