"""The command lines whose results are pinned in tests/upgrade, in the order in which they are run.

make_fixtures.py runs them with the release whose files are kept, test_upgrade.py with the code as it stands.
Both run them in a folder with `images`, `home` (TLCLI_HOME) and `runs`; `{runs}` is where `finetune` writes.
"""

NETWORK = ("--image-size", "24", "--dtype", "fp32", "--cache-dtype", "fp32", "--device", "cpu", "-j", "2")
BACKBONE = ("--backbone", "classic/lenet5", "--random-init", *NETWORK)
VIEWS = ("--augment", "light", "--views", "3")
EPOCHS = ("--amp", "none", "--epochs", "2", "-b", "8", "--lr", "0.005")
TRAINING = (*EPOCHS, "--head-init", "probe")

SCRATCH = ("--backbone", "classic/lenet5", "--scenario", "scratch", "--augment", "none")

TIMM = (
    "--backbone",
    "test_vit",
    "--random-init",
    "--model-kwargs",
    "embed_dim=24,depth=2",
    "--image-size",
    "32",
)

COMMANDS: dict[str, tuple[str, ...]] = {
    "recommend": ("recommend", "--size", "small", "--similarity", "low"),
    "data-check": ("data", "check", "images"),
    "data-split": ("data", "split", "images"),
    "data-preview": ("data", "preview", "images", "--augment", "light", "--images", "2", "--samples", "2"),
    "backbones-list": ("backbones", "list", "lenet"),
    "backbones-show": ("backbones", "show", "classic/lenet5", "--random-init"),
    "finetune-scratch": ("finetune", "images", *SCRATCH, *NETWORK, *EPOCHS, "-o", "{runs}/scratch"),
    "extract-pooled": ("extract", "images", *BACKBONE),
    "extract-cut": ("extract", "images", *BACKBONE, "--freeze", "2"),
    "extract-views": ("extract", "images", *BACKBONE, "--freeze", "2", *VIEWS),
    "finetune-feature-extraction": ("finetune", "images", *BACKBONE, "-o", "{runs}/feature-extraction"),
    "finetune-timm": ("finetune", "images", *TIMM, "--dtype", "fp32", "-j", "2", "-o", "{runs}/timm"),
    "finetune-freeze": (
        *("finetune", "images", *BACKBONE, "--freeze", "2", *VIEWS, "--cache", "always", *TRAINING),
        *("-o", "{runs}/freeze"),
    ),
    "finetune-full": (
        *("finetune", "images", *BACKBONE, "--scenario", "full", "--augment", "none", *TRAINING),
        *("-o", "{runs}/full"),
    ),
    "evaluate-feature-extraction": ("evaluate", "runs/feature-extraction", "-j", "2"),
    "evaluate-timm": ("evaluate", "runs/timm", "-j", "2"),
    "evaluate-freeze": ("evaluate", "runs/freeze", "-j", "2"),
    "evaluate-full": ("evaluate", "runs/full", "-j", "2"),
    "evaluate-scratch": ("evaluate", "runs/scratch", "-j", "2"),
    "predict": ("predict", "runs/feature-extraction", "images/val", "-j", "2"),
    "report": ("report", "runs/freeze"),
    "cache-list": ("cache", "list"),
    "cache-verify": ("cache", "verify"),
    "cache-prune": ("cache", "prune", "--max-size", "1TB", "--dry-run"),
    "demo": ("demo", "-o", "demo", "--overwrite"),
}
"""Name of the stored document -> arguments, to which `--json` is added."""
