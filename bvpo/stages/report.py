"""``bvpo report EXPERIMENT``: ``results.json`` and ``report.html`` from what a run left in its folders.

Reads evaluations, metrics and manifests; writes the two files into the experiment's folder and prints the headline table.
The same folders give the same files. It runs nothing and changes nothing else; run again at any time, also half-way.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bvpo.command import ReaderParser, parse_reader, whole_number
from bvpo.config import ExperimentConfig, load_config
from bvpo.evaluation.results import Results
from bvpo.experiment import Experiment, write_atomically
from bvpo.report.pages import render_page
from bvpo.report.results import best_method, page_values, text_table
from bvpo.runs.gather import conversations, gather
from bvpo.strict import UserError, to_dict

logger = logging.getLogger(__name__)

ABOUT = "Write results.json and report.html from an experiment's evaluations, and print the headline table."


def main(argv: Sequence[str]) -> int | None:
    parser = ReaderParser("report", ABOUT)
    parser.add_argument(
        "--transcripts", type=whole_number(0), default=4, metavar="N",
        help="prompts of each benchmark whose answers are shown side by side (default 4)",
    )  # fmt: skip
    folder, options = parse_reader(parser, argv)
    experiment = Experiment(folder)
    config = _config(experiment)
    results = gather(config, command=f"bvpo run {_relative(experiment.config_file)}")
    write_atomically(experiment.results, json.dumps(to_dict(results), indent=1, ensure_ascii=False) + "\n")
    write_atomically(experiment.page, page(config, results, options.transcripts))
    sys.stdout.write(text_table(results))
    logger.info("results      %s", experiment.results)
    logger.info("report       %s", experiment.page)
    return None


def page(config: ExperimentConfig, results: Results, num_prompts: int) -> str:
    """The report as one self-contained page."""
    untrained = [row.name for row in results.methods if not row.trained]
    shown = [*untrained[:1], results.baseline, best_method(results)]
    talks = list(conversations(config, list(dict.fromkeys(shown)), num_prompts)) if num_prompts else []
    return render_page("results.html", **page_values(config, results), talks=talks)


def _config(experiment: Experiment) -> ExperimentConfig:
    path, folder = experiment.config_file, experiment.folder
    if not path.is_file():
        raise UserError(f"{path}: no such file; is {folder} an experiment's folder?")
    # The folder that is named is the one that is read, also when it was copied or renamed since.
    return dataclasses.replace(load_config(path), root=str(folder.parent), name=folder.resolve().name)


def _relative(path: Path) -> Any:
    try:
        return path.resolve().relative_to(Path.cwd())
    except ValueError:
        return path
