"""From one config to the jobs of a comparison, its tuning grid and its stamps."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bvpo.config import EvaluateConfig, ExperimentConfig, load_config
from bvpo.experiment import begin_stage, finish_stage
from bvpo.runs.cost import bounds
from bvpo.runs.plan import grid_cells, nested, plan
from bvpo.runs.stamps import Stamps
from bvpo.runs.tuning import Cell, at_edges, choose, finalists, kept_tuned, plan_tuning, read_tuned, tuned_toml
from bvpo.strict import UserError

TOML = """
name = "cmp"
root = "{root}/experiments"
seed = 3
[model]
path = "m"
[prompts]
sources = ["p.jsonl"]
[train.loss]
beta = 0.3
[evaluate.benchmarks.chat]
source = "split:test"
metric = "reward"
[run]
seeds = [1, 2]
{run}
"""
METHODS = """
[run.methods.base.evaluate]
model = "base"
[run.methods.dpo]
data.views = ["trace"]
train.alpha.value = 1.0
[run.methods.mix]
train.alpha.value = 0.25
"""
TUNE = """
[run.tune]
seeds = [8, 9]
objective = ["chat/thinking/reward"]
file = "{root}/tuned.toml"
settings.prompts.count = 5
same = {{ mix = "dpo" }}
[run.tune.grid]
"train.learning_rate" = [1e-4, 1e-3]
"train.loss.beta+train.warmup_ratio" = [0.1, 0.5]
"""


def config(tmp_path: Path, run: str = METHODS, *flags: str) -> ExperimentConfig:
    path = tmp_path / "c.toml"
    path.write_text(
        TOML.format(root=tmp_path, run=run.replace("{{", "{").replace("}}", "}").replace("{root}", str(tmp_path)))
    )
    return load_config(path, flags)


def test_a_comparison_is_ordinary_experiments(tmp_path: Path) -> None:
    """Mutation: methods that share a folder, a method that forgets its settings, a base that is trained."""
    jobs = {job.name: job for job in plan(config(tmp_path))}
    assert list(jobs) == [f"seed-{seed}/{name}" for seed in (1, 2) for name in ("data", "base", "dpo", "mix")]
    assert jobs["seed-2/data"].verbs == ("prompts", "sample", "score", "pair")
    assert jobs["seed-2/base"].verbs == ("evaluate",)
    assert jobs["seed-2/mix"].verbs == ("train", "evaluate")
    mix = jobs["seed-2/mix"].config
    assert (mix.train.alpha.value, mix.train.loss.beta, mix.seed) == (0.25, 0.3, 2)
    top = tmp_path / "experiments" / "cmp"
    assert mix.data.quads == str(top / "seed-2" / "data" / "quads.jsonl")
    assert jobs["seed-2/mix"].folder == top / "seed-2" / "mix"
    assert jobs["seed-2/mix"].after == ("seed-2/data",)
    assert not mix.run.methods, "an ordinary experiment does not know of the comparison"
    assert mix.train.reference_cache == jobs["seed-2/dpo"].config.train.reference_cache != ""


def test_without_methods_the_chain_is_the_job(tmp_path: Path) -> None:
    """Mutation: a chain that works in another folder."""
    (job,) = plan(config(tmp_path, ""))
    assert job.folder == tmp_path / "experiments" / "cmp"
    assert job.verbs == ("prompts", "sample", "score", "pair", "train", "evaluate")
    (job,) = plan(replace(config(tmp_path, ""), evaluate=EvaluateConfig()))
    assert job.verbs[-1] == "train", "nothing to evaluate on"


@pytest.mark.parametrize(
    ("run", "message"),
    [
        ('stages = ["sample", "prompts"]', "in the order of the work"),
        ('stages = ["smaple"]', "did you mean 'sample'"),
        ('baseline = "dpoo"' + METHODS, "did you mean 'dpo'"),
        ("[run.methods.a.train.loss]\nbeat = 1.0", "run.methods.a: unknown field 'train.loss.beat'; did you mean"),
        ("[run.methods.a.train.loss]\nbeta = -1.0", "run.methods.a: field 'train.loss.beta': got -1.0"),
        ("[run.methods.data.train.loss]\nbeta = 1.0", "taken by the folder"),
        (METHODS + TUNE.replace("[8, 9]", "[2]"), "2 is also a seed of the comparison"),
        (METHODS + TUNE.replace('"dpo" }', '"dpx" }'), "did you mean 'dpo'"),
    ],
)  # fmt: skip
def test_mistakes_are_found_before_any_work(tmp_path: Path, run: str, message: str) -> None:
    """Mutation: a check that is left to the stage, hours later."""
    with pytest.raises(UserError) as error:
        plan(config(tmp_path, run))
    assert message in str(error.value)


def test_tuning_has_its_own_seeds_prompts_and_folders(tmp_path: Path) -> None:
    """Mutation: tuning on the comparison's prompts, or in its folders."""
    jobs, cells = plan_tuning(config(tmp_path, METHODS + TUNE))
    assert all("tuning/seed-" in str(job.folder) for job in jobs)
    assert {job.config.prompts.count for job in jobs} == {5}
    assert {job.config.seed for job in jobs} == {8, 9}
    assert [cell.method for cell in cells] == ["dpo"] * 4, "base is not trained, mix takes dpo's"
    assert cells[1].settings == {"train.learning_rate": 1e-4, "train.loss.beta": 0.5, "train.warmup_ratio": 0.5}
    assert len({folder for cell in cells for folder in cell.folders}) == 8


def evaluated(folder: Path, value: float) -> Path:
    """A folder that says it was evaluated, with this reward, where its config says. Mutation: `eval` whatever that is."""
    place = folder / "eval_long" / "chat"
    place.mkdir(parents=True)
    (folder / "config.toml").write_text('[evaluate]\nfolder = "eval_long"\n')
    (place / "thinking.json").write_text(json.dumps({"metrics": {"reward": {"estimate": {"value": value}}}}))
    return folder


def cells_of(tmp_path: Path, *scores: tuple[float, ...]) -> list[Cell]:
    """One cell for each group of scores, one folder for each score."""
    return [
        Cell(
            method="dpo",
            number=number,
            settings={"train.learning_rate": 10.0**-number},
            folders=tuple(evaluated(tmp_path / f"{number}-{seed}", value) for seed, value in enumerate(values)),
        )
        for number, values in enumerate(scores)
    ]


def test_the_best_cell_is_written_and_read_again(tmp_path: Path) -> None:
    """Mutation: the smallest mean, a tie to the later cell, or `same` that is forgotten."""
    own = config(tmp_path, METHODS + TUNE)
    best, log = choose(cells_of(tmp_path, (1.0, 2.0), (3.0, 1.0), (2.0, 2.0)), own.run.tune.objective)
    assert best == {"dpo": {"train.learning_rate": 0.1}}
    assert [row["mean"] for row in log] == [1.5, 2.0, 2.0]
    (tmp_path / "tuned.toml").write_text(tuned_toml(own, best))
    assert read_tuned(own) == {"dpo": {"train.learning_rate": 0.1}, "mix": {"train.learning_rate": 0.1}}
    jobs = {job.name: job for job in plan(own, read_tuned(own))}
    assert jobs["seed-1/mix"].config.train.learning_rate == 0.1
    assert jobs["seed-1/mix"].config.train.alpha.value == 0.25


def test_the_best_cells_run_again_on_further_seeds(tmp_path: Path) -> None:
    """Mutation: the first or the final seeds alone decide, a cell that did not run on all wins, or all cells run on them."""
    further = "seeds = [8, 9]\nfinal_seeds = [7]\nfinalists = 3"
    own = config(tmp_path, METHODS + TUNE.replace("seeds = [8, 9]", further))
    cells = cells_of(tmp_path, (0.0, 0.0), (4.0, 4.0), (3.0, 3.0), (1.0, 1.0))
    last = finalists(cells, own.run.tune.objective, own.run.tune.finalists)
    assert [cell.number for cell in last] == [1, 2, 3]
    jobs, finals = plan_tuning(own, last)
    assert [job.name for job in jobs] == ["seed-7/data", "seed-7/dpo.1", "seed-7/dpo.2", "seed-7/dpo.3"]
    assert [len(cell.folders) for cell in finals] == [3, 3, 3]
    for cell, value in zip(finals, (0.0, 3.0, 5.0), strict=True):
        evaluated(cell.folders[-1], value)
    best, log = choose(cells, own.run.tune.objective, finals)
    assert best == {"dpo": cells[2].settings}, "9 / 3, against 8 / 3 and 7 / 3"
    assert [row["mean"] for row in log] == pytest.approx([0.0, 8 / 3, 3.0, 7 / 3])
    assert [row["scores"] for row in log] == [[0.0, 0.0], [4.0, 4.0, 0.0], [3.0, 3.0, 3.0], [1.0, 1.0, 5.0]]
    assert [row["final"] for row in log] == [False, True, True, True]
    assert "8, 9, and 7 for the best 3" in tuned_toml(own, best)
    for seeds, said in (("[9]", "9 is also a seed"), ("[7, 7]", "expected each seed once")):
        wrong = METHODS + TUNE.replace("seeds = [8, 9]", f"seeds = [8, 9]\nfinal_seeds = {seeds}")
        with pytest.raises(UserError, match=f"run.tune.final_seeds: .*{said}"):
            plan(config(tmp_path, wrong))


def test_an_experiment_keeps_the_values_it_ran_with(tmp_path: Path) -> None:
    """Mutation: the report reads run.tune.file, which a later tuning replaces."""
    values = {"dpo": {"train.loss.beta": 1.0}}
    assert kept_tuned(tmp_path) == {}
    (tmp_path / "tuned.json").write_text(json.dumps(values))
    assert kept_tuned(tmp_path) == values
    (tmp_path / "tuned.json").write_text("[1]")
    with pytest.raises(UserError, match=r"tuned\.json"):
        kept_tuned(tmp_path)


def test_a_missing_file_of_tuned_values_is_told(tmp_path: Path) -> None:
    """Mutation: an error that names neither the setting nor the way to make the file."""
    with pytest.raises(
        UserError, match=r"run\.tune\.file: .*tuned\.toml is not there; `bvpo run CONFIG --tune` writes it"
    ):
        read_tuned(config(tmp_path, METHODS + TUNE))


def test_values_of_another_experiment_may_be_read(tmp_path: Path) -> None:
    """Mutation: a method of the file that is not run here refused, or a file about none of ours accepted."""
    own = config(tmp_path, METHODS + TUNE)
    (tmp_path / "tuned.toml").write_text('[other]\n"train.loss.beta" = 2.0\n[dpo]\n"train.loss.beta" = 1.0\n')
    assert read_tuned(own) == {"dpo": {"train.loss.beta": 1.0}, "mix": {"train.loss.beta": 1.0}}
    (tmp_path / "tuned.toml").write_text('[other]\n"train.loss.beta" = 2.0\n')
    with pytest.raises(UserError, match=r"none of its methods \(other\)"):
        read_tuned(own)


def test_values_at_an_end_of_the_grid_are_named(tmp_path: Path) -> None:
    """Mutation: a value in the middle that is named, or a single value."""
    own = config(tmp_path, METHODS + TUNE.replace("[1e-4, 1e-3]", "[1e-4, 1e-3, 1e-2]").replace("[0.1, 0.5]", "[0.1]"))
    assert at_edges(own, {"dpo": {"train.learning_rate": 1e-2, "train.loss.beta": 0.1}}) == [
        "dpo: train.learning_rate = 0.01"
    ]
    assert at_edges(own, {"dpo": {"train.learning_rate": 1e-3, "train.loss.beta": 0.1}}) == []


def test_wrong_settings_are_told_where_they_are_written(tmp_path: Path) -> None:
    """Mutation: a grid or a file of tuned values whose mistakes are said to be in run.methods."""
    grid = TUNE.replace('"train.learning_rate"', '"train.learningrate"')
    with pytest.raises(UserError, match=r"^run\.tune\.grid, for dpo: .*'train\.learningrate'"):
        plan_tuning(config(tmp_path, METHODS + grid))
    own = grid.replace("[run.tune.grid]", "[run.tune.grids.dpo]") + '[run.tune.grid]\n"train.loss.beta" = [0.1]\n'
    with pytest.raises(UserError, match=r"^run\.tune\.grids\.dpo, for dpo: .*'train\.learningrate'"):
        plan_tuning(config(tmp_path, METHODS + own.replace('same = {{ mix = "dpo" }}', "")))
    with pytest.raises(UserError, match=r"^run\.tune\.file, for mix: field 'train\.loss\.beta': got -1"):
        plan(config(tmp_path, METHODS + TUNE), {"mix": {"train.loss.beta": -1.0}})
    with pytest.raises(UserError, match=r"^run\.methods\.dpo: "):
        plan(config(tmp_path, METHODS.replace("train.alpha.value = 1.0", "train.alpha.value = 2.0")))


def test_grid_values_are_lists(tmp_path: Path) -> None:
    """Mutation: a single value read as the letters of a word."""
    own = config(tmp_path, METHODS + TUNE.replace("[0.1, 0.5]", '"ab"'))
    with pytest.raises(UserError, match="expected a list of values"):
        grid_cells(own, "dpo")


def test_dotted_settings_become_tables() -> None:
    """Mutation: the later of two settings of one section replaces the section."""
    assert nested({"a.b": 1, "a.c.d": 2}) == {"a": {"b": 1, "c": {"d": 2}}}


def test_stamps_know_what_is_done(tmp_path: Path) -> None:
    """Mutation: a stage counts as done under other settings, for another model, or before its manifest says so."""
    own = config(tmp_path, "", "--model.path", str(tmp_path / "m"))
    (tmp_path / "m").mkdir()
    weights = tmp_path / "m" / "model.safetensors"
    weights.write_bytes(b"one")
    folder = tmp_path / "experiments" / "cmp"
    begin_stage(folder, "pair", config={})
    stamps = Stamps(own)
    stamps.mark("pair")
    assert not stamps.is_done("pair"), "begun is not finished"
    finish_stage(folder, "pair", counts={})
    assert stamps.is_done("pair")
    assert not stamps.is_done("train")
    assert not Stamps(own, limit=3).is_done("pair")
    other = config(tmp_path, "", "--model.path", str(tmp_path / "m"), "--pair.min_margin", "1.0")
    assert not Stamps(other).is_done("pair")
    weights.write_bytes(b"two")
    assert not Stamps(own).is_done("pair")


def test_every_shipped_comparison_is_a_plan() -> None:
    """Mutation: an experiment file with a method that its own checks refuse."""
    files = sorted(Path("experiments").glob("*.toml"))
    found: dict[str, Any] = {}
    for file in files:
        if not file.name.endswith(".tuned.toml"):
            own = load_config(file)
            found[file.stem] = plan(own, read_tuned(own))
    assert "vignette" in found
    names = {job.name for job in found["vignette"]}
    assert {"model", "seed-1/data", "seed-5/bvpo-50-anchor"} <= names


def test_bounds_of_a_run(tmp_path: Path) -> None:
    """Mutation: one view, one seed, or the untrained method counted as training."""
    (tmp_path / "p.jsonl").write_text("{}\n" * 40)
    own = config(tmp_path, METHODS, "--prompts.sources", str(tmp_path / "p.jsonl"), "--train.quads_per_step", "16")
    found = bounds(own)
    assert (found.seeds, found.trained_methods, found.evaluated_methods) == (2, 2, 3)
    assert found.samples == 2 * 40 * 2 * 5
    assert found.steps_per_method == 3
    assert found.evaluation_samples == 2 * 3 * 40 * 2
    assert bounds(own, limit=7).samples == 2 * 7 * 2 * 5
    assert bounds(config(tmp_path, METHODS, "--prompts.sources", "org/set")).samples is None
    assert any(
        "not known" in line for line in bounds(config(tmp_path, METHODS, "--prompts.sources", "org/set")).lines()
    )
