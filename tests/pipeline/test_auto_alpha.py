"""``alpha = "auto"`` through the real loop: it uses what it estimates, resumes bit for bit, agrees over ranks, and is
refused where its rule does not hold. ``bvpo analyze --gradients`` and the stage's warning are here too."""

from __future__ import annotations

import itertools
import json
import os
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from training_fixtures import make_trainer, random_quads, step_gradients, tiny_causal_lm, use_exact_norms
from transformers import AutoModelForCausalLM, AutoTokenizer

from bvpo.cli import main
from bvpo.experiment.manifest import begin_stage
from bvpo.method.online_alpha import OnlineAlpha
from bvpo.strict import UserError
from bvpo.training.probe.sketching import CountSketch

pytestmark = pytest.mark.filterwarnings("ignore")

WORKER = Path(__file__).with_name("telemetry_worker.py")
QUADS = random_quads(16, seed=11, ragged_views=False)
SETTINGS: dict[str, Any] = {
    "beta": 0.3, "learning_rate": 2e-5, "quads_per_step": 4, "max_steps": 24, "logging_steps": 1,
    "save_strategy": "steps", "save_steps": 6, "alpha_schedule": "auto", "alpha": 0.7, "alpha_every": 1,
}  # fmt: skip


def auto(folder: Path, **settings: Any) -> Any:
    model = tiny_causal_lm("qwen2", seed=2, dtype=torch.float32)
    return make_trainer(folder, model, QUADS, **(SETTINGS | settings))


def entries(run: Any) -> list[dict[str, Any]]:
    return [entry for entry in run.state.log_history if "loss" in entry]


def same_numbers(one: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in one.items() if "per_second" not in name}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Any:
    run = auto(tmp_path_factory.mktemp("whole"))
    run.train()
    return run


def test_the_estimate_is_used_once_it_has_seen_enough(whole: Any) -> None:
    """4 quads a look: 64 after 16 looks. Mutations: the estimate is logged and not used; the look of a step weighs that very
    step; metrics.jsonl without the ingredients."""
    logged = entries(whole)
    assert [entry["alpha"] for entry in logged[:16]] == [0.7] * 16
    for before, entry in itertools.pairwise(logged[15:]):
        assert entry["alpha"] == before["alpha_hat"] != 0.7
    lines = [json.loads(line) for line in (Path(whole.args.output_dir) / "metrics.jsonl").read_text().splitlines()]
    names = {
        "alpha_hat",
        "noise/trace",
        "noise/empty",
        "noise/covariance",
        "noise/distance",
        "noise/drift",
        "noise/quads",
    }
    assert names <= set(lines[0]) and lines[0]["noise/quads"] == 4
    follow = OnlineAlpha(0.7, beta=0.3)
    for line in lines[:24]:
        follow.observe(line)
    assert follow.estimate == pytest.approx(logged[-1]["alpha_hat"]), "the log does not hold all ingredients"


def test_interrupted_and_resumed_equals_uninterrupted(whole: Any, tmp_path: Path) -> None:
    """Stopped while alpha is estimated: the same bits. Mutations: the estimate starts anew; a sum left out of its state."""
    from transformers import TrainerCallback

    class Stop(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            control.should_training_stop = state.global_step == 18

    auto(tmp_path, callbacks=[Stop()]).train()
    resumed = auto(tmp_path)
    resumed.train(resume_from_checkpoint=True)
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name]), name
    assert [same_numbers(e) for e in entries(whole)] == [same_numbers(e) for e in entries(resumed)]
    assert {e["alpha"] for e in entries(resumed)[18:]} != {0.7}


def test_other_looks_are_another_run(tmp_path: Path) -> None:
    """They decide alpha; without ``auto`` they decide nothing. Mutations: either way round."""
    auto(tmp_path / "a", max_steps=1, save_steps=1).train()
    with pytest.raises(UserError, match="alpha_every: 1 -> 2"):
        auto(tmp_path / "a", max_steps=1, alpha_every=2).train(resume_from_checkpoint=True)
    constant = {"alpha_schedule": "constant", "alpha_every": None, "max_steps": 1, "save_steps": 1}
    auto(tmp_path / "b", **constant, telemetry_steps=1).train()
    auto(tmp_path / "b", **constant, telemetry_steps=0).train(resume_from_checkpoint=True)


def test_far_from_the_reference_alpha_falls_back(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A learning rate that carries the policy away. Mutations: no fallback; no word; a word at every step."""
    monkeypatch.setattr("bvpo.method.online_alpha.LEAST_QUADS", 8)
    run = auto(tmp_path, learning_rate=0.003, max_steps=12, save_strategy="no")
    run.train()
    logged = entries(run)
    assert any(entry["alpha"] != 0.7 for entry in logged), "never trusted to begin with"
    assert logged[-1]["noise/drift"] > 1.0 and logged[-1]["alpha"] == 0.7 != logged[-1]["alpha_hat"]
    said = [r.message for r in caplog.records if "left the reference's neighbourhood" in r.message]
    assert len(said) == 1 and "alpha is 0.7" in said[0]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"loss": "simpo"}, "'simpo' is biased"),
        ({"loss": "ipo"}, "'ipo' is biased"),
        ({"loss": "rdpo", "length_weight": 0.1}, "'rdpo' is biased"),
        ({"trace_estimator": "answer"}, "'answer' leaves the trace's own gradient out"),
        ({"alpha_every": None, "telemetry_steps": 0}, "needs looks"),
        ({"alpha_end": 0.2}, "'auto' never reads it"),
        ({"alpha_schedule": "constant"}, "'constant' never reads it"),
    ],
)
def test_auto_is_refused_where_its_rule_does_not_hold(tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    """Mutation: any of these accepted."""
    with pytest.raises(UserError, match=message) as error:
        auto(tmp_path, **settings)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("loss", ["hinge", "robust"])
def test_auto_takes_the_other_unbiased_losses(tmp_path: Path, loss: str) -> None:
    """Mutation: a list of names in place of the registry's flag."""
    run = auto(tmp_path, loss=loss, max_steps=1, save_strategy="no")
    run.train()
    assert "alpha_hat" in entries(run)[0]


def test_a_source_of_ones_own_is_told_every_look(tmp_path: Path) -> None:
    """Mutation: only our own estimate hears of looks."""

    class Mine:
        def __init__(self) -> None:
            self.seen: list[dict[str, float]] = []

        def value(self, progress: float) -> float:
            return 0.25

        def observe(self, ingredients: Any) -> None:
            self.seen.append(dict(ingredients))

    constant = {"alpha_schedule": "constant", "alpha_every": None, "save_strategy": "no"}
    run = auto(tmp_path, alpha_source=(mine := Mine()), telemetry_steps=2, max_steps=4, **constant)
    run.train()
    assert len(mine.seen) == 2 and mine.seen[0]["noise/distance"] == entries(run)[0]["noise/distance"]
    assert {entry["alpha"] for entry in entries(run)} == {0.25}


# --- several processes -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("two")
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(WORKER.parents[2]), "GLOO_SOCKET_IFNAME": "lo"}
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone"]
    command = [sys.executable, *launcher, str(WORKER), str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return torch.load(folder / "results.pt", weights_only=False)


def test_two_ddp_processes_estimate_what_one_does(two_processes: dict[str, Any], tmp_path: Path) -> None:
    """The same quads, the same sketches: the same alpha, and weights. Mutations: each rank its own quads; rows averaged over
    ranks; a look through DDP's own forward, whose next step then fails."""
    from tests.pipeline.telemetry_worker import trained

    one = trained(tmp_path)
    for name, value in one.model.state_dict().items():
        torch.testing.assert_close(two_processes["state"][name], value, rtol=1e-9, atol=1e-10, msg=name)
    logs = entries(one)
    assert {entry["alpha"] for entry in logs[-3:]} != {0.7}, "the estimate was never used"
    for a, b in zip(logs, two_processes["logs"], strict=True):
        for name in ("alpha", "alpha_hat", "noise/trace", "noise/covariance", "noise/distance", "noise/drift"):
            assert a[name] == pytest.approx(b[name], rel=1e-6, abs=1e-9), name


def test_sharded_rows_are_means_over_ranks(two_processes: dict[str, Any], tmp_path: Path) -> None:
    """Each row under FSDP2: the mean gradient of two quads, sketched shard by shard. Mutations: the same signs for different
    shards; ranks' rows averaged; sums in place of means; the reduced gradient of one row left in the next."""
    from tests.pipeline.telemetry_worker import PLAN, WHOLE

    for row in range(PLAN.num_rows):
        pair = [WHOLE[i] for i in PLAN.quads[2 * row : 2 * row + 2]]
        for view, alpha in (("trace", 1.0), ("empty", 0.0)):
            model = use_exact_norms(tiny_causal_lm("qwen2", seed=2))
            settings = {"beta": 0.3, "loss": "simpo", "gamma": 0.5, "alpha": alpha}
            step_gradients(make_trainer(tmp_path / f"{row}{view}", model, pair, **settings))
            expected = torch.zeros(256, dtype=torch.float64)
            for rank in range(2):
                chunks = [p.grad.chunk(2) for p in model.parameters()]
                shards = [c[rank] if rank < len(c) else c[0][:0] for c in chunks]
                expected += CountSketch((5, 6, rank), torch.device("cpu"), torch.float64)(shards)
            np.testing.assert_allclose(two_processes["rows"][view][row], expected, rtol=1e-8, atol=1e-9)


# --- the command line ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model and the quads of the first run."""
    folder = tmp_path_factory.mktemp("first")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        runpy.run_path(str(WORKER.parents[2] / "docs" / "examples" / "first_run.py"), run_name="__main__")
    return folder / "experiments" / "first"


def test_analyze_gradients_answers_the_question(first: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As text and as JSON, of the same quads. Mutations: ``--batch`` ignored; all quads in place of the limit; two answers
    that differ."""
    words = ["analyze", "--gradients", str(first / "model"), str(first / "quads.jsonl"), "--limit", "10"]
    words += ["--batch", "6", "--resamples", "50"]
    assert main(words) == 0
    text = capsys.readouterr().out
    assert main([*words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["noise"]["num_quads"] == found["noise"]["num_prompts"] == 10
    assert [at["quads_per_step"] for at in found["noise"]["batches"]] == [1, 6, 8, 32, 128, 512]
    assert found["answer"].startswith("At 6 quads per step") and found["answer"] in text
    assert found["drift"] == pytest.approx(0, abs=1e-4) and found["doubts"] == []
    alphas = [at["alpha"] for at in found["noise"]["batches"]]
    assert all(0 <= a["low"] <= a["high"] <= 1 for a in alphas)
    assert all(a["value"] <= b["value"] for a, b in itertools.pairwise(alphas)), (
        "less noise, less need of the empty view"
    )


def test_analyze_gradients_says_what_it_doubts(first: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A model far from its reference, on traces sampled at T = 0.8. Mutations: the model taken for its own reference; the
    manifest beside the quads not read."""
    quads = tmp_path / "quads.jsonl"
    quads.write_text((first / "quads.jsonl").read_text(encoding="utf-8"), encoding="utf-8")
    begin_stage(tmp_path, "sample", config={"sample": {"temperature": 0.8, "top_p": 1.0}})
    torch.manual_seed(1)
    other = AutoModelForCausalLM.from_pretrained(first / "model")
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    other.save_pretrained(tmp_path / "moved")
    AutoTokenizer.from_pretrained(first / "model").save_pretrained(tmp_path / "moved")
    words = ["analyze", "--gradients", str(tmp_path / "moved"), str(quads), "--reference", str(first / "model")]
    assert main([*words, "--limit", "4", "--resamples", "20", "--json"]) == 0
    far, warm = sorted(json.loads(capsys.readouterr().out)["doubts"], key=lambda doubt: "sampled" in doubt)
    assert "far from its reference" in far and "temperature 0.8" in warm


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["MODEL", "QUADS", "--beta", "0"], "argument --beta: got '0', expected a number above 0"),
        (["MODEL"], "required: QUADS"),
        (["MODEL", "QUADS", "--limit", "1"], "fewer than two prompts"),
        (["nowhere", "QUADS"], "nowhere"),
    ],
)
def test_analyze_gradients_refuses_in_one_line(
    first: Path, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Mutation: a traceback, or numbers from one prompt."""
    places = {"MODEL": str(first / "model"), "QUADS": str(first / "quads.jsonl")}
    assert main(["analyze", "--gradients", *(places.get(word, word) for word in words)]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("bvpo: error")]
    assert message in line


def test_training_warns_of_other_temperatures(first: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The manifest beside the quads knows how they were sampled. Mutations: no word; a word without ``auto``."""
    quads = tmp_path / "quads.jsonl"
    quads.write_text((first / "quads.jsonl").read_text(encoding="utf-8"), encoding="utf-8")
    begin_stage(tmp_path, "sample", config={"sample": {"temperature": 0.8}})
    path = tmp_path / "c.toml"
    path.write_text(
        f'name = "a"\nroot = {json.dumps(str(tmp_path))}\n[model]\npath = {json.dumps(str(first / "model"))}\n'
        f"[data]\nquads = {json.dumps(str(quads))}\n[train.hf]\nuse_cpu = true\n",
        encoding="utf-8",
    )
    for schedule, warned in (("auto", 1), ("constant", 0)):
        caplog.clear()
        with caplog.at_level("WARNING", logger="bvpo"):
            assert main(["train", str(path), "--dry-run", "--train.alpha.schedule", schedule]) == 0
        assert sum("temperature 0.8" in record.getMessage() for record in caplog.records) == warned
