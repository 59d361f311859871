"""One training step of every causal-LM family of the installed transformers against plain single sequences.

Each family is built small, with random weights and low thresholds, in a process of its own; the loss and the gradient of
a DPO step through the layout that the family is given are compared with sequences run one at a time, without our layouts.
Results go to a dated file after each family, and a second run does what is left. ``--page`` writes the page from the file.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import json
import multiprocessing
import platform
import queue
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "architectures.md"
LOSS, GRADIENT = 1e-5, 1e-4
LAYERS = 4
# Settings that a family's defaults leave off: name -> what is added to the configuration, where it has such a field.
ROPES: dict[str, dict[str, Any]] = {
    "dynamic rope": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0},
    "longrope": {"rope_type": "longrope", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 24},
}
# Families whose defaults have only one kind of layer, or leave out what a model needs.
NEEDED: dict[str, dict[str, Any]] = {
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": {"n_routed_experts": 8, "num_experts_per_tok": 2, "n_shared_experts": 1},
    "gemma3n_text": {"num_hidden_layers": 10, "num_kv_shared_layers": 5},
    "hunyuan_v1_dense": {"head_dim": 128},
    "hunyuan_v1_moe": {"head_dim": 128},
    "ministral": {"head_dim": 128},
    "nemotron": {"num_key_value_heads": 8},
}
ROPE_FAMILIES = ("llama", "phi3", "qwen2", "qwen3")


def variants() -> list[str]:
    """``family`` or ``family/variant``, in the order of transformers' own list."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    found: list[str] = []
    for family in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        found.append(family)
        if family in ROPE_FAMILIES:
            found += [f"{family}/{name}" for name in ROPES]
    return found


def build(name: str) -> Any:
    """A small model of the family, in float32, without dropout, sharp enough to show a leak."""
    import torch
    import transformers
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES  # pyright: ignore[reportPrivateImportUsage]
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    from bvpo.training.miniature import sharpen

    family, _, variant = name.partition("/")
    config = small(getattr(transformers, CONFIG_MAPPING_NAMES[family]), variant)
    kind = getattr(transformers, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[family])
    with torch.device("meta"):
        size = sum(p.numel() for p in kind(config).parameters())
    if size > 80e6:
        raise ValueError(f"{size / 1e6:.0f} million parameters at the smallest widths")
    torch.manual_seed(0)
    model = kind(config).float()
    sharpen(model)
    return model.eval()


def small(kind: Any, variant: str) -> Any:
    from bvpo.training.miniature import setting, small_config

    config = _few_layers(kind, **NEEDED.get(kind.model_type, {}))
    text = config.get_text_config()
    if hasattr(kind, "sliding_window") and setting(config, "sliding_window") is None:
        text.sliding_window = 4096
    if setting(config, "use_sliding_window") is False:
        config = _few_layers(kind, use_sliding_window=True, sliding_window=4096, max_window_layers=LAYERS // 2)
    config = small_config(config)
    text = config.get_text_config()
    if variant:
        rope = dict(ROPES[variant])
        text.max_position_embeddings = 24 if variant == "dynamic rope" else 96
        if variant == "longrope":
            dims = (getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads) // 2
            rope |= {"short_factor": [1.0] * dims, "long_factor": [4.0] * dims}
        text.rope_parameters = rope
        if hasattr(text, "original_max_position_embeddings"):
            text.original_max_position_embeddings = 24
    for part in (config, text):
        for name, value in vars(part).items():
            if ("dropout" in name or name.endswith("drop")) and isinstance(value, float):
                setattr(part, name, 0.0)
        if hasattr(part, "is_decoder"):
            part.is_decoder = True
        part.use_cache = False
    return config


def _few_layers(kind: Any, **more: Any) -> Any:
    for layers in ({} if "num_hidden_layers" in more else {"num_hidden_layers": LAYERS}, {}):
        try:
            config = kind(**layers, **more)
            if len(getattr(config.get_text_config(), "layer_types", None) or [0] * LAYERS) in (LAYERS, 0) or not layers:
                return config
        except Exception:  # a family whose other fields assume its own depth
            if not layers:
                raise
    return kind(**more)


def measure(name: str, built: Callable[[], None]) -> dict[str, Any]:
    """What the family is given, and how far its step is from plain single sequences. ``built``: called once it is."""
    from bvpo.strict import UserError
    from bvpo.training import policy
    from bvpo.training.miniature import thresholds

    try:
        model = build(name)
        untouched = copy.deepcopy(model)
        quads = mixed_quads(untouched)
        theirs = plain_step(untouched, quads)  # a family whose own step fails in this configuration is not built either
    except Exception as error:
        return {"outcome": "not built", "why": _line(error)}
    built()
    notes: list[str] = []
    policy.logger.warning = lambda text, *args: notes.append(str(text % args))  # type: ignore[method-assign]
    try:
        policy.install(model)
        layout = policy.choose_layout(model, "auto")
    except UserError as error:
        return {"outcome": "refused", "why": str(error)}
    found = compared(our_step(model, layout, quads), theirs)
    why = "" if not notes else notes[0].partition("layout: ")[2]
    equal = found["loss_error"] <= LOSS and found["gradient_error"] <= GRADIENT
    outcome = "WRONG" if not equal else "equal" if layout == "tree" else "falls back"
    return {"outcome": outcome, "layout": layout, "why": why, "thresholds": thresholds(untouched.config), **found}


def mixed_quads(model: Any) -> Any:
    """Two quads of mixed length: short ones, and one past every threshold."""
    import numpy as np

    from bvpo.training.tokens import Branch, TokenQuad

    vocabulary = min(500, model.config.get_text_config().vocab_size)
    generator = np.random.default_rng(1)

    def ids(num: int) -> Any:
        return generator.integers(3, vocabulary, num).astype(np.int32)

    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None) or 150
    long = 100 if limit <= 96 else min(150, limit) - 50  # dynamic rope and longrope have no end
    plans = [(6, (9, 5, 7, 3)), (45, (long, 8, 21, 4))]
    return [
        TokenQuad(
            id=str(n),
            prefix_ids=ids(n),
            branches=tuple(Branch(ids=ids(k), scored_from=0, answer_from=k // 2) for k in sizes),  # type: ignore[arg-type]
        )
        for n, sizes in plans
    ]


def _step(model: Any, sums: Any) -> tuple[float, dict[str, Any]]:
    """Loss and gradients of DPO at a reference of zero, from the log-probs [quads, 4] of the branches."""
    import torch
    import torch.nn.functional as F

    sums = sums.double()
    margins = torch.stack([sums[:, 0] - sums[:, 1], sums[:, 2] - sums[:, 3]])
    loss = -F.logsigmoid(0.05 * margins).mean()
    model.zero_grad()
    loss.backward()
    return float(loss), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def plain_step(model: Any, quads: Any) -> tuple[float, dict[str, Any]]:
    """Sequences one at a time, through the model's own call, without any of our code; dynamic rope starts afresh."""
    import numpy as np
    import torch

    ropes = {n: copy.deepcopy(m) for n, m in model.named_modules() if hasattr(m, "original_max_seq_len")}
    rows = []
    for quad in quads:
        for branch in quad.branches:
            for name, fresh in ropes.items():
                model.set_submodule(name, copy.deepcopy(fresh))
            row = torch.tensor(np.concatenate([quad.prefix_ids, branch.ids]).astype(np.int64))[None]
            logps = torch.log_softmax(model(input_ids=row, use_cache=False).logits[0, :-1].float(), -1)
            rows.append(logps.gather(1, row[0, 1:, None])[len(quad.prefix_ids) - 1 :, 0].sum())
    return _step(model, torch.stack(rows).view(len(quads), 4))


def our_step(model: Any, layout: str, quads: Any) -> tuple[float, dict[str, Any]]:
    from bvpo.training import policy
    from bvpo.training.layout import LAYOUTS

    policy.use_layout(model, layout)
    return _step(model, policy.branch_outputs(model, LAYOUTS[layout](quads))[..., :2].sum(-1))


def compared(ours: tuple[float, dict[str, Any]], theirs: tuple[float, dict[str, Any]]) -> dict[str, float]:
    import torch

    (our_loss, mine), (expected, plain) = ours, theirs
    zero = torch.zeros(())
    norm = sum(float(g.double().square().sum()) for g in plain.values()) ** 0.5
    gap = sum(
        float((mine.get(n, zero) - plain.get(n, zero)).double().square().sum()) for n in mine.keys() | plain.keys()
    )
    return {
        "loss": expected,
        "loss_error": abs(our_loss - expected) / max(1.0, abs(expected)),
        "gradient_error": gap**0.5 / max(norm, 1e-30),
    }


def _line(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".strip().splitlines()[0][:160]


def _child(name: str, answers: Any) -> None:
    try:
        answers.put(measure(name, lambda: answers.put("built")))
    except BaseException as error:
        answers.put({"outcome": "FAILED", "why": _line(error)})


def warm_up() -> None:
    """Imports what every family needs before the processes part. One thread: a fork keeps no others."""
    import torch

    from bvpo.training import policy

    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    model = build("llama")
    policy.install(model)
    policy.choose_layout(model, "auto")


def isolated(name: str, timeout: float) -> dict[str, Any]:
    """In a process of its own: some families crash the interpreter, some take for ever. What fails once there is a model
    is our failure."""
    context = multiprocessing.get_context("fork")
    answers: Any = context.Queue()
    process = context.Process(target=_child, args=(name, answers))
    process.start()
    outcome, why, stop = "not built", f"took longer than {timeout:g} s", time.monotonic() + timeout
    while time.monotonic() < stop:
        try:
            found = answers.get(timeout=0.5)
        except queue.Empty:
            if process.is_alive():
                continue
            why = f"its process ended with code {process.exitcode}"
            break
        if found != "built":
            process.join(5)
            return found
        outcome = "FAILED"
    process.kill()
    return {"outcome": outcome, "why": why}


def versions() -> dict[str, str]:
    import torch
    import transformers

    return {"python": platform.python_version(), "torch": torch.__version__, "transformers": transformers.__version__}


def page(results: dict[str, Any], path: Path) -> str:
    """docs/architectures.md from a result file."""
    rows = results["families"]
    counts = {kind: sum(r["outcome"] == kind for r in rows.values()) for kind in ("equal", "falls back", "refused")}
    lines = [
        "# Architectures",
        "",
        f"Written by `{results['command']} --page` from `benchmarks/results/{path.name}` (transformers "
        f"{results['versions']['transformers']}, torch {results['versions']['torch']}); `make prove-parity` measures again.",
        "",
        "A row is one step of DPO in float32 on a small model of the family with random weights, evaluation mode and no "
        "dropout, against plain single sequences: mixed lengths up to 145 tokens, past every window, chunk and rope limit, "
        "which are set low. *equal*: the shared-prefix layout, loss within 1e-5 (of losses above 1, relative) and gradient "
        "within 1e-4 (relative). "
        "*falls back*: another layout, just as equal, because of the last column. *refused*: one line at the start.",
        "",
        f"{counts['equal']} equal, {counts['falls back']} fall back, {counts['refused']} refused, "
        f"{sum(r['outcome'] == 'WRONG' for r in rows.values())} wrong, "
        f"{sum(r['outcome'] == 'FAILED' for r in rows.values())} failed, "
        f"{sum(r['outcome'] == 'not built' for r in rows.values())} not built, {results['left']} not measured.",
        "",
        "| family | outcome | layout | loss differs by | gradient differs by | why |",
        "|---|---|---|---|---|---|",
    ]
    for name, row in rows.items():
        numbers = [f"{row[key]:.1e}" if key in row else "" for key in ("loss_error", "gradient_error")]
        why = row["why"].replace("|", "/")
        lines.append(f"| `{name}` | {row['outcome']} | {row.get('layout', '')} | {numbers[0]} | {numbers[1]} | {why} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--families", nargs="+", help="these only (default: all)")
    parser.add_argument("--timeout", type=float, default=120.0, help="seconds for one family")
    parser.add_argument("--out", type=Path, default=RESULTS / f"parity-{datetime.date.today()}.json")
    parser.add_argument("--again", action="store_true", help="measure also what the file has")
    parser.add_argument("--page", action="store_true", help="only write docs/architectures.md from the file")
    args = parser.parse_args()
    everything = variants()
    results: dict[str, Any] = {"command": "benchmarks/parity.py", "families": {}}
    if args.out.is_file():
        results = json.loads(args.out.read_text(encoding="utf-8"))
    results["versions"] = versions()
    done = results["families"]
    if not args.page:
        warm_up()
    for name in () if args.page else args.families or everything:
        if name in done and not args.again:
            continue
        start = time.monotonic()
        done[name] = isolated(name, args.timeout)
        print(
            f"{name}: {done[name]['outcome']} {done[name].get('layout', '')} {time.monotonic() - start:.0f} s",
            flush=True,
        )
        results["families"] = done = {n: done[n] for n in everything if n in done}
        results["left"] = len(everything) - len(done)
        args.out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    PAGE.write_text(page(results, args.out), encoding="utf-8")


if __name__ == "__main__":
    main()
