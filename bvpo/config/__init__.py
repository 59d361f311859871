"""The settings of an experiment: one tree of frozen dataclasses, read from TOML and the command line.

In: ``load_config(path, ["--train.loss.beta", "0.1"])``; out: a complete, checked :class:`ExperimentConfig`, which
``dump_toml`` writes back so that reading it again gives the same config. The string below each field is its
documentation everywhere (``--help``, tables). Names that registries own (losses, formats, schedulers, optimizers) are
checked where the registry lives, not here: this module imports no torch.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any, Literal

from bvpo.config.layers import Layer, build, parse_flags, place_of, read_toml
from bvpo.config.toml import UNSET, dump_toml
from bvpo.strict import FieldError, convert, did_you_mean, from_dict, show

__all__ = [
    "AlphaConfig",
    "AnchorConfig",
    "BenchmarkConfig",
    "DataConfig",
    "EvaluateConfig",
    "ExperimentConfig",
    "FunctionScorerConfig",
    "JudgeConfig",
    "LoraSettings",
    "LossConfig",
    "ModelConfig",
    "PairConfig",
    "PromptsConfig",
    "RewardModelConfig",
    "RunConfig",
    "SampleConfig",
    "ScoreConfig",
    "TinyConfig",
    "TrainConfig",
    "TuneConfig",
    "benchmarks_of",
    "dump_toml",
    "load_config",
    "validate",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """The policy at the start of training, which is also the reference."""

    path: str
    """Model to align: a local folder or a Hub name. Weights load from safetensors only."""
    revision: str | None = None
    """Hub branch, tag or commit of the model; none takes the default branch."""
    format: str = "auto"
    """Reasoning format: how the model opens and closes its trace. 'auto' detects it and refuses when unsure."""
    custom_format: dict[str, Any] = field(default_factory=dict)
    """A reasoning format of your own (with format = 'auto'); docs/formats.md lists its keys."""
    trust_remote_code: bool = False
    """Run Python code shipped with the model. Only for sources you trust."""
    tokenizer: str | None = None
    """Tokenizer folder or Hub name when it is not the model's own."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptsConfig:
    """Where prompts come from, which of them are dropped, and how the rest is split."""

    sources: tuple[str, ...] = ()
    """JSON-lines, JSON, CSV, Parquet or text files (one prompt per line), folders of datasets.save_to_disk, or Hub names.
    A source may end in its own options: 'org/set?split=train_sft&column=prompt&id=prompt_id&config=main'."""
    split: str = "train"
    """Split of sources that have splits."""
    column: str = "auto"
    """Column that holds the prompt: a text or a list of messages. 'auto' takes the first usual name that is there."""
    id_column: str = ""
    """Column that names a prompt; empty names each by the hash of its content."""
    last_assistant: Literal["drop", "strip"] = "drop"
    """Conversations that end with an assistant turn: drop them, or strip that turn."""
    max_chars: int | None = None
    """Drop prompts with more characters, >= 1; none keeps all."""
    max_tokens: int | None = None
    """Drop prompts with more tokens of the model's tokenizer, chat markup not counted, >= 1; none keeps all."""
    near_duplicates: float | None = 0.8
    """Drop prompts whose word shingles agree with an earlier prompt's to this Jaccard index, in (0, 1]; none keeps them.
    Questions that differ in one number of many words count as near duplicates."""
    shingle_words: int = 3
    """Words in a row that make one shingle, >= 1."""
    decontaminate: tuple[str, ...] = ()
    """Benchmark files (JSON lines, JSON, CSV, Parquet, text; * is a pattern): prompts that contain an item are dropped."""
    decontaminate_fields: tuple[str, ...] = ()
    """Fields of the benchmark files that hold texts; empty takes the usual names of questions."""
    ngram_words: int = 13
    """Words in a row shared with a benchmark item that make a prompt contaminated, >= 2. Shorter items must occur whole,
    and items under 8 words must be the whole prompt."""
    validation_fraction: float = 0.0
    """Share of prompts in the split 'validation', in [0, 1); chosen by content and seed, so adding prompts moves none."""
    test_fraction: float = 0.0
    """Share of prompts in the split 'test', in [0, 1)."""
    count: int | None = None
    """Keep only this many of the prompts that pass every check, >= 1, chosen by content and seed; none keeps all."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleConfig:
    """Sampling: which responses are drawn, with what engine, and which part of them by this process."""

    engine: str = "embedded"
    """What generates: 'embedded' (transformers, in this process), 'openai' (compatible servers), 'vllm' (in process), or
    'ray' (one of these as actors on many machines)."""
    endpoints: tuple[str, ...] = ()
    """Addresses of the servers of engine 'openai', such as http://127.0.0.1:8000/v1; several share the work."""
    options: dict[str, Any] = field(default_factory=dict)
    """Any other option of the engine, by its own name, such as options.max_batch_rows = 32; see docs/sampling.md."""
    views: tuple[Literal["trace", "empty"], ...] = ("trace", "empty")
    """Which views are sampled; one may be added later."""
    num_samples: int = 5
    """Samples per prompt and view, >= 1; more may be asked for later, and only those are drawn then."""
    temperature: float = 0.8
    """Sampling temperature, >= 0; 0 takes the most probable token, so that all samples of a prompt are the same."""
    top_p: float = 1.0
    """Share of the probability that nucleus sampling keeps, in (0, 1]; 1 keeps all."""
    top_k: int = 0
    """Most probable tokens that are kept, >= 0; 0 keeps all."""
    max_new_tokens: int = 4096
    """Longest response in tokens, >= 1; a longer one is cut, and a trace that is cut has no answer."""
    splits: tuple[str, ...] = ()
    """Splits of the prompts that are sampled; empty samples all."""
    shard: str = ""
    """'i/N' samples the i-th of N parts of the prompts (from 0), chosen by hash: one part per machine; empty samples all."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DataConfig:
    """Preference data: quads, or one TRL preference set per view."""

    quads: str = ""
    """JSON-lines file of quads (one prompt's trace pair and empty pair per line)."""
    trace: str = ""
    """TRL preference set of the trace view: a local json, jsonl or parquet file, a folder, or a Hub name."""
    empty: str = ""
    """TRL preference set of the empty view, matched to the trace set by prompt."""
    trace_split: str = "train"
    """Split of the trace set."""
    empty_split: str = "train"
    """Split of the empty set."""
    eval_quads: str = ""
    """JSON-lines file of held-out quads: for evaluation during training, and the reliability of what the model then says."""
    eval_fraction: float = 0.0
    """Share of the quads held out instead of a file, in [0, 1); chosen by seed, split by prompt. The report's reliability
    diagram needs held-out quads."""
    views: tuple[Literal["trace", "empty"], ...] = ("trace", "empty")
    """Views that are trained on. With alpha 1 or 0 throughout the other view counts nothing and may be left out, which
    saves its compute (and its metrics)."""
    limit: int | None = None
    """Use only the first quads, at least 1; none uses all."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardModelConfig:
    """The reward model of the scorers 'armorm' and 'classifier', run in this process with its own chat template."""

    model: str = "RLHFlow/ArmoRM-Llama3-8B-v0.1"
    """Reward model: a local folder or a Hub name. Weights load from safetensors only."""
    revision: str | None = None
    """Hub branch, tag or commit of the reward model; none takes the default branch."""
    trust_remote_code: bool = False
    """Run Python code shipped with the reward model (scorer 'classifier' only). Only for sources you trust."""
    dtype: Literal["auto", "bf16", "fp32"] = "auto"
    """Precision of the weights; 'auto' takes bf16 on GPUs that have it, else fp32. A linear head runs in fp32."""
    device: str = "auto"
    """Device such as cuda, cuda:1 or cpu; 'auto' takes the GPU if there is one."""
    max_length: int | None = None
    """Longest conversation in tokens, >= 2; a longer one fails, it is never cut. none takes the model's own limit."""
    batch_tokens: int = 16384
    """Tokens of a batch, padding included, >= 1; a longer conversation goes alone. Never changes a score's meaning."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FunctionScorerConfig:
    """A Python function as the scorer."""

    path: str = ""
    """The function: 'package.module:name' or 'folder/file.py:name'. It takes (messages, answer) and returns a number
    or None; see docs/scoring.md."""
    batch_size: int | None = None
    """Answers per call, >= 1: the function then takes two lists and returns one. none calls it once per answer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class JudgeConfig:
    """A language model as the judge, behind any OpenAI-compatible endpoint."""

    model: str = ""
    """Name of the judge as the endpoint knows it; a dated version keeps scores comparable."""
    base_url: str = ""
    """Address of the endpoint, such as http://127.0.0.1:8000/v1; empty takes OPENAI_BASE_URL, else OpenAI's own."""
    api_key_env: str = "OPENAI_API_KEY"
    """Environment variable that holds the key. Keys are never read from files, logged or stored."""
    mode: Literal["pointwise", "pairwise"] = "pointwise"
    """'pointwise' rates each answer; 'pairwise' compares the answers to a prompt, each two in both orders, and scores
    the share of comparisons won."""
    template: str = ""
    """Text file with the judge's instructions, holding {prompt} and {answer} ({answer_a}, {answer_b}); empty takes ours."""
    pattern: str = ""
    """Regular expression with one group that finds the verdict in the reply; empty takes [[7]] or [[A]], [[B]], [[C]]."""
    rating_min: float = 1.0
    """Lowest rating of 'pointwise', >= 0; a rating outside the range is a failure."""
    rating_max: float = 10.0
    """Highest rating of 'pointwise', above the lowest."""
    temperature: float | None = 0.0
    """Sampling temperature of the judge, >= 0; none leaves it to the endpoint."""
    max_tokens: int | None = 1024
    """Longest reply in tokens, >= 1; none leaves it to the endpoint."""
    request: dict[str, Any] = field(default_factory=dict)
    """Any other field of the request body, such as request.seed or request.max_completion_tokens."""
    concurrency: int = 16
    """Requests in flight, >= 1."""
    retries: int = 5
    """Repeats of a request that failed for a passing reason (rate limit, connection, server error), >= 0."""
    timeout: float = 300.0
    """Seconds until a request counts as failed, > 0."""
    cache: str = ""
    """Folder of the judge's replies, to share between experiments; empty keeps them in the experiment's folder."""
    price_input: float | None = None
    """US dollars per million prompt tokens, >= 0, for the estimate before the run."""
    price_output: float | None = None
    """US dollars per million reply tokens, >= 0, for the estimate before the run."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreConfig:
    """Scoring: what tells a good final answer from a bad one. Only the answer is scored, never the trace."""

    scorer: Literal["armorm", "classifier", "function", "judge"] = "armorm"
    """'armorm': the multi-objective reward model of the paper; 'classifier': any reward model with one output;
    'function': your own; 'judge': a language model."""
    reward_model: RewardModelConfig = field(default_factory=RewardModelConfig)
    function: FunctionScorerConfig = field(default_factory=FunctionScorerConfig)
    judge: JudgeConfig = field(default_factory=JudgeConfig)


@dataclass(frozen=True, slots=True, kw_only=True)
class PairConfig:
    """Pairing: which of a prompt's scored responses become chosen and rejected, in each view by itself."""

    strategy: Literal["best_worst", "top_vs_random", "all_pairs"] = "best_worst"
    """'best_worst': highest against lowest score (the paper); 'top_vs_random': highest against a random other;
    'all_pairs': every two, widest margins first."""
    ties: Literal["drop", "shorter", "index"] = "drop"
    """What to do with equal scores: 'drop' and count, or prefer the 'shorter' answer or the lower sample 'index'."""
    min_margin: float = 0.0
    """Smallest difference of the two scores, >= 0; pairs below it are dropped and counted."""
    max_pairs: int | None = None
    """Most pairs of a prompt and view for 'all_pairs', >= 1; none keeps all."""
    no_answer: Literal["reject", "drop"] = "drop"
    """A response of the empty view without an answer: 'reject' lets it lose to every answer of its prompt, so that falling
    silent is taught against; 'drop' leaves it out (the paper). It is never chosen."""
    no_answer_trace: Literal["reject", "drop"] = "drop"
    """The same for the trace view, where most are traces that never closed: what is rejected is all that was sampled."""
    traces: int = 1
    """Most traces of each answer in a trace pair, >= 1; more than 1 are for train.trace_estimator 'traces'."""
    export: bool = True
    """Also write the pairs as TRL preference sets, one per view, into the folder preferences."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LossConfig:
    """The pairwise preference loss, applied to each view by itself. A parameter that the chosen loss does not read is
    refused when set away from its default."""

    name: str = "dpo"
    """Loss of each pair, a name from the registry bvpo.method.losses.LOSSES."""
    beta: float = 0.1
    """Scale of the implicit reward, > 0; larger keeps the policy nearer to the reference. Paper: 0.01 or 0.1."""
    label_smoothing: float = 0.0
    """Assumed share of swapped labels, in [0, 0.5)."""
    gamma: float = 1.0
    """Target margin of SimPO, >= 0, subtracted inside the sigmoid: sigmoid(beta * margin - gamma). SimPO's own code
    takes the ratio gamma / beta instead."""
    length_weight: float = 0.0
    """Weight of the length difference (R-DPO), >= 0, in reward per token."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AlphaConfig:
    """The mixing weight: alpha * (trace view's loss) + (1 - alpha) * (empty view's loss)."""

    schedule: Literal["constant", "linear", "cosine", "auto"] = "constant"
    """How alpha moves over the run: fixed, from 'value' to 'end' along a line or half a cosine, or 'auto': estimated from
    the gradients' noise near the reference, 'value' until then and beyond (docs/auto-alpha.md)."""
    value: float = 0.5
    """Alpha at the start, in [0, 1]: 1 trains on the trace view alone, 0 on the empty view alone."""
    end: float | None = None
    """Alpha at the last step, in [0, 1]; required by 'linear' and 'cosine', refused by 'constant' and 'auto'."""
    every: int | None = None
    """Optimizer steps between the looks of 'auto', >= 1; none takes train.telemetry_steps."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AnchorConfig:
    """An extra term that holds the policy's own text near the reference; composes with every loss and alpha."""

    kind: Literal["none", "nll", "kl"] = "none"
    """'nll': negative log-likelihood of the chosen response; 'kl': KL(reference || policy) summed over the tokens of both
    responses. Trace-view pairs only."""
    tokens: Literal["trace", "answer", "both"] = "trace"
    """Which tokens of the response are held."""
    weight: float = 0.0
    """Weight of the term, > 0 when a kind is chosen; the size of the loss's beta is a good start."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraSettings:
    """Low-rank adapters instead of full training."""

    enabled: bool = False
    """Train adapters only; the base model stays frozen."""
    rank: int = 16
    """Rank of the adapters, >= 1."""
    alpha: int = 32
    """LoRA's own scale (not the mixing weight), > 0; updates are multiplied by alpha / rank."""
    dropout: float = 0.0
    """Dropout before the adapters, in [0, 1)."""
    target_modules: tuple[str, ...] = ("all-linear",)
    """Modules that get an adapter: names, or 'all-linear'."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainConfig:
    """Training: what one optimizer step is, how it is computed, and what is written down."""

    quads_per_step: int = 128
    """Quads per optimizer step over all devices, >= 1: the effective batch size."""
    epochs: float = 1.0
    """Passes over the data, > 0; ignored when max_steps is set."""
    max_steps: int = -1
    """Optimizer steps, >= 1; -1 trains for 'epochs'."""
    learning_rate: float = 7e-7
    """Peak learning rate, > 0."""
    lr_scheduler: str = "cosine"
    """Learning-rate schedule, a transformers scheduler name."""
    warmup_ratio: float = 0.1
    """Share of the steps with a rising learning rate, in [0, 1]."""
    weight_decay: float = 0.0
    """AdamW weight decay, >= 0."""
    optimizer: str = "adamw"
    """Optimizer: 'adamw', or any name that TrainingArguments.optim knows."""
    adam_beta1: float = 0.9
    """Decay of AdamW's first moment, in [0, 1)."""
    adam_beta2: float = 0.999
    """Decay of AdamW's second moment, in [0, 1)."""
    adam_epsilon: float = 1e-8
    """AdamW's epsilon, > 0."""
    max_grad_norm: float = 1.0
    """Gradient norm above which gradients are scaled down, >= 0; 0 turns clipping off."""
    max_length: int = 4096
    """Longest prompt plus response in tokens, >= 2; longer ones are never cut, see over_long."""
    over_long: Literal["drop", "refuse"] = "drop"
    """What to do with a pair that has a response over max_length: drop and count it, or refuse to start."""
    score_empty_block: bool = True
    """Score the forced closing marker in the empty view, as the paper does; false scores the answer alone."""
    trace_estimator: Literal["joint", "answer", "traces"] = "joint"
    """What the trace view scores: trace and answer jointly (the paper), the answer given its trace, or the answer over
    all its traces in the pair (see pair.traces), weighted by their importance."""
    layout: Literal["auto", "tree", "packed", "padded", "single"] = "auto"
    """How sequences are laid out: 'tree' computes the shared prompt once; 'packed', 'padded' and 'single' do not."""
    tokens_per_micro_batch: int | None = None
    """Tokens per backward pass and device, >= 1; none takes one quad at a time. Splits a step, never changes it."""
    backward: Literal["micro_batch", "sequence"] = "micro_batch"
    """Graph held at once: a micro-batch, or one sequence at a time with cached gradients (slower, least memory)."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, more time."""
    precision: Literal["auto", "bf16", "fp32", "pure_bf16"] = "auto"
    """'bf16' is autocast over fp32 weights ('auto' takes it on GPUs that have it, else fp32). 'pure_bf16' weights lose
    most updates at small learning rates."""
    dropout: bool = False
    """Train with the dropout and router noise that the model has. Off, policy and reference compute the same."""
    reference: Literal["cached", "held", "adapter"] = "cached"
    """Reference log-probs: computed once and kept on disk, a second model in memory, or the base under the adapter."""
    reference_cache: str = ""
    """Folder of the cached reference log-probs; empty puts it into the output folder. Share it between runs."""
    last_step: Literal["keep", "drop"] = "keep"
    """What to do with the short last step of an epoch."""
    logging_steps: int = 10
    """Optimizer steps between log entries, >= 1."""
    eval: Literal["no", "epoch", "steps"] = "no"
    """When to evaluate on held-out quads."""
    eval_steps: int = 100
    """Optimizer steps between evaluations, >= 1, for eval = 'steps'."""
    save: Literal["no", "epoch", "steps"] = "epoch"
    """When to write a checkpoint to resume from; the final model is always written."""
    save_steps: int = 100
    """Optimizer steps between checkpoints, >= 1, for save = 'steps'."""
    save_total_limit: int | None = 2
    """Checkpoints to keep, >= 1, oldest deleted first; none keeps all."""
    report_to: tuple[str, ...] = ()
    """Trackers such as tensorboard or wandb; metrics.jsonl is always written."""
    head_chunk: int = 256
    """Tokens whose vocabulary scores exist at one time, >= 1: memory against speed, never the result."""
    telemetry_steps: int = 50
    """Optimizer steps between looks at the gradients' noise, >= 0, the first in step 1; 0 takes none. Never the result."""
    loss: LossConfig = field(default_factory=LossConfig)
    alpha: AlphaConfig = field(default_factory=AlphaConfig)
    anchor: AnchorConfig = field(default_factory=AnchorConfig)
    lora: LoraSettings = field(default_factory=LoraSettings)
    hf: dict[str, Any] = field(default_factory=dict)
    """Any other TrainingArguments field, by its own name, such as hf.torch_compile = true."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TinyConfig:
    """The tiny reasoning model that `bvpo tiny` makes: a real Qwen2 trained from scratch on two tasks."""

    tasks: tuple[Literal["add", "cups"], ...] = ("add", "cups")
    """What its problems are: 'add' adds numbers modulo a number, 'cups' follows a ball under cups that swap places."""
    modulus: int = 7
    """Modulus of 'add', in [2, 1000]: larger is harder, and a guess is right less often."""
    cups: int = 4
    """Number of cups, in [2, 8]."""
    chain_min: int = 2
    """Fewest numbers of a sum, or swaps of the cups, in [2, 10]."""
    chain_max: int = 4
    """Most numbers or swaps of the preference prompts, from chain_min to 10."""
    sft_chain_max: int = 5
    """Most numbers or swaps of the training examples, from chain_min to 10."""
    benchmark_min: int = 4
    """Fewest numbers or swaps of a benchmark problem, in [2, 10]."""
    benchmark_max: int = 5
    """Most numbers or swaps of a benchmark problem, from benchmark_min to 10."""
    filler: float = 0.5
    """Probability of another filler word before a step of a trace, in [0, 0.8]."""
    false_start: float = 0.15
    """Probability that a step of a trace is begun with a wrong result and taken back, in [0, 1]."""
    slip: float = 0.05
    """Probability that a step of a trace ends in a wrong result that is not taken back, in [0, 0.5]: what alignment can
    repair or make worse."""
    recheck: float = 0.35
    """Probability that a trace goes through all steps a second time, in [0, 1]."""
    empty_fraction: float = 0.4
    """Share of the training examples with an empty trace, in [0, 1]: what NoThinking is learned from."""
    hidden: int = 64
    """Width of the model, >= 8; a multiple of 2 * heads."""
    layers: int = 2
    """Layers, >= 1."""
    heads: int = 4
    """Attention heads, >= 1."""
    mlp: int = 168
    """Width of the feed-forward part, >= 8."""
    steps: int = 2000
    """Steps of supervised training, >= 1."""
    batch_size: int = 16
    """Examples of a step, >= 1."""
    learning_rate: float = 3e-3
    """Peak learning rate of the supervised training, > 0; warm-up over a tenth of the steps, then a cosine."""
    seed: int = 2
    """Seed of weights, corpus, prompts and benchmark, in [0, 2**32). Not every seed learns both tasks equally well."""
    num_prompts: int = 8000
    """Preference prompts that are written, >= 1, all different."""
    num_tuning: int = 2000
    """Further preference prompts, >= 1, none of them among the others: what settings may be tuned on."""
    num_benchmark: int = 400
    """Benchmark problems that are written, >= 1; neither the corpus nor the preference prompts hold any of them."""
    threads: int = 1
    """CPU threads of the training, >= 1; the weights depend on it in their last digits, so it is part of the cache's key."""
    device: str = "cpu"
    """Where the training runs: cpu, cuda or cuda:1."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchmarkConfig:
    """One benchmark: a table [evaluate.benchmarks.NAME]."""

    source: str
    """Prompts: any source that prompts.sources takes, or 'split:NAME' for that split of the experiment's own prompts. The
    field 'id' of a row names it, and its other fields (such as 'reference') are the metadata that functions may take."""
    scorer: Literal["experiment", "function"] = "experiment"
    """What gives the main metric: the scorer of [score], or a function of the benchmark's own."""
    function: str = ""
    """The function of scorer 'function': 'package.module:name' or 'folder/file.py:name', as in score.function.path."""
    metric: str = "score"
    """Name of the main metric, such as reward or accuracy."""
    more: dict[str, Any] = field(default_factory=dict)
    """Further metrics, each a function: more.correct = 'package.module:name'."""
    unclosed: dict[str, Any] = field(default_factory=dict)
    """What a response without an answer (its trace never closed, or nothing follows it) counts in a metric: a number, or
    'none' to leave it out and count it, such as unclosed.reward = -3.0. Unless set, evaluate.no_answer says it."""
    num_samples: int | None = None
    """Samples per prompt and mode, >= 1, instead of evaluate.num_samples."""
    temperature: float | None = None
    """Sampling temperature, >= 0, instead of evaluate.temperature."""
    max_new_tokens: int | None = None
    """Longest response in tokens, >= 1, instead of evaluate.max_new_tokens."""
    limit: int | None = None
    """Use only the first prompts, >= 1."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluateConfig:
    """Evaluation of a model on benchmarks in both modes: Thinking (trace view) and NoThinking (empty view)."""

    model: str = ""
    """Model to evaluate: empty takes the experiment's train/final, 'base' takes model.path, else a folder or Hub name."""
    folder: str = "eval"
    """Folder of the results inside the experiment's; another model needs another one, such as eval_base."""
    modes: tuple[Literal["thinking", "nothinking"], ...] = ("thinking", "nothinking")
    """Which modes are evaluated; one may be added later."""
    num_samples: int = 1
    """Samples per prompt and mode, >= 1: metrics are averages over them (avg@k), and 0/1 metrics get pass@k as well."""
    temperature: float = 0.6
    """Sampling temperature, >= 0."""
    top_p: float = 1.0
    """Share of the probability that nucleus sampling keeps, in (0, 1]; 1 keeps all."""
    max_new_tokens: int = 8192
    """Longest response in tokens, >= 1; a trace that is cut has no answer."""
    no_answer: Literal["count", "drop"] = "count"
    """Responses without an answer: 'count' takes what a function says of the empty text, and the lowest score where the
    scorer is a judge or a reward model; 'drop' leaves them out, and every line then says how many."""
    benchmarks: dict[str, Any] = field(default_factory=dict)
    """The benchmarks: a table [evaluate.benchmarks.NAME] for each; docs/evaluation.md lists its keys. Engine and scorer are
    those of [sample] and [score]."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TuneConfig:
    """Tuning of a comparison (`bvpo run CONFIG --tune`): every method gets a grid, on seeds and prompts of its own."""

    seeds: tuple[int, ...] = ()
    """Seeds of the tuning runs, none of them in run.seeds."""
    final_seeds: tuple[int, ...] = ()
    """Further seeds, on which only the best cells of each method run; the best by all seeds is chosen. Few seeds alone pick
    what was lucky on them."""
    finalists: int = 3
    """Cells of each method that go on to final_seeds, >= 1."""
    grid: dict[str, Any] = field(default_factory=dict)
    """Settings and the values to try, every combination: grid."train.loss.beta" = [0.1, 0.5]. Settings joined by '+' take
    the same value."""
    grids: dict[str, Any] = field(default_factory=dict)
    """A grid for one method instead, by its name, such as grids.simpo."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Settings that only the tuning runs have, such as settings.prompts.sources for prompts of their own."""
    objective: tuple[str, ...] = ()
    """What is made large: 'benchmark/mode/metric', such as chat/thinking/reward; several are averaged."""
    same: dict[str, Any] = field(default_factory=dict)
    """Methods that take another's tuned values instead of a grid, such as same.dpo-tokens = 'dpo'."""
    file: str = ""
    """TOML file of the tuned values: written by --tune with its log beside it, read by every run. Empty reads none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunConfig:
    """`bvpo run`: which stages one command runs, and the comparison of several methods over several seeds."""

    stages: tuple[str, ...] = ("prompts", "sample", "score", "pair", "train", "evaluate")
    """Verbs of the chain, in their order; each is skipped when it is finished, 'evaluate' also without benchmarks."""
    seeds: tuple[int, ...] = ()
    """Seeds of a comparison: each has its own prompts, samples, pairs and runs. Empty takes num_seeds of them."""
    num_seeds: int = 1
    """Number of seeds, >= 1, counted up from the experiment's own; read when seeds is empty."""
    methods: dict[str, Any] = field(default_factory=dict)
    """Methods to compare: a partial config for each, such as methods.dpo.train.alpha.value = 1.0. The chain up to pairing
    runs once per seed, training and evaluation once per seed and method. Empty runs the chain once."""
    baseline: str = ""
    """The method that the others are compared with, prompt by prompt; empty takes the first that is trained."""
    declared: dict[str, Any] = field(default_factory=dict)
    """Comparisons that are declared before the seeds run: a table [run.declared.NAME] with better and than (methods) and on
    (benchmark/mode/metric). The report says what became of each, at intervals that hold for all of them together."""
    workers: int | None = None
    """Processes that work at the same time, >= 1; none takes one per CPU core, or one where there is a GPU."""
    tune: TuneConfig = field(default_factory=TuneConfig)


@dataclass(frozen=True, slots=True, kw_only=True)
class ExperimentConfig:
    """One experiment: one folder, one config."""

    name: str
    """Name of the experiment and of its folder."""
    root: str = "experiments"
    """Folder that holds the experiment's folder."""
    seed: int = 42
    """Seed of everything random, in [0, 2**32)."""
    model: ModelConfig
    prompts: PromptsConfig = field(default_factory=PromptsConfig)
    sample: SampleConfig = field(default_factory=SampleConfig)
    score: ScoreConfig = field(default_factory=ScoreConfig)
    pair: PairConfig = field(default_factory=PairConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    tiny: TinyConfig = field(default_factory=TinyConfig)
    run: RunConfig = field(default_factory=RunConfig)


def load_config(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> ExperimentConfig:
    """Defaults < TOML file < ``--section.field value`` overrides, checked; errors name ``path:line`` or the flag."""
    layers: list[Layer] = [read_toml(ExperimentConfig, path), parse_flags(ExperimentConfig, overrides)]
    config = build(ExperimentConfig, layers)
    try:
        validate(config)
    except FieldError as error:
        raise error.at(place_of(error.field, layers)) from None
    return config


# ---------------------------------------------------------------------------------------------------------------------
# ranges and combinations

Check = tuple[Callable[[Any], bool], str]


def _at_least(low: float) -> Check:
    return (lambda v: v >= low), f"{low:g} or more"


def _between(low: float, high: float) -> Check:
    return (lambda v: low <= v <= high), f"a number from {low:g} to {high:g}"


def _below(low: float, high: float) -> Check:
    return (lambda v: low <= v < high), f"a number from {low:g} to below {high:g}"


def _is_shard(text: str) -> bool:
    part, slash, parts = text.partition("/")
    return bool(slash) and part.isdecimal() and parts.isdecimal() and int(part) < int(parts)


_POSITIVE: Check = ((lambda v: v > 0), "a number above 0")
_NAME: Check = ((lambda v: v not in ("", ".", "..") and not set(v) & set("/\\:\0\n")), "a folder name without / \\ :")
_FILLED: Check = ((lambda v: bool(v)), "something")

RANGES: dict[type, dict[str, Check]] = {
    ExperimentConfig: {"name": _NAME, "root": _FILLED, "seed": ((lambda v: 0 <= v < 2**32), "0 to 4294967295")},
    ModelConfig: {"path": _FILLED, "format": _FILLED, "revision": _FILLED, "tokenizer": _FILLED},
    PromptsConfig: {
        "sources": ((lambda v: all(v)), "file names or Hub names"),
        "split": _FILLED,
        "column": _FILLED,
        "max_chars": _at_least(1),
        "max_tokens": _at_least(1),
        "near_duplicates": ((lambda v: 0 < v <= 1), "a number above 0, up to 1"),
        "shingle_words": _at_least(1),
        "decontaminate": ((lambda v: all(v)), "file names or patterns"),
        "decontaminate_fields": ((lambda v: all(v)), "names of fields"),
        "ngram_words": _at_least(2),
        "validation_fraction": _below(0, 1),
        "test_fraction": _below(0, 1),
        "count": _at_least(1),
    },
    SampleConfig: {
        "engine": _FILLED,
        "endpoints": ((lambda v: all(v)), "addresses"),
        "views": ((lambda v: bool(v) and len(set(v)) == len(v)), "one or both of trace and empty, each once"),
        "num_samples": _at_least(1),
        "temperature": _at_least(0),
        "top_p": ((lambda v: 0 < v <= 1), "a number above 0, up to 1"),
        "top_k": _at_least(0),
        "max_new_tokens": _at_least(1),
        "splits": ((lambda v: all(v)), "names of splits"),
        "shard": ((lambda v: not v or _is_shard(v)), "a part such as 0/4, from 0/4 to 3/4"),
    },
    DataConfig: {
        "views": ((lambda v: bool(v) and len(set(v)) == len(v)), "one or both of trace and empty, each once"),
        "trace_split": _FILLED,
        "empty_split": _FILLED,
        "eval_fraction": _below(0, 1),
        "limit": _at_least(1),
    },
    RewardModelConfig: {
        "model": _FILLED,
        "revision": _FILLED,
        "device": _FILLED,
        "max_length": _at_least(2),
        "batch_tokens": _at_least(1),
    },
    FunctionScorerConfig: {"batch_size": _at_least(1)},
    JudgeConfig: {
        "base_url": (
            (lambda v: not v or (v.startswith(("http://", "https://")) and "@" not in v)),
            "an address with http:// or https:// and without a password",
        ),
        "api_key_env": _FILLED,
        "rating_min": _at_least(0),
        "rating_max": _POSITIVE,
        "temperature": _at_least(0),
        "max_tokens": _at_least(1),
        "concurrency": _at_least(1),
        "retries": _at_least(0),
        "timeout": _POSITIVE,
        "price_input": _at_least(0),
        "price_output": _at_least(0),
    },
    PairConfig: {"min_margin": _at_least(0), "max_pairs": _at_least(1), "traces": _at_least(1)},
    LossConfig: {
        "name": _FILLED,
        "beta": _POSITIVE,
        "label_smoothing": _below(0, 0.5),
        "gamma": _at_least(0),
        "length_weight": _at_least(0),
    },
    AlphaConfig: {"value": _between(0, 1), "end": _between(0, 1), "every": _at_least(1)},
    AnchorConfig: {"weight": _at_least(0)},
    LoraSettings: {
        "rank": _at_least(1),
        "alpha": _POSITIVE,
        "dropout": _below(0, 1),
        "target_modules": ((lambda v: bool(v) and all(v)), "at least one module name"),
    },
    TrainConfig: {
        "quads_per_step": _at_least(1),
        "epochs": _POSITIVE,
        "max_steps": ((lambda v: v == -1 or v >= 1), "1 or more, or -1"),
        "learning_rate": _POSITIVE,
        "lr_scheduler": _FILLED,
        "warmup_ratio": _between(0, 1),
        "weight_decay": _at_least(0),
        "optimizer": _FILLED,
        "adam_beta1": _below(0, 1),
        "adam_beta2": _below(0, 1),
        "adam_epsilon": _POSITIVE,
        "max_grad_norm": _at_least(0),
        "max_length": _at_least(2),
        "tokens_per_micro_batch": _at_least(1),
        "logging_steps": _at_least(1),
        "eval_steps": _at_least(1),
        "save_steps": _at_least(1),
        "save_total_limit": _at_least(1),
        "report_to": ((lambda v: all(v)), "names of trackers"),
        "head_chunk": _at_least(1),
        "telemetry_steps": _at_least(0),
    },
    EvaluateConfig: {
        "folder": _NAME,
        "modes": ((lambda v: bool(v) and len(set(v)) == len(v)), "one or both of thinking and nothinking, each once"),
        "num_samples": _at_least(1),
        "temperature": _at_least(0),
        "top_p": ((lambda v: 0 < v <= 1), "a number above 0, up to 1"),
        "max_new_tokens": _at_least(1),
    },
    TinyConfig: {
        "tasks": ((lambda v: bool(v) and len(set(v)) == len(v)), "one or both of add and cups, each once"),
        "modulus": _between(2, 1000),
        "cups": _between(2, 8),
        "chain_min": _between(2, 10),
        "chain_max": _between(2, 10),
        "sft_chain_max": _between(2, 10),
        "benchmark_min": _between(2, 10),
        "benchmark_max": _between(2, 10),
        "filler": _between(0, 0.8),
        "false_start": _between(0, 1),
        "slip": _between(0, 0.5),
        "recheck": _between(0, 1),
        "empty_fraction": _between(0, 1),
        "hidden": _at_least(8),
        "layers": _at_least(1),
        "heads": _at_least(1),
        "mlp": _at_least(8),
        "steps": _at_least(1),
        "batch_size": _at_least(1),
        "learning_rate": _POSITIVE,
        "seed": ((lambda v: 0 <= v < 2**32), "0 to 4294967295"),
        "num_prompts": _at_least(1),
        "num_tuning": _at_least(1),
        "num_benchmark": _at_least(1),
        "threads": _at_least(1),
        "device": _FILLED,
    },
    RunConfig: {
        "stages": ((lambda v: bool(v) and all(v)), "names of verbs"),
        "num_seeds": _at_least(1),
        "workers": _at_least(1),
    },
    TuneConfig: {"finalists": _at_least(1)},
}
"""What a set value must fulfil beyond its type; ``None`` (not set) always passes. One entry per section class."""


def validate(config: Any) -> None:
    """Raises :class:`FieldError` for a value out of range or settings that contradict each other.

    Takes the whole config or any section of it, so a config built in Python is checked by the same rules.
    """
    _validate_ranges(config, "")
    _validate_together(config, "")


def _validate_ranges(config: Any, prefix: str) -> None:
    checks = RANGES.get(type(config), {})
    for f in fields(config):
        value, path = getattr(config, f.name), f"{prefix}{f.name}"
        if is_dataclass(value):
            _validate_ranges(value, f"{path}.")
            continue
        if value is None or f.name not in checks:
            continue
        passes, expected = checks[f.name]
        if not passes(value):
            raise FieldError("", path, f"field {path!r}: got {show(value)}, expected {expected}")


def _validate_together(config: Any, prefix: str) -> None:
    for f in fields(config):
        if is_dataclass(getattr(config, f.name)):
            _validate_together(getattr(config, f.name), f"{prefix}{f.name}.")
    for name, problem in _contradictions(config):
        raise FieldError("", f"{prefix}{name}", f"field '{prefix}{name}': {problem}")


def _contradictions(config: Any) -> list[tuple[str, str]]:
    """(field, problem) pairs of one section; a setting that nothing would read counts as a contradiction."""
    own = _SECTION_CHECKS.get(type(config))
    found = own(config) if own else []
    match config:
        case AlphaConfig(schedule="constant" | "auto" as schedule, end=end) if end is not None:
            problem = f"got {show(end)}, but schedule {schedule!r} never reads it; set schedule or leave it out"
            found.append(("end", problem))
        case AlphaConfig(schedule=schedule, every=every) if every is not None and schedule != "auto":
            found.append(("every", f"got {show(every)}, but schedule {schedule!r} never reads it; set it to 'auto'"))
        case AlphaConfig(schedule="linear" | "cosine" as schedule, end=None):
            found.append(("end", f"not set, but schedule {schedule!r} needs the final alpha"))
        case AnchorConfig(kind="none", weight=weight) if weight > 0:
            found.append(("weight", f"got {show(weight)}, but kind 'none' never reads it; set kind to 'nll' or 'kl'"))
        case AnchorConfig(kind=kind, weight=0) if kind != "none":
            found.append(("weight", f"got 0, but kind {kind!r} needs a weight above 0"))
        case PromptsConfig(decontaminate=(), decontaminate_fields=fields_) if fields_:
            found.append(("decontaminate_fields", "set, but no benchmark files are: set decontaminate or leave it out"))
        case PromptsConfig(validation_fraction=validation, test_fraction=test) if validation + test >= 1:
            problem = f"got {show(test)}, which with validation_fraction leaves nothing to train on"
            found.append(("test_fraction", problem))
        case ExperimentConfig():
            held_out = bool(config.data.eval_quads) or config.data.eval_fraction > 0
            if config.train.eval != "no" and not held_out:
                problem = (
                    f"got {config.train.eval!r}, but no quads are held out; set data.eval_quads or data.eval_fraction"
                )
                found.append(("train.eval", problem))
            found += _view_contradictions(config)
    return found


def _view_contradictions(config: ExperimentConfig) -> list[tuple[str, str]]:
    """One view alone needs all the weight: alpha 1 or 0 throughout."""
    alpha, views = config.train.alpha, config.data.views
    needed = 1.0 if views == ("trace",) else 0.0
    if len(views) == 2 or (alpha.schedule == "constant" and alpha.value == needed):
        return []
    problem = f"got only {views[0]!r}, which needs train.alpha.value = {needed:g} and its schedule 'constant'"
    return [("data.views", problem)]


_ENGINE_OPTIONS_FROM_ELSEWHERE = {
    "endpoints": "sample.endpoints",
    "revision": "model.revision",
    "tokenizer": "model.tokenizer",
    "trust_remote_code": "model.trust_remote_code",
    "format": "model.format",
}


def _sample_contradictions(sample: SampleConfig) -> list[tuple[str, str]]:
    found: list[tuple[str, str]] = []
    if sample.engine == "openai" and not sample.endpoints:
        found.append(("endpoints", "not set, but engine 'openai' needs the addresses of its servers"))
    if sample.engine != "openai" and sample.endpoints:
        found.append(("endpoints", f"set, but engine {sample.engine!r} never reads it; set engine to 'openai'"))
    for key in sample.options:
        # the one engine whose model has a name of its own: what the servers call it
        own = "model.path" if key == "model" and sample.engine != "openai" else _ENGINE_OPTIONS_FROM_ELSEWHERE.get(key)
        if own:
            found.append((f"options.{key}", f"is set by bvpo itself; write {own} instead"))
    return found


def _data_contradictions(data: DataConfig) -> list[tuple[str, str]]:
    found: list[tuple[str, str]] = []
    if data.quads and (data.trace or data.empty):
        found.append(("quads", "set together with data.trace or data.empty; choose quads or preference sets"))
    if data.eval_quads and data.eval_fraction > 0:
        found.append(("eval_fraction", "set together with data.eval_quads; choose one"))
    return found


_SCORER_SECTIONS = {"armorm": "reward_model", "classifier": "reward_model", "function": "function", "judge": "judge"}


def _score_contradictions(score: ScoreConfig) -> list[tuple[str, str]]:
    """Settings of a scorer that is not used, and what the used one cannot do without."""
    used = _SCORER_SECTIONS[score.scorer]
    found: list[tuple[str, str]] = []
    for section in sorted(set(_SCORER_SECTIONS.values()) - {used}):
        given = getattr(score, section)
        for f in fields(given):
            if getattr(given, f.name) != getattr(type(given)(), f.name):
                found.append((f"{section}.{f.name}", f"set, but scorer {score.scorer!r} never reads it"))
    if score.scorer == "function" and not score.function.path:
        found.append(("function.path", "not set, but scorer 'function' needs it"))
    if score.scorer == "judge" and not score.judge.model:
        found.append(("judge.model", "not set, but scorer 'judge' needs it"))
    if score.scorer == "classifier" and score.reward_model.model == RewardModelConfig().model:
        found.append(("reward_model.model", "not set, but scorer 'classifier' needs a model with one output"))
    if score.scorer == "armorm" and score.reward_model.trust_remote_code:
        found.append(("reward_model.trust_remote_code", "set, but scorer 'armorm' never runs the model's own code"))
    return found


def _tiny_contradictions(tiny: TinyConfig) -> list[tuple[str, str]]:
    found: list[tuple[str, str]] = []
    for low, high in (("chain_min", "chain_max"), ("chain_min", "sft_chain_max"), ("benchmark_min", "benchmark_max")):
        if getattr(tiny, high) < getattr(tiny, low):
            problem = f"got {getattr(tiny, high)}, expected at least {low}, which is {getattr(tiny, low)}"
            found.append((high, problem))
    if tiny.hidden % (2 * tiny.heads):
        found.append(("hidden", f"got {tiny.hidden}, expected a multiple of 2 * heads, which is {2 * tiny.heads}"))
    return found


def _pair_contradictions(pair: PairConfig) -> list[tuple[str, str]]:
    found: list[tuple[str, str]] = []
    if pair.max_pairs is not None and pair.strategy != "all_pairs":
        found.append(("max_pairs", f"got {pair.max_pairs}, but strategy {pair.strategy!r} never reads it"))
    if pair.ties != "drop" and pair.min_margin > 0:
        found.append(("ties", f"got {pair.ties!r}, but min_margin {pair.min_margin:g} already drops every tie"))
    return found


def _judge_contradictions(judge: JudgeConfig) -> list[tuple[str, str]]:
    found: list[tuple[str, str]] = []
    if judge.mode == "pairwise":
        for name in ("rating_min", "rating_max"):
            if getattr(judge, name) != getattr(JudgeConfig(), name):
                found.append((name, "set, but mode 'pairwise' never reads it"))
    elif judge.rating_max <= judge.rating_min:
        found.append(("rating_max", f"got {judge.rating_max:g}, expected more than rating_min {judge.rating_min:g}"))
    for key in judge.request:
        if key in ("model", "messages", "temperature", "max_tokens", "n", "stream"):
            found.append((f"request.{key}", "is set by bvpo itself; leave it out"))
    return found


def _train_contradictions(train: TrainConfig) -> list[tuple[str, str]]:
    found: list[tuple[str, str]] = []
    if train.alpha.schedule == "auto" and not (train.alpha.every or train.telemetry_steps):
        found.append(("telemetry_steps", "got 0, but alpha.schedule 'auto' needs looks; set it, or alpha.every"))
    if train.reference == "adapter" and not train.lora.enabled:
        found.append(("reference", "got 'adapter', but lora.enabled is false: there is no adapter to turn off"))
    own = {f.name for f in fields(TrainConfig)}
    for key, value in train.hf.items():
        if key in own:
            found.append((f"hf.{key}", f"is a setting of bvpo itself; write train.{key} instead"))
        elif value is None:
            found.append((f"hf.{key}", "got null, which TOML cannot hold; leave the entry out"))
    return found


_BENCHMARK_RANGES: dict[str, Check] = {
    "source": _FILLED,
    "metric": _FILLED,
    "num_samples": _at_least(1),
    "temperature": _at_least(0),
    "max_new_tokens": _at_least(1),
    "limit": _at_least(1),
}


def benchmarks_of(evaluate: EvaluateConfig) -> dict[str, BenchmarkConfig]:
    """Name -> benchmark, of a config that was checked."""
    return {name: from_dict(BenchmarkConfig, table) for name, table in evaluate.benchmarks.items()}


def _evaluate_contradictions(evaluate: EvaluateConfig) -> list[tuple[str, str]]:
    """Free tables in the eyes of the overlay, so types and ranges of benchmarks are checked here."""
    found: list[tuple[str, str]] = []
    if evaluate.folder in _EXPERIMENT_FOLDERS:
        found.append(("folder", f"got {evaluate.folder!r}, which holds something else; choose another name"))
    for name, table in evaluate.benchmarks.items():
        where = f"benchmarks.{name}"
        if not _NAME[0](name):
            found.append((where, f"expected {_NAME[1]} as the name of a benchmark"))
            continue
        try:
            benchmark = convert(BenchmarkConfig, table)
        except FieldError as error:
            problem = error.problem.removeprefix(f"field {error.field!r}: ")
            found.append((f"{where}.{error.field}".rstrip("."), problem))
            continue
        for key, (passes, expected) in _BENCHMARK_RANGES.items():
            value = getattr(benchmark, key)
            if value is not None and not passes(value):
                found.append((f"{where}.{key}", f"got {show(value)}, expected {expected}"))
        found += [(f"{where}.{key}", problem) for key, problem in _benchmark_contradictions(benchmark)]
    return found


_EXPERIMENT_FOLDERS = ("samples", "scores", "judge", "train", "preferences")


def _benchmark_contradictions(benchmark: BenchmarkConfig) -> list[tuple[str, str]]:
    found: list[tuple[str, str]] = []
    if benchmark.scorer == "function" and not benchmark.function:
        found.append(("function", "not set, but scorer 'function' needs it"))
    if benchmark.scorer != "function" and benchmark.function:
        found.append(("function", f"set, but scorer {benchmark.scorer!r} never reads it; set scorer to 'function'"))
    for metric, path in benchmark.more.items():
        if metric == benchmark.metric:
            found.append((f"more.{metric}", "has the name of the main metric; choose another"))
        elif not isinstance(path, str) or ":" not in path:
            found.append((f"more.{metric}", f"got {show(path)}, expected 'package.module:name' or 'file.py:name'"))
    metrics = (benchmark.metric, *benchmark.more)
    for metric, value in benchmark.unclosed.items():
        if metric not in metrics:
            found.append((f"unclosed.{metric}", f"is no metric of this benchmark{did_you_mean(metric, metrics)}"))
        elif value != UNSET and (isinstance(value, bool) or not isinstance(value, int | float)):
            found.append((f"unclosed.{metric}", f"got {show(value)}, expected a number or {UNSET!r}"))
    return found


_SECTION_CHECKS: dict[type, Callable[[Any], list[tuple[str, str]]]] = {
    SampleConfig: _sample_contradictions,
    DataConfig: _data_contradictions,
    ScoreConfig: _score_contradictions,
    JudgeConfig: _judge_contradictions,
    PairConfig: _pair_contradictions,
    TinyConfig: _tiny_contradictions,
    TrainConfig: _train_contradictions,
    EvaluateConfig: _evaluate_contradictions,
}
