"""matplotlib's figures as inline SVG that takes its colours and its font from the page."""

import io
import re
import xml.etree.ElementTree as ElementTree

from matplotlib import rc_context
from matplotlib.figure import Figure

SERIES = 5
# colours that nobody would choose stand for the page's variables while matplotlib draws
_VARIABLES = {
    "#a1b2c0": "var(--ink)",
    "#a1b2c1": "var(--grid)",
    "#a1b2c2": "var(--heat)",
    **{f"#a1b3c{number}": f"var(--series-{number})" for number in range(SERIES)},
}
INK, GRID, HEAT, *_SERIES = _VARIABLES
# of a text, the size is kept: the family is the page's
_FAMILY = re.compile(r"font-family: [^;]*;? ?")
_DIGITS = re.compile(r"(\d\.\d\d)\d+")
_STYLE = {
    "svg.fonttype": "none",
    "svg.id": None,
    "font.size": 9,
    "axes.titlesize": 9,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": GRID,
    "xtick.color": INK,
    "ytick.color": INK,
    "grid.color": GRID,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.facecolor": "none",
    "figure.facecolor": "none",
    "legend.frameon": False,
    "legend.labelcolor": INK,
    # a name with dollar signs is no formula
    "text.parse_math": False,
}


def series_colour(number: int) -> str:
    """The colour of the series with this number; they repeat after `SERIES`, line styles have to go on telling."""
    return _SERIES[number % SERIES]


def style():
    """A context in which figures are made for [`inline_svg`]."""
    return rc_context(_STYLE)


def inline_svg(figure: Figure, name: str, title: str, description: str) -> str:
    """
    The figure as an `<svg>` element: as wide as its place, readable by screen readers, without an outer reference.

    Args:
        figure (`matplotlib.figure.Figure`): drawn inside of [`style`].
        name (`str`): unique in the page; the ids inside begin with it.
        title (`str`): what it shows.
        description (`str`): what can be seen in it.
    """
    stream = io.StringIO()
    figure.savefig(stream, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    root = ElementTree.fromstring(stream.getvalue())
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]
        element.attrib = {key: _inlined(key, value, name) for key, value in _plain_attributes(element)}
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag in ("metadata", "style"):
                parent.remove(child)
    width, height = root.get("viewBox").split()[2:]
    root.attrib = {
        "viewBox": f"0 0 {width} {height}",
        "role": "img",
        "aria-labelledby": f"{name}-title {name}-description",
    }
    for place, (tag, text) in enumerate((("title", title), ("desc", description))):
        told = ElementTree.Element(tag, id=f"{name}-{'title' if tag == 'title' else 'description'}")
        told.text = text
        root.insert(place, told)
    return ElementTree.tostring(root, encoding="unicode")


def _plain_attributes(element: ElementTree.Element) -> list[tuple[str, str]]:
    """Without namespaces, which HTML does not know."""
    return [(key.rpartition("}")[2], value) for key, value in element.attrib.items()]


def _inlined(key: str, value: str, name: str) -> str:
    if key == "id":
        return f"{name}-{value}"
    if key == "href":
        return value.replace("#", f"#{name}-", 1)
    if key == "d":
        return _DIGITS.sub(r"\1", value)
    value = value.replace("url(#", f"url(#{name}-")
    if key == "style":
        value = _FAMILY.sub("", value)
    for colour, variable in _VARIABLES.items():
        value = value.replace(colour, variable)
    return value
