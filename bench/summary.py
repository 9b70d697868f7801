"""What a run's measurements say together: medians over the rounds, ratios and differences within each."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from bench.candidates.direct import Direct
from bench.figures import middle

DIRECT = Direct.name


class Summary:
    """The results of a run, asked for one figure at a time; NaN stands for what was not measured."""

    def __init__(self, results: dict[str, Any]) -> None:
        self.results = results
        self._rounds: dict[tuple[str, str, str], dict[int, dict[str, Any]]] = {}
        for taken in results["measurements"]:
            key = (taken["scenario"], taken["dialect"], taken["candidate"])
            self._rounds.setdefault(key, {})[taken["round"]] = taken

    @property
    def candidates(self) -> list[str]:
        """Those that were measured at least once, in the order of the roster."""
        return [
            name
            for name in self.results["candidates"]
            if any(name == measured for _, _, measured in self._rounds)
        ]

    @property
    def dialects(self) -> list[str]:
        """The endpoints, in the order of their measuring."""
        return list(dict.fromkeys(dialect for _, dialect, _ in self._rounds))

    def value(self, scenario: str, dialect: str, candidate: str, figure: str) -> float:
        """Return a figure's median over the rounds."""
        rounds = self._rounds.get((scenario, dialect, candidate), {}).values()
        return middle([taken[figure] for taken in rounds if figure in taken])

    def ratio(self, scenario: str, dialect: str, candidate: str, figure: str, to: str) -> float:
        """Return the median of a figure's ratio to another candidate's in the same round."""
        return self._paired(scenario, dialect, (candidate, to), figure, _quotient)

    def added(self, scenario: str, dialect: str, candidate: str, figure: str) -> float:
        """Return the median of what a figure is above the direct baseline's in the same round."""
        return self._paired(scenario, dialect, (candidate, DIRECT), figure, lambda a, b: a - b)

    def _paired(
        self,
        scenario: str,
        dialect: str,
        candidates: tuple[str, str],
        figure: str,
        combine: Callable[[float, float], float],
    ) -> float:
        ours, theirs = (self._rounds.get((scenario, dialect, name), {}) for name in candidates)
        pairs = [(ours[number], theirs[number]) for number in ours if number in theirs]
        return middle([combine(a[figure], b[figure]) for a, b in pairs if figure in a and figure in b])

    def start_seconds(self, candidate: str) -> float:
        """Return the median of how long it took from starting it to answers from every endpoint."""
        return middle([start["seconds"] for start in self._starts(candidate)])

    def start_resident_bytes(self, candidate: str) -> float:
        """Return the median of its resident memory when it had just started."""
        return middle([start["resident_bytes"] for start in self._starts(candidate)])

    def _starts(self, candidate: str) -> list[dict[str, Any]]:
        return [start for start in self.results["starts"] if start["candidate"] == candidate]

    def most_resident_bytes(self, candidate: str) -> float:
        """Return its largest resident memory in any scenario but those that begin afresh to fill it."""
        filling = {name for name, scenario in self.results["scenarios"].items() if scenario["fresh"]}
        taken = [
            taken["resident_bytes"]
            for taken in self.results["measurements"]
            if taken["candidate"] == candidate
            and taken["scenario"] not in filling
            and "resident_bytes" in taken
        ]
        return max(taken, default=math.nan)


def _quotient(above: float, below: float) -> float:
    return above / below if below else math.nan
