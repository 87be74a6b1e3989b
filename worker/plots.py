"""The report's pictures: SVG that follows the page's colours, prints in black and white, and says what it shows.

Series differ by marker and line, never by colour alone.
"""

import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from xml.sax.saxutils import escape

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

# Stand-ins for the page's colours, which change between light and dark.
_INK, _SOFT, _LINE, _ACCENT = "#010101", "#020202", "#030303", "#040404"
_PAGE_COLOURS = {_INK: "var(--ink)", _SOFT: "var(--soft)", _LINE: "var(--line)", _ACCENT: "var(--accent)"}
LEAST_ROWS_OF_A_BIN = 5
_MARKS = ("o-", "s--", "^:", "D-.", "v-", "P--", "X:")
_RC: Any = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 10,
    "text.color": _INK,
    "axes.edgecolor": _SOFT,
    "axes.labelcolor": _SOFT,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": _SOFT,
    "ytick.color": _SOFT,
    "grid.color": _LINE,
    "legend.frameon": False,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
}


@dataclass(frozen=True)
class Estimate:
    """A share of rows and its 95 % interval, each 0 to 1."""

    name: str
    value: float
    low: float
    high: float
    is_chosen: bool = False


def ladder(estimates: Sequence[Estimate]) -> str:
    """Accuracy of each method as a dot on its interval, in the order given from the top."""

    def draw(axes: Axes) -> None:
        for row, estimate in enumerate(estimates):
            colour = _ACCENT if estimate.is_chosen else _INK
            axes.plot([estimate.low, estimate.high], [row, row], "|-", color=colour, markersize=9)
            axes.plot(
                estimate.value, row, "o", markersize=8, color=colour,
                markerfacecolor=colour if estimate.is_chosen else "none",
            )  # fmt: skip
        axes.set_yticks(range(len(estimates)), [estimate.name for estimate in estimates])
        axes.tick_params(axis="y", labelcolor=_INK, length=0)
        axes.spines["left"].set_visible(False)
        axes.set_ylim(len(estimates) - 0.5, -0.5)
        axes.set_xlabel("accuracy, with its 95 % interval")
        axes.xaxis.set_major_formatter(PercentFormatter(1.0))
        axes.grid(axis="x")

    said = (f"{e.name} {e.value:.1%} ({e.low:.1%} to {e.high:.1%})" for e in estimates)
    return _svg("ladder", "Accuracy of every method", "; ".join(said), draw, (7.6, 0.9 + 0.42 * len(estimates)))


def learning_curve(points: Sequence[Mapping[str, Any]], names: Mapping[str, str], prompts: Mapping[str, float]) -> str:
    """Accuracy over the number of train rows; a prompt, which needs none, is a level line.

    Args:
        points: `learning_curve` of metrics.json.
        names: Plain names by method.
        prompts: Accuracy by prompt method.
    """
    sizes = [point["n_train"] for point in points]
    curves = {method: [point["methods"][method]["accuracy"] for point in points] for method in points[0]["methods"]}

    def draw(axes: Axes) -> None:
        for mark, (method, accuracies) in zip(_MARKS, curves.items(), strict=False):
            colour = _ACCENT if method == "lora" else _INK
            axes.plot(sizes, accuracies, mark, color=colour, label=names[method], markersize=6)
        for line, (method, accuracy) in zip((":", "--"), prompts.items(), strict=False):
            axes.axhline(accuracy, color=_SOFT, linestyle=line, label=f"{names[method]} (no training)")
        axes.set_xscale("log")
        axes.set_xticks(sizes, [f"{size:,}" for size in sizes], minor=False)
        axes.xaxis.set_minor_locator(mpl.ticker.NullLocator())
        axes.set_xlabel("train rows")
        _share_axis(axes, "accuracy on the test rows")

    said = [
        f"{names[m]}: " + ", ".join(f"{a:.1%} at {n:,} rows" for n, a in zip(sizes, c, strict=True))
        for m, c in curves.items()
    ]
    said += [f"{names[method]}: {accuracy:.1%} without training" for method, accuracy in prompts.items()]
    return _svg("learning", "Accuracy over the number of train rows", "; ".join(said), draw, (7.6, 5.2))


def reliability(bins: Mapping[str, Sequence[Mapping[str, Any]]], names: Mapping[str, str]) -> str:
    """Share right over mean confidence, by bins of enough rows; on the diagonal a method is as right as it says.

    Args:
        bins: By method, `calibration.bins` of metrics.json.
        names: Plain names by method.
    """
    filled = {method: [one for one in of if one["n"] >= LEAST_ROWS_OF_A_BIN] for method, of in bins.items()}

    def draw(axes: Axes) -> None:
        axes.plot([0, 1], [0, 1], color=_LINE, linewidth=3, label="as right as it says")
        _accuracy_over(axes, "mean_confidence", filled, names)
        axes.set_xlabel("mean confidence")
        _share_axis(axes, "share right")

    said = (
        f"{names[m]}: " + ", ".join(f"{o['accuracy']:.0%} right at {o['mean_confidence']:.0%}" for o in of)
        for m, of in filled.items()
    )
    return _svg("reliability", "Share right over confidence", "; ".join(said), draw, (5.2, 5.8))


def coverage(curves: Mapping[str, Sequence[Mapping[str, Any]]], names: Mapping[str, str]) -> str:
    """Share right among the rows a method is surest of, over the share of rows it answers.

    Args:
        curves: By method, `coverage` of metrics.json.
        names: Plain names by method.
    """
    answered = {method: [one for one in of if one["coverage"] > 0] for method, of in curves.items()}

    def draw(axes: Axes) -> None:
        _accuracy_over(axes, "coverage", answered, names)
        axes.set_xlabel("rows answered, the least sure left out")
        _share_axis(axes, "share right of those")

    said = (
        f"{names[m]}: " + ", ".join(f"{o['accuracy']:.1%} right of {o['coverage']:.0%}" for o in of[::4])
        for m, of in answered.items()
    )
    return _svg("coverage", "Share right over the share of rows answered", "; ".join(said), draw, (5.2, 5.8))


def _accuracy_over(
    axes: Axes, key: str, points: Mapping[str, Sequence[Mapping[str, Any]]], names: Mapping[str, str]
) -> None:
    """One line for each method, through its points' `key`, a share too, and `accuracy`."""
    axes.xaxis.set_major_formatter(PercentFormatter(1.0))
    for mark, (method, of) in zip(_MARKS, points.items(), strict=False):
        colour = _ACCENT if method == "lora" else _INK
        axes.plot([p[key] for p in of], [p["accuracy"] for p in of], mark, color=colour, label=names[method])


def _share_axis(axes: Axes, name: str) -> None:
    axes.set_ylabel(name)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.grid()
    axes.figure.legend(loc="outside lower center")


def _svg(name: str, title: str, description: str, draw: Any, size_inches: tuple[float, float]) -> str:
    """One inline SVG; the ids in it are its own on the page."""
    with mpl.rc_context({**_RC, "svg.hashsalt": name}):
        figure = Figure(figsize=size_inches, layout="constrained")
        draw(figure.subplots())
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    svg = buffer.getvalue()
    svg = re.sub(r' (?:xmlns(?::xlink)?|version)="[^"]*"', "", svg[svg.index("<svg") :])
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", svg, flags=re.DOTALL)
    for stand_in, colour in _PAGE_COLOURS.items():
        svg = svg.replace(stand_in, colour)
    svg = svg.replace("'DejaVu Sans'", "system-ui")
    svg = re.sub(r'<g id="[^"]*">', "<g>", svg)  # the same in every picture; those that are referred to are salted
    label = f'role="img" aria-labelledby="{name}-title {name}-description"'
    told = f'<title id="{name}-title">{escape(title)}</title><desc id="{name}-description">{escape(description)}</desc>'
    return re.sub(r"<svg ([^>]*)>", lambda match: f"<svg {label} {match[1]}>{told}", svg, count=1)
