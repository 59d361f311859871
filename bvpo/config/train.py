"""[train]: the loss, alpha, the anchor, adapters, and what one optimizer step is. BVPOConfig is made from these fields."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Annotated, Any, Literal

from bvpo.config.ranges import FILLED, FREE, POSITIVE, Argument, Problems, Range, all_filled, at_least, below, between
from bvpo.strict import show


@dataclass(frozen=True, slots=True, kw_only=True)
class LossConfig:
    """The pairwise preference loss, applied to each view by itself. A parameter that the chosen loss does not read is
    refused when set away from its default."""

    name: Annotated[str, FILLED, Argument("loss")] = "dpo"
    """Loss of each pair, a name from the registry bvpo.method.losses.LOSSES."""
    beta: Annotated[float, POSITIVE] = 0.1
    """Scale of the implicit reward, > 0; larger keeps the policy nearer to the reference. Paper: 0.01 or 0.1."""
    label_smoothing: Annotated[float, below(0, 0.5)] = 0.0
    """Assumed share of swapped labels, in [0, 0.5)."""
    gamma: Annotated[float, at_least(0)] = 1.0
    """Target margin of SimPO, >= 0, subtracted inside the sigmoid: sigmoid(beta * margin - gamma). SimPO's own code
    takes the ratio gamma / beta instead."""
    length_weight: Annotated[float, at_least(0)] = 0.0
    """Weight of the length difference (R-DPO), >= 0, in reward per token."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AlphaConfig:
    """The mixing weight: alpha * (trace view's loss) + (1 - alpha) * (empty view's loss)."""

    schedule: Annotated[Literal["constant", "linear", "cosine", "auto"], Argument("alpha_schedule")] = "constant"
    """How alpha moves over the run: fixed, from 'value' to 'end' along a line or half a cosine, or 'auto': estimated from
    the gradients' noise near the reference, 'value' until then and beyond (docs/auto-alpha.md)."""
    value: Annotated[float, between(0, 1), Argument("alpha")] = 0.5
    """Alpha at the start, in [0, 1]: 1 trains on the trace view alone, 0 on the empty view alone."""
    end: Annotated[float | None, between(0, 1), Argument("alpha_end")] = None
    """Alpha at the last step, in [0, 1]; required by 'linear' and 'cosine', refused by 'constant' and 'auto'."""
    every: Annotated[int | None, at_least(1), Argument("alpha_every"), FREE] = None
    """Optimizer steps between the looks of 'auto', >= 1; none takes train.telemetry_steps."""

    def contradictions(self) -> Problems:
        moves = self.schedule in ("linear", "cosine")
        if self.end is not None and not moves:
            problem = (
                f"got {show(self.end)}, but schedule {self.schedule!r} never reads it; set schedule or leave it out"
            )
            yield "end", problem
        if self.every is not None and self.schedule != "auto":
            yield "every", f"got {show(self.every)}, but schedule {self.schedule!r} never reads it; set it to 'auto'"
        if self.end is None and moves:
            yield "end", f"not set, but schedule {self.schedule!r} needs the final alpha"


@dataclass(frozen=True, slots=True, kw_only=True)
class AnchorConfig:
    """An extra term that holds the policy's own text near the reference; composes with every loss and alpha."""

    kind: Annotated[Literal["none", "nll", "kl"], Argument("anchor")] = "none"
    """'nll': negative log-likelihood of the chosen response; 'kl': KL(reference || policy) summed over the tokens of both
    responses. Trace-view pairs only."""
    tokens: Annotated[Literal["trace", "answer", "both"], Argument("anchor_tokens")] = "trace"
    """Which tokens of the response are held."""
    weight: Annotated[float, at_least(0), Argument("anchor_weight")] = 0.0
    """Weight of the term, > 0 when a kind is chosen; the size of the loss's beta is a good start."""

    def contradictions(self) -> Problems:
        if self.kind == "none" and self.weight > 0:
            problem = f"got {show(self.weight)}, but kind 'none' never reads it; set kind to 'nll' or 'kl'"
            yield "weight", problem
        if self.kind != "none" and self.weight == 0:
            yield "weight", f"got 0, but kind {self.kind!r} needs a weight above 0"


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraSettings:
    """Low-rank adapters instead of full training."""

    enabled: bool = False
    """Train adapters only; the base model stays frozen."""
    rank: Annotated[int, at_least(1)] = 16
    """Rank of the adapters, >= 1."""
    alpha: Annotated[int, POSITIVE] = 32
    """LoRA's own scale (not the mixing weight), > 0; updates are multiplied by alpha / rank."""
    dropout: Annotated[float, below(0, 1)] = 0.0
    """Dropout before the adapters, in [0, 1)."""
    target_modules: Annotated[tuple[str, ...], Range(lambda v: bool(v) and all(v), "at least one module name")] = (
        "all-linear",
    )
    """Modules that get an adapter: names, or 'all-linear'."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainConfig:
    """Training: what one optimizer step is, how it is computed, and what is written down."""

    quads_per_step: Annotated[int, at_least(1)] = 128
    """Quads per optimizer step over all devices, >= 1: the effective batch size."""
    epochs: Annotated[float, POSITIVE, Argument("num_train_epochs")] = 1.0
    """Passes over the data, > 0; ignored when max_steps is set."""
    max_steps: Annotated[int, Range(lambda v: v == -1 or v >= 1, "1 or more, or -1")] = -1
    """Optimizer steps, >= 1; -1 trains for 'epochs'."""
    learning_rate: Annotated[float, POSITIVE] = 7e-7
    """Peak learning rate, > 0."""
    lr_scheduler: Annotated[str, FILLED, Argument("lr_scheduler_type")] = "cosine"
    """Learning-rate schedule, a transformers scheduler name."""
    warmup_ratio: Annotated[float, between(0, 1), Argument("warmup_steps")] = 0.1
    """Share of the steps with a rising learning rate, in [0, 1]."""
    weight_decay: Annotated[float, at_least(0)] = 0.0
    """AdamW weight decay, >= 0."""
    optimizer: Annotated[str, FILLED, Argument("optim", theirs=True)] = "adamw"
    """Optimizer: 'adamw', or any name that TrainingArguments.optim knows."""
    adam_beta1: Annotated[float, below(0, 1)] = 0.9
    """Decay of AdamW's first moment, in [0, 1)."""
    adam_beta2: Annotated[float, below(0, 1)] = 0.999
    """Decay of AdamW's second moment, in [0, 1)."""
    adam_epsilon: Annotated[float, POSITIVE] = 1e-8
    """AdamW's epsilon, > 0."""
    max_grad_norm: Annotated[float, at_least(0)] = 1.0
    """Gradient norm above which gradients are scaled down, >= 0; 0 turns clipping off."""
    max_length: Annotated[int, at_least(2)] = 4096
    """Longest prompt plus response in tokens, >= 2; longer ones are never cut, see over_long."""
    over_long: Literal["drop", "refuse"] = "drop"
    """What to do with a pair that has a response over max_length: drop and count it, or refuse to start."""
    score_empty_block: bool = True
    """Score the forced closing marker in the empty view, as the paper does; false scores the answer alone."""
    trace_estimator: Literal["joint", "answer", "traces"] = "joint"
    """What the trace view scores: trace and answer jointly (the paper), the answer given its trace, or the answer over
    all its traces in the pair (see pair.traces), weighted by their importance."""
    layout: Annotated[Literal["auto", "tree", "packed", "padded", "single"], FREE] = "auto"
    """How sequences are laid out: 'tree' computes the shared prompt once; 'packed', 'padded' and 'single' do not."""
    tokens_per_micro_batch: Annotated[int | None, at_least(1), FREE] = None
    """Tokens per backward pass and device, >= 1; none takes one quad at a time. Splits a step, never changes it."""
    backward: Annotated[Literal["micro_batch", "sequence"], FREE] = "micro_batch"
    """Graph held at once: a micro-batch, or one sequence at a time with cached gradients (slower, least memory)."""
    gradient_checkpointing: Annotated[bool, Argument("gradient_checkpointing", theirs=True), FREE] = False
    """Recompute activations in the backward pass: less memory, more time."""
    precision: Literal["auto", "bf16", "fp32", "pure_bf16"] = "auto"
    """'bf16' is autocast over fp32 weights ('auto' takes it on GPUs that have it, else fp32). 'pure_bf16' weights lose
    most updates at small learning rates."""
    dropout: bool = False
    """Train with the dropout and router noise that the model has. Off, policy and reference compute the same."""
    reference: Annotated[Literal["cached", "held", "adapter"], FREE] = "cached"
    """Reference log-probs: computed once and kept on disk, a second model in memory, or the base under the adapter."""
    reference_cache: Annotated[str, FREE] = ""
    """Folder of the cached reference log-probs; empty puts it into the output folder. Share it between runs."""
    last_step: Literal["keep", "drop"] = "keep"
    """What to do with the short last step of an epoch."""
    logging_steps: Annotated[int, at_least(1), FREE] = 10
    """Optimizer steps between log entries, >= 1."""
    eval: Annotated[Literal["no", "epoch", "steps"], Argument("eval_strategy", theirs=True), FREE] = "no"
    """When to evaluate on held-out quads."""
    eval_steps: Annotated[int, at_least(1), Argument("eval_steps", theirs=True), FREE] = 100
    """Optimizer steps between evaluations, >= 1, for eval = 'steps'."""
    save: Annotated[Literal["no", "epoch", "steps"], Argument("save_strategy", theirs=True), FREE] = "epoch"
    """When to write a checkpoint to resume from; the final model is always written."""
    save_steps: Annotated[int, at_least(1), Argument("save_steps", theirs=True), FREE] = 100
    """Optimizer steps between checkpoints, >= 1, for save = 'steps'."""
    save_total_limit: Annotated[int | None, at_least(1), Argument("save_total_limit", theirs=True), FREE] = 2
    """Checkpoints to keep, >= 1, oldest deleted first; none keeps all."""
    report_to: Annotated[
        tuple[str, ...], all_filled("names of trackers"), Argument("report_to", theirs=True), FREE
    ] = ()
    """Trackers such as tensorboard or wandb; metrics.jsonl is always written."""
    head_chunk: Annotated[int, at_least(1), FREE] = 256
    """Tokens whose vocabulary scores exist at one time, >= 1: memory against speed, never the result."""
    telemetry_steps: Annotated[int, at_least(0), FREE] = 50
    """Optimizer steps between looks at the gradients' noise, >= 0, the first in step 1; 0 takes none. Never the result."""
    loss: LossConfig = field(default_factory=LossConfig)
    alpha: AlphaConfig = field(default_factory=AlphaConfig)
    anchor: AnchorConfig = field(default_factory=AnchorConfig)
    lora: LoraSettings = field(default_factory=LoraSettings)
    hf: dict[str, Any] = field(default_factory=dict)
    """Any other TrainingArguments field, by its own name, such as hf.torch_compile = true."""

    def contradictions(self) -> Problems:
        found: list[tuple[str, str]] = []
        if self.alpha.schedule == "auto" and not (self.alpha.every or self.telemetry_steps):
            found.append(("telemetry_steps", "got 0, but alpha.schedule 'auto' needs looks; set it, or alpha.every"))
        if self.reference == "adapter" and not self.lora.enabled:
            found.append(("reference", "got 'adapter', but lora.enabled is false: there is no adapter to turn off"))
        own = {f.name for f in fields(TrainConfig)}
        for key, value in self.hf.items():
            if key in own:
                found.append((f"hf.{key}", f"is a setting of bvpo itself; write train.{key} instead"))
            elif value is None:
                found.append((f"hf.{key}", "got null, which TOML cannot hold; leave the entry out"))
        return found
