"""Inline SVG: an element of a page that takes the page's ink and refers to nothing outside."""

import math
import re
import xml.etree.ElementTree as ElementTree

import pytest

from tlcli.page import figures

LINES = {"plain": [(0.01, 0.8), (0.1, 0.9), (1.0, 0.7)], "l2-normalised": [(0.01, 0.6), (0.1, 0.65)]}
BINS = [
    {"confidence": 0.5, "accuracy": 0.4, "count": 10},
    {"confidence": 0.9, "accuracy": 0.95, "count": 30},
    {"confidence": 0.0, "accuracy": 0.0, "count": 0},
]


def drawings() -> dict[str, str]:
    """Return one of each figure."""
    return {
        "curves": figures.curves(LINES, x_label="l2 penalty", y_label="accuracy", log_x=True),
        "reliability": figures.reliability(BINS),
        "heat map": figures.heat_map([[0.9, 0.1], [0.3, 0.7]], x_label="predicted", y_label="true"),
    }


@pytest.mark.parametrize("name", ["curves", "reliability", "heat map"])
def test_a_figure_is_one_svg_element_that_follows_the_page(name: str) -> None:
    svg = drawings()[name]
    assert svg.startswith('<svg class="figure" role="img" aria-label="')
    assert svg.endswith("</svg>")
    assert "currentColor" in svg
    assert figures.INK not in svg
    assert "http" not in svg
    assert "<style" not in svg
    assert not re.search(r"#000000|black", svg), "ink that would vanish on a dark page"
    ElementTree.fromstring(svg.replace("xlink:", ""))


def test_the_same_numbers_give_the_same_bytes() -> None:
    assert drawings() == drawings()


def test_names_and_labels_stay_text() -> None:
    svg = drawings()["curves"]
    for word in ("plain", "l2-normalised", "l2 penalty", "accuracy"):
        assert f">{word}</text>" in svg


def test_the_chosen_point_is_ringed() -> None:
    def rings(mark: tuple[str, float] | None) -> int:
        svg = figures.curves(LINES, x_label="x", y_label="y", log_x=True, mark=mark)
        return svg.count("stroke-width: 1.4")

    assert rings(("plain", 0.1)) > rings(None)
    assert rings(("plain", 0.5)) == rings(None)


def test_values_that_cannot_be_drawn_are_left_out() -> None:
    lines = {"a": [(0.0, math.nan), (1.0, math.inf), (2.0, 0.5)], "empty": []}
    assert "<svg" in figures.curves(lines, x_label="x", y_label="y")


def test_zero_has_a_place_on_a_logarithmic_axis() -> None:
    lines = {"a": [(0.0, 0.1), (0.01, 0.2), (10.0, 0.3)]}
    assert ">0</text>" in figures.curves(lines, x_label="x", y_label="y", log_x=True)


def test_bins_without_images_are_left_out() -> None:
    assert "<svg" in figures.reliability([{"confidence": 0.0, "accuracy": 0.0, "count": 0}])
