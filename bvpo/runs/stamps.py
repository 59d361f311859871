"""What is done already: ``run.json`` of an experiment folder remembers under which settings each verb was finished.

In: a config; out: whether a verb can be skipped. A stage that ran invalidates the stages after it; whether new settings may
go on with old files is not decided here but by the stage itself, which refuses with the difference.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from bvpo.config import ExperimentConfig
from bvpo.experiment import Experiment, write_atomically
from bvpo.keys import content_hash
from bvpo.strict import to_dict
from bvpo.verbs import READERS

_UNRECORDED = ("tiny", *READERS)  # verbs without an entry in the manifest; the model itself is part of the stamp
_SMALL = 64 * 2**20  # bytes of weights that are read to tell two models apart; of larger ones the sizes must do


class Stamps:
    """The finished verbs of one folder, and the settings and model they were finished with."""

    def __init__(self, config: ExperimentConfig, limit: int | None = None) -> None:
        self._experiment = Experiment.of(config)
        settings = {k: v for k, v in to_dict(config).items() if k not in ("run", "name", "root")}
        self._settings = {"settings": settings, "limit": limit}
        self._model = Path(config.model.path)

    def is_done(self, verb: str) -> bool:
        """Whether the verb finished here under these very settings, and its stage still says so."""
        entry = self._experiment.stage(self._experiment.evaluate_stage if verb == "evaluate" else verb)
        finished = verb in _UNRECORDED or (entry is not None and entry.finished is not None)
        return finished and self._read().get(verb) == self._stamp()

    def mark(self, verb: str) -> None:
        write_atomically(self._experiment.stamps, json.dumps({**self._read(), verb: self._stamp()}, indent=1) + "\n")

    def _read(self) -> dict[str, Any]:
        try:
            found = json.loads((self._experiment.stamps).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}

    def _stamp(self) -> str:
        return content_hash({**self._settings, "model": model_mark(self._model)})


def model_mark(folder: Path) -> list[list[Any]]:
    """Name, size and (of a small model) content of the files of a local model; nothing for a name on a hub."""
    if not folder.is_dir():
        return []
    files = [f for f in sorted(folder.iterdir()) if f.suffix == ".safetensors" or f.name == "tokenizer.json"]
    small = sum(f.stat().st_size for f in files) <= _SMALL
    return [[f.name, f.stat().st_size, hashlib.sha256(f.read_bytes()).hexdigest() if small else ""] for f in files]
