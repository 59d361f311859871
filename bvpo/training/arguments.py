"""``BVPOConfig``: the trainer's arguments, a :class:`transformers.TrainingArguments` with the method's own fields.

Every field that Hugging Face users know (learning rate, schedulers, ``report_to``, FSDP, DeepSpeed, hub upload, ...) means
what it means there. Two things differ, because an optimizer step is a number of *quads* and not of rows:
``per_device_train_batch_size`` x ``gradient_accumulation_steps`` x processes only says how many quads a step has when
``quads_per_step`` is not given, and how a step is cut into backward passes is ``tokens_per_micro_batch``.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import TrainingArguments

from bvpo.config import AlphaConfig, AnchorConfig, LossConfig, TrainConfig, validate
from bvpo.method.losses import LOSSES
from bvpo.strict import UserError


@dataclass
class BVPOConfig(TrainingArguments):
    """Arguments of :class:`bvpo.BVPOTrainer`; docs/training.md explains each with its range."""

    learning_rate: float = field(default=7e-7, metadata={"help": "Peak learning rate; the paper's value."})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "Learning-rate schedule."})
    warmup_steps: float = field(default=0.1, metadata={"help": "Warm-up steps; below 1 a share of all steps."})
    num_train_epochs: float = field(default=1.0, metadata={"help": "Passes over the data."})
    logging_steps: float = field(default=10, metadata={"help": "Optimizer steps between log entries."})
    # The filter would cost a device synchronisation every step; divergence is checked at each log entry instead.
    logging_nan_inf_filter: bool = field(
        default=False, metadata={"help": "Has no use here: a NaN loss stops training."}
    )
    remove_unused_columns: bool = field(default=False, metadata={"help": "Has no effect here: quads are not rows."})

    loss: str = field(default="dpo", metadata={"help": "Preference loss of each pair (bvpo.method.losses.LOSSES)."})
    beta: float = field(default=0.1, metadata={"help": "Scale of the implicit reward."})
    label_smoothing: float = field(default=0.0, metadata={"help": "Assumed share of swapped labels (dpo, robust)."})
    gamma: float = field(default=1.0, metadata={"help": "SimPO target margin inside the sigmoid."})
    length_weight: float = field(default=0.0, metadata={"help": "R-DPO reward per token."})
    alpha: float = field(default=0.5, metadata={"help": "Weight of the trace view; 1 - alpha is the empty view's."})
    alpha_schedule: str = field(default="constant", metadata={"help": "constant, linear, cosine or auto."})
    alpha_end: float | None = field(default=None, metadata={"help": "Last alpha of a linear or cosine schedule."})
    alpha_every: int | None = field(
        default=None, metadata={"help": "Steps between the looks of alpha_schedule = auto; None: telemetry_steps."}
    )
    anchor: str = field(
        default="none", metadata={"help": "none, nll or kl: holds trace-view tokens near the reference."}
    )
    anchor_tokens: str = field(default="trace", metadata={"help": "Anchored tokens: trace, answer or both."})
    anchor_weight: float = field(default=0.0, metadata={"help": "Weight of the anchor; about beta."})
    trace_estimator: str = field(
        default="joint", metadata={"help": "Trace view scores trace + answer, the answer, or it over several traces."}
    )

    reasoning_format: str = field(default="auto", metadata={"help": "Reasoning format name, or auto."})
    custom_format: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Fields of a reasoning format of your own (docs/formats.md)."}
    )
    max_length: int = field(
        default=4096, metadata={"help": "Longest prompt + response in tokens; nothing is ever cut."}
    )
    over_long: str = field(default="drop", metadata={"help": "drop (and count) or refuse longer pairs."})
    score_empty_block: bool = field(default=True, metadata={"help": "Score the forced closing marker (paper: yes)."})

    quads_per_step: int | None = field(default=None, metadata={"help": "Quads of an optimizer step over all devices."})
    tokens_per_micro_batch: int | None = field(
        default=None, metadata={"help": "Token budget of a backward; None: 1 quad."}
    )
    last_step: str = field(default="keep", metadata={"help": "keep or drop an epoch's short last step."})
    layout: str = field(default="auto", metadata={"help": "auto, tree, packed, padded or single."})
    backward: str = field(default="micro_batch", metadata={"help": "micro_batch, or sequence (cached gradients)."})
    precision: str = field(default="auto", metadata={"help": "auto, bf16, fp32 or pure_bf16."})
    dropout: bool = field(default=False, metadata={"help": "Train with the model's own dropout and router noise."})
    reference: str = field(default="cached", metadata={"help": "cached, held or adapter."})
    reference_cache: str = field(default="", metadata={"help": "Folder of cached reference log-probs."})
    head_chunk: int = field(default=256, metadata={"help": "Rows whose vocabulary logits exist at one time."})
    telemetry_steps: int = field(default=50, metadata={"help": "Steps between looks at gradient noise; 0: none."})

    def __post_init__(self) -> None:
        _check_choices(self)
        if self.alpha_schedule == "auto":
            _require_auto(self)
        cuda_bf16 = torch.cuda.is_available() and torch.cuda.is_bf16_supported()
        if self.precision == "auto" and not self.fp16:
            self.bf16 = bool(self.bf16) or (cuda_bf16 and not self.use_cpu)
        elif self.precision != "auto" and self.fp16:
            raise UserError(f"precision: got {self.precision!r} together with fp16 = True; give one or the other")
        elif self.precision != "auto":
            self.bf16 = self.precision == "bf16"
        if self.dataloader_persistent_workers:
            raise UserError("dataloader_persistent_workers: not supported, workers must see each epoch's new order")
        local = self.per_device_train_batch_size * self.gradient_accumulation_steps
        # One item of our dataloader is a whole optimizer step, so nobody else may accumulate (set before DeepSpeed's
        # "auto" values are filled in).
        self.gradient_accumulation_steps = 1
        super().__post_init__()
        refuse_zero3(self.deepspeed_plugin)
        if self.quads_per_step is None:
            self.quads_per_step = local * max(1, self.world_size)
        self.per_device_train_batch_size = max(1, self.quads_per_step // max(1, self.world_size))
        if self.n_gpu > 1:
            self._n_gpu = 1  # one process drives one device; DataParallel would split a row that is one tree

    def loss_config(self) -> LossConfig:
        names = [f.name for f in dataclasses.fields(LossConfig) if f.name != "name"]
        return LossConfig(name=self.loss, **{name: getattr(self, name) for name in names})

    def alpha_config(self) -> AlphaConfig:
        for name, value in (("alpha", self.alpha), ("alpha_end", self.alpha_end)):
            if value is not None and not 0 <= value <= 1:
                raise UserError(f"{name}: got {value!r}, expected a number from 0 to 1")
        schedule: Any = self.alpha_schedule
        return AlphaConfig(schedule=schedule, value=self.alpha, end=self.alpha_end, every=self.alpha_every)

    def anchor_config(self) -> AnchorConfig:
        config = AnchorConfig(kind=self.anchor, tokens=self.anchor_tokens, weight=self.anchor_weight)  # type: ignore[arg-type]
        if config.kind == "none" and config.weight:
            raise UserError(f"anchor_weight: got {config.weight}, but anchor is 'none'; name a kind (nll or kl)")
        if config.kind != "none" and not config.weight > 0:
            raise UserError(f"anchor_weight: got {config.weight}, expected a number above 0 for anchor {config.kind!r}")
        return config


def refuse_zero3(plugin: Any) -> None:
    """ZeRO-3 would hide the weights from the choice of a layout, and leave a final model without any."""
    stage = ((plugin and plugin.deepspeed_config) or {}).get("zero_optimization", {}).get("stage")
    if stage == 3:
        raise UserError("deepspeed: ZeRO-3 is not supported; use stage 2, or FSDP2, which shards the weights as well")


_CHOICES = {
    "anchor": ("none", "nll", "kl"),
    "anchor_tokens": ("trace", "answer", "both"),
    "trace_estimator": ("joint", "answer", "traces"),
    "over_long": ("drop", "refuse"),
    "last_step": ("keep", "drop"),
    "layout": ("auto", "tree", "packed", "padded", "single"),
    "backward": ("micro_batch", "sequence"),
    "precision": ("auto", "bf16", "fp32", "pure_bf16"),
    "reference": ("cached", "held", "adapter"),
}


def _check_choices(args: BVPOConfig) -> None:
    for name, choices in _CHOICES.items():
        if getattr(args, name) not in choices:
            raise UserError(f"{name}: got {getattr(args, name)!r}, expected one of {', '.join(choices)}")
    for name in ("quads_per_step", "tokens_per_micro_batch", "max_length", "head_chunk", "alpha_every"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise UserError(f"{name}: got {value}, expected a positive integer")
    if args.telemetry_steps < 0:
        raise UserError(f"telemetry_steps: got {args.telemetry_steps}, expected 0 or more")


def why_biased(args: BVPOConfig) -> str | None:
    """Why the trace view's expected gradient is not the marginal loss's even at the reference; None where it is."""
    if args.loss in LOSSES and not LOSSES[args.loss].zero_trace_bias_at_reference:
        return f"loss {args.loss!r} is biased in the trace view even at the reference (docs/losses.md says why)"
    if args.trace_estimator == "answer":
        return "trace_estimator 'answer' leaves the trace's own gradient out, which biases the trace view"
    return None


def _require_auto(args: BVPOConfig) -> None:
    """Refuses what the rule behind ``auto`` is not valid for."""
    validate(args.alpha_config())
    reason = why_biased(args)
    if reason is not None:
        raise UserError(f"alpha 'auto' takes the trace view for unbiased, but {reason}; set a constant alpha")
    if not (args.alpha_every or args.telemetry_steps):
        raise UserError("alpha 'auto' needs looks at the gradients: set alpha_every, or telemetry_steps above 0")


# transformers renamed the switch; the old name warns on the new versions and is the only one on the old ones.
_FIELDS = {f.name for f in dataclasses.fields(TrainingArguments)}
_CHECKPOINTING = "activation_checkpointing" if "activation_checkpointing" in _FIELDS else "gradient_checkpointing"
_OPTIMIZERS = {"adamw": "adamw_torch"}
_SAME_NAME = (
    "learning_rate",
    "weight_decay",
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "max_grad_norm",
    "max_steps",
    "max_length",
    "over_long",
    "score_empty_block",
    "trace_estimator",
    "layout",
    "tokens_per_micro_batch",
    "quads_per_step",
    "backward",
    "precision",
    "dropout",
    "reference",
    "reference_cache",
    "last_step",
    "logging_steps",
    "eval_steps",
    "save_steps",
    "save_total_limit",
    "head_chunk",
    "telemetry_steps",
)


def arguments_from(
    config: TrainConfig,
    *,
    output_dir: str,
    seed: int,
    reasoning_format: str = "auto",
    custom_format: Mapping[str, Any] | None = None,
) -> BVPOConfig:
    """The trainer's arguments of an experiment; ``[train.hf]`` passes any other TrainingArguments field, names checked."""
    values: dict[str, Any] = {name: getattr(config, name) for name in _SAME_NAME}
    values |= {
        "output_dir": output_dir,
        _CHECKPOINTING: config.gradient_checkpointing,
        f"{_CHECKPOINTING}_kwargs": {"use_reentrant": False} if config.gradient_checkpointing else None,
        "seed": seed,
        "data_seed": seed,
        "reasoning_format": reasoning_format,
        "custom_format": dict(custom_format or {}) or None,
        "num_train_epochs": config.epochs,
        "lr_scheduler_type": config.lr_scheduler,
        "warmup_steps": config.warmup_ratio,
        "optim": _OPTIMIZERS.get(config.optimizer, config.optimizer),
        "eval_strategy": config.eval,
        "save_strategy": config.save,
        "report_to": list(config.report_to) or "none",
        "loss": config.loss.name,
        "alpha": config.alpha.value,
        "alpha_schedule": config.alpha.schedule,
        "alpha_end": config.alpha.end,
        "alpha_every": config.alpha.every,
        "anchor": config.anchor.kind,
        "anchor_tokens": config.anchor.tokens,
        "anchor_weight": config.anchor.weight,
    }
    values |= {f.name: getattr(config.loss, f.name) for f in dataclasses.fields(LossConfig) if f.name != "name"}
    known = {f.name for f in dataclasses.fields(BVPOConfig) if f.init}
    for name in config.hf:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            raise UserError(
                f"field 'train.hf.{name}': not a TrainingArguments field" + (f"; nearest: {near[0]!r}" if near else "")
            )
        if name in values:
            raise UserError(f"field 'train.hf.{name}': set it in [train] instead, where it has a field of its own")
    return BVPOConfig(**values, **config.hf)
