"""Small charts as inline SVG and HTML: no script, no library, readable at any width.

The drawing is stretched to its box while the labels are ordinary text beside it, so letters keep their size on a phone.
Colours are classes that the page's style sheet fills in.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

Numbers: TypeAlias = NDArray[np.float64]

BINS = 500
"""A line is drawn with at most the lowest and the highest point of so many bins."""

_BOX = 1000  # both sides of the drawing, in its own units


@dataclass(frozen=True, slots=True)
class Line:
    """One line of a chart: `style` is a class of the style sheet, x ascends, non-finite points are left out."""

    label: str
    style: str
    x: Numbers
    y: Numbers


@dataclass(frozen=True, slots=True)
class Axis:
    """A range of values, linear or logarithmic, with round ticks."""

    low: float
    high: float
    ticks: tuple[float, ...]
    logarithmic: bool = False

    def share(self, values: Numbers) -> Numbers:
        """Return where values lie between the ends, 0 to 1."""
        scale: Callable[[Numbers], Numbers] = np.log10 if self.logarithmic else np.asarray
        low, high = scale(np.array([self.low, self.high], dtype=np.float64))
        shares: Numbers = (scale(values) - low) / (high - low)
        return shares


def line_chart(title: str, lines: Sequence[Line], note: str = "") -> str:
    """Return a figure of lines over steps. Values that span decades get a logarithmic axis."""
    drawn = [_finite(line) for line in lines]
    drawn = [thin(line) for line in drawn if line.x.size]
    if not drawn:
        return _figure(title, "", '<p class="empty">No steps yet.</p>', note)
    x_axis = linear_axis(np.concatenate([line.x for line in drawn]), round_ends=False)
    y_values = np.concatenate([line.y for line in drawn])
    y_axis = log_axis(y_values) if spans_decades(y_values) else linear_axis(y_values)
    paths = "".join(f'<path class="{line.style}" d="{_path(line, x_axis, y_axis)}"/>' for line in drawn)
    grid = "".join(f'<path class="grid" d="M0,{y:.1f}H{_BOX}"/>' for y in _BOX * (1 - _tick_shares(y_axis)))
    svg = (
        f'<svg viewBox="0 0 {_BOX} {_BOX}" preserveAspectRatio="none" role="img" aria-label="{escape(title)}">'
        f"{grid}{paths}</svg>"
    )
    legend = "".join(f'<span class="key {line.style}">{escape(line.label)}</span>' for line in drawn if len(drawn) > 1)
    return _figure(title, legend, f'<div class="plot">{svg}{_labels(x_axis, y_axis)}</div>', note)


def bar_chart(counts: Mapping[str, int]) -> str:
    """Return horizontal bars, one a name, in the order given, with the count and its share."""
    most, total = max(counts.values(), default=0), sum(counts.values())
    rows = "".join(
        f'<tr><th scope="row">{escape(name)}</th>'
        f'<td class="bar"><span style="width:{100 * count / max(most, 1):.1f}%"></span></td>'
        f"<td>{count:,}</td><td>{100 * count / max(total, 1):.1f} %</td></tr>"
        for name, count in counts.items()
    )
    return f'<table class="bars">{rows}</table>'


def smooth(values: Numbers, span: int) -> Numbers:
    """Return the bias-corrected exponential mean with weight 2 / (span + 1); non-finite values leave it as it was."""
    keep = 1.0 - 2.0 / (span + 1)
    mean = weight = 0.0
    result = np.full(values.size, math.nan)
    for i, value in enumerate(values.tolist()):
        if math.isfinite(value):
            mean = keep * mean + (1.0 - keep) * value
            weight = keep * weight + (1.0 - keep)
        if weight > 0:
            result[i] = mean / weight
    return result


def thin(line: Line, bins: int = BINS) -> Line:
    """Return the line with its ends and the lowest and highest point of each bin: no spike is lost."""
    size = line.x.size
    if size <= 2 * bins:
        return line
    edges = np.linspace(0, size, bins + 1).astype(int)
    kept = {0, size - 1}
    for start, end in zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True):
        part = line.y[start:end]
        kept |= {start + int(part.argmin()), start + int(part.argmax())}
    index = sorted(kept)
    return Line(line.label, line.style, line.x[index], line.y[index])


def spans_decades(values: Numbers) -> bool:
    """Tell whether the highest value dwarfs the others so that a linear axis would show a flat line."""
    return bool(values.min() > 0 and values.max() > 30 * np.median(values))


def linear_axis(values: Numbers, *, round_ends: bool = True) -> Axis:
    """Return an axis over finite values with about five ticks; it begins at 0 where that wastes little."""
    low, high = float(values.min()), float(values.max())
    if 0 <= low < 0.6 * high:
        low = 0.0
    if low == high:
        room = abs(low) / 2 or 1.0
        low, high = low - room, high + room
    step = round_step((high - low) / 6)
    low, high = (math.floor(low / step) * step, math.ceil(high / step) * step) if round_ends else (low, high)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return Axis(low, high, tuple(i * step for i in range(first, last + 1)))


def log_axis(values: Numbers) -> Axis:
    """Return a logarithmic axis over positive values with ticks at whole decades."""
    first = math.floor(math.log10(values.min()))
    last = max(math.ceil(math.log10(values.max())), first + 1)
    every = math.ceil((last - first) / 6)
    return Axis(10.0**first, 10.0**last, tuple(10.0**i for i in range(first, last + 1, every)), logarithmic=True)


def round_step(rough: float) -> float:
    """Return the smallest of 1, 2, 5 x 10^k that is at least `rough`."""
    power: float = 10.0 ** math.floor(math.log10(rough))
    return next(m * power for m in (1.0, 2.0, 5.0, 10.0) if m * power >= rough * (1 - 1e-9))


def tick_text(value: float) -> str:
    """Write a tick shortly: 0, 0.25, 1500, 20k, 1.5M, 2e-5."""
    size = abs(value)
    if size >= 1e6:
        return f"{value / 1e6:.4g}M"
    if size >= 1e4:
        return f"{value / 1e3:.4g}k"
    if size >= 1e-3 or value == 0:
        return f"{value:.6g}"
    mantissa, exponent = f"{value:.3e}".split("e")
    return f"{float(mantissa):g}e{int(exponent)}"


def _finite(line: Line) -> Line:
    good = np.isfinite(line.x) & np.isfinite(line.y)
    return Line(line.label, line.style, line.x[good], line.y[good])


def _path(line: Line, x_axis: Axis, y_axis: Axis) -> str:
    xs, ys = _BOX * x_axis.share(line.x), _BOX * (1 - y_axis.share(line.y))
    return "M" + "L".join(f"{x:.1f},{y:.1f}" for x, y in zip(xs.tolist(), ys.tolist(), strict=True))


def _tick_shares(axis: Axis) -> Numbers:
    return axis.share(np.array(axis.ticks, dtype=np.float64))


def _labels(x_axis: Axis, y_axis: Axis) -> str:
    across = zip(x_axis.ticks, _tick_shares(x_axis).tolist(), strict=True)
    upward = zip(y_axis.ticks, _tick_shares(y_axis).tolist(), strict=True)
    return "".join(
        [f'<span class="x" style="left:{100 * share:.2f}%">{tick_text(tick)}</span>' for tick, share in across]
        + [f'<span class="y" style="top:{100 - 100 * share:.2f}%">{tick_text(tick)}</span>' for tick, share in upward]
    )


def _figure(title: str, legend: str, body: str, note: str) -> str:
    remark = f'<p class="note">{escape(note)}</p>' if note else ""
    return f'<figure class="chart"><figcaption>{escape(title)}{legend}</figcaption>{body}{remark}</figure>'
