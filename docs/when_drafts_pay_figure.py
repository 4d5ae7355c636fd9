"""Writes docs/when_drafts_pay.svg: where iGRPO has more signal than GRPO, and how much, for 4 + 4 against 8.

    python docs/when_drafts_pay_figure.py

Plain SVG without a plotting library, so that the figure needs none and follows a dark theme.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from when_drafts_pay import COPIES, IGNORES, MODELS, READS, REPAIRS, G, N, ratio

from igrpo_jax.probe import draft_signal

OUT = Path(__file__).with_name("when_drafts_pay.svg")
TOP, HEIGHT, WIDTH = 62, 270, 350  # of the axes, in pixels
DECADES = (0.001, 0.01, 0.1, 1.0)
HEAD = """<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 920 400" role="img" aria-labelledby="title description">
  <title id="title">Where iGRPO (4 + 4) has more signal than GRPO (8)</title>
  <desc id="description">Left: the successes p alone and w after a wrong draft at which iGRPO has more signal, for
    three successes r after a right draft. Right: the ratio of the squared signal-to-noise ratios over p, for four
    models.</desc>
  <style>
    svg { --card: #ffffff; --edge: #d0d7de; --ink: #1f2328; --soft: #59636e; --band: #e6e9ed; --a: #cfe8ff;
          --b: #8cc4f5; --c: #4a8fc7; --l1: #8a939d; --l2: #c0603a; --l3: #4a8fc7; --l4: #3f9a4b; }
    @media (prefers-color-scheme: dark) {
      svg { --card: #161b22; --edge: #3d444d; --ink: #f0f3f6; --soft: #a9b3be; --band: #2a313a; --a: #12324a;
            --b: #1f5680; --c: #58a6e0; --l1: #a9b3be; --l2: #e08a63; --l3: #58a6e0; --l4: #56b865; }
    }
    text { font: 13px system-ui, -apple-system, "Segoe UI", Helvetica, Arial, sans-serif; fill: var(--ink); }
    .head { font-weight: 600; font-size: 15px; }
    .soft { fill: var(--soft); }
    .middle { text-anchor: middle; }
    .end { text-anchor: end; }
    .card { fill: var(--card); stroke: var(--edge); }
    .axis { fill: none; stroke: var(--soft); }
    .grid { fill: none; stroke: var(--edge); }
    .band { fill: var(--band); }
    .dashed { fill: none; stroke: var(--soft); stroke-dasharray: 5 4; }
    .line { fill: none; stroke-width: 2; }
  </style>
  <rect class="card" x="1" y="1" width="918" height="398" rx="12"/>
"""


class Axes(NamedTuple):
    """A panel: where it lies, and how values become pixels."""

    left: float
    x: Callable[[float], float]  # of a value, 0 to 1 across the panel
    y: Callable[[float], float]

    def point(self, x: float, y: float) -> str:
        """Returns "x,y" in pixels of a point; what lies outside of the panel is moved to its edge."""
        across, up = (min(max(part, 0.0), 1.0) for part in (self.x(x), self.y(y)))
        return f"{self.left + across * WIDTH:.1f},{TOP + (1 - up) * HEIGHT:.1f}"

    def path(self, kind: str, style: str, x: Sequence[float], y: Sequence[float]) -> str:
        """Returns a "polyline" or a "polygon" through points."""
        points = " ".join(self.point(*pair) for pair in zip(x, y, strict=True))
        return f'  <{kind} {style} points="{points}"/>\n'


def text(x: float, y: float, words: str, kind: str = "", extra: str = "") -> str:
    """Returns a line of text."""
    return f'  <text class="{kind}" x="{x:g}" y="{y:g}"{extra}>{words}</text>\n'


def frame(axes: Axes, title: str, y_label: str, x_ticks: Sequence[float], y_ticks: Sequence[float]) -> str:
    """Returns the lines, ticks and names of a panel."""
    parts = [text(axes.left, 36, title, "head")]
    for value in x_ticks:
        parts.append(axes.path("polyline", 'class="grid"', (value, value), (y_ticks[0], y_ticks[-1])))
        parts.append(text(axes.left + axes.x(value) * WIDTH, TOP + HEIGHT + 18, f"{value:g}", "soft middle"))
    for value in y_ticks:
        parts.append(axes.path("polyline", 'class="grid"', (x_ticks[0], x_ticks[-1]), (value, value)))
        parts.append(text(axes.left - 8, TOP + (1 - axes.y(value)) * HEIGHT + 4, f"{value:g}", "soft end"))
    parts.append(f'  <rect class="axis" x="{axes.left}" y="{TOP}" width="{WIDTH}" height="{HEIGHT}"/>\n')
    parts.append(text(axes.left + WIDTH / 2, TOP + HEIGHT + 40, "p, success alone", "middle"))
    x, y = axes.left - 42, TOP + HEIGHT / 2
    parts.append(text(x, y, y_label, "middle", f' transform="rotate(-90 {x:g} {y:g})"'))
    return "".join(parts)


def log(value: float) -> float:
    """Returns the place of a value on an axis from .001 to 1."""
    return float(np.log10(value / DECADES[0]) / 3)


def regions() -> str:
    """Returns the panel of the (p, w) at which iGRPO has more signal."""
    axes = Axes(70, log, log)
    edge = draft_signal.hopeless_from(N, G)
    bottom, top = DECADES[0], DECADES[-1]
    band = axes.path("polygon", 'class="band"', (edge, 1 - edge, 1 - edge, edge), (bottom, bottom, top, top))
    p = np.geomspace(bottom, 0.999 * edge, 60)  # at the edge itself a rounding would decide
    areas = []
    for r, color in ((0.5, "a"), (0.9, "b"), (1.0, "c")):
        least, largest = draft_signal.repair_range(p, r, N, G)
        inside = ~np.isnan(least)
        x = np.r_[p[inside], p[inside][::-1]]
        areas.append(axes.path("polygon", f'fill="var(--{color})"', x, np.r_[least[inside], largest[inside][::-1]]))
    same = axes.path("polyline", 'class="dashed"', (bottom, top), (bottom, top))
    names = [
        text(337, 300, "nothing", "soft middle"),
        text(337, 316, "helps", "soft middle"),
        text(128, 310, "w = p", "soft"),
        text(212, 240, "iGRPO, if r ="),
    ]
    for number, (label, color) in enumerate((("1", "c"), (".9", "b"), (".5", "a"))):
        y = 250 + 22 * number
        names.append(f'  <rect fill="var(--{color})" x="216" y="{y}" width="16" height="14"/>\n')
        names.append(text(240, y + 12, label))
    lines = frame(axes, "Where iGRPO has more signal", "w, after a wrong draft", DECADES, DECADES)
    return band + "".join(areas) + lines + same + "".join(names)


def ratios() -> str:
    """Returns the panel of the ratio over p."""
    ticks = (0.0, 0.5, 1.0, 1.5, 2.0, 2.5)
    axes = Axes(540, log, lambda value: value / ticks[-1])
    lines = frame(axes, "How much more or less", "ratio of SNR², iGRPO to GRPO", DECADES, ticks)
    p = np.geomspace(DECADES[0], 0.97, 80)
    names = {IGNORES: (1, 0.5), COPIES: (2, 0.3), READS: (3, 0.85), REPAIRS: (4, 2.2)}
    curves = []
    for model, (number, height) in names.items():
        values = np.array([ratio(x, model) for x in p])
        shown = values <= ticks[-1]
        curves.append(axes.path("polyline", f'class="line" stroke="var(--l{number})"', p[shown], values[shown]))
        label = model.partition(":")[0] if ":" in model else model
        y = TOP + (1 - axes.y(height)) * HEIGHT
        curves.append(text(axes.left + 10, y, label, "", f' style="fill: var(--l{number})"'))
    one = axes.path("polyline", 'class="dashed"', DECADES[:: len(DECADES) - 1], (1.0, 1.0))
    return lines + one + "".join(curves)


def figure() -> str:
    """Returns the text of docs/when_drafts_pay.svg."""
    assert set(MODELS) == {IGNORES, COPIES, READS, REPAIRS}
    return HEAD + regions() + ratios() + "</svg>\n"


if __name__ == "__main__":
    OUT.write_text(figure(), encoding="utf-8")
