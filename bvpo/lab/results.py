"""What the laboratory hands over: verdicts, tables and curves, as plain values that print, draw and become JSON.

In: numbers. Out: records. Nothing here computes, formats a page or writes a file.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

Cell = str | float | int


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """One statement, what of it was checked, the number that came out, and the bound that decides.

    ``key`` names the check in files and tests. ``at_least``: the number must reach the bound instead of staying below it.
    """

    key: str
    statement: str
    checked: str
    value: float
    bound: float
    at_least: bool = False

    @property
    def holds(self) -> bool:
        return self.value >= self.bound if self.at_least else self.value <= self.bound  # not a number: neither

    @property
    def relation(self) -> str:
        return ">=" if self.at_least else "<="


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """Numbers with names. ``note`` says how to read them."""

    title: str
    note: str
    header: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """One curve; ``mark`` is a point of it that matters, such as its minimum."""

    label: str
    x: tuple[float, ...]
    y: tuple[float, ...]
    mark: tuple[float, float] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Plot:
    """Curves over a common axis."""

    title: str
    caption: str
    x_label: str
    y_label: str
    lines: tuple[Line, ...]
    log_x: bool = False
    log_y: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Findings:
    """What one part of the laboratory found."""

    verdicts: tuple[Verdict, ...] = ()
    tables: tuple[Table, ...] = ()
    plots: tuple[Plot, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class LabReport:
    """Everything, and the settings it was made with."""

    seed: int
    quick: bool
    worlds: Table
    findings: Findings = field(default_factory=Findings)

    @property
    def holds(self) -> bool:
        return all(verdict.holds for verdict in self.findings.verdicts)


def merge(parts: Sequence[Findings]) -> Findings:
    """In the order of the parts."""
    return Findings(
        verdicts=tuple(one for part in parts for one in part.verdicts),
        tables=tuple(one for part in parts for one in part.tables),
        plots=tuple(one for part in parts for one in part.plots),
    )
