"""Writes the tables of the pages, and a plot, from the dated files under benchmarks/results/.

    python benchmarks/tables.py          rewrite the pages
    python benchmarks/tables.py --check  exit 1 if a page differs from the files

Between ``<!-- table: NAME -->`` and ``<!-- end -->`` nothing is written by hand. Numbers in sentences: quotes.py.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PAGES = ("README.md", "docs/quickstart.md", "docs/claims.md", "docs/estimators.md", "docs/performance.md")
PLOT = ROOT / "docs" / "images" / "growth.svg"
RESULTS = ROOT / "benchmarks" / "results"


# Quoted already, not committed yet: what is bound to these kinds is not compared. Any other kind must be there.
AWAITED = {"lab"}


class NoResults(Exception):
    """There is no file of a kind."""

    def __init__(self, kind: str) -> None:
        super().__init__(f"no {kind} results under {RESULTS}")
        self.kind = kind


PARTS = {"kill": ("records_per_round", "rounds_that_differ")}
"""Kinds whose files may hold a part of what is measured: a word that each part has."""


@cache
def newest(kind: str, having: str = "") -> dict[str, Any]:
    """The newest file of a kind (that mentions ``having``, where a run may be of parts), and its name as ``file``."""
    files = [path for path in sorted(RESULTS.glob(f"{kind}-????-??-??.json")) if having in path.read_text()]
    if not files:
        raise NoResults(kind)
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
    record = newest("kill", having=PARTS["kill"][0])
    rows = []
    for name, row in record["campaigns"].items():
        if "records_per_round" not in row:  # training has none
            continue
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


# How the pages call the methods of the experiments.
VIGNETTE = {
    "base": "before alignment",
    "dpo": "DPO (alpha 1)",
    "dpo-tokens": "DPO, as many tokens as BVPO",
    "empty": "empty view alone (alpha 0)",
    "simpo": "SimPO",
    "bvpo-25": "BVPO, alpha 0.25",
    "bvpo-50": "BVPO, alpha 0.5",
    "bvpo-75": "BVPO, alpha 0.75",
    "bvpo-50-answer": "BVPO 0.5, answer estimator",
    "dpo-anchor": "DPO + trace anchor",
    "bvpo-50-anchor": "BVPO 0.5 + trace anchor",
}
HEADLINE = ("base", "dpo", "dpo-tokens", "empty", "bvpo-50", "dpo-anchor", "bvpo-50-anchor")
ESTIMATORS = {
    "base": "before alignment",
    "dpo": "joint (DPO)",
    "dpo-tokens": "joint, the tokens of a mixture",
    "empty": "empty view",
    "bvpo-50": "joint + empty (BVPO 0.5)",
    "answer": "answer",
    "answer-empty": "answer + empty",
    "bvpo-50-answer": "answer + empty",
    "per-token": "per token",
    "per-token-empty": "per token + empty",
    "dpo-nll": "joint, NLL anchor",
    "bvpo-50-nll": "joint + empty, NLL anchor ¹",
    "dpo-anchor": "joint, KL anchor",
    "bvpo-50-anchor": "joint + empty, KL anchor",
    "answer-empty-anchor": "answer + empty, KL anchor ¹",
}
WEIGHTS = {"kl-0": "0", "kl-003": "0.03", "dpo-anchor": "0.1 (tuned)", "kl-03": "0.3", "kl-1": "1"}
CHAT = {"reward, Thinking": ("chat", "thinking", "reward"), "reward, NoThinking": ("chat", "nothinking", "reward")}
REASONING = ("reasoning", "thinking", "accuracy")


def over_seeds(record: Mapping[str, Any], part: str, method: str, cell: tuple[str, ...]) -> dict[str, Any]:
    """The result of ``scores`` or ``differences`` for a method and (benchmark, mode, metric)."""
    keys = ("method", "benchmark", "mode", "metric")
    (found,) = [row["result"] for row in record[part] if tuple(row[key] for key in keys) == (method, *cell)]
    return found


def difference(record: Mapping[str, Any], method: str, cell: tuple[str, ...], *, half_width: bool) -> str:
    """To the baseline; bold where the interval leaves out zero, empty for the baseline itself."""
    if method == record["baseline"]:
        return ""
    found = over_seeds(record, "differences", method, cell)
    low, high = found["seed_low"], found["seed_high"]
    spread = f"± {(high - low) / 2:.3f}" if half_width else f"[{low:+.3f}, {high:+.3f}]"
    text = f"{found['value']:+.3f} {spread}"
    return f"**{text}**" if low > 0 or high < 0 else text


def vignette(methods: Sequence[str]) -> str:
    record = newest("vignette")
    rows = []
    for name in methods:
        row = [VIGNETTE[name]]
        for cell in CHAT.values():
            row.append(f"{over_seeds(record, 'scores', name, cell)['value']:.3f}")
            row.append(difference(record, name, cell, half_width=False))
        rows.append([*row, f"{over_seeds(record, 'scores', name, REASONING)['value']:.3f}"])
    header = ["method", *(title for name in CHAT for title in (name, "minus DPO")), "reasoning, Thinking"]
    return table(header, rows)


def tournament(kind: str, labels: Mapping[str, str], first: str) -> str:
    record = newest(kind)
    made = {row["name"]: row for row in record["methods"]}
    cells = CHAT | {"reasoning": REASONING}
    rows = []
    for name, label in labels.items():
        if name not in made:
            continue
        tuned = {key.split(".")[-1]: value for key, value in made[name]["tuned"].items()}
        chosen = f"{tuned['learning_rate']:g}, {tuned['beta']:g}" if tuned else ""
        tokens = f"{made[name]['tokens'] / 1000:.0f}k" if made[name]["tokens"] else ""
        row = [label, chosen, tokens]
        for cell in cells.values():
            row.append(f"{over_seeds(record, 'scores', name, cell)['value']:.3f}")
            row.append(difference(record, name, cell, half_width=True))
        rows.append(row)
    header = [first, "lr, beta", "tokens", *(title for name in cells for title in (name, "minus joint"))]
    return table(header, rows)


def declared(kind: str) -> str:
    rows = []
    for row in newest(kind)["declared"]:
        better, than = (ESTIMATORS[row[side]].rstrip(" ¹") for side in ("better", "than"))
        mode = {"thinking": "Thinking", "nothinking": "NoThinking"}[row["mode"]]
        result = row["result"]
        found = f"{result['value']:+.3f} [{result['seed_low']:+.3f}, {result['seed_high']:+.3f}]"
        rows.append([f"{better} above {than}: {row['benchmark']} {row['metric']}, {mode}", found, row["outcome"]])
    return table(["declared", "difference", "outcome"], rows)


# How estimators.md calls the rows of the laboratory's tables.
LAB_ESTIMATORS = {
    "joint": "joint",
    "answer": "answer",
    "per token": "per token",
    "2 traces, importance-weighted": "2 traces",
    "3 traces, importance-weighted": "3 traces",
    "joint + 1 beta NLL of the chosen trace": "joint + 1 beta NLL",
    "joint + 1 beta KL of the traces": "joint + 1 beta KL",
    "empty view alone": "empty view",
}
LAB_RUNS = {
    "joint, B = 8": "joint",
    "joint, B = 12 (tokens of the mixture)": "joint, 12 quads: the mixture's tokens",
    "joint, B = 128 (little noise)": "joint, 128 quads: little noise",
    "joint + 0.3 beta KL": "joint + 0.3 beta KL",
    "joint + 1 beta KL": "joint + 1 beta KL",
    "joint + 1 beta NLL": "joint + 1 beta NLL",
    "mixed, alpha = 0.5": "mixed, alpha 0.5",
    "mixed, alpha = 0.5, + 1 beta KL": "mixed, alpha 0.5, + 1 beta KL",
    "empty view": "empty view",
}


def lab_rows(title: str) -> dict[str, dict[str, Any]]:
    """A table of ``bvpo lab`` by its title: first cell -> column -> cell."""
    (found,) = [some for some in newest("lab")["findings"]["tables"] if some["title"] == title]
    return {row[0]: dict(zip(found["header"], row, strict=True)) for row in found["rows"]}


def lab_estimators(when: str) -> str:
    found = lab_rows(f"Estimators over 7 small transformers, {when}")
    columns = ("MSE", "rescaled", "MSE mixed", "rescaled mixed")
    rows = [[label, *(found[name][column].strip("-") for column in columns)] for name, label in LAB_ESTIMATORS.items()]
    return table(["estimator", "raw", "rescaled", "raw, mixed", "rescaled, mixed"], rows)


def lab_runs() -> str:
    found = lab_rows("What an anchor does over a run")
    minus = lab_rows("The same, minus joint, B = 8 without an anchor")
    rows = []
    for name, label in LAB_RUNS.items():
        row = [label]
        for column in ("Thinking reward", "NoThinking reward"):
            row += [f"{found[name][column]:.3f}", minus.get(name, {}).get(column, "")]
        row += [f"{found[name][column]:.3f}" for column in ("trace KL", "trace KL, other prompts")]
        rows.append([*row, f"{found[name]['|b_t|^2']:.2f}"])
    header = ["method", "Thinking reward", "difference", "NoThinking reward", "difference"]
    return table([*header, "trace KL", "other prompts", "`\\|b_t\\|^2 / \\|mu\\|^2` at the end"], rows)


TABLES: dict[str, Callable[[], str]] = {
    "vignette-headline": partial(vignette, HEADLINE),
    "vignette-methods": partial(vignette, tuple(VIGNETTE)),
    "lab-reference": partial(lab_estimators, "at the reference"),
    "lab-trained": partial(lab_estimators, "after 40 steps"),
    "lab-runs": lab_runs,
    "hard": partial(tournament, "tournament-hard", ESTIMATORS, "estimator"),
    "hard-declared": partial(declared, "tournament-hard"),
    "hard-weights": partial(tournament, "tournament-hard", WEIGHTS, "weight"),
    "fresh": partial(tournament, "tournament-fresh", ESTIMATORS, "estimator"),
    "fresh-declared": partial(declared, "tournament-fresh"),
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
    """The page with every marked table written anew; one whose results are awaited stays as it is."""

    def fill(match: re.Match[str]) -> str:
        try:
            return f"{match[1]}\n{TABLES[match[2]]()}\n{match[3]}"
        except NoResults as missing:
            if missing.kind not in AWAITED:
                raise
            return match[0]

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
    stale = []
    for name in PAGES:
        page = (ROOT / name).read_text(encoding="utf-8")
        if (new := render(page)) != page:
            stale.append(name)
            if "--check" not in sys.argv:
                (ROOT / name).write_text(new, encoding="utf-8")
    if "--check" not in sys.argv:
        draw_growth()
    elif stale:
        raise SystemExit(f"{', '.join(stale)}: not what benchmarks/results says; run python benchmarks/tables.py")


if __name__ == "__main__":
    main()
