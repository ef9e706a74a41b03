"""Charts as inline SVG, which takes its colours from the page it stands in."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from html import escape
from typing import NamedTuple

_WIDTH, _HEIGHT = 640, 280
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 12, 14, 44
_MOST_POINTS = 400


class Line(NamedTuple):
    """Points `(x, y)`, or `(x, y, half)` with the half width of an interval; `marked`: each with a dot."""

    name: str
    points: Sequence[tuple[float, ...]]
    marked: bool = False


def line_chart(title: str, lines: Sequence[Line], x_name: str, y_name: str, show: Callable[[float], str]) -> str:
    """Lines over steps, long ones as the means of neighbouring points. `show` writes a value of the y axis."""
    lines = [line._replace(points=_thinned(line.points)) for line in lines if line.points]
    xs = [point[0] for line in lines for point in line.points]
    ys = [point[1] + side for line in lines for point in line.points for side in _sides(point)]
    place, frame = _frame(xs, ys, x_name, y_name, show)
    parts, legend = [frame], []
    for number, line in enumerate(lines):
        if any(len(point) > 2 for point in line.points):
            upper = [place(p[0], p[1] + _sides(p)[1]) for p in line.points]
            lower = [place(p[0], p[1] + _sides(p)[0]) for p in reversed(line.points)]
            parts.append(f'<polygon class="band s{number}" points="{_path(upper + lower)}"/>')
        places = [place(*point[:2]) for point in line.points]
        parts.append(f'<polyline class="line s{number}" points="{_path(places)}"/>')
        if line.marked:
            parts += [f'<circle class="dot s{number}" cx="{x:.1f}" cy="{y:.1f}" r="3"/>' for x, y in places]
        legend.append(f'<span><svg class="key" viewBox="0 0 24 8" aria-hidden="true"><path class="line s{number}" '
                      f'd="M0 4H24"/></svg> {escape(line.name)}</span>')  # fmt: skip
    told = "; ".join(
        f"{line.name}: {show(line.points[0][1])} at {line.points[0][0]:,.0f}, "
        f"{show(line.points[-1][1])} at {line.points[-1][0]:,.0f}"
        for line in lines
    )
    return _figure(title, told, "".join(parts), f'<p class="legend">{" ".join(legend)}</p>')


def scatter_chart(title: str, points: Sequence[tuple[float, float]], x_name: str, y_name: str) -> str:
    """Points with the diagonal on which both are equal."""
    both = [value for point in points for value in point]
    place, frame = _frame(both, both, x_name, y_name, "{:.3g}".format)
    (x1, y1), (x2, y2) = place(min(both), min(both)), place(max(both), max(both))
    diagonal = f'<line class="line s1" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'
    dots = "".join('<circle class="point s0" cx="{:.1f}" cy="{:.1f}" r="2.2"/>'.format(*place(*p)) for p in points)
    told = f"{len(points):,} points; on the line, both are equal"
    return _figure(title, told, frame + diagonal + dots, f'<p class="legend">{escape(told)}</p>')


def _figure(title: str, told: str, inside: str, below: str) -> str:
    return (
        f'<figure><figcaption>{escape(title)}</figcaption><svg class="chart" viewBox="0 0 {_WIDTH} {_HEIGHT}" '
        f'role="img"><title>{escape(title)}</title><desc>{escape(told)}</desc>{inside}</svg>{below}</figure>'
    )


def _frame(
    xs: Sequence[float], ys: Sequence[float], x_name: str, y_name: str, show: Callable[[float], str]
) -> tuple[Callable[[float, float], tuple[float, float]], str]:
    """Where a point lies, and axes with their ticks."""
    (x_low, x_high), (y_low, y_high) = _limits(xs), _limits(ys)

    def place(x: float, y: float) -> tuple[float, float]:
        across = (x - x_low) / (x_high - x_low) * (_WIDTH - _LEFT - _RIGHT)
        up = (y - y_low) / (y_high - y_low) * (_HEIGHT - _TOP - _BOTTOM)
        return _LEFT + across, _HEIGHT - _BOTTOM - up

    parts = []
    for value in _ticks(y_low, y_high):
        y = place(x_low, value)[1]
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{_LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{escape(show(value))}</text>')
    for value in _ticks(x_low, x_high):
        x = place(value, y_low)[0]
        parts.append(f'<text x="{x:.1f}" y="{_HEIGHT - _BOTTOM + 18}" text-anchor="middle">{value:,.10g}</text>')
    middle = (_TOP + _HEIGHT - _BOTTOM) / 2
    centre = (_LEFT + _WIDTH - _RIGHT) / 2
    parts.append(f'<text x="{centre}" y="{_HEIGHT - 6}" text-anchor="middle">{escape(x_name)}</text>')
    parts.append(f'<text transform="translate(14 {middle}) rotate(-90)" text-anchor="middle">{escape(y_name)}</text>')
    return place, "".join(parts)


def _limits(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    room = 0.04 * (high - low) or 0.05 * abs(high) or 1.0
    return low - room, high + room


def _ticks(low: float, high: float, most: int = 6) -> list[float]:
    rough = (high - low) / most
    size = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * size for factor in (1, 2, 5, 10) if factor * size >= rough * (1 - 1e-9))
    return [k * step for k in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _sides(point: tuple[float, ...]) -> tuple[float, float]:
    return (-point[2], point[2]) if len(point) > 2 else (0.0, 0.0)


def _thinned(points: Sequence[tuple[float, ...]]) -> list[tuple[float, ...]]:
    each = -(-len(points) // _MOST_POINTS)
    groups = [points[at : at + each] for at in range(0, len(points), each)]
    return [tuple(sum(column) / len(group) for column in zip(*group, strict=True)) for group in groups]


def _path(places: Sequence[tuple[float, float]]) -> str:
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
