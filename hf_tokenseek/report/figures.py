"""
The figures of a report, drawn by matplotlib.

matplotlib draws SVG that needs no script: it stands in the page as it is, 10 to 60 kB a figure, follows the page's
colours, and is read out by screen readers. plotly would bring 4 MB of script into every report for zooming in curves
of a few hundred points.
"""

from collections.abc import Callable, Collection, Iterable, Sequence
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap, to_rgba
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from .statistics import HeatMap, Overlap, Points
from .svg import HEAT, INK, inline_svg, series_colour, style

# as wide as a phone, so that the text is readable there; inches of 72 points
WIDTH, HEIGHT = 4.9, 2.9
STEPS = "optimizer step"
DASHES = ("-", "--", "-.", ":")
MOST_MARKED = 40
LONGEST_NAME = 48
SHADES = 12


class Drawn(NamedTuple):
    """
    A figure for the page.

    Args:
        title (`str`): its heading.
        svg (`str`): the picture.
    """

    title: str
    svg: str


class Line(NamedTuple):
    """
    A curve and how it looks.

    Args:
        label (`str`): what the legend calls it.
        points ([`Points`]): without any, it is left out.
        colour (`int`): its number; the same run has the same one in all figures.
        dashes (`int`): their number; lines of one figure differ in them, too.
    """

    label: str
    points: Points
    colour: int = 0
    dashes: int = 0


def draw(name: str, title: str, description: str, plot: Callable[[Axes], None], height: float = HEIGHT) -> Drawn:
    """A figure with one pair of axes, which `plot` fills."""
    with style():
        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        plot(figure.add_subplot())
        return Drawn(title, inline_svg(figure, name, title, description))


def lines(name: str, title: str, unit: str, curves: Sequence[Line], x: str = STEPS, zero: bool = False) -> Drawn:
    """
    Curves in one figure.

    Args:
        name, title (`str`): as in [`inline_svg`].
        unit (`str`): what the vertical axis counts.
        curves (`Sequence[Line]`): what to draw.
        x (`str`, *optional*): what the horizontal axis counts.
        zero (`bool`, *optional*, defaults to `False`): whether the vertical axis begins at 0.
    """

    curves = [line for line in curves if line.points.x]

    def plot(axes: Axes) -> None:
        for label, points, colour, dashes in curves:
            marker = "." if len(points.x) <= MOST_MARKED else ""
            look = {"color": series_colour(colour), "linestyle": DASHES[dashes % len(DASHES)], "marker": marker}
            axes.plot(*points, label=_name(label), linewidth=1.5, **look)
        axes.set(xlabel=x, ylabel=unit)
        if x == STEPS:
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.6, linewidth=0.6)
        axes.margins(y=0.08)
        if zero:
            most = max(value for line in curves for value in line.points.y)
            axes.set_ylim(0, 1.08 * most or 1)
        if len(curves) > 1:
            _legend_above(axes)

    return draw(name, title, _told(curves, unit, x), plot, HEIGHT + _legend_height([line.label for line in curves]))


def bars(
    name: str,
    title: str,
    unit: str,
    groups: dict[str, Sequence[float]],
    x: str | None = None,
    names: Sequence[str] | None = None,
) -> Drawn:
    """
    Bars side by side: one place on the horizontal axis for each number of a group.

    Args:
        name, title, unit (`str`): as in [`lines`].
        groups (`dict[str, Sequence[float]]`): by what the legend calls them.
        x (`str`, *optional*): what the horizontal axis counts.
        names (`Sequence[str]`, *optional*): of its places; their numbers if not given.
    """

    def plot(axes: Axes) -> None:
        width = 0.8 / len(groups)
        for number, (label, values) in enumerate(groups.items()):
            places = [place + (number - (len(groups) - 1) / 2) * width for place in range(len(values))]
            hatch = "////" if number % 2 else None
            look = {"color": series_colour(number), "edgecolor": INK, "linewidth": 0.3, "hatch": hatch}
            axes.bar(places, values, width, label=_name(label), **look)
        axes.set(xlabel=x, ylabel=unit)
        if names is None:
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        else:
            axes.set_xticks(range(len(names)), names, fontsize=8)
        axes.grid(axis="y", alpha=0.6, linewidth=0.6)
        axes.set_axisbelow(True)
        if len(groups) > 1:
            _legend_above(axes)

    told = (
        f"{label}: {sum(values):.4g} {unit} in all, at most {max(values):.4g}." for label, values in groups.items()
    )
    return draw(name, title, " ".join(told), plot, HEIGHT + _legend_height(groups))


def positions(name: str, title: str, totals: dict[str, list[int]]) -> Drawn:
    """Where the tokens of each kind stand: share of the tokens at that place, stacked."""
    sums = [max(1, sum(column)) for column in zip(*totals.values(), strict=True)]
    places = [100 * place / len(sums) for place in range(len(sums))]

    def plot(axes: Axes) -> None:
        below = [0.0] * len(sums)
        # the colours of the token map
        for number, kind in ((1, "loss"), (2, "evidence")):
            share = [100 * count / total for count, total in zip(totals[kind], sums, strict=True)]
            look = {"color": series_colour(number), "edgecolor": INK, "hatch": "////" if number == 2 else None}
            axes.bar(places, share, 100 / len(sums), below, align="edge", label=kind, linewidth=0.3, **look)
            below = [a + b for a, b in zip(below, share, strict=True)]
        axes.set(xlabel="place in the sequence [%]", ylabel="selected of the tokens there [%]", xlim=(0, 100))
        axes.grid(axis="y", alpha=0.6, linewidth=0.6)
        axes.set_axisbelow(True)
        _legend_above(axes)

    told = ", ".join(f"{sum(counts)} {kind}" for kind, counts in totals.items())
    return draw(name, title, f"Tokens of all micro-batches that were selected from: {told}.", plot)


def overlap(name: str, title: str, found: dict[str, list[Overlap]]) -> Drawn:
    """How much of the evidence stays from visit to visit, and how much would by chance."""
    curves = []
    for number, (label, points) in enumerate(found.items()):
        visits = [point.visit for point in points]
        by_chance = Points(visits, [point.by_chance for point in points])
        curves.append(Line(f"{label}, found", Points(visits, [point.found for point in points]), number, number))
        curves.append(Line(f"{label}, by chance", by_chance, number, number + 2))
    return lines(name, title, "|A∩B| / |A∪B|", curves, "visit of the same sample", zero=True)


def heat_map(name: str, title: str, unit: str, found: HeatMap, x: str) -> Drawn:
    """Layers from the bottom up, shades for shares between 0 and 1."""
    layers = len(found.values)
    # one colour, more or less of it: right on light and on dark pages
    shades = ListedColormap([to_rgba(HEAT, level / (SHADES - 1)) for level in range(SHADES)])

    def plot(axes: Axes) -> None:
        edges = [layer - 0.5 for layer in range(layers + 1)]
        mesh = axes.pcolormesh(found.edges, edges, found.values, cmap=shades, vmin=0, vmax=1, clip_on=False)
        axes.set(xlabel=x, ylabel="layer")
        axes.spines[:].set_visible(True)
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(MaxNLocator(integer=True))
        axes.figure.colorbar(mesh, ax=axes, label=unit, pad=0.02, fraction=0.06, drawedges=False)

    means = [sum(row) / max(1, len(row)) for row in found.values]
    told = f"{layers} layers; {unit}, mean over the columns, is least in layer {means.index(min(means))} "
    told += f"({min(means):.2f}) and most in layer {means.index(max(means))} ({max(means):.2f})."
    return draw(name, title, told, plot, min(6.0, 1.2 + 0.11 * layers + 0.6))


def _name(label: str) -> str:
    """A label that fits, behind a space: matplotlib keeps names that begin with `_` out of the legend."""
    keep = LONGEST_NAME // 2
    return f" {label if len(label) <= LONGEST_NAME else f'{label[:keep]}…{label[-keep:]}'}"


def _legend_columns(labels: Iterable[str]) -> int:
    return 1 if max(map(len, labels)) > LONGEST_NAME // 2 else 2


def _legend_height(labels: Collection[str]) -> float:
    """Inches that a legend takes beyond its first row."""
    return 0.16 * (-(-len(labels) // _legend_columns(labels)) - 1)


def _legend_above(axes: Axes) -> None:
    columns = _legend_columns(axes.get_legend_handles_labels()[1])
    place = {"loc": "lower left", "bbox_to_anchor": (0, 1)}
    axes.legend(**place, ncols=columns, borderaxespad=0.2, handlelength=2.4, fontsize=8)


def _told(curves: Sequence[Line], unit: str, x: str) -> str:
    """The curves in words."""
    return " ".join(
        f"{label}: {points.y[0]:.4g} {unit} at {x} {points.x[0]:.4g}, {points.y[-1]:.4g} at {points.x[-1]:.4g}, "
        f"between {min(points.y):.4g} and {max(points.y):.4g}."
        for label, points, *_ in curves
    )
