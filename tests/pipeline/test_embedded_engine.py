"""The embedded engine on tiny real models: what a sample depends on, how it ends, what is refused, what is bounded."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from models_fixtures import MODEL_FAMILIES, save_tiny_model, tiny_model, tiny_tokenizer
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM, MambaConfig, MambaForCausalLM

from bvpo.engines.base import ENGINES, Engine, Generation, Request, Sampling, create_engine
from bvpo.engines.local import engine as embedded
from bvpo.engines.local.decoder import Decoder
from bvpo.engines.local.engine import BatchSettings, from_model
from bvpo.engines.local.slots import SlotCache
from bvpo.strict import UserError

TOKENIZER = tiny_tokenizer()


def requests_for(
    num_prompts: int, samples: int, *, new_tokens: int = 20, seed: int = 0, **params: Any
) -> list[Request]:
    """Prompts of unequal lengths with several samples each."""
    rng = random.Random(seed)
    prompts = [tuple(rng.randrange(3, 300) for _ in range(rng.randrange(1, 25))) for _ in range(num_prompts)]
    sampling = Sampling(max_new_tokens=new_tokens, **params)
    return [
        Request(key=f"{seed}/{p}/{k}", prompt_ids=ids, seed=1000 * p + k, params=sampling)
        for p, ids in enumerate(prompts)
        for k in range(samples)
    ]


def generate(model: Any, requests: list[Request], **batch: int) -> dict[str, Generation]:
    generations = list(from_model(model, TOKENIZER, BatchSettings(**batch)).generate(requests))
    by_key = {g.key: g for g in generations}
    assert len(by_key) == len(generations) == len(requests)
    return by_key


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model("qwen2")


# What a sample depends on.


def test_samples_do_not_depend_on_the_batch(model: Any) -> None:
    """Batches of 1, 2, 7, 16 and 80, another order, and strangers mixed in. Mutations: one generator for all rows, noise
    by slot instead of by seed, no padding of small batches (log-probabilities move), a moved row that leaves its key."""
    requests = requests_for(16, 5, new_tokens=12)
    expected = generate(model, requests, max_batch_rows=80)
    shuffled = random.Random(1).sample(requests, len(requests))
    strangers = random.Random(2).sample(requests + requests_for(9, 3, seed=7, top_p=0.9), len(requests) + 27)
    runs = [generate(model, requests, max_batch_rows=rows) for rows in (1, 2, 7, 16)]
    runs += [generate(model, shuffled, max_batch_rows=7), generate(model, strangers, max_batch_rows=13)]
    for run in runs:
        for key, generation in expected.items():
            assert run[key].token_ids == generation.token_ids
            assert run[key].text == generation.text
            assert run[key].logprobs == pytest.approx(generation.logprobs, abs=1e-4)
    assert len({g.token_ids for g in expected.values()}) == len(requests)


@pytest.mark.parametrize("family", [f for f in MODEL_FAMILIES if f != "qwen2"])
def test_other_families_do_not_depend_on_the_batch_either(family: str) -> None:
    """Rows pass the sliding window at different steps. Mutation: a ring addressed by slot length, not by window."""
    other = tiny_model(family)
    requests = requests_for(6, 2, new_tokens=30)
    expected = generate(other, requests, max_batch_rows=12)
    run = generate(other, requests[::-1], max_batch_rows=5)
    assert {k: g.token_ids for k, g in run.items()} == {k: g.token_ids for k, g in expected.items()}


def test_seed_and_prompt_decide(model: Any) -> None:
    """Mutation: the seed ignored, or the key hashed into the noise."""
    request = requests_for(1, 1)[0]
    twins = [
        Request(key=f"twin{i}", prompt_ids=request.prompt_ids, seed=s, params=request.params)
        for i, s in enumerate((5, 5, 6))
    ]
    by_key = generate(model, twins)
    assert by_key["twin0"].token_ids == by_key["twin1"].token_ids != by_key["twin2"].token_ids


def test_eviction_changes_no_sample_and_respects_the_budget(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache that cannot hold all rows at full length. Mutations: an evicted row that restarts its noise at step 0 or
    loses its log-probabilities, a budget checked for rows only."""
    allocated: list[int] = []
    evicted: list[int] = []
    resize, step = SlotCache.resize, Decoder.step

    def spy_resize(self: SlotCache, like: Any, num_slots: int, length: int, kept_rows: int) -> None:
        allocated.append(num_slots * length)
        resize(self, like, num_slots, length, kept_rows)

    def spy_step(self: Decoder) -> Any:
        finished, sent_away = step(self)
        evicted.append(len(sent_away))
        return finished, sent_away

    requests = requests_for(4, 3, new_tokens=200)
    expected = generate(model, requests, max_batch_rows=12)
    monkeypatch.setattr(SlotCache, "resize", spy_resize)
    monkeypatch.setattr(Decoder, "step", spy_step)
    run = generate(model, requests, max_batch_rows=12, max_batch_tokens=800)
    assert max(allocated) <= 800
    assert sum(evicted) > 0
    for key, generation in expected.items():
        assert run[key].token_ids == generation.token_ids
        assert run[key].logprobs == pytest.approx(generation.logprobs, abs=1e-4)


def test_greedy_equals_transformers(model: Any) -> None:
    """Mutation: any error of position, mask or cache that the engine makes in every batch alike."""
    requests = requests_for(5, 1, temperature=0.0)
    by_key = generate(model, requests)
    for request in requests:
        output = model.generate(
            torch.tensor([request.prompt_ids]),
            attention_mask=torch.ones(1, len(request.prompt_ids), dtype=torch.long),
            max_new_tokens=20,
            do_sample=False,
        )
        assert by_key[request.key].token_ids == tuple(output[0, len(request.prompt_ids) :].tolist())


# What it costs.


def test_a_prompt_is_computed_once_for_its_samples(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also when they arrive scattered and do not fit the batch together. Mutation: one prefill per request."""
    computed: list[tuple[int, ...]] = []
    compute = Decoder.compute_prompt

    def spy(self: Decoder, ids: Any) -> Any:
        computed.append(tuple(ids))
        return compute(self, ids)

    engine = from_model(model, TOKENIZER, BatchSettings(max_batch_rows=6, max_batch_tokens=10_000))
    list(engine.generate(requests_for(1, 1)))  # the check of the model computes prompts of its own
    monkeypatch.setattr(Decoder, "compute_prompt", spy)
    requests = requests_for(4, 5)
    list(engine.generate(random.Random(0).sample(requests, len(requests))))
    assert sorted(computed) == sorted({r.prompt_ids for r in requests})


def test_finished_rows_leave_and_others_enter(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Mutations: finished rows decoded on (more row steps than tokens), or no refill before a batch is empty."""
    sizes: list[int] = []
    step = Decoder.step

    def spy(self: Decoder) -> Any:
        sizes.append(len(self.rows))
        return step(self)

    rng = random.Random(0)
    requests = [
        Request(key=str(i), prompt_ids=(5, i + 3), seed=i, params=Sampling(max_new_tokens=rng.choice((2, 40))))
        for i in range(24)
    ]
    engine = from_model(model, TOKENIZER, BatchSettings(max_batch_rows=4))
    list(engine.generate(requests[:1]))
    monkeypatch.setattr(Decoder, "step", spy)
    generations = list(engine.generate(requests))
    num_tokens = sum(len(g.token_ids) for g in generations)
    assert sum(sizes) == num_tokens - len(requests)  # first tokens come with the prompt
    assert max(sizes) == 4
    assert len(sizes) <= sum(sizes) / 4 + 40


def test_small_and_odd_batches_are_padded(model: Any) -> None:
    """What makes float32 samples the same bit for bit on x86 (BatchLimits.padded). Mutation: the rows passed as they are."""
    shapes: set[tuple[int, int]] = set()
    engine = from_model(model, TOKENIZER, BatchSettings(max_batch_rows=21))
    list(engine.generate(requests_for(1, 1)))
    handle = model.register_forward_pre_hook(
        lambda module, args, kwargs: shapes.add(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    list(engine.generate(requests_for(9, 3)))
    handle.remove()
    steps = {rows for rows, columns in shapes if columns == 1 and rows > 1}
    assert 16 in steps and 22 in steps and all(rows >= 16 and rows % 2 == 0 for rows in steps)


def test_requests_and_generations_stream(model: Any) -> None:
    """Mutation: collecting all requests before the first step, or all generations before the first yield."""
    pulled = 0

    def endless() -> Iterator[Request]:
        nonlocal pulled
        while True:
            pulled += 1
            yield Request(key=str(pulled), prompt_ids=(4,), seed=pulled, params=Sampling(max_new_tokens=3))

    generations = from_model(model, TOKENIZER, BatchSettings(max_batch_rows=4)).generate(endless())
    assert [next(generations).finish for _ in range(10)]
    assert pulled < 60
    generations.close()


# How a response ends.


def test_every_kind_of_stop_token_ends_a_response() -> None:
    """Generation configuration, tokenizer and request each name some. Mutations: one of the three ignored, the stop token
    dropped from the ids or shown in the text."""
    model = tiny_model("qwen2", spread=0.1)
    configured, own, asked = list(range(20, 26)), TOKENIZER.eos_token_id, tuple(range(60, 66))
    model.generation_config.eos_token_id = configured
    by_key = generate(model, requests_for(40, 5, new_tokens=40, stop_token_ids=asked), max_batch_rows=100)
    stops = {*configured, own, *asked}
    seen = set()
    for generation in by_key.values():
        if generation.finish == "stop":
            seen.add(generation.token_ids[-1])
            shown = generation.token_ids[:-1]
        else:
            assert generation.finish == "length" and len(generation.token_ids) == 40
            shown = generation.token_ids
        assert not stops.intersection(shown)
        assert generation.text == TOKENIZER.decode(shown, skip_special_tokens=False)
        assert generation.logprobs is not None and len(generation.logprobs) == len(generation.token_ids)
    assert own in seen and seen.intersection(configured) and seen.intersection(asked)
    assert {g.finish for g in by_key.values()} == {"stop", "length"}


def test_text_keeps_the_markers_of_the_trace(model: Any) -> None:
    """Mutation: skip_special_tokens=True, which deletes markers that are special tokens."""
    marker = TOKENIZER.convert_tokens_to_ids("<｜begin▁of▁sentence｜>")
    biased = tiny_model("qwen2")
    with torch.no_grad():
        biased.lm_head.weight.zero_()
    biased.generation_config.eos_token_id = None
    texts = [g.text for g in generate(biased, requests_for(10, 5, new_tokens=60)).values() if marker in g.token_ids]
    assert texts and all("<｜begin▁of▁sentence｜>" in text for text in texts)


def test_max_new_tokens_of_one_and_mixed_lengths(model: Any) -> None:
    """Mutation: the first token, which comes from the prompt, not counted against the limit."""
    requests = [
        Request(key=str(n), prompt_ids=(3, 4), seed=n, params=Sampling(max_new_tokens=n)) for n in (1, 2, 3, 33)
    ]
    by_key = generate(model, requests)
    for request in requests:
        generation, limit = by_key[request.key], request.params.max_new_tokens
        assert len(generation.token_ids) == limit or generation.finish == "stop"
        assert len(generation.token_ids) <= limit


def test_the_context_cuts_a_response_and_refuses_a_prompt() -> None:
    """Mutation: positions beyond what the model was built for."""
    short = tiny_model("llama", max_position_embeddings=30)
    short.generation_config.eos_token_id = None
    params = Sampling(max_new_tokens=100, temperature=1.0)
    fits = Request(key="fits", prompt_ids=(7,) * 20, seed=0, params=params)
    by_key = generate(short, [fits, Request(key="long", prompt_ids=(7,) * 30, seed=0, params=params)])
    assert by_key["fits"].finish == "stop" or len(by_key["fits"].token_ids) == 10
    assert by_key["long"].finish == "error" and "30 tokens" in (by_key["long"].error or "")


# What is refused.


def test_bad_requests_fail_alone(model: Any) -> None:
    """Mutation: an exception that ends the whole run, or an out-of-range id that reaches the embedding."""
    good = requests_for(2, 1)
    params = Sampling(max_new_tokens=20)
    bad = [
        Request(key="empty", prompt_ids=(), seed=0, params=params),
        Request(key="outside", prompt_ids=(3, 10**6), seed=0, params=params),
        Request(key="big", prompt_ids=(3,) * 200, seed=0, params=params),
    ]
    by_key = generate(model, [*bad, *good], max_batch_tokens=128)
    for request, word in zip(bad, ("no tokens", "token 1000000", "max_batch_tokens"), strict=True):
        generation = by_key[request.key]
        assert (
            generation.finish == "error" and word in (generation.error or "") and "\n" not in (generation.error or "")
        )
        assert generation.token_ids == () and generation.logprobs is None
    assert all(by_key[r.key].finish != "error" for r in good)


def test_broken_weights_give_errors_not_tokens() -> None:
    """While running, and from the start. Mutation: NaN logits sampled from."""
    broken = tiny_model("llama")
    engine = from_model(broken, TOKENIZER)
    list(engine.generate(requests_for(1, 1)))
    with torch.no_grad():
        broken.lm_head.weight[3] = float("nan")
    generations = list(engine.generate(requests_for(2, 2)))
    with pytest.raises(UserError, match="not finite"):
        next(from_model(broken, TOKENIZER).generate(requests_for(1, 1)))
    assert {g.finish for g in generations} == {"error"}
    assert all("not finite" in (g.error or "") for g in generations)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_new_tokens", 0),
        ("temperature", -1.0),
        ("temperature", float("nan")),
        ("top_p", 0.0),
        ("top_p", 1.5),
        ("top_k", -1),
        ("stop_token_ids", (-3,)),
    ],
)
def test_sampling_parameters_are_checked(field: str, value: Any) -> None:
    """Mutation: a check removed."""
    with pytest.raises(UserError, match=f"field '{field}': got"):
        Sampling(**({"max_new_tokens": 5} | {field: value}))


def test_state_space_models_are_refused_before_their_weights_are_read(tmp_path: Path) -> None:
    """Mutation: the check of layer kinds removed (the model would fail deep inside a forward pass)."""
    config = MambaConfig(vocab_size=64, hidden_size=16, num_hidden_layers=2, state_size=4)
    MambaForCausalLM(config).save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"model type 'mamba'.*LinearAttentionLayer") as caught:
        create_engine("embedded", {"model": str(tmp_path)})
    assert "\n" not in str(caught.value)


class ForgetsPositions(LlamaForCausalLM):
    """An architecture that works everywhere in transformers and takes no positions from outside."""

    def forward(self, input_ids: Any = None, position_ids: Any = None, **kwargs: Any) -> Any:
        cache = kwargs.get("past_key_values")
        start = cache.get_seq_length() if cache is not None else 0
        positions = torch.arange(start, start + input_ids.shape[1])[None]
        return super().forward(input_ids=input_ids, position_ids=positions, **kwargs)


def test_a_model_that_ignores_positions_is_refused() -> None:
    """Mutation: no check of a model against its own plain forward pass: samples would be wrong without a sign."""
    forgetful = ForgetsPositions(tiny_model("llama").config)
    forgetful.load_state_dict(tiny_model("llama").state_dict())
    engine = from_model(forgetful, TOKENIZER)
    with pytest.raises(UserError, match="gives other logits than a plain forward pass"):
        next(engine.generate(requests_for(1, 1)))


def test_other_attention_implementations_are_refused() -> None:
    """Mutation: masks handed to a kernel that ignores them."""
    model = tiny_model("llama")
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(UserError, match=r"'flash_attention_2'.*sdpa, eager"):
        next(from_model(model, TOKENIZER).generate(requests_for(1, 1)))


# Model folders.


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("model"))


def test_a_model_folder_is_loaded_when_first_needed(folder: Path, model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Mutations: weights read for the fingerprint or capabilities; another model or dtype than the folder's."""
    loads: list[object] = []
    load = embedded.load_model
    monkeypatch.setattr(embedded, "load_model", lambda plan: (loads.append(plan), load(plan))[1])
    engine = create_engine("embedded", {"model": str(folder), "device": "cpu", "max_batch_rows": 8})
    assert isinstance(engine, Engine)
    assert engine.caps.batch_invariant and engine.caps.seed and engine.caps.logprobs and engine.caps.token_prompts
    assert json.loads(json.dumps(engine.fingerprint())) == engine.fingerprint()
    assert loads == []
    requests = requests_for(3, 2)
    by_key = {g.key: g.token_ids for g in engine.generate(requests)}
    assert by_key == {k: g.token_ids for k, g in generate(model, requests).items()}
    list(engine.generate(requests))
    assert len(loads) == 1
    engine.close()
    with pytest.raises(AssertionError, match="closed"):
        next(engine.generate(requests))


def test_fingerprint_follows_the_content(folder: Path, tmp_path: Path) -> None:
    """Mutation: the path instead of the content, or a file that changes samples left out of the hash."""

    def fingerprint(path: Path, **options: Any) -> dict[str, Any]:
        return create_engine("embedded", {"model": str(path), "device": "cpu", **options}).fingerprint()

    copy = tmp_path / "elsewhere"
    shutil.copytree(folder, copy)
    original = fingerprint(folder)
    assert fingerprint(copy) == original
    assert fingerprint(copy, dtype="bfloat16") != original
    config = copy / "generation_config.json"
    config.write_text(config.read_text().replace("{", '{"note": 1,', 1))
    renamed = fingerprint(copy)
    assert renamed != original
    weights = load_file(copy / "model.safetensors")
    weights["model.norm.weight"] = weights["model.norm.weight"] + 1
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    assert fingerprint(copy) not in (renamed, original)


def test_parameters_in_memory_are_identified_as_they_are_now() -> None:
    """Mutation: a fingerprint kept from before the model was trained on."""
    trained = tiny_model("llama")
    engine = from_model(trained, TOKENIZER)
    before = engine.fingerprint()
    assert engine.fingerprint() == before
    with torch.no_grad():
        trained.lm_head.weight[0, 0] += 1
    assert engine.fingerprint() != before


def test_half_precision_does_not_promise_batch_invariance(folder: Path) -> None:
    """Mutation: the promise made for every dtype; in bfloat16 batch sizes change samples."""
    assert not create_engine(
        "embedded", {"model": str(folder), "dtype": "bfloat16", "device": "cpu"}
    ).caps.batch_invariant


def test_only_safetensors_are_loaded(folder: Path, tmp_path: Path) -> None:
    """Mutation: pickled weights accepted, which run code when they are read."""
    copy = tmp_path / "pickled"
    shutil.copytree(folder, copy)
    torch.save(load_file(copy / "model.safetensors"), copy / "pytorch_model.bin")
    (copy / "model.safetensors").unlink()
    with pytest.raises(UserError, match="safetensors") as caught:
        next(create_engine("embedded", {"model": str(copy), "device": "cpu"}).generate(requests_for(1, 1)))
    assert "\n" not in str(caught.value)


def test_remote_code_needs_the_flag(folder: Path, tmp_path: Path) -> None:
    """Mutation: trust_remote_code=True by default."""
    copy = tmp_path / "custom"
    shutil.copytree(folder, copy)
    config = json.loads((copy / "config.json").read_text())
    config |= {"model_type": "made_up", "auto_map": {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}}
    (copy / "config.json").write_text(json.dumps(config))
    (copy / "code.py").write_text("raise SystemExit('ran')\n")
    with pytest.raises(UserError, match=r"runs code of its own.*trust_remote_code"):
        create_engine("embedded", {"model": str(copy), "device": "cpu"})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": "/no/such/folder"}, "model '/no/such/folder'"),
        ({"model": "x", "dtype": "int8"}, "dtype: got 'int8'"),
        ({"model": "x", "max_batch_row": 3}, "did you mean 'max_batch_rows'"),
        ({"model": "x", "max_batch_rows": 0}, "'max_batch_rows': got 0"),
        ({}, "needs option 'model'"),
    ],
    ids=str,
)
def test_wrong_options_get_one_line(options: dict[str, Any], message: str) -> None:
    """Mutation: a TypeError or a page of transformers' text instead."""
    with pytest.raises(UserError, match=message.replace("(", r"\(")) as caught:
        create_engine("embedded", options)
    assert "\n" not in str(caught.value)


def test_unknown_engines_are_named_with_the_known_ones() -> None:
    """Mutation: a KeyError."""
    with pytest.raises(UserError, match=r"got 'embeded', expected one of .*embedded"):
        create_engine("embeded", {})
    assert all(":" in target for target in ENGINES.values())


def test_the_protocol_imports_no_torch() -> None:
    """Mutation: a torch or transformers import in base.py; the command line would pay seconds for it."""
    code = "import sys, bvpo.engines.base; sys.exit(bool({'torch', 'transformers', 'numpy'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
