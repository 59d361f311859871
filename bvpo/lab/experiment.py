"""The whole laboratory in one call: every check, table and curve.

In: a seed, and whether to be quick (smaller worlds, fewer steps; for a first look and for tests). Out: a
:class:`bvpo.lab.results.LabReport`. The same seed gives the same numbers on the same machine. It writes nothing.
"""

from __future__ import annotations

from collections.abc import Callable

from bvpo.lab.anchors import run_anchors
from bvpo.lab.bias import check_bias
from bvpo.lab.catalog import describe_worlds
from bvpo.lab.curves import draw_curves
from bvpo.lab.descent import check_descent
from bvpo.lab.results import Findings, LabReport, merge
from bvpo.lab.theorems import check_theorems
from bvpo.lab.tournament import run_tournament

PARTS: dict[str, Callable[..., Findings]] = {
    "theorems 1, 2 and 4": check_theorems,
    "theorem 3": check_descent,
    "bias of the trace view": check_bias,
    "curves": draw_curves,
    "tournament of estimators": run_tournament,
    "anchors over runs": run_anchors,
}


def run_lab(seed: int, *, quick: bool, begin: Callable[[str], None] = lambda part: None) -> LabReport:
    """All parts in order; ``begin`` is told the name of each."""
    parts = []
    for name, part in PARTS.items():
        begin(name)
        parts.append(part(seed, quick=quick))
    return LabReport(seed=seed, quick=quick, worlds=describe_worlds(), findings=merge(parts))
