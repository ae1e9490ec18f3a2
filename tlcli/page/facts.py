"""What a run was made of and with, as names and texts."""

from collections.abc import Mapping
from typing import Any


def facts_of(run: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return what the run was made of and with, as name and text; facts that a run lacks are left out."""
    data, backbone, head = run["data"], run["backbone"], run["head"]
    counts = ", ".join(f"{count:,} {split}" for split, count in data["num_images"].items() if count)
    ignored = ", ".join(f"{count} {reason}" for reason, count in (data.get("ignored") or {}).items())
    device, dtype = run.get("device") or {}, run.get("dtype") or {}
    facts = [
        ("Data", data["path"]),
        ("Images", counts),
        (
            "Left out",
            "; ".join(text for text in (_bad(data.get("bad")), ignored and f"ignored: {ignored}") if text),
        ),
        ("Classes", str(len(run["class_names"]))),
        ("Backbone", backbone["name"]),
        ("Architecture", backbone.get("architecture")),
        ("Licence of the backbone", backbone.get("license") or "not stated; ask its publisher"),
        ("Scenario", run["scenario"]),
        ("Frozen", _frozen(run)),
        ("Frozen part", ((run.get("recipe") or {}).get("caching") or {}).get("reason")),
        ("Head", _plain({"kind": head.get("kind"), **(head.get("chosen") or {})})),
        ("Cross-validation in train", _plain(head.get("cv") or {})),
        ("Corrected for the choice of the head", _plain((head.get("cv") or {}).get("corrected") or {})),
        ("Preprocessing", _plain(run.get("preprocess") or {})),
        ("Device", _because(device.get("name"), device.get("reason"))),
        ("Compute type", _because(dtype.get("name"), dtype.get("reason"))),
        ("Seconds", _plain(run.get("seconds") or {})),
        ("Made", f"{run.get('created', '')} with tlcli {run.get('tlcli_version', '')}"),
        ("Versions", _plain(run.get("versions") or {})),
        ("Digest of the data", data.get("digest")),
    ]
    return [(name, str(text)) for name, text in facts if text]


def _bad(bad: Any) -> str:
    count = bad if isinstance(bad, int) else len(bad or ())
    return f"{count} unreadable (bad_images.csv)" if count else ""


def _because(what: Any, reason: Any) -> str:
    return f"{what} ({reason})" if what and reason else str(what or "")


def _plain(values: Mapping[str, Any]) -> str:
    """Return a small mapping as text: `scaling plain, l2 0.01`."""
    return ", ".join(
        f"{str(name).replace('_', ' ')} {value_text(value)}"
        for name, value in values.items()
        if value is not None and not isinstance(value, dict)
    )


def value_text(value: Any) -> str:
    """Return a value of a run as text."""
    if isinstance(value, list | tuple):
        return ("x" if all(isinstance(item, int) for item in value) else " ").join(map(value_text, value))
    return f"{value:.4g}" if isinstance(value, float) else "-" if value is None else str(value)


# ---- how the backbone was trained -------------------------------------------------------------------------


def training_of(run: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return what the page says of a run that trained units of the backbone; None for a head alone."""
    training = run.get("training")
    if not training:
        return None
    best = training.get("best_epoch")
    publication = training.get("publication") or {}
    return {
        "sentence": publication.get("sentence"),
        "published": publication.get("published", "trained"),
        "probe": (training.get("probe") or {}).get("val_top1_accuracy"),
        "selected_on": training.get("selected_on"),
        "best_epoch": best,
        "epochs": training["epochs"],
    }


def _frozen(run: Mapping[str, Any]) -> str | None:
    if run["scenario"] == "feature-extraction":
        return None  # the scenario's name says it
    count = run["backbone"].get("num_frozen_units")
    return f"units 1 to {count}" if count else "nothing"


def recipe_of(run: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return every value of the training as name and text; [] for a head alone."""
    recipe = dict(run.get("recipe") or {})
    recipe.pop("caching", None)  # among the facts
    augmentation = recipe.pop("augmentation", None) or {}
    settings = {**recipe, **{name: value for name, value in augmentation.items() if name != "version"}}
    found = {name: _setting(name, value) for name, value in settings.items()}
    if "lr" in recipe and recipe["lr"] is None:
        found["lr"] = f"{value_text(run['training']['lr'])} (found by short trainings)"
    return [(name.replace("_", " "), text) for name, text in found.items()]


def _setting(name: str, value: Any) -> str:
    if value is None:
        return "a new one every epoch" if name == "num_views" else "off"
    return {True: "yes", False: "no"}[value] if isinstance(value, bool) else value_text(value)
