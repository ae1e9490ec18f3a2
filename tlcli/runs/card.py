"""The model card: README.md of a run."""

from collections.abc import Mapping
from typing import Any

from tlcli.config.fields import long_name
from tlcli.wording import counted, images_text, printable


def model_card(facts: Mapping[str, Any]) -> str:
    """Return the README.md of a run: what it is, how good it is, how to use it."""
    backbone, data, head = facts["backbone"], facts["data"], facts["head"]
    chosen = dict(head["chosen"] or {})
    if ((facts.get("training") or {}).get("publication") or {}).get("published") == "probe":
        chosen = {name: value for name, value in chosen.items() if name not in {"lr", "epochs"}}
    name = backbone["name"].rstrip("/").rpartition("/")[2]  # of a local folder without where it lies
    lines = [
        "---",
        "library_name: timm",
        "tags: [image-classification, tlcli]",
        f"license: {backbone['license'] or 'unknown'}",
        "---",
        "",
        f"# Classifier of {len(facts['class_names'])} classes on {name}",
        "",
        f"Made by tlcli {facts['tlcli_version']} on {facts['created'][:10]} ({facts['scenario']}).",
        "",
        f"- Classes: {', '.join(n if n.isprintable() else repr(n) for n in facts['class_names'][:50])}"
        + (" ..." if len(facts["class_names"]) > 50 else ""),
        f"- Images: {', '.join(f'{count} {name}' for name, count in data['num_images'].items() if count)}",
        f"- Backbone: {backbone['architecture']}, licence {backbone['license'] or 'not stated'}",
        "- Head: " + ", ".join([head["kind"], *(f"{long_name(k)} {v}" for k, v in chosen.items())]),
        *_training_line(facts),
    ]
    for name, found in facts["metrics"].items():
        if found:
            low, high = found["interval"]["low"], found["interval"]["high"]
            images = images_text(found["num_images"], found["interval"].get("num_groups"))
            lines.append(
                f"- {name.replace('_', ' ').capitalize()}: top-1 accuracy {found['top1_accuracy']:.3f} "
                f"(95 % interval {low:.3f} to {high:.3f}, {images}; "
                f"always the most frequent class: {found['majority_baseline']:.3f})"
            )
    if warnings := facts.get("warnings"):
        messages = (warning["message"].replace(backbone["name"], name) for warning in warnings)
        lines += ["", "Warnings:", "", *(f"- {printable(message)}" for message in messages)]
    lines += ["", "```python", *_usage(facts), "```", ""]
    return "\n".join(lines)


def _training_line(facts: Mapping[str, Any]) -> list[str]:
    """Return how the backbone's units were trained; [] where only a head was."""
    recipe, training = facts.get("recipe"), facts.get("training")
    if not recipe or not training:
        return []
    publication = training.get("publication") or {}
    if publication.get("published") == "probe":
        return [f"- {publication['sentence'].capitalize()}."]
    count = facts["backbone"].get("num_frozen_units")
    augmentation = recipe.get("augmentation") or {}
    rate = training.get("lr") or recipe.get("lr")
    epochs = counted(training["epochs"], "epoch")
    if continued := facts.get("continued"):
        epochs += f" (continued after epoch {continued['after_epoch']} with a new schedule)"
    if training.get("best_epoch"):
        epochs += (
            f" of which epoch {training['best_epoch']} was kept (chosen on {training.get('selected_on')})"
        )
    parts = [
        f"units 1 to {count} frozen" if count else "no unit frozen",
        epochs,
        f"optimiser {recipe['opt']}" if recipe.get("opt") else "",
        f"learning rate {rate:.2g} ({recipe.get('sched', 'constant')})" if rate else "",
        f"augmentation {augmentation['name']}" if "name" in augmentation else "",
        "started from a linear probe" if recipe.get("head_init") == "probe" else "",
    ]
    lines = [f"- Training: {facts['scenario']}, " + ", ".join(part for part in parts if part)]
    if publication.get("sentence"):
        lines.append(f"- Compared: {publication['sentence']}")
    return lines


def _usage(facts: Mapping[str, Any]) -> list[str]:
    if facts["head"]["stored"]["classifier"]:
        return ["import timm", "", 'model = timm.create_model("local-dir:RUN", pretrained=True).eval()']
    if facts["head"]["stored"]["facts"].get("kind") == "knn":
        return [
            "# tlcli predict RUN IMAGES",
            "# head.safetensors has the features of the training images, model.safetensors the backbone.",
        ]
    return [
        "# tlcli predict RUN IMAGES",
        "# The head is in head.safetensors; model.safetensors is the backbone without it.",
    ]
