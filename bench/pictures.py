"""Results as pictures."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path

import attrs
import matplotlib as mpl

mpl.use("svg")

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import NullFormatter

from bench.summary import DIRECT, Summary
from bench.targets import KIB, MIB

_WIDTH_INCHES = 8.0
_ROW_INCHES = 0.42
#: Less is noise.
_LEAST = 1e-3
_COLORS = ("#2f6f9f", "#d98c3f")


@attrs.frozen
class Picture:
    """
    A bar for each candidate and endpoint; `measure` takes the summary, an endpoint and a candidate.

    `of_process`: it is the same for all endpoints.
    """

    name: str
    title: str
    measure: Callable[[Summary, str, str], float]
    of_process: bool = False


def _value(scenario: str, figure: str, unit: float = 1) -> Callable[[Summary, str, str], float]:
    return lambda summary, dialect, candidate: summary.value(scenario, dialect, candidate, figure) / unit


def _added(scenario: str, figure: str) -> Callable[[Summary, str, str], float]:
    return lambda summary, dialect, candidate: summary.added(scenario, dialect, candidate, figure)


PICTURES = (
    Picture(
        "plain-small",
        "Plain requests of 0.2 kB per second of a core (more is better)",
        _value("plain-small", "requests_per_cpu_second"),
    ),
    Picture("plain-1m", "CPU µs per request of 1 MB", _value("plain-1m", "cpu_us_per_request")),
    Picture("streams", "CPU µs per event, streams back to back", _value("streams", "cpu_us_per_event")),
    Picture(
        "paced-64", "CPU µs per event, 64 streams of 50 events/s", _value("paced-64", "cpu_us_per_event")
    ),
    Picture(
        "first-byte",
        "Added to the time to the first byte, p50, ms, 64 streams",
        _added("paced-64", "first_byte_p50_ms"),
    ),
    Picture("idle", "KiB of memory for each idle open stream", _value("idle", "bytes_each", KIB)),
    Picture(
        "memory",
        "MiB of resident memory under load, at most",
        lambda summary, _, candidate: summary.most_resident_bytes(candidate) / MIB,
        of_process=True,
    ),
)


def draw(summary: Summary, directory: Path) -> Iterator[tuple[str, str]]:
    """Write the pictures of which something was measured into a folder; yield their names and titles."""
    # The same results make the same bytes.
    mpl.rcParams.update({"svg.hashsalt": "bench", "font.size": 9, "svg.fonttype": "none"})
    for picture in PICTURES:
        rows = _rows(picture, summary)
        if any(not math.isnan(value) for _, values in rows for value in values):
            _draw(picture, _endpoints(picture, summary), rows, directory / f"{picture.name}.svg")
            yield f"{picture.name}.svg", picture.title


def _endpoints(picture: Picture, summary: Summary) -> list[str]:
    return ["all endpoints"] if picture.of_process else summary.dialects


def _rows(picture: Picture, summary: Summary) -> list[tuple[str, list[float]]]:
    return [
        (
            summary.results["candidates"][candidate]["title"],
            [picture.measure(summary, dialect, candidate) for dialect in _endpoints(picture, summary)],
        )
        for candidate in summary.candidates
        if candidate != DIRECT
    ]


def _draw(picture: Picture, dialects: list[str], rows: list[tuple[str, list[float]]], path: Path) -> None:
    height = 0.9 + _ROW_INCHES * len(rows)
    figure, axes = plt.subplots(figsize=(_WIDTH_INCHES, height), layout="constrained")
    thickness = 0.8 / len(dialects)
    for index, dialect in enumerate(dialects):
        values = [_length(values[index]) for _, values in rows]
        places = [row + (index - (len(dialects) - 1) / 2) * thickness for row in range(len(rows))]
        bars = axes.barh(places, values, thickness, label=dialect, color=_COLORS[index % len(_COLORS)])
        axes.bar_label(bars, [_label(values[index]) for _, values in rows], padding=3, fontsize=7)
    _dress(axes, picture.title, [name for name, _ in rows])
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def _length(value: float) -> float:
    """Return how long a bar is: on a logarithmic axis there is none for nothing, or less."""
    return value if value > _LEAST else math.nan


def _dress(axes: Axes, title: str, names: list[str]) -> None:
    axes.set_title(title, loc="left")
    axes.set_xscale("log")
    widths = [bar.get_width() for bars in axes.containers for bar in bars]
    widths = [width for width in widths if not math.isnan(width)] or [1.0]
    # From a whole power of ten, with room for what is written beside the longest.
    axes.set_xlim(10 ** math.floor(math.log10(min(widths))), max(widths) * 1.8)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,g}")
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=2, frameon=False)


def _label(value: float) -> str:
    return "" if math.isnan(value) else f"{value:,.3g}" if abs(value) < 1000 else f"{value:,.0f}"
