"""The report's drawings, as inline SVG: coloured by the page's own variables, so that they follow its theme."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Mapping, Sequence

from robodual_client.calvin.histogram import Histogram

_WIDTH, _HEIGHT = 360, 190
_LEFT, _RIGHT, _TOP, _BOTTOM = 40, 14, 14, 30
_INNER_WIDTH, _INNER_HEIGHT = _WIDTH - _LEFT - _RIGHT, _HEIGHT - _TOP - _BOTTOM


def chain_curve(rates: Sequence[float], intervals: Sequence[tuple[float, float]]) -> str:
    """Share of chains (0 to 1) that solved at least 1, 2, ... tasks, with a band for each share's interval."""
    places = [((index + 0.5) / len(rates), f"{index + 1}/{len(rates)}") for index in range(len(rates))]
    label = "Share of chains that solved at least so many tasks in a row"
    return _curve(places, rates, intervals, _PERCENT, label)


def delay_curve(
    delays: Sequence[int], values: Sequence[float], intervals: Sequence[tuple[float, float]], most: int, label: str
) -> str:
    """A figure of 0 to `most` (1: a share) against the delay in control steps, with a band for its interval."""
    widest = max(1, *delays)
    places = [(0.05 + 0.9 * delay / widest, str(delay)) for delay in delays]
    return _curve(places, values, intervals, _PERCENT if most == 1 else _Scale(most, 1, 2, ""), label)


@dataclass(frozen=True)
class _Scale:
    most: int
    factor: int
    digits: int
    unit: str

    def ticks(self) -> list[tuple[float, str]]:
        count = 4 if self.most == 1 else self.most
        levels = [self.most * level / count for level in range(count + 1)]
        return [(level, f"{level * self.factor:g}{self.unit}") for level in levels]


_PERCENT = _Scale(1, 100, 1, "%")


def _curve(
    places: Sequence[tuple[float, str]],
    values: Sequence[float],
    intervals: Sequence[tuple[float, float]],
    scale: _Scale,
    label: str,
) -> str:
    """`places`: where each value stands, 0 to 1, and what is written under it."""
    xs = [_LEFT + _INNER_WIDTH * place for place, _ in places]

    def y(value: float) -> float:
        return _TOP + _INNER_HEIGHT * (1 - value / scale.most)

    parts = [_rule(y(level), text) for level, text in scale.ticks()]
    upper = [f"{x:.1f},{y(high):.1f}" for x, (_, high) in zip(xs, intervals)]
    lower = [f"{x:.1f},{y(low):.1f}" for x, (low, _) in zip(xs, intervals)]
    parts.append(f'<polygon class="band" points="{" ".join([*upper, *reversed(lower)])}"/>')
    line = " ".join(f"{x:.1f},{y(value):.1f}" for x, value in zip(xs, values))
    parts.append(f'<polyline class="line" points="{line}"/>')
    for x, (_, text), value in zip(xs, places, values):
        parts.append(f'<circle class="dot" cx="{x:.1f}" cy="{y(value):.1f}" r="4.5"/>')
        above = y(value) - 11 if value < 0.93 * scale.most else y(value) + 20
        parts.append(_text(x, above, f"{value * scale.factor:.{scale.digits}f}", "value"))
        parts.append(_text(x, _HEIGHT - 10, text, "tick"))
    return _svg(parts, label)


def durations(histogram: Histogram, label: str) -> str:
    """Milliseconds on a logarithmic axis, with the median and the 99th percentile marked."""
    edges, heights = histogram.columns(48)
    low, high = math.log10(edges[0]), math.log10(edges[-1])

    def x(value: float) -> float:
        return _LEFT + _INNER_WIDTH * (math.log10(value) - low) / (high - low)

    parts = _columns(heights)
    steps = (1, 2, 5) if high - low < 2 else (1,)
    ticks = [step * 10.0**power for power in range(-3, 6) for step in steps]
    parts += [_text(x(tick), _HEIGHT - 10, f"{tick:g}", "tick") for tick in ticks if edges[0] < tick < edges[-1]]
    for q, name in ((0.5, "p50"), (0.99, "p99")):
        at = x(histogram.quantile(q))
        parts.append(f'<line class="mark" x1="{at:.1f}" x2="{at:.1f}" y1="{_TOP}" y2="{_HEIGHT - _BOTTOM}"/>')
        side = (at + 4, "note") if at < _WIDTH - _RIGHT - 30 else (at - 4, "note end")
        parts.append(_text(side[0], _TOP + (8 if q == 0.5 else 22), name, side[1]))
    return _svg(parts, label)


def ages(counts: Mapping[int, int], label: str) -> str:
    """How many steps had a conditioning, or an action, of each age in steps."""
    oldest = max(counts)
    width = max(1, math.ceil((oldest + 1) / 48))
    bins = [sum(counts.get(age, 0) for age in range(first, first + width)) for first in range(0, oldest + 1, width)]
    parts = _columns(bins)
    every = max(1, len(bins) // 12)
    for index in range(0, len(bins), every):
        x = _LEFT + _INNER_WIDTH * (index + 0.5) / len(bins)
        parts.append(_text(x, _HEIGHT - 10, str(index * width), "tick"))
    return _svg(parts, label)


def _columns(heights: Sequence[int]) -> list[str]:
    total, top = sum(heights), max(heights)
    parts = [
        _rule(_TOP + _INNER_HEIGHT * (1 - share), f"{share * top / total * 100:.0f}%") for share in (0.0, 0.5, 1.0)
    ]
    width = _INNER_WIDTH / len(heights)
    gap = min(2.0, width / 5)
    for index, height in enumerate(heights):
        if height:
            tall = max(1.0, _INNER_HEIGHT * height / top)
            x, y = _LEFT + width * index + gap / 2, _TOP + _INNER_HEIGHT - tall
            title = f"<title>{height}</title>"
            size = f'width="{width - gap:.1f}" height="{tall:.1f}"'
            parts.append(f'<rect class="bar" x="{x:.1f}" y="{y:.1f}" {size} rx="1.5">{title}</rect>')
    return parts


def _rule(y: float, label: str) -> str:
    line = f'<line class="rule" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
    return line + f'<text class="tick end" x="{_LEFT - 7}" y="{y + 4:.1f}">{label}</text>'


def _text(x: float, y: float, text: str, kind: str) -> str:
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}">{text}</text>'


def _svg(parts: Sequence[str], label: str) -> str:
    return f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{label}">{"".join(parts)}</svg>'
