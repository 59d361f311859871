"""The shipped recipes: every config is real, every accelerate file means what its comments say."""

from __future__ import annotations

import logging
import os
import re
from pathlib import Path
from typing import Any

import pytest
from models_fixtures import save_tiny_model
from training_fixtures import write_tokens

from bvpo.config import ExperimentConfig, dump_toml, load_config
from bvpo.config.layers import settings
from bvpo.method.losses import resolve_loss
from bvpo.records import Message, Pair, Quad, Response
from bvpo.strict import write_jsonl

RECIPES = Path(__file__).resolve().parents[2] / "recipes"
EXPERIMENTS = RECIPES.parent / "experiments"
CONFIGS = sorted(path.relative_to(RECIPES).as_posix() for path in RECIPES.rglob("*.toml"))
LAUNCHERS = sorted(path.name for path in (RECIPES / "accelerate").glob("*.yaml"))
MODELS = ("r1-distill-qwen-1.5b", "r1-distill-qwen-7b", "r1-0528-qwen3-8b")
GIB = 1024**3


def values(config: ExperimentConfig) -> dict[str, Any]:
    """Every setting by its dotted name."""
    found: dict[str, Any] = {}
    for setting in settings(ExperimentConfig):
        node: Any = config
        for part in setting.field.split("."):
            node = getattr(node, part)
        found[setting.field] = node
    return found


def changed(one: str, other: str) -> dict[str, Any]:
    """The settings of ``one`` that differ from ``other``, names of experiments left out."""
    a, b = (values(load_config(RECIPES / name)) for name in (one, other))
    return {field: a[field] for field in a if a[field] != b[field] and field not in ("name", "data.quads")}


def arguments(config: ExperimentConfig, folder: Path) -> Any:
    from bvpo.training.arguments import arguments_from

    fmt = config.model.format
    return arguments_from(config.train, output_dir=str(folder), seed=config.seed, reasoning_format=fmt)


def test_every_model_has_every_recipe() -> None:
    """Mutation: a recipe lost, or one that no list names."""
    kinds = ("bvpo", "bvpo-anchor", "bvpo-lora", "dpo", "simpo")
    assert set(CONFIGS) == {f"{model}/{kind}.toml" for model in MODELS for kind in kinds} | {"blueprint.toml"}
    names = [load_config(RECIPES / name).name for name in CONFIGS]
    assert len(set(names)) == len(names), "two recipes would share an experiment folder"


@pytest.mark.parametrize("name", CONFIGS)
def test_recipe_is_a_config_the_trainer_takes(name: str, tmp_path: Path) -> None:
    """Mutations: a misspelt setting, a loss parameter that the loss does not read, a value out of range."""
    config = load_config(RECIPES / name, ["--train.hf.use_cpu", "true"])
    path = tmp_path / "dumped.toml"
    path.write_text(dump_toml(config), encoding="utf-8")
    assert load_config(path) == config
    args = arguments(config, tmp_path)
    assert args.quads_per_step == config.train.quads_per_step and args.gradient_accumulation_steps == 1
    resolve_loss(args.loss_config())
    args.alpha_config(), args.anchor_config()


@pytest.mark.parametrize("model", MODELS)
def test_recipes_hold_the_papers_settings(model: str) -> None:
    """Mutation: any of the paper's numbers changed in a recipe, or in a default that it relies on."""
    config = load_config(RECIPES / model / "bvpo.toml")
    beta = 0.1 if model == "r1-0528-qwen3-8b" else 0.01
    expected = {
        "sample.num_samples": 5,
        "sample.temperature": 0.8,
        "score.scorer": "armorm",
        "pair.strategy": "best_worst",
        "train.optimizer": "adamw",
        "train.quads_per_step": 128,
        "train.epochs": 1.0,
        "train.learning_rate": 7e-7,
        "train.lr_scheduler": "cosine",
        "train.warmup_ratio": 0.1,
        "train.max_length": 4096,
        "train.loss.name": "dpo",
        "train.loss.beta": beta,
        "train.alpha.value": 0.5,
        "train.alpha.schedule": "constant",
        "train.score_empty_block": True,
        "train.trace_estimator": "joint",
        "train.anchor.kind": "none",
        "pair.no_answer": "drop",
        "pair.no_answer_trace": "drop",
    }
    found = values(config)
    assert {field: found[field] for field in expected} == expected
    assert "ultrafeedback" in config.prompts.sources[0]


@pytest.mark.parametrize("model", MODELS)
def test_baselines_and_variants_differ_only_where_they_say(model: str) -> None:
    """Mutation: a baseline that is trained for longer, at another rate or on other data than BVPO."""
    main = f"{model}/bvpo.toml"
    beta = load_config(RECIPES / main).train.loss.beta
    making = {"prompts.sources", "sample.engine", "pair.no_answer"}  # the data is made once, by the main recipe
    dpo = {"train.alpha.value": 1.0} | ({} if beta == 0.01 else {"train.loss.beta": 0.01})
    simpo = {"train.alpha.value": 1.0, "train.loss.name": "simpo", "train.loss.beta": 2.5}
    anchor = {"train.anchor.kind": "kl", "train.anchor.weight": beta, "train.reference": "held"}
    for kind, expected in (("dpo", dpo), ("simpo", simpo), ("bvpo-anchor", anchor)):
        found = changed(f"{model}/{kind}.toml", main)
        extra = set(found) - set(expected) - making - {"train.reference_cache"}
        assert not extra and {k: found[k] for k in expected} == expected, (kind, found)
    lora = set(changed(f"{model}/bvpo-lora.toml", main)) - making
    allowed = {"train.lora.enabled", "train.learning_rate", "train.precision", "train.reference_cache"}
    assert {"train.lora.enabled", "train.learning_rate"} <= lora <= allowed
    experiment = load_config(RECIPES / main).name
    for kind in ("dpo", "simpo", "bvpo-anchor", "bvpo-lora"):
        assert load_config(RECIPES / model / f"{kind}.toml").data.quads == f"experiments/{experiment}/quads.jsonl"


@pytest.mark.parametrize("path", (RECIPES / "blueprint.toml", EXPERIMENTS / "vignette-3b-t1-t2.toml"), ids=str)
def test_blueprint_holds_its_defaults(path: Path) -> None:
    """Mutation: one of the blueprint's defaults replaced by ours."""
    config = load_config(path)
    train = config.train
    assert (config.seed, train.learning_rate, train.weight_decay, train.quads_per_step) == (42, 2e-5, 0.01, 32)
    assert (train.epochs, train.max_length, train.eval, train.optimizer) == (3.0, 256, "epoch", "adamw")
    assert (train.loss.beta, config.data.eval_fraction) == (0.1, 0.1)
    assert config.run.seeds == ((42, 123, 999) if config.run.methods else ())


@pytest.mark.parametrize(("name", "model"), list(zip(("r1-1.5b", "r1-7b", "r1-8b"), MODELS, strict=True)))
def test_experiments_train_as_the_recipes_do(name: str, model: str) -> None:
    """The paper's experiment in one command: its methods are the recipes', and the run is bounded without a network.
    Mutations: a baseline with BVPO's beta on the 8B model; a method lost; prompts without a number."""
    from bvpo.runs.cost import bounds
    from bvpo.runs.plan import plan

    config = load_config(EXPERIMENTS / f"{name}.toml")
    jobs = {job.name: job.config for job in plan(config)}
    assert set(jobs) == {f"seed-42/{kind}" for kind in ("data", "base", "dpo", "simpo", "bvpo")}
    for kind in ("dpo", "simpo", "bvpo"):
        ours, recipe = values(jobs[f"seed-42/{kind}"]), values(load_config(RECIPES / model / f"{kind}.toml"))
        parts = ("model.", "train.", *(("sample.", "score.", "pair.") if kind == "bvpo" else ()))
        found = {key for key in ours if key.startswith(parts) and ours[key] != recipe[key]}
        assert found <= {"train.reference_cache", "sample.splits", "pair.export"}, (kind, found)
    cost = bounds(config)
    assert cost.trained_methods == 3 and cost.samples and cost.steps_per_method and cost.evaluation_tokens


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("recipes") / "model")


@pytest.fixture(scope="module")
def quads(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty short quads of text."""

    def pair(view: Any, i: int) -> Pair:
        trace = f"\nso {i}\n" if view == "trace" else None
        chosen, rejected = (Response(answer=f"\n\n{text} {i}", trace=trace) for text in ("Yes", "No"))
        return Pair(view=view, chosen=chosen, rejected=rejected)

    path = tmp_path_factory.mktemp("data") / "quads.jsonl"
    rows = [
        Quad(
            id=f"q{i}",
            messages=(Message(role="user", content=f"Is {i} so?"),),
            trace=pair("trace", i),
            empty=pair("empty", i),
        )
        for i in range(40)
    ]
    write_jsonl(path, rows)
    return path


@pytest.mark.parametrize("name", CONFIGS)
def test_dry_run_of_a_recipe(
    name: str, tiny: Path, quads: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A local model in place of the Hub's. Mutations: a recipe whose data section cannot be replaced; an estimate that
    fails for a loss or an adapter; a dry run that trains."""
    from bvpo.stages.train import main

    caplog.set_level(logging.INFO, "bvpo")
    logging.getLogger("bvpo").propagate = True
    flags = {"model.path": tiny, "data.quads": quads, "root": tmp_path, "train.reference_cache": tmp_path / "reference"}
    words = [word for field, value in flags.items() for word in (f"--{field}", str(value))]
    main([str(RECIPES / name), *words, "--train.hf.use_cpu", "true", "--dry-run"])
    config = load_config(RECIPES / name)
    said = caplog.text
    for word in (
        "parameters",
        "optimizer steps",
        "memory",
        f"alpha {config.train.alpha.value:g}",
        config.train.loss.name,
    ):
        assert word in said
    assert ("reference (once)" in said) == (config.train.reference == "cached" and config.train.loss.name != "simpo")
    assert not (tmp_path / config.name / "train" / "final").exists()


# The public sizes of the three models: what their config.json says.
_QWEN2 = {"vocab_size": 151936, "num_hidden_layers": 28, "tie_word_embeddings": False}
SIZES: dict[str, tuple[str, dict[str, int]]] = {
    "r1-distill-qwen-1.5b": (
        "qwen2",
        _QWEN2 | {"hidden_size": 1536, "intermediate_size": 8960, "num_attention_heads": 12, "num_key_value_heads": 2},
    ),
    "r1-distill-qwen-7b": (
        "qwen2",
        _QWEN2
        | {"vocab_size": 152064, "hidden_size": 3584, "intermediate_size": 18944}
        | {"num_attention_heads": 28, "num_key_value_heads": 4},
    ),
    "r1-0528-qwen3-8b": (
        "qwen3",
        _QWEN2
        | {"num_hidden_layers": 36, "hidden_size": 4096, "intermediate_size": 12288, "head_dim": 128}
        | {"num_attention_heads": 32, "num_key_value_heads": 8},
    ),
}


@pytest.mark.parametrize("model", MODELS)
def test_recipes_fit_their_hardware(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The README's table, by the trainer's own estimate, with the longest quads that max_length allows. Mutations: an
    estimate that does not know of a launcher's FSDP (it would refuse these runs); checkpointing taken out of a recipe;
    full-precision bases in the LoRA recipes of 7B and 8B."""
    from training_fixtures import random_quads
    from transformers import AutoConfig

    from bvpo.training import estimate
    from bvpo.training.arguments import BVPOConfig

    kind, sizes = SIZES[model]
    real = AutoConfig.for_model(kind, **sizes)
    tokens = write_tokens(tmp_path / "tokens", random_quads(2, ragged_views=False))
    tokens.num_tokens[:] = 4 * 4096
    monkeypatch.setattr(BVPOConfig, "world_size", 8)

    def cost(recipe: str, **options: Any) -> Any:
        config = load_config(RECIPES / model / recipe, ["--train.hf.use_cpu", "true"])
        args = arguments(config, tmp_path)
        args.bf16 = config.train.precision != "pure_bf16"  # as on a GPU
        return estimate.estimate_run(real, tokens, args, **options)

    full = {"lora_rank": None, "needs_held_reference": False}
    alone = cost("bvpo.toml", **full)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    sharded = cost("bvpo.toml", **full)
    assert sharded.weights + sharded.gradients + sharded.optimizer <= (alone.memory - alone.activations) // 8 + 8
    anchored = cost("bvpo-anchor.toml", lora_rank=None, needs_held_reference=True)
    monkeypatch.delenv("ACCELERATE_USE_FSDP")
    lora = cost("bvpo-lora.toml", lora_rank=16, needs_held_reference=False)
    assert lora.trainable < alone.parameters / 50
    for recipe, found in (("full, FSDP2", sharded), ("full with the KL anchor", anchored), ("LoRA", lora)):
        assert round(found.memory / GIB) == stated(recipe, model), recipe
        assert found.memory < 70 * GIB


def stated(recipe: str, model: str) -> int:
    """GiB in the table of recipes/README.md."""
    text = (RECIPES / "README.md").read_text(encoding="utf-8")
    row = re.search(rf"^\| {recipe}[^|]*\|(.*)$", text, re.MULTILINE)
    assert row, f"no row for {recipe}"
    return int(re.findall(r"(\d+) GiB", row[1])[MODELS.index(model)])


@pytest.mark.parametrize("name", LAUNCHERS)
def test_launcher_files_are_accelerates(name: str) -> None:
    """Mutation: a key that accelerate does not know (it refuses the file), or a comment's command with another name."""
    from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file

    path = RECIPES / "accelerate" / name
    config = load_config_from_file(str(path))
    assert isinstance(config, ClusterConfig)
    assert config.num_processes == int((re.search(r"-(\d+)gpu", name) or [0, 2])[1])
    assert f"recipes/accelerate/{name}" in path.read_text(encoding="utf-8")
    keys = {"fsdp_version", "fsdp_reshard_after_forward", "fsdp_auto_wrap_policy", "fsdp_offload_params"}
    keys |= {"fsdp_state_dict_type", "fsdp_cpu_ram_efficient_loading", "fsdp_activation_checkpointing"}
    assert set(config.fsdp_config) == (keys if name.startswith("fsdp2") else set())


def test_fsdp2_file_gives_the_plugin_we_rely_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """Through accelerate's own launcher and environment. Mutations: FSDP1, sharded final weights, empty weights on all
    ranks but the first (accelerate's default), checkpointing twice."""
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils import FullyShardedDataParallelPlugin
    from accelerate.utils.launch import prepare_multi_gpu_env
    from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy

    path = RECIPES / "accelerate" / "fsdp2-8gpu.yaml"
    words = ["--config_file", str(path), "-m", "bvpo", "train", "mine.toml"]
    before = dict(os.environ)
    args, _, _ = _validate_launch_command(launch_command_parser().parse_args(words))
    assert args.use_fsdp and args.num_processes == 8 and args.mixed_precision == "bf16"
    env = prepare_multi_gpu_env(args)
    for key in set(os.environ) - set(before):
        monkeypatch.delenv(key)
    for key, value in env.items():
        if key.startswith("FSDP_"):
            monkeypatch.setenv(key, value)
    plugin = FullyShardedDataParallelPlugin()
    assert plugin.fsdp_version == 2 and plugin.reshard_after_forward is True
    assert plugin.auto_wrap_policy is transformer_auto_wrap_policy and plugin.transformer_cls_names_to_wrap is None
    assert "FULL_STATE_DICT" in str(plugin.state_dict_type)
    assert not plugin.cpu_ram_efficient_loading and not plugin.activation_checkpointing
