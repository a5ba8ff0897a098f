"""Draws charts: once as a list of lines, rectangles and texts, then as SVG for a page or as pixels for a PNG file.

The charts are plain SVG made here and not by a chart library in the page: they show without JavaScript, they weigh a
few kilobytes, and the page's policy can forbid every script but its own. The same shapes give RUN/curves.png.

Every series has a colour and a dash pattern of its own, so that it can be told apart without colours. The colours come
from Okabe and Ito's palette ("Color Universal Design", 2008), darkened where the contrast with white was below 3.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, UInt8
from markupsafe import Markup
from PIL import Image, ImageDraw

from fasterrcnn_jax.inference.drawing import readable
from fasterrcnn_jax.printing import printable

# In units of the chart, which are CSS pixels on a phone: text stays readable there without zooming.
WIDTH, HEIGHT = 360, 236
LEFT, RIGHT, TOP, BOTTOM = 62, 10, 10, 38
TEXT = 12
# Names of the colours, which the style sheet sets for light and dark, and their values on white.
COLOURS = {
    "s0": "#0072b2",
    "s1": "#c04e00",
    "s2": "#007a5a",
    "s3": "#a0487d",
    "s4": "#5b5b5b",
    "s5": "#8a6d00",
    "grid": "#d9d9d9",
    "axis": "#767676",
    "text": "#333333",
}
SERIES = tuple(name for name in COLOURS if name.startswith("s"))
DASHES = ("", "7 4", "2 3", "9 3 2 3", "4 2", "1 3")

Points = Float[np.ndarray, "n 2"]


class Line(NamedTuple):
    points: Points  # in units of the chart
    colour: str
    width: float = 2.0
    dash: str = ""
    name: str = ""  # the page's script finds the line by it


class Rectangle(NamedTuple):
    box: tuple[float, float, float, float]  # left, top, width, height
    colour: str
    opacity: float = 1.0
    title: str = ""


class Words(NamedTuple):
    x: float
    y: float  # of the base line
    text: str
    anchor: str = "start"  # start, middle, end
    turned: bool = False  # reads upwards


class Chart(NamedTuple):
    """A drawing of `WIDTH` x `HEIGHT` units, or of another size."""

    title: str
    description: str  # for those who cannot see the chart
    shapes: tuple[Line | Rectangle | Words, ...]
    legend: tuple[str, ...] = ()  # names of the series, in the order of SERIES and DASHES
    size: tuple[int, int] = (WIDTH, HEIGHT)
    bars: bool = False  # the legend shows bars


class Series(NamedTuple):
    name: str
    x: np.ndarray  # [n]
    y: np.ndarray  # [n]; NaN breaks the line
    id: str = ""  # the page's script finds the line by it


class Axis(NamedTuple):
    """A linear axis."""

    name: str
    low: float
    high: float
    ticks: tuple[float, ...]


def axis(name: str, low: float, high: float, *, count: int = 5) -> Axis:
    """Returns an axis from `low` to `high`, both moved outwards to round numbers, with about `count` ticks."""
    if not (math.isfinite(low) and math.isfinite(high)):
        low, high = 0.0, 1.0
    if high <= low:
        low, high = low - abs(low) * 0.5 - 0.5 * (low == 0), high + abs(high) * 0.5 + 0.5 * (high == 0)
    raw = (high - low) / max(1, count - 1)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    ticks = tuple(round(number * step, 12) for number in range(first, last + 1))
    return Axis(name, ticks[0], ticks[-1], ticks)


def unit_axis(name: str) -> Axis:
    """Returns the axis of a fraction, from 0 to 1."""
    return Axis(name, 0.0, 1.0, (0.0, 0.25, 0.5, 0.75, 1.0))


def short_number(value: float) -> str:
    """Returns a number of few characters, such as 0.25, 1.5k, 2M and 2.5e-4."""
    for limit, letter in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= limit:
            return f"{value / (1e3 if letter == 'k' else limit):.4g}{letter}"
    if 0 < abs(value) < 1e-3:
        digits, _, power = f"{value:.2e}".partition("e")
        return f"{digits.rstrip('0').rstrip('.')}e{int(power)}"
    return f"{value:.4g}"


def line_chart(title: str, series: Sequence[Series], x: Axis, y: Axis) -> Chart:
    """Returns a chart of lines."""
    shapes: list[Line | Rectangle | Words] = _frame(x, y)
    for number, one in enumerate(series):
        points = np.stack([np.asarray(one.x, np.float64), np.asarray(one.y, np.float64)], axis=1)
        colour, dash = SERIES[number % len(SERIES)], DASHES[number % len(DASHES)]
        for part in _unbroken(points):
            shapes.append(Line(place(thinned(part), x, y), colour, dash=dash, name=one.id))
        if not len(points) and one.id:
            shapes.append(Line(np.zeros((0, 2)), colour, dash=dash, name=one.id))
    ends = "; ".join(
        f"{one.name} ends at {short_number(float(one.y[-1]))}" if np.isfinite(one.y[-1]) else f"{one.name} is undefined"
        for one in series
        if len(one.y)
    )
    names = tuple(one.name for one in series) if len(series) > 1 else ()
    return Chart(title, f"{y.name} over {x.name}. {ends}", tuple(shapes), names)


def bar_chart(
    title: str, names: Sequence[str], groups: Sequence[tuple[str, np.ndarray]], x_name: str, y: Axis
) -> Chart:
    """Returns a chart with one bar per name and group, the bars of a name side by side.

    Args:
      names: below the bars.
      groups: (name, heights) of each series.
    """
    x = Axis(x_name, 0.0, float(max(1, len(names))), ())
    shapes = _frame(x, y)
    room = (WIDTH - LEFT - RIGHT) / max(1, len(names))
    width = room * 0.8 / len(groups)
    for number, (group, heights) in enumerate(groups):
        for place_of, height in enumerate(np.asarray(heights, np.float64)):
            if not np.isfinite(height):
                continue
            left, top = LEFT + room * (place_of + 0.1) + width * number, _y(min(height, y.high), y)
            box = (left, top, width * 0.94, _y(y.low, y) - top)
            words = f"{names[place_of]}{', ' + group if len(groups) > 1 else ''}: {short_number(float(height))}"
            shapes.append(Rectangle(box, SERIES[number % len(SERIES)], title=words))
    # As many names as fit beside each other.
    every = max(1, math.ceil(max((len(name) for name in names), default=0) * TEXT * 0.56 / room))
    shapes += [
        Words(LEFT + room * (number + 0.5), HEIGHT - BOTTOM + TEXT + 3, name, "middle")
        for number, name in enumerate(names)
        if number % every == 0
    ]
    told = "; ".join(
        f"{group}: "
        + ", ".join(
            f"{name} {short_number(float(h)) if np.isfinite(h) else 'undefined'}"
            for name, h in zip(names, heights, strict=True)
        )
        for group, heights in groups
    )
    return Chart(
        title, f"{y.name} by {x_name}. {told}", tuple(shapes), tuple(g for g, _ in groups if len(groups) > 1), bars=True
    )


def heat_map(title: str, counts: Float[np.ndarray, "r c"], *, aspect: float = 1.0) -> Chart:
    """Returns a map whose cells are the darker the larger their count is.

    Args:
      aspect: height of the whole map, divided by its width.
    """
    rows, columns = counts.shape
    width, height = WIDTH, max(40, round(WIDTH * aspect))
    most = max(float(counts.max(initial=0.0)), 1e-12)
    shapes: list[Line | Rectangle | Words] = [
        Rectangle((c * width / columns, r * height / rows, width / columns, height / rows), "s0", counts[r, c] / most)
        for r in range(rows)
        for c in range(columns)
        if counts[r, c] > 0
    ]
    edge = np.array([[0.5, 0.5], [width - 0.5, 0.5], [width - 0.5, height - 0.5], [0.5, height - 0.5], [0.5, 0.5]])
    row, column = np.unravel_index(int(counts.argmax()), counts.shape) if counts.size else (0, 0)
    where = f"The fullest cell is row {row + 1} of {rows} from the top, column {column + 1} of {columns}"
    return Chart(title, where, (*shapes, Line(edge, "axis", 1.0)), size=(width, height))


def place(points: Points, x: Axis, y: Axis) -> Points:
    """Returns points in units of the chart."""
    across = LEFT + (points[:, 0] - x.low) / (x.high - x.low) * (WIDTH - LEFT - RIGHT)
    return np.stack([across, _y(points[:, 1], y)], axis=1)


def thinned(points: Points, most: int = 400) -> Float[np.ndarray, "_ 2"]:
    """Returns at most about `most` of the points: of each part, the first, the lowest and the highest one."""
    if len(points) <= most:
        return points
    kept = []
    for part in np.array_split(np.arange(len(points)), most // 3):
        values = points[part, 1]
        kept.append(part[sorted({0, int(values.argmin()), int(values.argmax())})])
    return points[np.unique(np.concatenate([*kept, [len(points) - 1]]))]


def svg(chart: Chart, number: int) -> Markup:
    """Returns a chart as an SVG element. Texts are escaped; no style attribute is used, which the policy forbids.

    Args:
      number: of the chart on its page, for the ids.
    """
    width, height = chart.size
    parts = [
        Markup(
            '<svg class="chart" viewBox="0 0 {} {}" role="img" aria-labelledby="chart-{}-title chart-{}-text">'
        ).format(width, height, number, number),
        Markup('<title id="chart-{}-title">{}</title><desc id="chart-{}-text">{}</desc>').format(
            number, printable(chart.title), number, printable(chart.description)
        ),
    ]
    parts += [_svg_of(shape) for shape in chart.shapes]
    return Markup("").join([*parts, Markup("</svg>")])


def pixels(chart: Chart, *, scale: int = 2) -> UInt8[np.ndarray, "h w 3"]:
    """Returns a chart on white, with its title and legend above it."""
    width, height = chart.size
    head = 22 + 16 * math.ceil(len(chart.legend) / 2)
    fine = scale * 2  # drawn twice as large and shrunk, because Pillow's lines have no smooth edges
    image = Image.new("RGB", (width * fine, (height + head) * fine), "white")
    pen = ImageDraw.Draw(image)
    _write(image, Words(width / 2, 16, chart.title, "middle"), fine, 0.0, size=TEXT + 2)
    for number, name in enumerate(chart.legend):
        x, y = LEFT + (number % 2) * (width - LEFT) / 2, 22 + 16 * (number // 2) + 8
        colour, dash = SERIES[number % len(SERIES)], DASHES[number % len(DASHES)]
        _stroke(pen, Line(np.array([[x, y], [x + 24, y]], np.float64), colour, dash=dash), fine, 0.0)
        _write(image, Words(x + 29, y + 4, name), fine, 0.0)
    for shape in chart.shapes:
        if isinstance(shape, Line):
            _stroke(pen, shape, fine, float(head))
        elif isinstance(shape, Words):
            _write(image, shape, fine, float(head))
        else:
            x, y, w, h = shape.box
            pen.rectangle(
                (x * fine, (y + head) * fine, (x + w) * fine, (y + h + head) * fine), fill=COLOURS[shape.colour]
            )
    return np.asarray(image.resize((width * scale, (height + head) * scale), Image.Resampling.LANCZOS))


def _frame(x: Axis, y: Axis) -> list[Line | Rectangle | Words]:
    shapes: list[Line | Rectangle | Words] = []
    bottom, right = HEIGHT - BOTTOM, WIDTH - RIGHT
    for tick in y.ticks:
        at = _y(tick, y)
        shapes.append(Line(np.array([[LEFT, at], [right, at]], np.float64), "grid", 1.0))
        shapes.append(Words(LEFT - 5, at + 4, short_number(tick), "end"))
    for tick in x.ticks:
        at = LEFT + (tick - x.low) / (x.high - x.low) * (right - LEFT)
        shapes.append(Line(np.array([[at, bottom], [at, bottom + 4]], np.float64), "axis", 1.0))
        # The last one ends with the chart.
        shapes.append(
            Words(min(at, right - 2), bottom + TEXT + 4, short_number(tick), "end" if at > right - 12 else "middle")
        )
    shapes.append(Line(np.array([[LEFT, TOP], [LEFT, bottom], [right, bottom]], np.float64), "axis", 1.0))
    shapes.append(Words((LEFT + right) / 2, HEIGHT - 5, x.name, "middle"))
    shapes.append(Words(11, (TOP + bottom) / 2, y.name, "middle", turned=True))
    return shapes


def _y(value, y: Axis):
    return HEIGHT - BOTTOM - (value - y.low) / (y.high - y.low) * (HEIGHT - TOP - BOTTOM)


def _unbroken(points: Points) -> list[Float[np.ndarray, "_ 2"]]:
    """Returns the parts of a line between the points that are not finite."""
    finite = np.isfinite(points).all(axis=1)
    breaks = np.flatnonzero(np.diff(finite.astype(np.int8))) + 1
    return [
        part for part, is_line in zip(np.split(points, breaks), np.split(finite, breaks), strict=True) if is_line.any()
    ]


def _number(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0")


def _svg_of(shape: Line | Rectangle | Words) -> Markup:
    if isinstance(shape, Line):
        points = " ".join(f"{_number(x)},{_number(y)}" for x, y in shape.points.tolist())
        extra = Markup(' stroke-dasharray="{}"').format(shape.dash) if shape.dash else Markup("")
        extra += Markup(' data-line="{}"').format(shape.name) if shape.name else Markup("")
        return Markup('<polyline class="{}" stroke-width="{:g}" points="{}"{}/>').format(
            shape.colour, shape.width, points, extra
        )
    if isinstance(shape, Rectangle):
        x, y, width, height = map(_number, shape.box)
        faint = Markup(' fill-opacity="{:.2f}"').format(shape.opacity) if shape.opacity < 1.0 else Markup("")
        start = Markup('<rect class="{}" x="{}" y="{}" width="{}" height="{}"{}').format(
            shape.colour, x, y, width, height, faint
        )
        return start + (
            Markup("><title>{}</title></rect>").format(printable(shape.title)) if shape.title else Markup("/>")
        )
    x, y = _number(shape.x), _number(shape.y)
    turn = Markup(' transform="rotate(-90 {} {})"').format(x, y) if shape.turned else Markup("")
    return Markup('<text x="{}" y="{}" text-anchor="{}"{}>{}</text>').format(
        x, y, shape.anchor, turn, printable(shape.text)
    )


def _stroke(pen: ImageDraw.ImageDraw, line: Line, scale: int, down: float) -> None:
    points = (line.points + [0.0, down]) * scale
    width = max(1, round(line.width * scale))
    for start, end in _dashes(points, [float(part) * scale for part in line.dash.split()]):
        pen.line([*start, *end], fill=COLOURS[line.colour], width=width)


def _dashes(points: Points, pattern: list[float]) -> list[tuple[tuple[float, float], tuple[float, float]]]:
    """Returns the straight pieces of a line that are drawn."""
    pieces, index, left = [], 0, pattern[0] if pattern else math.inf
    for (x1, y1), (x2, y2) in zip(points[:-1].tolist(), points[1:].tolist(), strict=True):
        length = math.hypot(x2 - x1, y2 - y1)
        at = 0.0
        while at < length:
            step = min(left, length - at)
            if index % 2 == 0:
                ends = [((x1 + (x2 - x1) * t / length), (y1 + (y2 - y1) * t / length)) for t in (at, at + step)]
                pieces.append((ends[0], ends[1]))
            at, left = at + step, left - step
            if left <= 1e-9:
                index += 1
                left = pattern[index % len(pattern)]
    return pieces


def _write(image: Image.Image, words: Words, scale: int, down: float, *, size: int = TEXT) -> None:
    text, font = readable(words.text, size * scale)
    anchor = {"start": "ls", "middle": "ms", "end": "rs"}[words.anchor]
    x, y = words.x * scale, (words.y + down) * scale
    if not words.turned:
        ImageDraw.Draw(image).text((x, y), text, fill=COLOURS["text"], font=font, anchor=anchor)
        return
    # Pillow turns images only.
    width, height = math.ceil(font.getlength(text)), size * scale * 3 // 2
    strip = Image.new("RGB", (width, height), "white")
    ImageDraw.Draw(strip).text((0, size * scale), text, fill=COLOURS["text"], font=font, anchor="ls")
    image.paste(strip.rotate(90, expand=True), (round(x) - size * scale, round(y - width / 2)))
