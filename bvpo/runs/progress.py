"""How far a comparison of ``bvpo run`` is: in, its folder; out, per method how many seeds are trained and evaluated.

Read from the manifests of the seeds' folders; nothing is run or written.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from bvpo.experiment import Experiment
from bvpo.runs.plan import DATA_FOLDER


@dataclass(frozen=True, slots=True, kw_only=True)
class MethodProgress:
    """One method of a comparison, or ``data``: numbers of seeds whose last stages are finished."""

    name: str
    started: int
    paired: int
    trained: int
    evaluated: int


def method_progress(folder: Path) -> list[MethodProgress]:
    """Data first, then methods by name; nothing where the folder is no comparison."""
    found: dict[str, list[set[str]]] = {}
    for one in Experiment(folder).members():
        finished = {name.partition(" ")[0] for name, entry in one.manifest().stages.items() if entry.get("finished")}
        found.setdefault(one.folder.name, []).append(finished)
    return [
        MethodProgress(
            name=name,
            started=len(found[name]),
            paired=sum("pair" in finished for finished in found[name]),
            trained=sum("train" in finished for finished in found[name]),
            evaluated=sum("evaluate" in finished for finished in found[name]),
        )
        for name in sorted(found, key=lambda name: (name != DATA_FOLDER, name))
    ]
