"""docs/backbones.md, from the rows of the matrix."""

from typing import Any

HEADER = """# Backbones that were tried

Every family (module) of timm's models and of torchvision's classifiers, by its smallest member: shown, a head
on frozen features, half of the units frozen, all trained, saved, reloaded in timm with equal logits, and
evaluated again. Random weights, a dozen images, once with all defaults and once in fp32
(`--dtype fp32 --amp none`). `make matrix` repeats it and writes this page.

{counts}

- **units** are what `--freeze K` counts, **cuts** the places among them where the network can be divided.
- **saved** is the share of the frozen half's work that caching at its cut saves; the rest is computed again
  in each epoch.
- **computes in** is the number type of the frozen part on a processor that is quick at bf16.

| family | member | image size | works | units | cuts | saved | computes in |
|---|---|---|---|---|---|---|---|
"""


def page(rows: list[dict[str, Any]]) -> str:
    """Return the page.

    Args:
        rows: Of each family one a variant.
    """
    families: dict[str, dict[str, dict[str, Any]]] = {}
    for row in rows:
        families.setdefault(row["family"], {})[row["variant"]] = row
    lines = [_line(family, variants) for family, variants in sorted(families.items(), key=_order)]
    works = sum(all(row["outcome"] == "works" for row in each.values()) for each in families.values())
    refused = sum(any(row["outcome"] == "refused" for row in each.values()) for each in families.values())
    counts = f"{len(families)} families: {works} work, {refused} are refused before work, "
    counts += f"{len(families) - works - refused} do not work."
    return HEADER.format(counts=counts) + "\n".join(lines) + "\n"


def _order(item: tuple[str, Any]) -> tuple[bool, str]:
    return "/" in item[0], item[0]


def _line(family: str, variants: dict[str, dict[str, Any]]) -> str:
    row = variants["default"]
    worst = next((one for one in variants.values() if one["outcome"] != "works"), row)
    size = "x".join(map(str, row["image_size"])) if "image_size" in row else ""
    works = "yes" if worst["outcome"] == "works" else f"{worst['outcome']}: {worst['why']}"
    if worst["outcome"] == "works" and not row["can_be_cut"]:
        works = "yes, frozen as a whole"
    saved = "" if row.get("saved_at_half") is None else f"{row['saved_at_half']:.0%}"
    cells = [
        family, row["name"], size, " ".join(works.split()), str(row.get("units", "")),
        str(row.get("cuts", "")), saved, _type(row.get("head_computes", "")),
    ]  # fmt: skip
    return f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |"


def _type(reason: str) -> str:
    if "autocast" in reason:
        return "bf16 by autocast"
    return reason.partition(" ")[0].rstrip(",")
