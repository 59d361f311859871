"""The manifest: written whole, compared before a stage goes on, and readable when it refuses."""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path

import pytest

from bvpo import files as disk_module
from bvpo.config import EvaluateConfig
from bvpo.experiment import Experiment, begin_stage, check_stage, differences, finish_stage, forget_stage, read_manifest
from bvpo.files import disk_error, write_atomically
from bvpo.strict import UserError

CONFIG = {"sampling": {"temperature": 0.8, "stop": (1, 2)}, "seed": 42}
ENGINE = {"engine": {"name": "embedded", "weights": "abc"}}


def test_a_stage_is_recorded_from_start_to_finish(tmp_path: Path) -> None:
    """Mutation: counts, shards, versions or the times not written."""
    begin_stage(tmp_path, "sample", config=CONFIG, fingerprints=ENGINE)
    entry = read_manifest(tmp_path).stage("sample")
    assert entry is not None
    assert entry.finished is None
    assert entry.config["sampling"]["temperature"] == 0.8
    assert {"bvpo", "python", "numpy", "torch"} <= set(entry.versions)
    finish_stage(tmp_path, "sample", counts={"records": 10}, shards={"a.parquet": "00"})
    after = read_manifest(tmp_path).stage("sample")
    assert after is not None
    assert (after.counts, after.shards, after.started) == ({"records": 10}, {"a.parquet": "00"}, entry.started)
    assert after.finished is not None


def test_the_same_settings_go_on(tmp_path: Path) -> None:
    """Mutation: a tuple that JSON made a list counts as changed, or the start time is forgotten."""
    first = begin_stage(tmp_path, "sample", config=CONFIG, fingerprints=ENGINE)
    assert begin_stage(tmp_path, "sample", config=CONFIG, fingerprints=ENGINE).started == first.started
    assert check_stage(tmp_path, "score", config={}) is None


def test_changed_settings_are_refused_with_the_difference(tmp_path: Path) -> None:
    """Mutation: no comparison, one that stops at the first level, or one that forgets the fingerprints."""
    begin_stage(tmp_path, "sample", config=CONFIG, fingerprints=ENGINE)
    before = (tmp_path / "manifest.json").read_bytes()
    changed = {"sampling": {"temperature": 0.6, "stop": (1, 2), "top_p": 0.9}}
    other = {"engine": {"name": "embedded", "weights": "abd"}}
    with pytest.raises(UserError) as caught:
        begin_stage(tmp_path, "sample", config=changed, fingerprints=other)
    assert str(caught.value) == (
        f"{tmp_path}: sample was started here with other settings: sampling.temperature: 0.8 -> 0.6; "
        f'seed: 42 -> (not set); sampling.top_p: (not set) -> 0.9; engine.weights: "abc" -> "abd"; '
        f"restore them, or give the experiment another name"
    )
    assert (tmp_path / "manifest.json").read_bytes() == before
    forget_stage(tmp_path, "sample")
    begin_stage(tmp_path, "sample", config=changed, fingerprints=other)


def test_differences() -> None:
    """Mutation: 1 and true taken for equal tables, or empty tables passed over."""
    assert differences({"a": {}}, {"a": {}}) == []
    assert differences({"a": {"b": 1}}, {"a": {}}) == ["a.b: 1 -> (not set)", "a: (not set) -> {}"]
    assert differences({}, {}) == []
    assert differences({"a": [1, 2]}, {"a": (1, 3)}) == ["a: [1, 2] -> [1, 3]"]


def test_many_differences_stay_one_short_line(tmp_path: Path) -> None:
    """Mutation: a message of a thousand lines or a megabyte."""
    begin_stage(tmp_path, "s", config={f"k{n}": "x" * 1000 for n in range(30)})
    with pytest.raises(UserError, match="and 24 more") as caught:
        begin_stage(tmp_path, "s", config={f"k{n}": "y" * 1000 for n in range(30)})
    assert len(str(caught.value)) < 1200


def test_processes_that_start_at_once_lose_nothing(tmp_path: Path) -> None:
    """Mutation: reading and writing the manifest without its lock."""
    names = [f"stage{n}" for n in range(12)]
    threads = [threading.Thread(target=begin_stage, args=(tmp_path, name), kwargs={"config": CONFIG}) for name in names]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(read_manifest(tmp_path).stages) == sorted(names)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "manifest.json: not valid JSON"),
        ('{"schema": 99}', "field 'schema': got 99, expected 1"),
        ("[]", r"got \[\] \(list\), expected an object"),
        ("\ufeff{}" + "x", "not valid JSON"),
        ('{"schema": 1, "created": "", "stages": {"sample": 3}}', "field 'stages.sample': got 3"),
        ('{"schema": 1, "created": "", "stages": {"sample": {"started": ""}}}', "missing field 'config'"),
    ],
)
def test_a_broken_manifest_is_named(text: str, words: str, tmp_path: Path) -> None:
    """Mutation: a traceback, or starting over silently."""
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(UserError, match=words):
        check_stage(tmp_path, "sample", config={})


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Mutation: writing in place, or leaving drafts behind."""
    path = tmp_path / "manifest.json"
    write_atomically(path, "old")

    def fail(source: object, target: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(disk_module.os, "replace", fail)
    with pytest.raises(UserError, match=r"manifest.json: no space left on the disk while writing it; free some"):
        write_atomically(path, "new")
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["manifest.json"]


def test_every_disk_error_is_one_line() -> None:
    """Mutation: an errno without words."""
    for code in range(1, 134):
        message = str(disk_error(OSError(code, os.strerror(code)), "file", "testing"))
        assert message.startswith("file: ")
        assert "\n" not in message


def test_the_file_is_json_people_can_read(tmp_path: Path) -> None:
    """Mutation: one long line."""
    begin_stage(tmp_path, "sample", config=CONFIG)
    text = (tmp_path / "manifest.json").read_text()
    assert json.loads(text)["stages"]["sample"]["config"]["seed"] == 42
    assert len(text.splitlines()) > 10


def test_the_own_evaluation_is_found(tmp_path: Path) -> None:
    """Mutations: `eval` whatever was asked for; the evaluation of another model taken for the experiment's own."""

    def evaluation() -> tuple[str, str]:
        experiment = Experiment(tmp_path)
        return experiment.evaluation.name, experiment.evaluate_stage

    assert evaluation() == ("eval", "evaluate")
    (tmp_path / "config.toml").write_text('[evaluate]\nfolder = "eval_hard"\n')
    assert evaluation() == ("eval_hard", "evaluate eval_hard")
    for folder, model in (("eval", ""), ("eval_long", ""), ("eval_base", "base")):
        stage = Experiment(tmp_path, folder).evaluate_stage
        begin_stage(tmp_path, stage, config={"evaluate": {"folder": folder, "model": model}})
    assert evaluation() == ("eval_long", "evaluate eval_long")


def test_no_evaluation_takes_a_folder_that_holds_something_else(tmp_path: Path) -> None:
    """Mutation: any of these left out of what evaluate.folder refuses."""
    one = Experiment(tmp_path)
    taken = one.samples_folder, one.scores_folder, one.judge_folder, one.train, one.preferences, one.reference
    for place in taken:
        assert list(EvaluateConfig(folder=place.name).contradictions()), place.name
