"""Tokens per CPU-second of the embedded engine against ``model.generate``, and where its parts stand.

The peer gets the same prompts left-padded into one batch with ``num_return_sequences=5``, the same temperature and the same
stop tokens, and is not asked for log-probabilities (the engine gives them). The two run in turn, so that whatever else the
machine does falls on both; the ratio is taken pair by pair. Tokens after a row's stop token do not count. It is measured
with responses that stop by themselves, as responses do, and with all of them running to the limit, where no row can be
dropped. Two tables say what the drawing of tokens and the cache cost next to the usual ways.

    python benchmarks/sampling.py            # 7 pairs, writes benchmarks/results/sampling-<date>.json
    python benchmarks/sampling.py --quick    # 3 pairs
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
import torch
import transformers
from transformers import DynamicCache, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from bvpo.engines.base import Request, Sampling
from bvpo.engines.local.decoder import BatchLimits, Decoder, Row
from bvpo.engines.local.engine import BatchSettings, EmbeddedEngine, from_model
from bvpo.engines.local.noise import gumbel_noise, noise_key
from bvpo.engines.local.sampling import RowParams, sample_tokens

VOCAB = 32_000
PROMPTS, SAMPLES, MAX_NEW_TOKENS = 16, 5, 128
TEMPERATURE = 0.8
# A random model is nearly uniform: with 1 % of the vocabulary as stop tokens about 7 of 10 responses stop by themselves.
STOP_IDS = list(range(2, 2 + VOCAB // 100))
ROWS = PROMPTS * SAMPLES
TARGET = 1.5


def build(stop_ids: Sequence[int]) -> tuple[Any, PreTrainedTokenizerFast]:
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=VOCAB,
        hidden_size=256,
        intermediate_size=1024,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=None,
    )
    model = Qwen2ForCausalLM(config).eval()
    model.generation_config.eos_token_id = list(stop_ids) or None
    words = {f"w{i}": i for i in range(VOCAB)}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="w0"))
    return model, PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="w0")


def prompts() -> list[tuple[int, ...]]:
    generator = np.random.default_rng(0)
    return [tuple(generator.integers(400, VOCAB, int(generator.integers(16, 65))).tolist()) for _ in range(PROMPTS)]


def run_engine(engine: EmbeddedEngine, seed: int) -> int:
    params = Sampling(max_new_tokens=MAX_NEW_TOKENS, temperature=TEMPERATURE)
    requests = [
        Request(key=f"{p}/{k}", prompt_ids=ids, seed=seed * 1000 + p * SAMPLES + k, params=params)
        for p, ids in enumerate(prompts())
        for k in range(SAMPLES)
    ]
    return sum(len(generation.token_ids) for generation in engine.generate(requests))


def run_generate(model: Any, seed: int) -> int:
    torch.manual_seed(seed)
    longest = max(len(ids) for ids in prompts())
    input_ids = torch.tensor([[0] * (longest - len(ids)) + list(ids) for ids in prompts()])
    mask = torch.tensor([[0] * (longest - len(ids)) + [1] * len(ids) for ids in prompts()])
    output = model.generate(
        input_ids,
        attention_mask=mask,
        do_sample=True,
        temperature=TEMPERATURE,
        top_k=0,
        top_p=1.0,
        max_new_tokens=MAX_NEW_TOKENS,
        num_return_sequences=SAMPLES,
    )
    stops = set(model.generation_config.eos_token_id or ())
    lengths = []
    for row in output[:, longest:].tolist():
        lengths.append(next((i + 1 for i, token in enumerate(row) if token in stops), len(row)))
    return sum(lengths)


def measure(run: Callable[[], int]) -> dict[str, float]:
    wall, cpu = time.perf_counter(), time.process_time()
    tokens = run()
    cpu = time.process_time() - cpu
    wall = time.perf_counter() - wall
    return {
        "tokens": tokens,
        "cpu_s": round(cpu, 3),
        "wall_s": round(wall, 3),
        "tokens_per_cpu_s": round(tokens / cpu, 1),
    }


def compare(pairs: int, stop_ids: Sequence[int]) -> dict[str, Any]:
    model, tokenizer = build(stop_ids)
    engine = from_model(model, tokenizer, BatchSettings(max_batch_rows=ROWS))
    run_engine(engine, 10_000)
    run_generate(model, 10_000)
    rows = []
    for seed in range(pairs):
        order: list[tuple[str, Callable[[], int]]] = [
            ("engine", lambda s=seed: run_engine(engine, s)),
            ("generate", lambda s=seed: run_generate(model, s)),
        ]
        pair: dict[str, Any] = {name: measure(run) for name, run in (order if seed % 2 else reversed(order))}
        pair["ratio"] = round(pair["engine"]["tokens_per_cpu_s"] / pair["generate"]["tokens_per_cpu_s"], 3)
        rows.append(pair)
        print(f"pair {seed}: engine {pair['engine']}  generate {pair['generate']}  ratio {pair['ratio']}")
    ratios = [row["ratio"] for row in rows]
    return {
        "median": statistics.median(ratios),
        "min": min(ratios),
        "max": max(ratios),
        "target": TARGET,
        "pairs": rows,
    }


@torch.inference_mode()
def step_costs() -> list[dict[str, float]]:
    """CPU-milliseconds of one forward step of 80 rows: our slots, and a DynamicCache of rows that are all equally long."""
    model, _ = build(())
    table = []
    for length in (64, 512, 1500):
        decoder = Decoder(model, BatchLimits(max_rows=ROWS, max_tokens=1 << 20, prefill_chunk=4096, min_rows=16))
        ids = tuple(range(400, 400 + length))
        params = Sampling(max_new_tokens=MAX_NEW_TOKENS)
        requests = [Request(key=str(i), prompt_ids=ids, seed=i, params=params) for i in range(ROWS)]
        rows = [Row(request=r, limit=MAX_NEW_TOKENS, stop_ids=frozenset()) for r in requests]
        decoder.admit(decoder.compute_prompt(ids), rows)
        cache = DynamicCache(config=model.config)
        model(torch.tensor([ids]), past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache.batch_repeat_interleave(ROWS)
        tokens = torch.full((ROWS, 1), 500)

        def ours(decoder: Decoder = decoder) -> object:
            return decoder.next_logits()

        def dynamic(cache: Any = cache, tokens: Any = tokens) -> object:
            return model(tokens, past_key_values=cache, use_cache=True)

        costs = {"slots_ms": round(_median_ms(ours), 1), "dynamic_cache_ms": round(_median_ms(dynamic), 1)}
        table.append({"tokens_so_far": length, **costs})
        print(table[-1])
    return table


def noise_costs() -> list[dict[str, float]]:
    """CPU-milliseconds for 80 rows: our whole draw, its random numbers, and one number per vocabulary entry instead."""
    table = []
    for vocab in (32_000, 151_936):
        logits = torch.randn(ROWS, vocab)
        keys = torch.tensor([noise_key(i) for i in range(ROWS)])
        steps = torch.zeros(ROWS, dtype=torch.long)
        params = RowParams(
            temperature_B=torch.full((ROWS,), TEMPERATURE), top_k_B=steps.clone(), top_p_B=torch.ones(ROWS)
        )

        def ours(logits: Any = logits, keys: Any = keys, steps: Any = steps, params: Any = params) -> object:
            return sample_tokens(logits, keys, steps, params, truncated=False)

        def blocks(keys: Any = keys, steps: Any = steps, vocab: int = vocab) -> object:
            return gumbel_noise(keys, steps, 0, -(-vocab // 512)), gumbel_noise(keys, steps, 1, 512)

        def flat(vocab: int = vocab) -> object:
            generators = (np.random.Generator(np.random.Philox(key=[i, 0])) for i in range(ROWS))
            return [g.standard_exponential(vocab, dtype=np.float32) for g in generators]

        def peer(logits: Any = logits) -> object:
            return torch.multinomial(torch.softmax(logits / TEMPERATURE, dim=-1), 1)

        contestants = {"draw": ours, "noise": blocks, "flat_numpy_noise": flat, "softmax_multinomial": peer}
        row: dict[str, float] = {"vocab": vocab}
        for name, run in contestants.items():
            row[f"{name}_ms"] = round(_median_ms(run), 2)
        table.append(row)
        print(row)
    return table


def _median_ms(run: Callable[[], object], repeats: int = 7) -> float:
    run()
    times = []
    for _ in range(repeats):
        start = time.process_time()
        run()
        times.append((time.process_time() - start) * 1e3)
    return statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="3 pairs instead of 7")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="folder of the result file")
    args = parser.parse_args()
    torch.set_num_threads(1)
    pairs = 3 if args.quick else 7
    result = {
        "benchmark": "sampling",
        "date": datetime.date.today().isoformat(),
        "command": "python benchmarks/sampling.py" + (" --quick" if args.quick else ""),
        "machine": {"processor": _processor(), "threads": 1},
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "numpy": np.__version__,
        },
        "task": f"Qwen2, 4 layers, hidden 256, vocabulary {VOCAB}, float32; {PROMPTS} prompts of 16-64 tokens x {SAMPLES} "
        f"samples x <= {MAX_NEW_TOKENS} new tokens, T = {TEMPERATURE}",
        "tokens_per_cpu_second_engine_over_generate": compare(pairs, STOP_IDS),
        "the_same_without_stops": compare(pairs, ()),
        "step_of_80_rows": step_costs(),
        "draw_of_80_rows": noise_costs(),
    }
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / f"sampling-{result['date']}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    for name in ("tokens_per_cpu_second_engine_over_generate", "the_same_without_stops"):
        ratio = result[name]
        print(f"{name}: {ratio['median']} ({ratio['min']} to {ratio['max']}), target {TARGET}")
    print(f"wrote {path}")
    sys.exit(0 if result["tokens_per_cpu_second_engine_over_generate"]["median"] >= TARGET else 1)


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor()
    )


if __name__ == "__main__":
    main()
