"""Where the tiny model's bases lie: cache hits and misses, what is refused, and that folders appear whole."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bvpo.config import TinyConfig
from bvpo.strict import UserError
from bvpo.tiny import cache
from bvpo.tiny.cache import ensure_base, identity

TINY = TinyConfig()


class Maker:
    """Writes a base of one file, and counts how often it was asked to."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, draft: Path, said: dict[str, Any]) -> None:
        self.calls += 1
        content = f"weights of {said['settings']['modulus']}"
        (draft / "model.safetensors").write_text(content)
        files = {"model.safetensors": hashlib.sha256(content.encode()).hexdigest()}
        (draft / "tiny.json").write_text(json.dumps({**said, "files": files}))


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Maker:
    monkeypatch.setenv("BVPO_CACHE", str(tmp_path / "cache"))
    return Maker()


def leftovers(folder: Path) -> list[str]:
    return sorted(
        path.name for path in folder.iterdir() if path.name.startswith(".") and not path.name.endswith(".lock")
    )


def test_made_once(tmp_path: Path, make: Maker) -> None:
    """Mutation: training again for a second folder, or for one that has the base."""
    assert ensure_base(tmp_path / "a", TINY, make).origin == "made"
    assert ensure_base(tmp_path / "a", TINY, make).origin == "here"
    assert ensure_base(tmp_path / "b", TINY, make).origin == "cache"
    assert make.calls == 1
    assert (tmp_path / "b" / "model.safetensors").read_text() == "weights of 7"
    assert not leftovers(tmp_path) and not leftovers(tmp_path / "cache" / "tiny")


@pytest.mark.parametrize("changed", [{"modulus": 5}, {"seed": 9}, {"steps": 1999}, {"threads": 2}, {"num_prompts": 7}])
def test_other_settings_are_another_base(tmp_path: Path, make: Maker, changed: dict[str, Any]) -> None:
    """Mutation: a key that leaves a setting out."""
    ensure_base(tmp_path / "a", TINY, make)
    assert ensure_base(tmp_path / "b", replace(TINY, **changed), make).origin == "made"


def test_code_and_libraries_are_part_of_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    """Mutation: a key that survives another torch; a key that depends on the number of the run."""
    before = identity(TINY)
    assert before == identity(TINY)
    monkeypatch.setattr(cache, "version", lambda name: f"{name}-99")
    assert identity(TINY) != before and identity(TINY)["code"] == before["code"]


def test_another_base_is_refused_with_the_difference(tmp_path: Path, make: Maker) -> None:
    """Mutation: overwriting a base that experiments may build on."""
    ensure_base(tmp_path / "a", TINY, make)
    with pytest.raises(
        UserError, match=re.escape("a: holds a base with other settings: tiny.modulus: 7 -> 5; restore them")
    ):
        ensure_base(tmp_path / "a", replace(TINY, modulus=5), make)
    assert make.calls == 1


def test_other_folders_are_refused(tmp_path: Path, make: Maker) -> None:
    """Mutation: writing over a folder or file that is somebody else's."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("x")
    (tmp_path / "file").write_text("x")
    for name in ("mine", "file"):
        with pytest.raises(UserError, match="holds no base of `bvpo tiny`"):
            ensure_base(tmp_path / name, TINY, make)
    assert make.calls == 0
    (tmp_path / "empty").mkdir()
    assert ensure_base(tmp_path / "empty", TINY, make).origin == "made"


def test_changed_files_are_noticed(tmp_path: Path, make: Maker) -> None:
    """Mutation: a base whose weights were replaced passes for the base; a damaged cache is copied."""
    ensure_base(tmp_path / "a", TINY, make)
    (tmp_path / "a" / "notes.txt").write_text("a file that came later is nobody's business")
    assert ensure_base(tmp_path / "a", TINY, make).origin == "here"
    (tmp_path / "a" / "model.safetensors").write_text("other weights")
    with pytest.raises(UserError, match=r"model\.safetensors: is not as `bvpo tiny` wrote it"):
        ensure_base(tmp_path / "a", TINY, make)
    cached = next((tmp_path / "cache" / "tiny").glob("*/model.safetensors"))
    cached.write_text("bit rot")
    assert ensure_base(tmp_path / "b", TINY, make).origin == "made"
    assert cached.read_text() == "weights of 7"


def test_first_tries_give_way(tmp_path: Path, make: Maker) -> None:
    """Mutation: a first try that the full run refuses, one that replaces the full base, or one that is taken for it."""
    folder = tmp_path / "a"
    assert ensure_base(folder, TINY, make, limit=10).description["settings"]["steps"] == 10
    assert ensure_base(folder, TINY, make, limit=10).origin == "here"
    assert ensure_base(folder, TINY, make, limit=20).description["settings"]["steps"] == 20
    assert ensure_base(folder, TINY, make).description["settings"]["steps"] == 2000
    assert "first_try" not in ensure_base(folder, TINY, make).description
    kept = ensure_base(folder, TINY, make, limit=10)
    assert kept.origin == "here" and kept.description["settings"]["steps"] == 2000
    # a base that was asked for with so few steps is no first try, and is not given away
    small = tmp_path / "small"
    ensure_base(small, replace(TINY, steps=10), make)
    with pytest.raises(UserError, match=r"tiny\.steps: 10 -> 2000"):
        ensure_base(small, TINY, make)


def test_a_failure_leaves_nothing(tmp_path: Path, make: Maker) -> None:
    """Mutation: training straight into the cache; half a base would be found there the next time."""

    def fails(draft: Path, said: dict[str, Any]) -> None:
        (draft / "model.safetensors").write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ensure_base(tmp_path / "a", TINY, fails)
    assert not (tmp_path / "a").exists() and not leftovers(tmp_path / "cache" / "tiny")
    assert ensure_base(tmp_path / "a", TINY, make).origin == "made"


def test_disks_that_do_not_take_it(tmp_path: Path, make: Maker, monkeypatch: pytest.MonkeyPatch) -> None:
    """Mutation: finding out after the training, or with a traceback."""
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match=r"while (creating the folder|looking into it)"):
        ensure_base(tmp_path / "file" / "a", TINY, make)
    monkeypatch.setenv("BVPO_CACHE", str(tmp_path / "file"))
    with pytest.raises(UserError, match="file"):
        ensure_base(tmp_path / "b", TINY, make)
    assert make.calls == 0

    def full(draft: Path, said: dict[str, Any]) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setenv("BVPO_CACHE", str(tmp_path / "cache"))
    with pytest.raises(UserError, match="no space left on the disk while writing the base"):
        ensure_base(tmp_path / "b", TINY, full)


def test_unreadable_description(tmp_path: Path, make: Maker) -> None:
    """Mutation: a traceback from json, or training over a base that was cut short by a full disk."""
    ensure_base(tmp_path / "a", TINY, make)
    (tmp_path / "a" / "tiny.json").write_text('{"settings": ')
    with pytest.raises(UserError, match=r"tiny\.json: cannot be read .*remove the folder"):
        ensure_base(tmp_path / "a", TINY, make)


def test_other_code_is_said_and_kept(tmp_path: Path, make: Maker, caplog: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Mutation: refusing every base after an upgrade, or saying nothing."""
    import logging

    ensure_base(tmp_path / "a", TINY, make)
    monkeypatch.setattr(cache, "version", lambda name: "99")
    monkeypatch.setattr(logging.getLogger("bvpo"), "propagate", True)
    with caplog.at_level("INFO"):
        assert ensure_base(tmp_path / "a", TINY, make).origin == "here"
    assert "made by another version: libraries.torch" in caplog.text


@pytest.mark.parametrize(
    ("own", "users", "expected"),
    [
        ("/own", "/users", "/own"),
        ("", "/users", "/users/bvpo"),
        ("", "", "/home/me/.cache/bvpo"),
        ("", "relative/cache", "/home/me/.cache/bvpo"),
    ],
)
def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch, own: str, users: str, expected: str) -> None:
    """Mutation: XDG_CACHE_HOME ignored, or before BVPO_CACHE, or a relative one taken, which its specification forbids."""
    for name, value in (("BVPO_CACHE", own), ("XDG_CACHE_HOME", users), ("HOME", "/home/me")):
        monkeypatch.setenv(name, value)
    assert cache.cache_folder() == Path(expected)
