"""The record store at full size: append, look up, seal, resume, read, each in a process of its own.

    python benchmarks/store.py [--records 600000] [--tokens 300] [--folder DIR] [--results DIR]

Prints a table of wall time, CPU time, rate and peak memory per phase, and writes benchmarks/results/store-DATE.json. Token
ids are uniform random numbers below 32,000 (nothing to compress but their range), the text is words drawn from 5,000. The
folder is deleted afterwards. Peak memory is VmHWM of the process; the phase "start" is the interpreter with its imports.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import pyarrow.parquet  # noqa: F401 - part of the memory that every phase starts with

from bvpo.experiment import RecordStore, versions
from bvpo.records import Sample

RESULTS = Path(__file__).resolve().parent / "results"


def sample_keys(num: int) -> Iterator[str]:
    return (hashlib.sha256(f"benchmark-{number}".encode()).hexdigest() for number in range(num))


def make_samples(num: int, num_tokens: int) -> Iterator[Sample]:
    """Samples one by one, drawn in blocks so that drawing costs little beside storing."""
    rng = np.random.default_rng(0)
    words = ["".join(map(chr, rng.integers(97, 123, size=rng.integers(2, 10)))) for _ in range(5000)]
    for number, key in enumerate(sample_keys(num)):
        if number % 1000 == 0:
            ids = rng.integers(0, 32000, (1000, num_tokens + 80)).tolist()
            picks = rng.integers(0, 5000, (1000, num_tokens * 2 // 3)).tolist()
        row, text = ids[number % 1000], " ".join([words[i] for i in picks[number % 1000]])
        yield Sample(
            key=key,
            prompt_id=f"prompt-{number // 10}",
            view="trace" if number % 10 < 5 else "empty",
            index=number % 5,
            prompt_ids=tuple(row[:80]),
            completion_start=80,
            token_ids=tuple(row[80:]),
            text=text,
            trace=text[: len(text) // 2],
            answer=text[len(text) // 2 :],
            finish="stop",
        )


# ---------------------------------------------------------------------------------------------------------------------
# phases: (folder, number of records, tokens per record) -> what to report; each runs in a fresh process


def start(folder: Path, num: int, num_tokens: int) -> dict[str, Any]:
    return {}


def draw(folder: Path, num: int, num_tokens: int) -> dict[str, Any]:
    return {"records": sum(1 for _ in make_samples(num, num_tokens))}


def append(folder: Path, num: int, num_tokens: int) -> dict[str, Any]:
    store = RecordStore(folder, Sample)
    with store.open_writer() as writer:
        for sample in make_samples(num, num_tokens):
            writer.append(sample)
    return {"records": writer.num_records}


def open_store(folder: Path, num: int, num_tokens: int) -> dict[str, Any]:
    """What a resumed stage does first: read the keys, then look up every request."""
    started = time.perf_counter()
    store = RecordStore(folder, Sample)
    scanned = time.perf_counter()
    missing = sum(key not in store for key in sample_keys(num))
    assert missing == 0, f"{missing} records are missing"
    stats = store.stats()
    return {
        "records": len(store),
        "key_scan_s": round(scanned - started, 3),
        "look_up_s": round(time.perf_counter() - scanned, 3),
        "bytes": stats.num_bytes,
        "files": stats.num_live + stats.num_shards,
    }


def seal(folder: Path, num: int, num_tokens: int) -> dict[str, Any]:
    return {"records": RecordStore(folder, Sample).seal().num_records}


def verify(folder: Path, num: int, num_tokens: int) -> dict[str, Any]:
    store = RecordStore(folder, Sample)
    assert not store.verify()
    return {"records": len(store)}


def read(folder: Path, num: int, num_tokens: int) -> dict[str, Any]:
    return {"records": sum(1 for _ in RecordStore(folder, Sample).iter())}


def read_columns(folder: Path, num: int, num_tokens: int) -> dict[str, Any]:
    store = RecordStore(folder, Sample)
    return {"records": sum(1 for _ in store.columns("key", "prompt_id", "view", "index"))}


PHASES: dict[str, Callable[[Path, int, int], dict[str, Any]]] = {
    "start": start,
    "draw": draw,
    "append": append,
    "resume_live": open_store,
    "seal": seal,
    "resume_sealed": open_store,
    "verify": verify,
    "read": read,
    "read_columns": read_columns,
}


def run_phase(name: str, folder: Path, num: int, num_tokens: int) -> None:
    """In the phase's own process: run it and print what it took as one JSON line."""
    wall, cpu = time.perf_counter(), time.process_time()
    found = PHASES[name](folder, num, num_tokens)
    result = {
        "phase": name,
        "wall_s": round(time.perf_counter() - wall, 3),
        "cpu_s": round(time.process_time() - cpu, 3),
        "peak_mib": peak_mib(),
        **found,
    }
    print(json.dumps(result))


def peak_mib() -> int:
    """Largest resident size of this process (getrusage would report the parent's where that is larger)."""
    with open("/proc/self/status") as stream:
        line = next(line for line in stream if line.startswith("VmHWM"))
    return int(line.split()[1]) // 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--records", type=int, default=600_000)
    parser.add_argument("--tokens", type=int, default=300)
    parser.add_argument("--folder", type=Path, help="where the records go (default: a temporary folder)")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--phase", choices=PHASES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.phase:
        run_phase(args.phase, args.folder, args.records, args.tokens)
        return
    folder = args.folder or Path(tempfile.mkdtemp(prefix="bvpo-store-"))
    if args.folder and args.folder.exists() and any(args.folder.iterdir()):
        parser.error(f"{folder} is not empty")
    try:
        phases = measure(folder, args.records, args.tokens)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    write_results(args, phases)


def measure(folder: Path, num: int, num_tokens: int) -> list[dict[str, Any]]:
    print(f"{'phase':<14} {'wall s':>8} {'CPU s':>8} {'records/s':>10} {'peak MiB':>9}  notes")
    phases = []
    for name in PHASES:
        command = [sys.executable, __file__, "--phase", name, "--folder", str(folder)]
        command += ["--records", str(num), "--tokens", str(num_tokens)]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        phase = json.loads(done.stdout)
        phases.append(phase)
        rate = f"{phase['records'] / phase['wall_s']:,.0f}" if phase.get("records") and phase["wall_s"] else ""
        known = ("phase", "wall_s", "cpu_s", "peak_mib", "records")
        notes = ", ".join(f"{key} {value}" for key, value in phase.items() if key not in known)
        print(
            f"{name:<14} {phase['wall_s']:>8.2f} {phase['cpu_s']:>8.2f} {rate:>10} {phase['peak_mib']:>9}  {notes}",
            flush=True,
        )
    return phases


def write_results(args: argparse.Namespace, phases: list[dict[str, Any]]) -> None:
    today = datetime.date.today().isoformat()
    result = {
        "benchmark": "store",
        "date": today,
        "command": f"python benchmarks/store.py --records {args.records} --tokens {args.tokens}",
        "versions": versions(),
        "machine": {"cpus": os.cpu_count(), "platform": platform.platform(), "load_at_end": os.getloadavg()},
        "num_records": args.records,
        "tokens_per_record": args.tokens,
        "phases": phases,
    }
    args.results.mkdir(parents=True, exist_ok=True)
    path = args.results / f"store-{today}.json"
    path.write_text(json.dumps(result, indent=2) + "\n")
    print(f"\nwritten to {path}")


if __name__ == "__main__":
    main()
