"""Writes the tables and the plot of docs/performance.md from the dated files under benchmarks/results/.

    python benchmarks/tables.py          rewrite the page
    python benchmarks/tables.py --check  exit 1 if the page differs from the files

Between ``<!-- table: NAME -->`` and ``<!-- end -->`` nothing is written by hand, so the page cannot quote a number that no
run has produced. The newest file of each kind counts.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "performance.md"
PLOT = ROOT / "docs" / "images" / "growth.svg"
RESULTS = ROOT / "benchmarks" / "results"


def newest(kind: str) -> dict[str, Any]:
    files = sorted(RESULTS.glob(f"{kind}-????-??-??.json"))
    if not files:
        raise SystemExit(f"no {kind} results under {RESULTS}")
    return json.loads(files[-1].read_text()) | {"file": files[-1].name}


def table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return "\n".join(lines + ["| " + " | ".join(str(cell) for cell in row) + " |" for row in rows])


def source(record: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {value}" for name, value in record["versions"].items())
    return f"\n\n`{record['command']}`, {record['date']}, {record['machine']}; {versions} ({record['file']})"


def trainer_speed() -> str:
    record = newest("trainer")
    rows = []
    for name, row in record["results"].items():
        if "median" in row:
            side = next(key for key in row if key.endswith("_s") and key != "trl_s")
            spread = f"{row['range'][0]:.2f} to {row['range'][1]:.2f}"
            rows.append(
                [
                    name,
                    f"**{row['median']:.2f}x**",
                    spread,
                    row["pairs"],
                    row["trl_s"],
                    row[side],
                    row.get("target", ""),
                ]
            )
    header = ["comparison", "TRL / ours", "range", "pairs", "TRL, CPU s", "ours, CPU s", "target"]
    return table(header, rows) + source(record)


def trainer_memory() -> str:
    record = newest("trainer")
    memory = record["results"]["memory"]
    peaks = {
        name: row["peak_above_idle_mb"] for name, row in memory.items() if isinstance(row, dict) and "idle_mb" in row
    }
    rows = [[name, memory[name]["idle_mb"], peak, f"{peak / peaks['trl']:.2f}"] for name, peak in peaks.items()]
    return table(["variant", "idle MB", "peak above idle MB", "of TRL's"], rows)


def trainer_growth() -> str:
    results = newest("trainer")["results"]
    parts = []
    for key, label in (
        ("growth with length (1 quad)", "sequence length"),
        ("growth with quads (length 512)", "quads a step"),
    ):
        rows = [[n, row["tokens"], row["cpu_s"], row["peak_above_idle_mb"]] for n, row in results[key].items()]
        parts.append(table([label, "tree tokens", "CPU s", "peak above idle MB"], rows))
    return "\n\n".join(parts)


def trainer_data() -> str:
    rows = [
        [f"{row['quads']:,}", row["first_step_s"], row["peak_above_idle_mb"]]
        for row in newest("trainer")["results"]["data set size"].values()
    ]
    return table(["quads on disk", "seconds to the end of the first step", "peak above idle MB"], rows)


def store() -> str:
    rows = []
    for p in newest("store")["phases"]:
        rate = f"{p['records'] / p['cpu_s']:,.0f}" if p.get("records") else ""
        parts = [f"{p['bytes'] / 1e9:.2f} GB in {p['files']} files"] if "bytes" in p else []
        if "key_scan_s" in p:
            parts.append(f"keys read in {p['key_scan_s']:.1f} s, {p['records']:,} looked up in {p['look_up_s']:.1f} s")
        row = [p["phase"].replace("_", " "), f"{p['wall_s']:.1f}", f"{p['cpu_s']:.1f}", rate, p["peak_mib"]]
        rows.append([*row, "; ".join(parts)])
    return table(["phase", "wall s", "CPU s", "records per CPU s", "peak MiB", ""], rows)


def sampling_speed() -> str:
    record = newest("sampling")
    rows = []
    for key, label in (
        ("tokens_per_cpu_second_engine_over_generate", "responses stop by themselves"),
        ("the_same_without_stops", "all responses run to the limit"),
    ):
        row = record[key]
        rates = [[pair[side]["tokens_per_cpu_s"] for pair in row["pairs"]] for side in ("generate", "engine")]
        middle = [f"{sorted(some)[len(some) // 2]:,.0f}" for some in rates]
        spread = f"{row['min']:.2f} to {row['max']:.2f}"
        rows.append([label, f"**{row['median']:.2f}x**", spread, len(row["pairs"]), *middle, row["target"]])
    header = [
        "80 responses",
        "engine / generate",
        "range",
        "pairs",
        "generate, tokens/CPU s",
        "engine, tokens/CPU s",
        "target",
    ]
    flat = record | {"machine": f"{record['machine']['processor']}, {record['machine']['threads']} thread"}
    return table(header, rows) + source(flat)


def sampling_parts() -> str:
    record = newest("sampling")
    rows = [
        [
            f"draw a token for 80 rows from {row['vocab']:,}",
            f"{row['draw_ms']:.1f}, of which random numbers {row['noise_ms']:.1f}",
            f"softmax and multinomial: {row['softmax_multinomial_ms']:.1f}",
        ]
        for row in record["draw_of_80_rows"]
    ]
    rows += [
        [
            f"forward pass of 80 rows after {row['tokens_so_far']:,} tokens",
            f"{row['slots_ms']:.1f}",
            f"`DynamicCache`: {row['dynamic_cache_ms']:.1f}",
        ]
        for row in record["step_of_80_rows"]
    ]
    return table(["one step, CPU ms", "engine", "usual way"], rows)


def kills() -> str:
    record = newest("kill")
    rows = []
    for name, row in record["campaigns"].items():
        during = row["when"].get("with some records stored", 0)
        wrong = sum(row[fault] for fault in ("lost", "invented", "changed", "duplicates_on_disk", "damaged"))
        worst = f"{row['largest_difference']:.1e}" if row["largest_difference"] else "0"
        rows.append([name, row["kills"], during, row["rounds"], row["records_per_round"], wrong, worst])
    header = [
        "what is killed",
        "kills",
        "of them amid records",
        "rounds",
        "records a round",
        "lost, doubled or changed",
    ]
    flat = record | {"machine": f"{record['machine']['cpus']} cores"}
    return table([*header, "largest difference"], rows) + source(flat)


TABLES: dict[str, Callable[[], str]] = {
    "trainer-speed": trainer_speed,
    "trainer-memory": trainer_memory,
    "trainer-growth": trainer_growth,
    "trainer-data": trainer_data,
    "store": store,
    "sampling-speed": sampling_speed,
    "sampling-parts": sampling_parts,
    "kills": kills,
}


def render(page: str) -> str:
    """The page with every marked table written anew."""

    def fill(match: re.Match[str]) -> str:
        return f"{match[1]}\n{TABLES[match[2]]()}\n{match[3]}"

    return re.sub(r"(<!-- table: ([a-z-]+) -->)\n.*?(<!-- end -->)", fill, page, flags=re.DOTALL)


def draw_growth() -> None:
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    matplotlib.rcParams["svg.hashsalt"] = "bvpo"  # the same numbers give the same file
    rows = newest("trainer")["results"]["growth with length (1 quad)"]
    lengths = [int(n) for n in rows]
    figure, axes = plt.subplots(1, 2, figsize=(8, 3), constrained_layout=True)
    for ax, key, label in zip(
        axes, ("cpu_s", "peak_above_idle_mb"), ("CPU seconds", "peak above idle, MB"), strict=True
    ):
        ax.plot(lengths, [row[key] for row in rows.values()], marker="o", color="#0072b2")
        ax.set(xscale="log", yscale="log", xlabel="sequence length (tokens)", ylabel=label)
        ax.grid(alpha=0.3)
    PLOT.parent.mkdir(exist_ok=True)
    figure.savefig(PLOT, metadata={"Date": None})


def main() -> None:
    page = PAGE.read_text(encoding="utf-8")
    new = render(page)
    if "--check" in sys.argv:
        raise SystemExit(
            0 if new == page else f"{PAGE.name} differs from benchmarks/results: run python benchmarks/tables.py"
        )
    PAGE.write_text(new, encoding="utf-8")
    draw_growth()


if __name__ == "__main__":
    main()
