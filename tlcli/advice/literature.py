"""What the literature says for and against the four scenarios, each finding with its source."""

# The two sources of from-scratch figures differ in schedule, so neither is quoted without the other.
LONG_SCHEDULE = (
    "with a long, tuned schedule on full training sets (BYOL, Grill et al. 2020, table 3, baselines of "
    "SimCLR, ResNet-50) training from scratch stays 0.1 to 20.7 points behind fine-tuning on 11 of 12 data "
    "sets and is 0.3 ahead on one, Birdsnap"
)
SHORT_SCHEDULE = (
    "with VTAB's short schedule (Zhai et al. 2019, ResNet-50, means of 19 data sets) scratch reaches 43.1 "
    "against 66.4 with ImageNet weights from 1,000 images, and 75.4 against 89.7 from the full sets"
)
SCRATCH_RARELY_WINS = (
    f"Scratch rarely wins: {SHORT_SCHEDULE}; {LONG_SCHEDULE}. VTAB's scratch runs have the same few steps as"
    " its fine-tuning (Flowers 50.6 there, 92.0 with the long schedule): read the two together."
)
FINE_GRAINED = (
    "Fine-grained classes need fine-tuning even when the images look similar: on full training sets a "
    "linear probe against fine-tuning gives 66.7 / 92.1 on Cars, 61.0 / 86.0 on Aircraft, 53.7 / 75.8 on "
    "Birdsnap and 72.3 / 88.3 on Food, while it is within 3 points on DTD, Pets, Caltech-101, VOC, SUN397 "
    "and Flowers (BYOL, table 3)."
)
BACKBONE_MATTERS = (
    "The backbone decides much: over ImageNet models, transfer accuracy follows ImageNet accuracy (r = 0.99"
    " for fixed features, 0.96 fine-tuned), but many common forms of regularisation in pretraining give "
    "worse fixed features (Kornblith et al. 2019). Try two or three; their features are computed once each."
)
FAR_IMAGES = (
    "Pretraining can be worth little on distant images: from 1,000 images VTAB has 72.6 from scratch and "
    "73.2 with ImageNet weights on Retinopathy, 75.6 and 80.6 on Camelyon, yet 85.0 and 95.3 on EuroSAT "
    f"(short schedule; {LONG_SCHEDULE}). Measure feature-extraction first: it is cheap and tells which case "
    "yours is."
)
DISTORTION = (
    "Fine-tuning from a random head can distort good features. Training the head first (LP-FT) was worth "
    "about 1 point in distribution and 10 out of it over plain fine-tuning on 10 data sets (Kumar et al. "
    "2022), and gives you the probe's accuracy to compare with."
)


def scratch_warning() -> str:
    """Return what giving up pretraining is expected to cost, to be said before training from scratch."""
    return (
        "Training from scratch gives up what pretraining learnt, and usually loses accuracy: "
        f"{SHORT_SCHEDULE}; {LONG_SCHEDULE}. Compare with --scenario full, which starts from the "
        "pretrained weights."
    )
