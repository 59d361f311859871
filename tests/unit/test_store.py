"""The record store: what goes in comes out once, damage is found and named, and the disk's refusals are one line."""

from __future__ import annotations

import errno
import json
import logging
import os
import random
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from store_fixtures import fill, live_files, make_sample, shards
from strategies import values_of

from bvpo.experiment import RecordStore, digest
from bvpo.experiment import recordstore as recordstore_module
from bvpo.experiment import writer as writer_module
from bvpo.experiment.index import KeyIndex, unpack
from bvpo.experiment.lines import BadLine, encode_line, read_lines
from bvpo.experiment.live import claim
from bvpo.records import Message, Quad, Sample, Score
from bvpo.strict import UserError, to_json


def everything(store: RecordStore[Any]) -> list[Any]:
    return list(store.iter())


# ------------------------------------------------------------------------------------------------ round trips


@pytest.mark.parametrize("cls", [Sample, Score])
def test_any_record_survives_lines_and_shards(cls: type, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Mutation: a column type that rounds, drops nulls, or cannot hold lone surrogates and 64-bit token ids."""

    @settings(suppress_health_check=[HealthCheck.too_slow], max_examples=25)
    @given(st.lists(values_of(cls), max_size=6))
    def check(records: list[Any]) -> None:
        store: RecordStore[Any] = RecordStore(tmp_path_factory.mktemp("store"), cls)
        with store.open_writer() as writer:
            for record in records:
                writer.append(record)
        key = (lambda r: r.key) if cls is Sample else (lambda r: (r.sample_key, r.scorer))
        first = list({key(r): r for r in reversed(records)}.values())
        store.refresh()
        assert sorted(map(to_json, everything(store))) == sorted(map(to_json, first))
        store.seal()
        assert not live_files(store.folder)
        assert sorted(map(repr, everything(store))) == sorted(map(repr, first))

    check()


def test_types_survive_exactly(tmp_path: Path) -> None:
    """Mutation: lists instead of tuples, or floats turned into integers, after sealing."""
    samples = [make_sample(n) for n in range(30)]
    store = fill(tmp_path, range(30), seal=True)
    assert everything(store) == samples
    assert all(type(s.token_ids) is tuple and type(s.token_ids[0]) is int for s in store)


def test_nested_records_with_a_key_function(tmp_path: Path) -> None:
    """Mutation: nested dataclasses lost by the JSON columns; ``key=`` ignored."""
    quads = [Quad(id=f"q{n}", messages=(Message(role="user", content=f"question {n}"),)) for n in range(5)]
    store = RecordStore(tmp_path, Quad, key=lambda quad: quad.id)
    with store.open_writer() as writer:
        for quad in quads:
            writer.append(quad)
    store.seal()
    assert everything(store) == quads
    assert store.get("q3") == quads[3]


def test_live_files_are_plain_json_lines(tmp_path: Path) -> None:
    """Mutation: a line format that other tools cannot read."""
    fill(tmp_path, range(3))
    rows = [json.loads(line) for line in live_files(tmp_path)[0].read_text().splitlines()]
    assert [row["record"]["key"] for row in rows] == [make_sample(n).key for n in range(3)]
    assert [row["id"] for row in rows] == [digest(make_sample(n).key).hex() for n in range(3)]


def test_shards_are_plain_parquet(tmp_path: Path) -> None:
    """Mutation: columns other tools cannot use (one JSON blob per record)."""
    import pyarrow.parquet as pq

    fill(tmp_path, range(20), seal=True)
    table = pq.read_table(shards(tmp_path)[0])
    assert table.column("token_ids").to_pylist()[3] == list(make_sample(3).token_ids)
    assert table.column("text").to_pylist()[3] == make_sample(3).text


def test_selection_and_columns(tmp_path: Path) -> None:
    """Mutation: ``only`` or column names ignored, in live files or in shards."""
    fill(tmp_path, range(10), seal=True)
    store = fill(tmp_path, range(10, 20))
    wanted = [make_sample(n).key for n in (3, 15, 99)]
    assert everything(store)[0] == make_sample(0)
    assert [s.key for s in store.iter(only=wanted)] == wanted[:2]
    assert store.get(wanted[1]) == make_sample(15)
    assert store.get(wanted[2]) is None
    assert list(store.columns("index", "trace", only=wanted)) == [
        {"index": make_sample(n).index, "trace": make_sample(n).trace} for n in (3, 15)
    ]
    with pytest.raises(ValueError, match="no fields"):
        next(store.columns("nonsense"))


def test_records_of_an_older_version_get_defaults(tmp_path: Path) -> None:
    """Mutation: a shard or line without a field that has a default is refused."""

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Old:
        key: str

    @dataclass(frozen=True, slots=True, kw_only=True)
    class New:
        key: str
        extra: dict[str, Any] = field(default_factory=dict)

    New.__name__ = Old.__name__
    old = RecordStore(tmp_path, Old, key=lambda r: r.key)
    for seal in (False, True):
        with old.open_writer() as writer:
            writer.append(Old(key=f"{seal}"))
        if seal:
            old.seal()
        new = RecordStore(tmp_path, New, key=lambda r: r.key)
        assert everything(new)[-1] == New(key=f"{seal}")


def test_another_class_is_refused_with_file_and_line(tmp_path: Path) -> None:
    """Mutation: errors without the place, or scores read as samples."""
    fill(tmp_path, range(3))
    store = RecordStore(tmp_path, Score)
    with pytest.raises(UserError, match=rf"{live_files(tmp_path)[0]}:1: unknown field 'key'"):
        everything(store)


# ------------------------------------------------------------------------------------------------ keys


def test_first_record_of_a_key_wins_before_and_after_sealing(tmp_path: Path) -> None:
    """Mutation: last wins, or sealing one file changes which record is the first."""
    store = RecordStore(tmp_path, Sample)
    early = store.open_writer()
    late = store.open_writer()
    late.append(make_sample(1, text="late"))
    early.append(make_sample(1, text="early"))
    early.append(make_sample(1, text="early again"))
    late.close()
    store.seal()  # seals the late file only: the early writer still works
    assert store.stats().num_active == 1
    assert [s.text for s in store] == ["early"]
    early.close()
    store.refresh()
    assert [s.text for s in store] == ["early"]
    assert store.stats().num_duplicates == 2
    report = store.seal()
    assert (report.num_records, report.num_duplicates) == (1, 1)
    assert [s.text for s in store] == ["early"]


def test_key_set(tmp_path: Path) -> None:
    """Mutation: look-ups that miss the ends of the index, or find what is not there."""
    fill(tmp_path, range(50), seal=True)
    store = fill(tmp_path, range(40, 90))
    keys = [make_sample(n).key for n in range(90)]
    assert len(store) == len(store.keys()) == 90
    assert set(store.keys()) == {digest(key) for key in keys}
    assert all(key in store for key in keys)
    assert not any(make_sample(n).key in store for n in range(90, 200))


def test_key_index_compares_whole_digests() -> None:
    """Mutation: comparing only the first eight of the sixteen bytes."""
    digests = [bytes(8) + bytes(7) + bytes([n]) for n in (3, 1, 2, 1)]
    index = KeyIndex.build([(unpack(b"".join(digests)), unpack(bytes(64))[:, 0].astype("int64"))])
    assert list(index) == sorted(set(digests))
    assert index.num_duplicates == 1
    assert bytes(15) + bytes([4]) not in index


def test_composite_keys_do_not_run_together() -> None:
    """Mutation: joining the parts of a key without marking where one ends."""
    assert digest(("ab", "c")) != digest(("a", "bc"))
    assert digest("ab") != digest(("ab", ""))


def test_scores_of_two_scorers_are_two_records(tmp_path: Path) -> None:
    """Mutation: a score's key without its scorer."""
    store = RecordStore(tmp_path, Score)
    with store.open_writer() as writer:
        for scorer in ("a", "b"):
            writer.append(Score(sample_key="k", prompt_id="p", view="trace", scorer=scorer, value=1.0))
    store.refresh()
    assert len(store) == 2
    assert ("k", "b") in store


# ------------------------------------------------------------------------------------------------ damage


def test_torn_tail_is_ignored_then_cut_and_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Mutation: a torn line read as a record, kept in front of the next one, or cut without a word."""
    fill(tmp_path, range(5))
    path = live_files(tmp_path)[0]
    whole = path.read_bytes()
    for cut in (1, 20, len(whole.splitlines()[-1])):
        path.write_bytes(whole[:-cut])
        store = RecordStore(tmp_path, Sample)
        assert len(store) == 4
        assert store.stats().torn_bytes > 0
        caplog.clear()
        with caplog.at_level(logging.WARNING, logger="bvpo"):
            store.open_writer().close()
        assert path.read_bytes() == b"".join(whole.splitlines(keepends=True)[:4])
        assert "unfinished bytes cut off" in caplog.text
        assert str(path) in caplog.text


def test_torn_tail_of_a_working_writer_is_left_alone(tmp_path: Path) -> None:
    """Mutation: repairing without the lock, which would cut a line that is being written."""
    store = RecordStore(tmp_path, Sample)
    with store.open_writer() as writer:
        writer.append(make_sample(0))
        os.write(writer._handle, b'{"crc":"half a li')
        size = writer.path.stat().st_size
        RecordStore(tmp_path, Sample).open_writer().close()
        assert store.seal().num_busy == 1
        assert writer.path.stat().st_size == size


def test_a_flipped_bit_is_found_wherever_it_is(tmp_path: Path) -> None:
    """Mutation: no checksum, or one that leaves out the key. Every bit of a record line is tried."""
    line = encode_line(digest("k"), b'{"key":"k"}')
    neighbours = [encode_line(digest(name), b"{}") for name in ("before", "after")]
    path = tmp_path / "lines"
    for bit in range(8 * len(line)):
        damaged = bytearray(line)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(neighbours[0] + bytes(damaged) + neighbours[1])
        with open(path, "rb") as stream:
            found = list(read_lines(stream))
        good = [e.ident for e in found if not isinstance(e, BadLine)]
        newline_hit = bit // 8 == len(line) - 1
        assert good == [digest(n) for n in (("before", "k", "after") if newline_hit else ("before", "after"))]
        assert any(isinstance(e, BadLine) and e.number == 2 for e in found) == (not newline_hit)


def test_damage_in_the_middle_loses_one_record_and_names_the_line(tmp_path: Path) -> None:
    """Mutation: stopping at the first bad line, or a wrong line number."""
    fill(tmp_path, range(20))
    path = live_files(tmp_path)[0]
    lines = path.read_bytes().splitlines(keepends=True)
    lines[6] = lines[6].replace(b"answer", b"answor")
    path.write_bytes(b"".join(lines))
    store = RecordStore(tmp_path, Sample)
    assert [s.key for s in store] == [make_sample(n).key for n in range(20) if n != 6]
    (damage,) = store.stats().damaged
    assert str(damage) == f"{path}:7: damaged record (checksum does not match)"
    assert store.verify() == [damage]
    with store.open_writer() as writer:
        writer.append(make_sample(6))  # the lost record is made again
    report = store.seal()
    assert report.damaged == (damage,)
    assert sorted(s.key for s in store) == sorted(make_sample(n).key for n in range(20))


def test_a_lost_newline_loses_no_record(tmp_path: Path) -> None:
    """Mutation: giving up on a bad line that holds two good records; they are read back and found by key, too."""
    fill(tmp_path, range(3))
    path = live_files(tmp_path)[0]
    content = bytearray(path.read_bytes())
    content[content.index(b"\n")] ^= 1
    path.write_bytes(content)
    store = RecordStore(tmp_path, Sample)
    assert everything(store) == [make_sample(n) for n in range(3)]
    assert store.get(make_sample(1).key) == make_sample(1)


def test_a_damaged_shard_loses_its_row_group_only(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Mutation: no page checksums, a whole shard given up, or a repair that loses or doubles what is intact."""
    store = fill(tmp_path, range(2500), seal=True)
    (path,) = shards(tmp_path)
    content = bytearray(path.read_bytes())
    place = _page_of_column(path, group=1, column="text")
    content[place] ^= 4
    path.write_bytes(content)
    store = RecordStore(tmp_path, Sample)
    assert len(store) == 2500  # keys are intact
    with caplog.at_level(logging.WARNING, logger="bvpo"):
        assert len(everything(store)) == 1500
    assert f"{path}: rows 1001-2000: damaged" in caplog.text
    assert [d.num_records for d in store.verify()] == [1000]
    assert [d.num_records for d in store.repair(full=True)] == [1000]
    assert len(store) == len(everything(store)) == 1500
    assert store.verify() == []
    assert path.with_name(f"{path.name}.damaged").exists()
    keys = {s.key for s in store}
    assert keys == {make_sample(n).key for n in range(2500) if not 1000 <= n < 2000}


def test_damaged_keys_or_footer_are_found_when_opening(tmp_path: Path) -> None:
    """Mutation: a broken shard stops the program, or counts as done."""
    fill(tmp_path, range(2500), seal=True)
    (path,) = shards(tmp_path)
    whole = path.read_bytes()
    content = bytearray(whole)
    content[_page_of_column(path, group=2, column="_id")] ^= 1
    path.write_bytes(content)
    store = RecordStore(tmp_path, Sample)
    assert len(store) == len(everything(store)) == 2000
    assert "rows 2001-2500" in str(store.stats().damaged[0])
    path.write_bytes(whole[:-100])
    store = RecordStore(tmp_path, Sample)
    assert len(store) == 0
    assert "unreadable shard" in str(store.stats().damaged[0])
    store.repair(full=True)
    assert not shards(tmp_path)


def _page_of_column(path: Path, group: int, column: str) -> int:
    """An offset well inside the data of one column chunk."""
    import pyarrow.parquet as pq

    meta = pq.ParquetFile(path).metadata.row_group(group)
    chunk = next(c for c in map(meta.column, range(meta.num_columns)) if c.path_in_schema.split(".")[0] == column)
    return chunk.data_page_offset + chunk.total_compressed_size - 20


# ------------------------------------------------------------------------------------------------ writers


def test_groups_are_synced_by_count_and_by_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Mutation: no fsync, one per record, or none while no new record comes."""
    synced: list[int] = []
    monkeypatch.setattr(writer_module.os, "fsync", synced.append)
    store = RecordStore(tmp_path, Sample)
    with store.open_writer(sync_records=10, sync_seconds=60) as writer:
        synced.clear()
        for number in range(35):
            writer.append(make_sample(number))
        assert len(synced) == 3
    assert len(synced) == 4
    done = threading.Event()
    monkeypatch.setattr(writer_module.os, "fsync", lambda handle: done.set())
    with store.open_writer(sync_records=1000, sync_seconds=0.02) as writer:
        done.clear()
        writer.append(make_sample(99))
        assert done.wait(5)


def test_writer_changes_files_before_they_grow_large(tmp_path: Path) -> None:
    """Mutation: no rotation, or a record lost or doubled at the change."""
    store = RecordStore(tmp_path, Sample)
    with store.open_writer(max_bytes=5000) as writer:
        for number in range(50):
            writer.append(make_sample(number))
        assert len(live_files(tmp_path)) > 3
    store.seal()
    assert everything(store) == [make_sample(n) for n in range(50)]


def test_an_unused_writer_leaves_nothing(tmp_path: Path) -> None:
    """Mutation: empty files that pile up with every resumed run."""
    RecordStore(tmp_path, Sample).open_writer().close()
    assert not live_files(tmp_path)


def test_threads_share_a_writer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Mutation: appending without the lock, which mixes lines that the system takes in several pieces."""
    real_write = os.write
    monkeypatch.setattr(writer_module.os, "write", lambda handle, data: real_write(handle, data[:500]))
    store = RecordStore(tmp_path, Sample)
    with store.open_writer() as writer:

        def work(start: int) -> None:
            for number in range(start, 200, 4):
                writer.append(make_sample(number, num_tokens=400))

        threads = [threading.Thread(target=work, args=(start,)) for start in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    store.refresh()
    assert not store.stats().damaged
    assert len(store) == 200


def test_large_shards_are_split(tmp_path: Path) -> None:
    """Mutation: a split that drops or repeats the records at its border."""
    store = fill(tmp_path, range(45))
    store.seal(shard_records=20)
    assert len(shards(tmp_path)) == 3
    assert everything(store) == [make_sample(n) for n in range(45)]
    assert store.verify() == []
    assert len(store.shard_hashes()) == 3


def test_a_store_sealed_by_another_process_can_still_be_read(tmp_path: Path) -> None:
    """Mutation: an iterator that stops with FileNotFoundError, or skips, when a live file turned into shards."""
    store = fill(tmp_path, range(30))
    fill(tmp_path, range(30, 40))
    store.refresh()
    records = store.iter()
    first = next(records)
    RecordStore(tmp_path, Sample).seal()
    assert [first, *records] == [make_sample(n) for n in range(40)]


def test_foreign_files_are_left_alone(tmp_path: Path) -> None:
    """Mutation: reading or deleting whatever lies in the folder."""
    (tmp_path / "notes.jsonl").write_text("not ours\n")
    (tmp_path / "x.parquet").write_text("not ours\n")
    store = fill(tmp_path, range(3), seal=True)
    assert len(store) == 3
    assert (tmp_path / "notes.jsonl").read_text() == (tmp_path / "x.parquet").read_text() == "not ours\n"


def test_another_machines_fresh_file_is_not_sealed(tmp_path: Path) -> None:
    """Mutation: trusting the lock alone, which some network file systems keep to one machine."""
    fill(tmp_path, range(3))
    (path,) = live_files(tmp_path)
    other = path.with_name(path.name.replace(f"-{writer_module.host_name()}-", "-elsewhere-"))
    path.rename(other)
    store = RecordStore(tmp_path, Sample)
    assert len(store) == 3
    with open(other, "ab") as stream:
        stream.write(b"half a line")
    store.open_writer().close()
    assert other.read_bytes().endswith(b"half a line")
    assert store.seal().num_busy == 1
    store.refresh()
    assert store.stats().num_active == 1
    os.utime(other, (0, 0))
    assert store.seal().num_records == 3


def test_a_file_that_grew_after_it_was_looked_at_is_not_sealed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Mutation: sealing (and removing) a file by an outdated list of its lines.

    A sealing process may look at a new file before its writer has locked it, and claim it after the writer has closed.
    """
    store = RecordStore(tmp_path, Sample)
    writer = store.open_writer()
    monkeypatch.setattr(recordstore_module, "is_active", lambda path: False)

    def claim_late(path: Path) -> Any:
        writer.append(make_sample(0))
        writer.close()
        return claim(path)

    monkeypatch.setattr(recordstore_module, "claim", claim_late)
    assert store.seal().num_busy == 1
    assert everything(store) == [make_sample(0)]


def test_a_writer_whose_file_was_taken_says_so(tmp_path: Path) -> None:
    """Mutation: writing on into a deleted file."""
    writer = RecordStore(tmp_path, Sample).open_writer()
    writer.append(make_sample(0))
    writer.path.unlink()
    with pytest.raises(UserError, match="removed while this process was writing it"):
        writer.sync()
    writer.close()


# ------------------------------------------------------------------------------------------------ the disk says no


@pytest.mark.parametrize(
    ("code", "words"),
    [(errno.ENOSPC, "no space left on the disk"), (errno.EROFS, "not writable"), (errno.EIO, "while storing a record")],
)
def test_a_failing_write_is_one_line_and_leaves_the_store_whole(
    code: int, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Mutation: half a line left in front of later records, or a bare OSError."""
    store = RecordStore(tmp_path, Sample)
    writer = store.open_writer()
    writer.append(make_sample(0))
    real_write = os.write

    def half(handle: int, data: Any) -> int:
        if len(data) > 30:
            return real_write(handle, data[:30])
        raise OSError(code, os.strerror(code))

    lines = iter([half])
    monkeypatch.setattr(writer_module.os, "write", lambda h, d: next(lines, _fail(code))(h, d))
    with pytest.raises(UserError, match=words) as caught:
        writer.append(make_sample(1))
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match=words):
        writer.append(make_sample(2))
    monkeypatch.undo()
    writer.close()
    store.refresh()
    assert everything(store) == [make_sample(0)]
    assert store.stats().torn_bytes == 0


def _fail(code: int) -> Any:
    def fail(handle: int, data: Any) -> int:
        raise OSError(code, os.strerror(code))

    return fail


def test_a_failing_sync_thread_is_heard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Mutation: an error of the background sync that nobody sees."""
    writer = RecordStore(tmp_path, Sample).open_writer(sync_seconds=0.01)

    def fail(handle: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    writer.append(make_sample(0))
    monkeypatch.setattr(writer_module.os, "fsync", fail)
    with pytest.raises(UserError, match="no space left"):
        for _ in range(1000):
            writer.append(make_sample(random.randrange(10**6)))
            threading.Event().wait(0.01)
    writer.close()
