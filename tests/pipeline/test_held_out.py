"""What a trained model says of held-out pairs: the margins of the loss, one line per pair, and nothing done twice."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from look_fixtures import Experiment, questions, save_talking_model
from training_fixtures import make_trainer, random_quads, tiny_causal_lm, write_tokens

from bvpo.cli import main
from bvpo.config import DataConfig
from bvpo.training.data import load_quads
from bvpo.training.trainer import BVPOTrainer

pytestmark = pytest.mark.filterwarnings("ignore")

HELD_OUT = random_quads(7, seed=12, ragged_views=True, tails=True)
SEED = 42  # a config's default
TRAIN = """
[pair]
export = false
[data]
eval_fraction = 0.4
[train]
quads_per_step = 3
epochs = 2
learning_rate = 1e-3
save = "steps"
save_steps = 1
logging_steps = 1
"""


@pytest.mark.parametrize(
    "settings", [{"loss": "dpo", "beta": 0.3}, {"loss": "simpo", "gamma": 0.5, "backward": "sequence"}]
)
def test_margins_are_those_of_the_loss(tmp_path: Path, settings: dict[str, Any]) -> None:
    """Their mean is what evaluation logs, which takes all pairs of a micro-batch together; without an evaluation during
    training, too. Mutations: rewards without the reference, or the reference of the trained weights; views swapped; the
    order of the epoch in place of the order of the quads."""
    model = tiny_causal_lm("qwen2", seed=2, dtype=torch.float32)
    quads = random_quads(9, seed=11, tails=True)
    held_out = write_tokens(tmp_path / "eval", HELD_OUT)
    run = make_trainer(tmp_path, model, quads, learning_rate=1e-3, quads_per_step=3, eval_dataset=held_out, **settings)
    before = run.held_out_margins()
    assert [set(entry) for entry in before] == [_views(quad) for quad in HELD_OUT]
    if settings["loss"] == "dpo":
        assert all(abs(margin) < 1e-5 for entry in before for margin in entry.values()), "policy and reference are one"
    run.train()
    assert run.model.training, "the pass leaves the model as it was"
    after = run.held_out_margins()
    logged = run.evaluate()
    for view in ("trace", "empty"):
        found = [entry[view] for entry in after if view in entry]
        assert len(found) == logged[f"eval_{view}/pairs"]
        assert sum(found) / len(found) == pytest.approx(logged[f"eval_{view}/rewards/margins"], abs=1e-5)
        assert max(map(abs, found)) > 0.01
    alone = make_trainer(
        tmp_path / "alone", model, quads, eval_dataset=write_tokens(tmp_path / "one", HELD_OUT[3:4]), **settings
    )
    if settings["loss"] == "simpo":  # which has no reference that would have moved
        assert alone.held_out_margins()[0] == pytest.approx(after[3], abs=1e-6)


def _views(quad: Any) -> set[str]:
    return {view for view, there in zip(("trace", "empty"), quad.has_view, strict=True) if there}


@pytest.fixture(scope="module")
def paired(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an experiment that has pairs."""
    root = tmp_path_factory.mktemp("held-out")
    save_talking_model(root / "model")
    Experiment(root, questions(14), TRAIN).make("prompts", "sample", "score", "pair")
    return root


def test_the_stage_writes_them_once(paired: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One line per held-out pair, in the order of the quads, with the scorer's margin; an interrupted run that is resumed
    leaves the same bytes, and a finished run that is run again runs no model over them. Mutations: training pairs among
    them; lines of an earlier step kept; the pass repeated."""
    folder = paired / "experiments" / "mine"
    config = [str(paired / "mine.toml"), "--root", str(paired / "whole")]
    for root in ("whole", "again"):
        (paired / root / "mine").mkdir(parents=True)
        (paired / root / "mine" / "quads.jsonl").write_bytes((folder / "quads.jsonl").read_bytes())
    assert main(["train", *config]) == 0
    path = paired / "whole" / "mine" / "train" / "held_out.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(one["id"], one["view"], one["score_margin"]) for one in lines] == _expected(folder / "quads.jsonl")
    assert all(one["score_margin"] > 0 and abs(one["margin"]) > 0 for one in lines)

    step, taken = BVPOTrainer.training_step, []

    def interrupted(self: Any, *args: Any, **kwargs: Any) -> Any:
        taken.append(1)
        if len(taken) == 3:
            raise KeyboardInterrupt
        return step(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(BVPOTrainer, "training_step", interrupted)
        assert main(["train", config[0], "--root", str(paired / "again")]) == 130
    other = paired / "again" / "mine" / "train" / "held_out.jsonl"
    assert not other.exists()
    assert main(["train", config[0], "--root", str(paired / "again")]) == 0
    assert other.read_bytes() == path.read_bytes()

    with monkeypatch.context() as patch:
        patch.setattr(BVPOTrainer, "held_out_margins", lambda self: pytest.fail("computed again"))
        assert main(["train", *config]) == 0
    assert other.read_bytes() == path.read_bytes()


def _expected(quads: Path) -> list[tuple[str, str, float]]:
    """(id, view, score margin) of the pairs that the config holds out."""
    data = DataConfig(quads=str(quads), eval_fraction=0.4)
    sets = load_quads(data, None, seed=SEED)  # type: ignore[arg-type]  # the quads hold tokens, so no format is read
    assert sets.eval is not None
    found = []
    for quad in sets.eval:
        for pair in (quad.trace, quad.empty):
            if pair is not None:
                assert pair.chosen.score is not None and pair.rejected.score is not None
                found.append((quad.id, pair.view, pair.chosen.score - pair.rejected.score))
    assert len(found) >= 4
    return found


def test_a_share_of_few_prompts_may_be_none(paired: Path) -> None:
    """A fraction that holds out no prompt of a small sample trains all the same, without the file. Mutation: a first look at
    a few prompts that stops because nothing is held out."""
    (paired / "few" / "mine").mkdir(parents=True)
    quads = (paired / "experiments" / "mine" / "quads.jsonl").read_bytes()
    (paired / "few" / "mine" / "quads.jsonl").write_bytes(quads)
    flags = ("--root", str(paired / "few"), "--data.eval_fraction", "1e-9", "--train.epochs", "1")
    assert main(["train", str(paired / "mine.toml"), *flags]) == 0
    train = paired / "few" / "mine" / "train"
    assert (train / "final").is_dir() and not (train / "held_out.jsonl").exists()
    assert json.loads((train / "summary.json").read_text())["held_out"] is None
