"""Where stages keep what they made: the record store of samples and scores, and the experiment's manifest."""

from bvpo.experiment.folder import Experiment, is_evaluation, require_as_paired
from bvpo.experiment.lines import Key, digest
from bvpo.experiment.manifest import (
    MANIFEST,
    Manifest,
    StageEntry,
    begin_stage,
    check_stage,
    differences,
    finish_stage,
    forget_stage,
    read_manifest,
    versions,
)
from bvpo.experiment.recordstore import RecordStore, SealReport, StoreStats
from bvpo.experiment.shards import Damage
from bvpo.experiment.writer import RecordWriter
from bvpo.files import write_atomically

__all__ = [
    "MANIFEST",
    "Damage",
    "Experiment",
    "Key",
    "Manifest",
    "RecordStore",
    "RecordWriter",
    "SealReport",
    "StageEntry",
    "StoreStats",
    "begin_stage",
    "check_stage",
    "differences",
    "digest",
    "finish_stage",
    "forget_stage",
    "is_evaluation",
    "read_manifest",
    "require_as_paired",
    "versions",
    "write_atomically",
]
