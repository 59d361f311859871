"""``BVPOConfig``: the trainer's arguments, a :class:`transformers.TrainingArguments` with the settings of [train] as fields.

What Hugging Face users know (schedulers, FSDP, hub upload, ...) means what it means there. An optimizer step is a number of
*quads*: ``per_device_train_batch_size`` x ``gradient_accumulation_steps`` x processes only says how many when
``quads_per_step`` is not given, and ``tokens_per_micro_batch`` says how a step is cut into backward passes.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, dataclass, field, is_dataclass
from operator import attrgetter
from typing import TYPE_CHECKING, Any, TypeVar, get_type_hints

import torch
from transformers import TrainingArguments

from bvpo.config import AlphaConfig, AnchorConfig, LossConfig, TrainConfig
from bvpo.config.layers import field_docs
from bvpo.config.ranges import Argument, Free, marks, range_problems, section_problems
from bvpo.method.losses import LOSSES
from bvpo.strict import FieldError, UserError, field_types, from_dict

C = TypeVar("C", bound=type)
_THEIRS = get_type_hints(TrainingArguments)
_NOT_ARGUMENTS = ("lora", "hf")  # adapters are PEFT's; [train.hf] holds other arguments by their own names


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainSetting:
    """A setting of [train] as a field of :class:`BVPOConfig`: ``field`` is its name below [train] (``alpha.value``),
    ``argument`` that of the field. ``free``: it never decides the result; ``own``: transformers has no such argument."""

    field: str
    argument: str
    type: Any
    default: Any
    doc: str
    free: bool
    theirs: bool

    @property
    def own(self) -> bool:
        return self.argument not in _THEIRS


def _settings(cls: type, prefix: str = "") -> Iterator[TrainSetting]:
    names, free = marks(cls, Argument), marks(cls, Free)
    for f in dataclasses.fields(cls):
        tp = field_types(cls)[f.name]
        if f.name in _NOT_ARGUMENTS:
            continue
        if is_dataclass(tp):
            yield from _settings(tp, f"{prefix}{f.name}.")  # type: ignore[arg-type]
            continue
        named = names.get(f.name, Argument(f.name))
        yield TrainSetting(
            field=f"{prefix}{f.name}",
            argument=named.name,
            type=_THEIRS.get(named.name, tp),
            default=f.default_factory() if f.default_factory is not MISSING else f.default,
            doc=field_docs(cls)[f.name],
            free=f.name in free,
            theirs=named.theirs,
        )


SETTINGS = tuple(_settings(TrainConfig))
_BY_FIELD = {setting.field: setting.argument for setting in SETTINGS}


def _with_settings(cls: C) -> C:
    """Adds a field for every setting of [train] that the class does not write down itself."""
    for setting in SETTINGS:
        if not setting.theirs and setting.argument not in cls.__annotations__:
            cls.__annotations__[setting.argument] = setting.type
            setattr(cls, setting.argument, field(default=setting.default, metadata={"help": setting.doc}))
    return cls


@dataclass
@_with_settings
class BVPOConfig(TrainingArguments):
    """Arguments of :class:`bvpo.BVPOTrainer`; docs/hyperparameters.md lists each with its default and its setting."""

    quads_per_step: int | None = field(default=None, metadata={"help": "Quads of an optimizer step over all devices."})
    reasoning_format: str = field(default="auto", metadata={"help": "Reasoning format name, or auto."})
    custom_format: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Fields of a reasoning format of your own (docs/formats.md)."}
    )
    # The filter would cost a device synchronisation every step; divergence is checked at each log entry instead.
    logging_nan_inf_filter: bool = field(
        default=False, metadata={"help": "Has no use here: a NaN loss stops training."}
    )
    remove_unused_columns: bool = field(default=False, metadata={"help": "Has no effect here: quads are not rows."})

    if TYPE_CHECKING:  # the fields that come from [train]

        def __getattr__(self, name: str) -> Any: ...

    def __post_init__(self) -> None:
        self._check_settings()
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
        return self._train_config().loss

    def alpha_config(self) -> AlphaConfig:
        return self._train_config().alpha

    def anchor_config(self) -> AnchorConfig:
        return self._train_config().anchor

    def _train_config(self) -> TrainConfig:
        """[train] as these arguments say it, apart from what is transformers' own."""
        table: dict[str, Any] = {}
        for setting in SETTINGS:
            value = getattr(self, setting.argument)
            if setting.own and not (setting.argument == "quads_per_step" and value is None):
                *sections, last = setting.field.split(".")
                node = table
                for section in sections:
                    node = node.setdefault(section, {})
                node[last] = value
        return from_dict(TrainConfig, table)

    def _check_settings(self) -> None:
        """The rules of [train] about types, choices, ranges and what goes together, in the arguments' names."""
        try:
            config = self._train_config()
        except FieldError as error:
            raise UserError(_in_arguments(error.field, error.problem)) from None
        for problems in (range_problems(config), section_problems(config)):
            for name, problem in problems:
                raise UserError(_in_arguments(name, problem))


def _in_arguments(name: str, problem: str) -> str:
    argument = _BY_FIELD.get(name, name)
    return f"{argument}: {problem.removeprefix(f'field {name!r}: ')}"


# Arguments of transformers that no setting of [train] stands for and that change the numbers of a run.
_ALSO = ("optim_args", "lr_scheduler_kwargs", "bf16", "fp16", "seed", "data_seed")
DECIDES = frozenset(s.argument for s in SETTINGS if not s.free) | {"reasoning_format", "custom_format", *_ALSO}
"""What must agree for a run to go on from a checkpoint. How a step is cut into backward passes and where the reference
lives change time and memory only, so a run that ran out of memory goes on with a smaller budget."""


def decisive_arguments(args: BVPOConfig) -> dict[str, Any]:
    """Everything in the arguments that decides the run's numbers."""
    return {name: getattr(args, name) for name in sorted(DECIDES)}


def refuse_zero3(plugin: Any) -> None:
    """ZeRO-3 would hide the weights from the choice of a layout, and leave a final model without any."""
    stage = ((plugin and plugin.deepspeed_config) or {}).get("zero_optimization", {}).get("stage")
    if stage == 3:
        raise UserError("deepspeed: ZeRO-3 is not supported; use stage 2, or FSDP2, which shards the weights as well")


def why_biased(args: BVPOConfig) -> str | None:
    """Why the trace view's expected gradient is not the marginal loss's even at the reference; None where it is."""
    if args.loss in LOSSES and not LOSSES[args.loss].zero_trace_bias_at_reference:
        return f"loss {args.loss!r} is biased in the trace view even at the reference (docs/losses.md says why)"
    if args.trace_estimator == "answer":
        return "trace_estimator 'answer' leaves the trace's own gradient out, which biases the trace view"
    return None


def _require_auto(args: BVPOConfig) -> None:
    """Refuses what the rule behind ``auto`` is not valid for."""
    reason = why_biased(args)
    if reason is not None:
        raise UserError(f"alpha 'auto' takes the trace view for unbiased, but {reason}; set a constant alpha")
    if not (args.alpha_every or args.telemetry_steps):
        raise UserError("alpha 'auto' needs looks at the gradients: set alpha_every, or telemetry_steps above 0")


# transformers renamed the switch; the old name warns on the new versions and is the only one on the old ones.
_CHECKPOINTING = "activation_checkpointing" if "activation_checkpointing" in _THEIRS else "gradient_checkpointing"
_OPTIMIZERS = {"adamw": "adamw_torch"}


def _train_settings(config: TrainConfig) -> dict[str, Any]:
    """Argument -> the value that [train] gives it."""
    return {setting.argument: attrgetter(setting.field)(config) for setting in SETTINGS}


def arguments_from(
    config: TrainConfig,
    *,
    output_dir: str,
    seed: int,
    reasoning_format: str = "auto",
    custom_format: Mapping[str, Any] | None = None,
) -> BVPOConfig:
    """The trainer's arguments of an experiment; ``[train.hf]`` passes any other TrainingArguments field, names checked."""
    values = _train_settings(config)
    checkpointing = values.pop("gradient_checkpointing")
    values |= {
        "output_dir": output_dir,
        _CHECKPOINTING: checkpointing,
        f"{_CHECKPOINTING}_kwargs": {"use_reentrant": False} if checkpointing else None,
        "seed": seed,
        "data_seed": seed,
        "reasoning_format": reasoning_format,
        "custom_format": dict(custom_format or {}) or None,
        "optim": _OPTIMIZERS.get(config.optimizer, config.optimizer),
        "report_to": list(config.report_to) or "none",
    }
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
