"""What is done already: ``run.json`` of an experiment folder remembers under which settings, and on which files and code,
each verb was finished. In: a config; out: whether a verb can be skipped. A stage that ran invalidates the stages after it;
whether new settings may go on with old files is not decided here but by the stage itself, which refuses with the difference.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from bvpo.config import ExperimentConfig
from bvpo.experiment import Experiment, write_atomically
from bvpo.files import model_mark
from bvpo.keys import content_hash
from bvpo.strict import UserError, to_dict
from bvpo.verbs import READERS, stage_fingerprint

_UNRECORDED = ("tiny", *READERS)  # verbs without an entry in the manifest; the model itself is part of the stamp


class Stamps:
    """The finished verbs of one folder, and the settings and model they were finished with."""

    def __init__(self, config: ExperimentConfig, limit: int | None = None) -> None:
        self._experiment = Experiment.of(config)
        settings = {k: v for k, v in to_dict(config).items() if k not in ("run", "name", "root")}
        self._settings = {"settings": settings, "limit": limit}
        self._config = config

    def is_done(self, verb: str) -> bool:
        """Whether the verb finished here under these very settings, and its stage still says so."""
        entry = self._experiment.stage(self._experiment.evaluate_stage if verb == "evaluate" else verb)
        finished = verb in _UNRECORDED or (entry is not None and entry.finished is not None)
        known = self._read().get(verb) if finished else None
        try:
            return known is not None and known == self._stamp(verb)
        except UserError:
            return False  # the stage says what is wrong

    def mark(self, verb: str) -> None:
        write_atomically(
            self._experiment.stamps, json.dumps({**self._read(), verb: self._stamp(verb)}, indent=1) + "\n"
        )

    def _read(self) -> dict[str, Any]:
        try:
            found = json.loads((self._experiment.stamps).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}

    def _stamp(self, verb: str) -> str:
        model = self._config.model
        marks = [model_mark(Path(path)) for path in (model.path, model.tokenizer) if path]
        return content_hash({**self._settings, "model": marks, "on": stage_fingerprint(verb, self._config)})
