"""Figures of the report as inline SVG, drawn by matplotlib.

Each function takes plain numbers and returns one `<svg>` element for an HTML page: no prologue, no external
reference, text as text, and everything that is not a data series in `currentColor`, so that a figure follows
the page from light to dark.
"""

import html
import io
import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

WIDTH, HEIGHT = 4.6, 3.1  # inches; drawn at 72 units an inch, so a phone shows text near its nominal size
INK = "#010203"  # stands for currentColor while matplotlib draws
SERIES = ("#2f7ed8", "#e08a00", "#1f9d6b", "#c0489b", "#7a6bd6", "#c2503a", "#4aa3b5", "#8a8a3a")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")

Line = Sequence[tuple[float, float]]


def curves(
    lines: Mapping[str, Line],
    *,
    x_label: str,
    y_label: str,
    log_x: bool = False,
    mark: tuple[str, float] | None = None,
    level: tuple[str, float] | None = None,
) -> str:
    """Return lines over a shared x axis.

    Args:
        lines: Name -> points (x, y), drawn in order of x; points that are not finite are left out.
        x_label: What x is, with its unit.
        y_label: What y is, with its unit.
        log_x: Whether x runs on a logarithmic scale.
        mark: Name and x of the point to ring: the one that was chosen.
        level: Name and y of a dashed line across the figure to compare with.
    """

    def draw(axes: Any) -> None:
        for (name, points), colour, marker in zip(
            lines.items(), itertools.cycle(SERIES), itertools.cycle(MARKERS), strict=False
        ):
            kept = sorted(point for point in points if abs(point[1]) < float("inf"))
            if not kept:
                continue
            few = len(kept) <= 40
            axes.plot(
                *zip(*kept, strict=True), color=colour, label=name, marker=marker if few else None,
                markersize=3.5,
            )  # fmt: skip
            chosen = [point for point in kept if mark and mark == (name, point[0])]
            if chosen:
                axes.plot(
                    *chosen[0], "o", color="none", markeredgecolor=INK, markeredgewidth=1.4, markersize=11
                )
        xs = [x for points in lines.values() for x, _ in points]
        if level:
            axes.axhline(level[1], color=INK, linewidth=1, linestyle=(0, (3, 3)), label=level[0])
        if log_x:
            _log_scale(axes, xs)
        elif all(float(x).is_integer() for x in xs):
            axes.xaxis.get_major_locator().set_params(integer=True)  # half an epoch is not a thing
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        if len(lines) > 1 or level:
            axes.legend(frameon=False, fontsize=9, ncols=1 if len(lines) <= 4 else 2)

    return _svg(draw, f"{y_label} over {x_label}")


def reliability(bins: Sequence[Mapping[str, float]]) -> str:
    """Return the reliability diagram: accuracy of each confidence bin, a dot sized by its images.

    Args:
        bins: Each with confidence and accuracy (means, 0 to 1) and count; empty bins are left out.
    """
    filled = [one for one in bins if one["count"]]
    most = max((one["count"] for one in filled), default=1)

    def draw(axes: Any) -> None:
        axes.plot([0, 1], [0, 1], color=INK, linewidth=1, linestyle=(0, (3, 3)), label="perfect")
        xs = [one["confidence"] for one in filled]
        ys = [one["accuracy"] for one in filled]
        axes.vlines(xs, xs, ys, color=SERIES[1], linewidth=2, alpha=0.8)
        axes.plot(xs, ys, color=SERIES[0], linewidth=1, alpha=0.6)
        sizes = [8 + 192 * one["count"] / most for one in filled]
        axes.scatter(xs, ys, s=sizes, color=SERIES[0], zorder=3, label="this run")
        axes.set_xlim(-0.02, 1.05)
        axes.set_ylim(-0.05, 1.08)
        axes.set_xlabel("confidence (probability of the predicted class)")
        axes.set_ylabel("accuracy")

    return _svg(draw, "Reliability diagram: accuracy over confidence")


def heat_map(matrix: Sequence[Sequence[float]], *, x_label: str, y_label: str) -> str:
    """Return a square matrix of shares (0 to 1, rows from the top) as a heat map."""

    def draw(axes: Any) -> None:
        from matplotlib.colors import LinearSegmentedColormap

        stops: Any = [(*_rgb(SERIES[0]), 0.0), (*_rgb(SERIES[0]), 1.0)]
        clear_to_blue = LinearSegmentedColormap.from_list("share", stops)
        axes.imshow(matrix, cmap=clear_to_blue, vmin=0, vmax=1, interpolation="nearest")
        axes.grid(False)
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)

    return _svg(draw, f"{y_label} against {x_label}", height=WIDTH)


def _log_scale(axes: Any, xs: Sequence[float]) -> None:
    """Make the x axis logarithmic, with a linear stretch to zero where a value is zero."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    if min(xs, default=1) > 0:
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(numticks=6))
    else:
        axes.set_xscale("symlog", linthresh=min((x for x in xs if x > 0), default=1.0))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))


def _svg(draw: Callable[[Any], None], label: str, height: float = HEIGHT) -> str:
    """Return what `draw` puts on a figure's axes as an inline, theme-following SVG element."""
    import matplotlib
    from matplotlib.figure import Figure

    style = {
        "svg.fonttype": "none",
        "svg.hashsalt": label,  # so that the same numbers give the same bytes
        "font.family": "sans-serif",
        "font.size": 10,
        "text.color": INK,
        "axes.edgecolor": INK,
        "axes.labelcolor": INK,
        "xtick.color": INK,
        "ytick.color": INK,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "grid.color": INK,
        "grid.alpha": 0.15,
    }
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        draw(figure.add_subplot())
        file = io.StringIO()
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(file, format="svg", transparent=True, metadata=nothing)
    return _inline(file.getvalue(), label)


def _inline(svg: str, label: str) -> str:
    """Return matplotlib's SVG file as an element: cut to what a page needs, its ink the page's colour."""
    svg = svg[svg.index("<svg") :]
    for only_in_a_file in (
        r"<metadata>.*?</metadata>\s*",
        r"<style.*?</style>\s*",
        r"<!--.*?-->\s*",
        r' xmlns(:\w+)?="[^"]*"',
        r' id="(figure|axes|patch|line2d|text|matplotlib|xtick|ytick|legend|LineCollection|Path)[\w.]*"',
    ):
        svg = re.sub(only_in_a_file, "", svg, flags=re.S)
    svg = re.sub(r"font-family: [^;\"]*", "font-family: system-ui, sans-serif", svg)
    svg = re.sub(r"font: ([\d.]+px) [^;\"]*", r"font: \1 system-ui, sans-serif", svg)
    view = re.search(r'viewBox="[^"]*"', svg)
    start = f'<svg class="figure" role="img" aria-label="{html.escape(label)}" {view[0] if view else ""}'
    svg = re.sub(r"<svg[^>]*", lambda _: start, svg, count=1)
    return re.sub(r"\n\s*", "\n", svg).replace(INK, "currentColor").strip()


def _rgb(colour: str) -> tuple[float, float, float]:
    red, green, blue = (int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5))
    return red, green, blue
