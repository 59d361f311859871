"""``bvpo lab``: checks the theory on models whose every trace is enumerated, and shows what the exact numbers say.

Takes no config: the worlds are its own (:mod:`bvpo.lab`). Prints a table of verdicts and writes ``lab.json`` and a
self-contained ``lab.html`` into a folder. One core, float64, the same seed gives the same files. Exit code 1 if a statement
does not hold. It trains and changes nothing else.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, NoReturn

import torch

from bvpo import __version__
from bvpo.command import whole_number
from bvpo.experiment import write_atomically
from bvpo.files import make_folder
from bvpo.lab.experiment import PARTS, run_lab
from bvpo.lab.results import Cell, LabReport, Plot, Verdict
from bvpo.report.charts import Chart, Curve, curve_chart
from bvpo.report.pages import render_page
from bvpo.strict import UserError

logger = logging.getLogger(__name__)

ABOUT = "Check the theory behind alpha on models whose every trace is enumerated. Writes lab.json and lab.html."
DEFINITIONS = (
    "g_t and g_e are the gradients of the trace view's and of the empty view's loss on one optimizer step, g_c = alpha g_t "
    "+ (1 - alpha) g_e, and mu is the gradient of the marginal loss, on log pi(y | x) = log sum over traces of "
    "pi(trace, y | x).",
    "b_t and b_e are the biases E g_t - mu and E g_e - mu; S_t, S_e and S_te the covariances, quoted by their traces. B is "
    "the number of quads in a step, which divides the covariances.",
    "alpha* is the alpha in [0, 1] that makes E|g_c - mu|^2 smallest. The per-step term is |Bias|^2 + eta L Var, eta the "
    "learning rate and L the smoothness of the marginal loss.",
    "Rescaled: the smallest E|c g - mu|^2 over all factors c, which is what remains once the learning rate is tuned.",
)
_ZERO = 1e-15  # below it, a table shows rounding


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{self.prog}: {message}; see {self.prog} --help")


def main(argv: Sequence[str]) -> int:
    parser = _Parser(prog="bvpo lab", description=ABOUT, allow_abbrev=False)
    parser.add_argument("--out", type=Path, default=Path("experiments/lab"), metavar="FOLDER", help="where to write")
    parser.add_argument("--seed", type=whole_number(0), default=0, metavar="N", help="seed of the worlds (default 0)")
    parser.add_argument("--quick", action="store_true", help="smaller worlds and fewer steps, for a first look")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    options = parser.parse_args(argv)
    make_folder(options.out)
    with one_thread():
        report = run_lab(options.seed, quick=options.quick, begin=_say)
    sys.stdout.write(verdict_table(report))
    write(options.out, report)
    logger.info("written to %s and lab.html", options.out / "lab.json")
    return 0 if report.holds else 1


def _say(part: str) -> None:
    logger.info("lab: %d of %d, %s", list(PARTS).index(part) + 1, len(PARTS), part)


@contextmanager
def one_thread() -> Iterator[None]:
    """Sums of many threads would round differently from machine to machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def write(folder: Path, report: LabReport) -> None:
    """``lab.json`` with every number, and the page."""
    values = {"bvpo": __version__, "torch": torch.__version__, "holds": report.holds, **asdict(report)}
    for verdict, record in zip(report.findings.verdicts, values["findings"]["verdicts"], strict=True):
        record["holds"] = verdict.holds
    text = json.dumps(values, indent=1, ensure_ascii=False) + "\n"
    write_atomically(folder / "lab.json", text)
    write_atomically(folder / "lab.html", page(report))


def page(report: LabReport) -> str:
    tables = (report.worlds, *report.findings.tables)
    return render_page(
        "lab.html",
        facts=_facts(report),
        verdicts=[
            {
                "statement": v.statement,
                "checked": v.checked,
                "value": number(v.value),
                "bound": f"{v.relation} {number(v.bound)}",
                "holds": v.holds,
            }
            for v in report.findings.verdicts
        ],
        charts=[_chart(place, plot) for place, plot in enumerate(report.findings.plots)],
        tables=[
            {"title": t.title, "note": t.note, "header": t.header, "rows": [[cell(c) for c in row] for row in t.rows]}
            for t in tables
        ],
        definitions=DEFINITIONS,
    )


def _facts(report: LabReport) -> list[tuple[str, str]]:
    holding = sum(v.holds for v in report.findings.verdicts)
    size = "quick: smaller worlds, fewer steps" if report.quick else "full"
    return [
        ("verdicts", f"{holding} of {len(report.findings.verdicts)} hold"),
        ("run", f"seed {report.seed}, {size}"),
        ("versions", f"bvpo {__version__}, torch {torch.__version__}"),
    ]


def _chart(place: int, plot: Plot) -> Chart:
    curves = [Curve(label=line.label, x=line.x, y=line.y, mark=line.mark) for line in plot.lines]
    svg = curve_chart(
        curves, x_label=plot.x_label, y_label=plot.y_label, log=plot.log_x, log_y=plot.log_y, salt=f"lab{place}"
    )
    grid = sorted({x for line in plot.lines for x in line.x})
    step = max(1, len(grid) // 20)  # the file has all points
    rows = [(cell(float(x)), *_at(plot, x)) for x in grid[::step]]
    marks = [cell(line.mark[0]) if line.mark else "" for line in plot.lines]
    if any(marks):
        rows.append(("marked at", *marks))
    return Chart(
        title=plot.title,
        caption=plot.caption,
        svg=svg,
        header=(plot.x_label, *(line.label for line in plot.lines)),
        rows=tuple(rows),
    )


def _at(plot: Plot, x: float) -> Iterator[str]:
    for line in plot.lines:
        yield cell(line.y[line.x.index(x)]) if x in line.x else ""


def number(value: float) -> str:
    return f"{value:.3g}"


def cell(value: Cell) -> str:
    """Of a table, where what is only rounding reads 0."""
    if isinstance(value, float):
        return "0" if abs(value) < _ZERO else f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return str(value)


def verdict_table(report: LabReport) -> str:
    """As plain text: statement, what was checked, number, bound, verdict."""
    lines = [f"{'statement':<18} {'what was checked':<74} {'number':>9} {'bound':>10} verdict"]
    for verdict in report.findings.verdicts:
        lines += _verdict_lines(verdict)
    holding = sum(v.holds for v in report.findings.verdicts)
    lines += ["", f"{holding} of {len(report.findings.verdicts)} checks hold"]
    return "\n".join(lines) + "\n"


def _verdict_lines(verdict: Verdict) -> Iterator[str]:
    first, *rest = textwrap.wrap(verdict.checked, 74)
    bound = f"{verdict.relation} {number(verdict.bound)}"
    outcome: Any = "holds" if verdict.holds else "FAILS"
    yield f"{verdict.statement:<18} {first:<74} {number(verdict.value):>9} {bound:>10} {outcome}"
    for line in rest:
        yield f"{'':<18} {line}"
