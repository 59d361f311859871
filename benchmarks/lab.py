"""The laboratory's full results as a dated file: every verdict, table and curve of ``bvpo lab``.

    python benchmarks/lab.py

Runs the verb in a folder of its own and writes benchmarks/results/lab-DATE.json: verdicts by key, tables, plots, seconds
of wall and CPU time, versions and command. Exit code 1 if a check fails.
"""

from __future__ import annotations

import datetime
import json
import os
import platform
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

from bvpo.stages import lab

RESULTS = Path(__file__).resolve().parent / "results"


def main() -> int:
    wall, cpu, day = time.perf_counter(), time.process_time(), datetime.date.today().isoformat()
    with tempfile.TemporaryDirectory() as folder:
        code = lab.main(["--out", folder])
        found = json.loads((Path(folder) / "lab.json").read_text(encoding="utf-8"))
    findings = found.pop("findings")
    record = {
        "benchmark": "lab",
        "date": day,
        "command": "python benchmarks/lab.py",
        "versions": {"bvpo": found.pop("bvpo"), "torch": found.pop("torch"), "numpy": version("numpy")},
        "machine": f"{platform.machine()}, 1 thread, {os.cpu_count()} cores",
        "seconds": {"wall": round(time.perf_counter() - wall, 1), "cpu": round(time.process_time() - cpu, 1)},
        **found,
        "verdicts": {verdict.pop("key"): verdict for verdict in findings["verdicts"]},
        "tables": findings["tables"],
        "plots": findings["plots"],
    }
    (RESULTS / f"lab-{day}.json").write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return code


if __name__ == "__main__":
    sys.exit(main())
