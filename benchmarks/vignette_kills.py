"""The vignette killed with SIGKILL at random moments and run again until it is done: are its results the same?

    python benchmarks/vignette_kills.py --times 20     # writes benchmarks/results/vignette-kills-<date>.json

Two runs of the same command in two folders. One is left alone, and makes the base model, which the other finds in the
cache. The other is killed, with all its processes, some random seconds after each start, and started again until it ends
by itself. Then their results.json are compared byte for byte. A process is killed, not the machine: nothing here says
what a power failure does.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import hashlib
import json
import os
import platform
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bvpo.experiment import versions

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
OUTCOME = Path("experiments/vignette/results.json")
MOMENTS = (1.0, 22.0)  # seconds after a start, of which the first five or so import libraries


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=20, help="kills")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--seeds", type=int, help="run.num_seeds, for a shorter run than the vignette's own")
    parser.add_argument("--keep", help="folder to work in, which is kept; by default a temporary one")
    args = parser.parse_args()
    command = [sys.executable, "-m", "bvpo", "run", "experiments/vignette.toml"]
    command += ["--run.num_seeds", str(args.seeds)] if args.seeds else []
    with contextlib.nullcontext(args.keep) if args.keep else tempfile.TemporaryDirectory() as folder:
        alone, again = (Path(folder) / name for name in ("alone", "killed"))
        for place in (alone, again):
            prepare(place)
        seconds = left_alone(command, alone)
        kills, total = killed(command, again, args.times, random.Random(args.seed))
        digests = {place.name: hashlib.sha256((place / OUTCOME).read_bytes()).hexdigest() for place in (alone, again)}
    save(
        {
            "command": "python benchmarks/vignette_kills.py " + " ".join(sys.argv[1:]),
            "seconds": {"alone": round(seconds, 1), "killed": round(total, 1)},
            "kills": kills,
            "results_json": digests,
            "identical": len(set(digests.values())) == 1,
        }
    )
    if len(set(digests.values())) > 1:
        sys.exit("the results differ")


def prepare(place: Path) -> None:
    """A folder in which the command finds the experiment, its tuned values, and nothing that was done before."""
    (place / "experiments").mkdir(parents=True)
    for name in ("vignette.toml", "vignette.tuned.toml"):
        shutil.copy(ROOT / "experiments" / name, place / "experiments" / name)


def start(command: list[str], place: Path) -> subprocess.Popen[bytes]:
    """In a process group of its own, so that a kill reaches the workers too."""
    cache = str(place.parent / "cache")  # nor is a base model of before found
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "BVPO_CACHE": cache, "OMP_NUM_THREADS": "1"}
    with (place / "log.txt").open("ab") as log:
        return subprocess.Popen(command, cwd=place, env=environment, stdout=log, stderr=log, start_new_session=True)


def left_alone(command: list[str], place: Path) -> float:
    started = time.perf_counter()
    if start(command, place).wait():
        sys.exit((place / "log.txt").read_text()[-2000:])
    return time.perf_counter() - started


def killed(command: list[str], place: Path, times: int, chance: random.Random) -> tuple[list[dict[str, Any]], float]:
    """The kills, each with the seconds that its try had run and what was finished then; and all seconds together."""
    started = time.perf_counter()
    kills: list[dict[str, Any]] = []
    while True:
        process = start(command, place)
        began = time.perf_counter()
        moment = chance.uniform(*MOMENTS) if len(kills) < times else None
        try:
            code = process.wait(timeout=moment)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            ran = round(time.perf_counter() - began, 2)
            kills.append({"after_s": ran, "finished": finished(place)})
            print(f"kill {len(kills):2} after {ran:6.2f} s, {kills[-1]['finished']} evaluations finished", flush=True)
            continue
        if code:
            sys.exit((place / "log.txt").read_text()[-2000:])
        if len(kills) < times:
            print(f"done after {len(kills)} kills; more seeds would leave time for more")
        return kills, time.perf_counter() - started


def finished(place: Path) -> int:
    return len(list((place / "experiments" / "vignette").glob("seed-*/*/eval/results.json")))


def save(found: dict[str, Any]) -> None:
    machine = {"processor": platform.processor() or platform.machine(), "cores": len(os.sched_getaffinity(0))}
    date = datetime.datetime.now(datetime.UTC).date().isoformat()
    path = RESULTS / f"vignette-kills-{date}.json"
    path.write_text(json.dumps({"date": date, **found, "machine": machine, "versions": versions()}, indent=1) + "\n")
    print(f"identical: {found['identical']}; written to {path}")


if __name__ == "__main__":
    main()
