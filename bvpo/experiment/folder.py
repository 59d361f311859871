"""One experiment folder: where everything in it lies, its stores, its prompts and its manifest. Nobody else joins these
paths. Benchmarks of an evaluation and the data and methods of a comparison are experiment folders themselves."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bvpo.data.scores import score_key, scorer_id
from bvpo.experiment import manifest
from bvpo.experiment.manifest import MANIFEST, Manifest, StageEntry
from bvpo.experiment.recordstore import RecordStore
from bvpo.experiment.sealing import shard_is_whole
from bvpo.files import hash_file, write_atomically
from bvpo.records import Prompt, Sample, Score
from bvpo.strict import UserError, read_jsonl

if TYPE_CHECKING:
    from bvpo.config import ExperimentConfig


_MAKE_PROMPTS = "make the experiment's prompts first (bvpo prompts)"


def is_evaluation(stage: str) -> bool:
    """Whether this name in a manifest is an evaluation's: "evaluate", or "evaluate FOLDER"."""
    return stage.partition(" ")[0] == "evaluate"


def require_as_paired(quads: Path) -> None:
    """Refuses quads that are others than ``bvpo pair`` wrote into this very file; other files are nobody's business."""
    try:
        entry = Experiment(quads.parent).stage("pair")
    except UserError:
        return
    known = None if entry is None else entry.shards.get(quads.name)
    if known is not None and quads.is_file() and known != hash_file(quads):
        raise UserError(
            f"{quads}: is not what bvpo pair wrote, by the hash in the manifest: cut, damaged or edited; pair again, or "
            "keep quads of your own in another file and name it in data.quads"
        )


class _At:
    """A place in the folder."""

    def __init__(self, *parts: str) -> None:
        self._parts = parts

    def __get__(self, experiment: Experiment, owner: Any) -> Path:
        return experiment.folder.joinpath(*self._parts)


class Experiment:
    """``Experiment(folder)``, or ``Experiment.of(config)``, which knows where its evaluation goes."""

    config_file, manifest_file, log = _At("config.toml"), _At(MANIFEST), _At("log.txt")
    prompts_file, dropped_file = _At("prompts.jsonl"), _At("prompts.dropped.jsonl")
    samples_folder, failed_folder = _At("samples"), _At("samples", "failed")
    scores_folder, judge_folder = _At("scores"), _At("judge")
    pairing, preferences = _At("pairing.json"), _At("preferences")
    train, final, reference = _At("train"), _At("train", "final"), _At("reference")
    metrics, summary = _At("train", "metrics.jsonl"), _At("train", "summary.json")
    held_out = _At("train", "held_out.jsonl")
    analysis, analysis_page = _At("analysis.json"), _At("analysis.html")
    results, page, verdicts = _At("results.json"), _At("report.html"), _At("verdicts.jsonl")
    stamps, declared, tuned = _At("run.json"), _At("declared.json"), _At("tuned.json")
    SEEN = ("seed-*/*/*/*/scores", "seed-*/*/*/*/verdicts.jsonl")
    """What any evaluation of a comparison leaves, finished or not."""

    def __init__(self, folder: Path, evaluation: str = "") -> None:
        self.folder = folder
        self._evaluation = evaluation

    @classmethod
    def of(cls, config: ExperimentConfig) -> Experiment:
        return cls(config.folder, config.evaluate.folder)

    def write_config(self, text: str) -> None:
        write_atomically(self.config_file, text)

    # ------------------------------------------------------------------------------------------------ data

    def prompts(self, limit: int | None = None, missing: str = _MAKE_PROMPTS) -> list[Prompt]:
        """The first of them, in the order of the file, which must be there."""
        if not self.prompts_file.is_file():
            raise UserError(f"{self.prompts_file}: no such file; {missing}")
        return list(read_jsonl(self.prompts_file, Prompt))[:limit]

    def quads(self, split: str = "train") -> Path:
        return self.folder / ("quads.jsonl" if split == "train" else f"quads.{split}.jsonl")

    def quads_files(self) -> list[Path]:
        """Of every split."""
        return sorted(self.folder.glob("quads*.jsonl"))

    def marks(self, *parts: str) -> dict[str, Any]:
        """What "prompts", "samples" and "scores" are now: equal as long as nothing was made anew, lost or edited."""
        stores = {"samples": self.samples_folder, "scores": self.scores_folder}
        found = {name: sorted(path.name for path in stores[name].glob("*.parquet")) for name in parts if name in stores}
        if "prompts" in parts and self.prompts_file.is_file():
            found["prompts"] = [hash_file(self.prompts_file)]
        return found

    def samples(self) -> RecordStore[Sample]:
        return RecordStore(self.samples_folder, Sample)

    def failed(self) -> RecordStore[Sample]:
        """The samples that could not be drawn. They are kept apart, because the first record of a key holds for good; a
        sample that fails twice in the same way is one record."""
        return RecordStore(self.failed_folder, Sample, key=lambda sample: (sample.key, sample.error or ""))

    def scores(self) -> RecordStore[Score]:
        return RecordStore(self.scores_folder, Score, key=score_key)

    def stores(self) -> dict[str, tuple[str, RecordStore[Any]]]:
        """Name -> the stage that lists its shards in the manifest, and the store; of those that are there."""
        found = {"samples": ("sample", self.samples()), "samples/failed": ("", self.failed())}
        all_ = {**found, "scores": ("score", self.scores())}
        return {name: one for name, one in all_.items() if one[1].folder.is_dir()}

    def require_whole(self) -> None:
        """Refuses a shard that is not as it was written, before anything is built on it; reads every byte of them."""
        for folder in (self.samples_folder, self.failed_folder, self.scores_folder):
            for path in sorted(folder.glob("*.parquet")):
                if not shard_is_whole(path):
                    raise UserError(
                        f"{path}: damaged, its content does not match its checksum; `bvpo status {self.folder} --repair` "
                        "drops what is lost, and the command that made it makes it again"
                    )

    # ------------------------------------------------------------------------------------------------ evaluations

    @property
    def evaluation(self) -> Path:
        """The folder of the evaluation: the one that was asked for, else the last of the experiment's own model, else what
        its config says."""
        return self.folder / (self._evaluation or self._own_evaluation())

    @property
    def evaluate_stage(self) -> str:
        """The name of that evaluation in the manifest."""
        name = self.evaluation.name
        return "evaluate" if name == "eval" else f"evaluate {name}"

    def _own_evaluation(self) -> str:
        stages = self.manifest().stages
        for name in reversed(stages):
            settings = stages[name].get("config", {}).get("evaluate", {}) if is_evaluation(name) else {"model": "none"}
            if not settings.get("model"):
                return name.partition(" ")[2] or "eval"
        if "evaluate" in stages:
            return "eval"  # of models from elsewhere too, the plain name is the one that others are compared with
        with suppress(OSError, ValueError, AttributeError, KeyError):
            return str(tomllib.loads(self.config_file.read_text(encoding="utf-8"))["evaluate"].get("folder", "eval"))
        return "eval"

    def benchmarks(self) -> dict[str, Experiment]:
        """Name -> folder of every benchmark of the evaluation that was begun."""
        found = sorted(self.evaluation.glob("*/prompts.jsonl"))
        return {path.parent.name: Experiment(path.parent) for path in found}

    def benchmark(self, name: str) -> Experiment:
        return Experiment(self.evaluation / name)

    def mode_result(self, mode: str) -> Path:
        """What a benchmark's folder says of one mode."""
        return self.folder / f"{mode}.json"

    def members(self) -> list[Experiment]:
        """The data and methods of a comparison, seed by seed."""
        return [Experiment(path.parent) for path in sorted(self.folder.glob(f"seed-*/*/{MANIFEST}"))]

    # ------------------------------------------------------------------------------------------------ manifest

    def manifest(self) -> Manifest:
        return manifest.read_manifest(self.folder)

    def stage(self, name: str) -> StageEntry | None:
        return self.manifest().stage(name)

    def check(self, stage: str, **identity: Mapping[str, Any]) -> StageEntry | None:
        return manifest.check_stage(self.folder, stage, **identity)  # type: ignore[arg-type]

    def begin(self, stage: str, **identity: Mapping[str, Any]) -> StageEntry:
        return manifest.begin_stage(self.folder, stage, **identity)  # type: ignore[arg-type]

    def finish(self, stage: str, *, counts: Mapping[str, Any], shards: Mapping[str, Any] | None = None) -> StageEntry:
        return manifest.finish_stage(self.folder, stage, counts=counts, shards=shards)

    def forget(self, stage: str) -> None:
        manifest.forget_stage(self.folder, stage)

    def scorer(self) -> str | None:
        """The name under which the scorer that was used last gave its scores."""
        entry = self.stage("score")
        return (
            None if entry is None else scorer_id(entry.config.get("scorer", ""), entry.fingerprints.get("scorer", {}))
        )
