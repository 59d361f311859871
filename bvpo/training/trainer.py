"""``BVPOTrainer``: a :class:`transformers.Trainer` whose optimizer step is a number of quads.

In: quads (or two TRL preference sets), a causal language model and a tokenizer. Out: an aligned model, checkpoints and
metrics. Everything that is not the method stays transformers': the loop, optimizers, schedules, accelerate, DDP, FSDP,
DeepSpeed, callbacks, trackers, resuming, hub upload. Overridden are only the data loader (one item = one optimizer step),
the training step (forward and backward over a step's micro-batches), and evaluation.

One pair's way: records.Quad -> tokens.tokenize_quad -> layout.build_tree -> policy.branch_outputs -> objective.Objective.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import logging
import math
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, Trainer, TrainerCallback, set_seed

from bvpo.method.mixing import AlphaSource, Weights, mix_views
from bvpo.records import View
from bvpo.strict import UserError
from bvpo.training import checkpoints, dropout, policy, reference
from bvpo.training.arguments import BVPOConfig, decisive_arguments
from bvpo.training.callbacks import Bookkeeping, use_concise_progress
from bvpo.training.first_step import FirstStep, starts_at_reference, tolerance
from bvpo.training.gradients import StepRunner
from bvpo.training.loading import (
    adapter_settings,
    agree,
    check_precision,
    describe_numerics,
    is_launched_sharded,
    keep_outputs_wide,
    load_policy,
    load_tokenizer,
    num_dense_parameters,
    peak_flops,
    shard_frozen,
    with_adapter,
)
from bvpo.training.objective import STATISTICS, Objective, describe
from bvpo.training.probe.samples import Plan, Rows, take
from bvpo.training.probe.telemetry import Telemetry
from bvpo.training.refcache import ReferenceCache, cache_fingerprint, weights_fingerprint
from bvpo.training.steps import StepBatch, StepDataset, only_item
from bvpo.training.tokens import TokenDataset

logger = logging.getLogger(__name__)


class BVPOTrainer(Trainer):
    """Trains a causal language model on quads with a mixture of trace-view and empty-view preference losses.

    Args:
        model: a ``PreTrainedModel``, a ``PeftModel``, or a path / Hub name (loaded in fp32 unless ``precision`` says
            otherwise, from safetensors only).
        args: a :class:`BVPOConfig`.
        train_dataset: quads - a list of :class:`bvpo.Quad`, a ``datasets.Dataset`` with the same columns, a mapping
            ``{"trace": ..., "empty": ...}`` of two TRL preference sets, or a ready :class:`TokenDataset`.
        eval_dataset: held-out quads, same forms.
        processing_class: the tokenizer (loaded from the model's folder when left out).
        ref_model: another reference than the initial policy; implies ``reference="held"``.
        peft_config: a PEFT configuration: trains adapters, and the reference is the model without them.
        alpha_source: replaces the configured schedule of alpha (another online estimate, say).
    """

    _tag_names: ClassVar[list[str]] = ["bvpo", "dpo", "reasoning"]
    _name = "BVPO"
    args: Any  # a BVPOConfig; transformers declares the base class
    model: Any
    model_wrapped: Any
    optimizer: Any

    def __init__(
        self,
        model: Any,
        args: BVPOConfig,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        *,
        ref_model: PreTrainedModel | None = None,
        peft_config: Any = None,
        alpha_source: AlphaSource | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
    ) -> None:
        self.objective = Objective.of(args)
        self.telemetry = Telemetry(args)
        self.alpha_source = alpha_source or self.telemetry.alpha_source()
        processing_class = load_tokenizer(processing_class, model)
        set_seed(args.seed)  # adapters are initialised here; the loop seeds again before training
        model = load_policy(model, args)
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        policy.install(base)
        train_tokens = self._tokens(train_dataset, processing_class, base, args, "train")
        eval_tokens = self._tokens(eval_dataset, processing_class, base, args, "eval")
        self._longest = max(
            (tokens.longest for tokens in (train_tokens, eval_tokens) if tokens), default=args.max_length
        )
        self.layout = agree(args, lambda: policy.choose_layout(base, args.layout, self._longest))
        policy.use_layout(base, self.layout)
        dropout.switch_off(base, self.layout, args)
        _say_router_loss(base, args)
        model = with_adapter(model, peft_config, args)
        check_precision(model, args)
        self.reference_model = self._hold_reference(model, ref_model, args)
        self._reference_weights = self._fingerprint_reference(base, args)
        self._train_steps = None if train_tokens is None else self._steps(train_tokens, args, args.last_step)
        self._eval_steps = None if eval_tokens is None else self._steps(eval_tokens, args)  # all of them
        # Until a step has shown a gradient; policy = reference holds for a first step alone.
        self._is_unproved = True
        self._starts_at_reference = not args.dropout and ref_model is None and starts_at_reference(model, peft_config)
        self._statistics: Tensor | None = None
        self._tokens_seen = 0
        self._alpha = float("nan")
        self._last_loss: Any = 0.0
        self._resumed: dict[str, Any] = {}
        self.takes_steps = False
        self.stop_asked = False  # set by a signal's handler: training ends behind the step at work, with a checkpoint
        self._clock = time.perf_counter()
        super().__init__(
            model=model,
            args=args,
            data_collator=only_item,
            train_dataset=self._train_steps,
            eval_dataset=self._eval_steps,
            processing_class=processing_class,
            callbacks=[*(callbacks or []), Bookkeeping(self)],
            optimizers=optimizers,
        )
        use_concise_progress(self)
        keep_outputs_wide(self.accelerator)
        # Our loss is complete when it leaves training_step: nothing must divide it again.
        self.model_accepts_loss_kwargs = False
        if self.reference_model is not None:
            self.reference_model = self._prepare_held(self.reference_model)
        if hasattr(base, "add_model_tags"):
            base.add_model_tags(self._tag_names)

    # --- set-up ----------------------------------------------------------------------------------------------------

    def _tokens(self, data: Any, tokenizer: Any, model: Any, args: BVPOConfig, name: str) -> TokenDataset | None:
        if data is None or isinstance(data, TokenDataset):
            return data
        from bvpo.training.data import token_dataset

        with args.main_process_first(local=False, desc=f"tokenising the {name} quads"):
            return token_dataset(data, tokenizer, model.config.get_text_config().vocab_size, cast(Any, args), name)

    def _steps(self, tokens: TokenDataset, args: BVPOConfig, last_step: str = "keep") -> StepDataset:
        assert args.quads_per_step is not None
        if args.backward == "sequence" and (args.fsdp or args.deepspeed or is_launched_sharded()):
            raise UserError(
                "backward: 'sequence' runs another number of forwards on each rank; use 'micro_batch' when sharding"
            )
        if args.backward == "sequence" and args.tokens_per_micro_batch is not None:
            raise UserError("tokens_per_micro_batch: backward = 'sequence' takes one sequence at a time; leave it out")
        if self.layout == "single" and (args.fsdp or args.deepspeed or is_launched_sharded()):
            raise UserError(
                "layout: 'single' runs another number of forwards on each rank; this model cannot be sharded"
            )
        if tokens.has_groups and args.trace_estimator != "traces":
            raise UserError(
                f"trace_estimator: got {args.trace_estimator!r}, but the tokens have quads with several traces"
            )
        return StepDataset(
            tokens,
            layout=self.layout,
            quads_per_step=args.quads_per_step,
            tokens_per_micro_batch=args.tokens_per_micro_batch,
            world_size=max(1, args.world_size),
            rank=args.process_index,
            seed=args.seed if args.data_seed is None else args.data_seed,
            last_step=last_step,
        )

    def _hold_reference(self, model: Any, ref_model: Any, args: BVPOConfig) -> Any:
        """A second model in memory where one is needed: asked for, given, or required by the KL anchor."""
        has_adapter = hasattr(model, "disable_adapter")
        if ref_model is None and args.reference == "adapter" and not has_adapter:
            raise UserError("reference: got 'adapter', but the model has no adapter; use 'cached' or 'held'")
        wants_rows = self.objective.needs_kl and not has_adapter
        if ref_model is None and args.reference != "held" and not wants_rows:
            return None
        if ref_model is None:
            if not (self.objective.needs_reference or self.objective.needs_kl):
                return None
            if has_adapter:
                raise UserError("reference: got 'held', but an adapter's reference is free; use 'cached' or 'adapter'")
            ref_model = copy.deepcopy(model)
        if hasattr(ref_model, "get_base_model"):
            raise UserError(
                "ref_model: got a PEFT model, expected a plain one; merge its adapter first (merge_and_unload)"
            )
        policy.install(ref_model)
        if self.layout not in policy.OWN_ATTENTION:
            ref_model.set_attn_implementation(model.config._attn_implementation)
        return ref_model.requires_grad_(False).eval()

    def _prepare_held(self, model: Any) -> Any:
        if self.is_deepspeed_enabled:
            raise UserError("reference: 'held' is not supported with DeepSpeed; use 'cached'")
        if self.is_fsdp_enabled:
            return shard_frozen(model, self.accelerator)
        return self.accelerator.prepare_model(model, evaluation_mode=True)

    def _fingerprint_reference(self, base: nn.Module, args: BVPOConfig) -> str:
        """Of whichever model is the reference, wherever it lives: held in memory, cached, or under an adapter."""
        if not (self.objective.needs_reference or self.objective.needs_kl):
            return ""
        held: Any = base if self.reference_model is None else self.reference_model
        # Adapters are no part of the reference: its cache serves every rank and every adapter.
        named = ((n.replace(".base_layer", ""), t) for n, t in held.state_dict().items() if "lora_" not in n)
        return agree(args, lambda: weights_fingerprint(named))

    def _reference_pass(self) -> reference.ReferencePass:
        args: Any = self.args
        folder = args.reference_cache or os.path.join(args.output_dir, "_reference")
        mixed = self.accelerator.mixed_precision
        dtype = f"{next(self.model.parameters()).dtype}/{mixed}"
        kernel = describe_numerics(self.accelerator.device)
        # The same weights give other numbers under another rope scaling, window or soft cap.
        config = self.accelerator.unwrap_model(self.model).config.to_diff_dict()
        numbers = json.dumps({k: v for k, v in config.items() if k not in _NO_NUMBERS}, sort_keys=True, default=str)
        weights = f"{self._reference_weights} {numbers}"
        fingerprint = cache_fingerprint(weights=weights, dtype=dtype, layout=self.layout, kernel=kernel)
        return reference.ReferencePass(
            ReferenceCache(folder, fingerprint),
            layout=self.layout,
            chunk=args.head_chunk,
            tokens_per_micro_batch=args.tokens_per_micro_batch,
            rank=args.process_index,
            world_size=max(1, args.world_size),
            autocast=self.accelerator.autocast,  # transformers' own context is empty
            device=self.accelerator.device,
            show_progress=not args.disable_tqdm and self.is_world_process_zero(),
            one_branch_at_a_time=args.backward == "sequence",
        )

    @property
    def _uses_cache(self) -> bool:
        return self.objective.needs_reference and self.args.reference == "cached" and self.reference_model is None

    def fill_reference(self, model: nn.Module, *others: StepDataset) -> None:
        """Computes the missing reference log-probs with ``model``, which must still be the untrained policy."""
        if not self._uses_cache:
            return
        reference_pass = self._reference_pass()
        for steps in (self._train_steps, self._eval_steps, *others):
            if steps is not None and steps.reference is None:
                steps.reference = reference_pass.values(steps.tokens, model)

    @property
    def lacks_reference(self) -> bool:
        """Whether training needs reference log-probs that are not loaded yet (they may be in the cache)."""
        return self._uses_cache and self._train_steps is not None and self._train_steps.reference is None

    @property
    def reference_is_cached(self) -> bool:
        """Whether the cache on disk holds all reference log-probs, so that filling runs no model."""
        reference_pass = self._reference_pass()
        sets = [steps.tokens for steps in (self._train_steps, self._eval_steps) if steps is not None]
        return all(reference_pass.is_complete(tokens) for tokens in sets)

    @property
    def train_tokens(self) -> TokenDataset | None:
        """The training quads in tokens."""
        return None if self._train_steps is None else self._train_steps.tokens

    def look(self, plan: Plan, seed: Sequence[int], buckets: int) -> Rows:
        """Single gradients of training quads with the model as it is; outside of a run too, after ``fill_reference``."""
        assert self._train_steps is not None
        return take(self.model, self._runner(), self._train_steps, plan, seed, buckets)

    def start_epoch(self, epoch: int) -> None:
        """A new order of the quads. Part of the plan, so a resumed epoch has the order of the interrupted one."""
        if self._train_steps is not None:
            self._train_steps.set_epoch(epoch)

    def start_clock(self, now: float) -> None:
        """Throughput is counted from here; loading and the reference pass are not training."""
        self._clock = now

    # --- the loop's hooks --------------------------------------------------------------------------------------------

    def train(  # type: ignore[override]
        self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any
    ) -> Any:
        """As in transformers. Reference log-probs are computed before the first step, with the untrained weights."""
        if self._train_steps is None:
            raise UserError("train_dataset: got none, expected quads to train on")
        self._resumed, resume = {}, str(resume_from_checkpoint or "")
        if resume_from_checkpoint is True:
            resume = self.newest_checkpoint()
            if not resume:
                raise UserError(f"{self.args.output_dir}: no finished checkpoint to resume from")
        if resume:
            self._resumed = checkpoints.read(Path(resume), self.identity())
        self.telemetry.restore(self._resumed.get("telemetry", {}))
        if not (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            self.fill_reference(self.model)  # sharded models wait until they are wrapped: see Bookkeeping
        result = super().train(resume_from_checkpoint=resume or None, **kwargs)
        return result._replace(training_loss=result.metrics["train_loss"])

    def newest_checkpoint(self) -> str:
        """The newest whole checkpoint in the output folder, as the first rank finds it, or ''."""
        return agree(self.args, lambda: checkpoints.newest(Path(self.args.output_dir)))

    def set_initial_training_values(self, args: Any, dataloader: DataLoader) -> Any:
        """As in transformers, which takes one step too many when resumed from the last checkpoint within an epoch."""
        num_epochs, *others = super().set_initial_training_values(args, dataloader)
        is_over = self._resumed and self._resumed["step"] >= others[-1]
        return (0 if is_over else num_epochs, *others)

    def ends_epoch(self, step: int, control: Any) -> bool:
        """Whether no step of this epoch comes after this one."""
        assert self._train_steps is not None
        return control.should_training_stop or step % len(self._train_steps) == 0

    def is_asked_to_stop(self) -> bool:
        """Whether any rank was asked to."""
        if max(1, self.args.world_size) == 1:
            return self.stop_asked
        asked: Any = self.accelerator.reduce(torch.tensor(float(self.stop_asked), device=self.accelerator.device))
        return bool(asked > 0)

    def get_train_dataloader(self) -> DataLoader:
        """One item per optimizer step. Already split over ranks, so accelerate must not shard it."""
        assert self._train_steps is not None
        return self._loader(self._train_steps)

    def num_examples(self, dataloader: DataLoader) -> int:
        """Quads of an epoch; transformers would count our items, which are steps."""
        steps = dataloader.dataset
        return (
            steps.tokens.num_groups - steps.plan.num_dropped
            if isinstance(steps, StepDataset)
            else super().num_examples(dataloader)
        )

    def _loader(self, steps: StepDataset) -> DataLoader:
        return DataLoader(
            steps,
            batch_size=1,
            shuffle=False,
            collate_fn=only_item,
            num_workers=self.args.dataloader_num_workers,
            prefetch_factor=self.args.dataloader_prefetch_factor,
        )

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """Forward and backward over one optimizer step; returns this rank's share of the loss, times the number of ranks."""
        step: StepBatch = inputs["step"]
        model.train()
        if hasattr(self.optimizer, "train") and callable(self.optimizer.train):
            self.optimizer.train()
        alpha, runner = self.alpha_source.value(self._progress()), self._runner()
        if self.is_in_train:
            self._look_at_noise(model, runner, step)
        weights = Weights.of(alpha, step.pairs, self.args.anchor_weight)
        if self._is_unproved and self.is_in_train:
            loss, statistics, num_tokens = self._prove(model, runner, step, weights)
        else:
            loss, statistics, num_tokens = runner.run(model, step, weights)
        self._statistics = statistics if self._statistics is None else self._statistics + statistics
        self._tokens_seen += num_tokens
        self._alpha = alpha
        self._last_loss = loss.detach()
        # transformers averages this over ranks for its log; our share is a part of a sum.
        return loss * max(1, self.args.world_size)

    def _prove(
        self, model: nn.Module, runner: StepRunner, step: StepBatch, weights: Weights
    ) -> tuple[Tensor, Tensor, int]:
        """A step that is watched, and refused where it shows that training would be silently wrong."""
        is_start = self._starts_at_reference and self.state.global_step == 0
        device = self.accelerator.device
        allowed = tolerance(model, self.accelerator.mixed_precision, device) if is_start else None
        first = FirstStep(self.objective, allowed)
        loss, statistics, num_tokens = dataclasses.replace(runner, watch=first.watch).run(model, step, weights)
        found = torch.cat([loss.detach().reshape(1).double(), statistics.flatten().double()])
        # DeepSpeed keeps gradients to itself, and some optimizers use them up during the backward pass.
        is_readable = not self.is_deepspeed_enabled and not any(
            n in str(self.args.optim) for n in ("lomo", "layerwise")
        )
        self._is_unproved = not first.judge(step, weights, found, self.accelerator, model if is_readable else None)
        self._starts_at_reference = False
        return loss, statistics, num_tokens

    def _look_at_noise(self, model: nn.Module, runner: StepRunner, step: StepBatch) -> None:
        """After this step's alpha was fixed, so that it does not depend on the noise of the gradient that it weighs."""
        assert self._train_steps is not None
        found = self.telemetry.before_step(model, runner, self._train_steps, step, self.state.global_step)
        if found and self.alpha_source is not self.telemetry.online:
            self.alpha_source.observe(found)

    def _progress(self) -> float:
        """0 in the first step, 1 in the last one."""
        return min(1.0, self.state.global_step / max(1, self.state.max_steps - 1))

    def _runner(self) -> StepRunner:
        return StepRunner(
            objective=self.objective,
            accelerator=self.accelerator,
            autocast=self.accelerator.autocast,  # transformers' own context is empty
            reference_model=self.reference_model,
            layout=self.layout,
            backward=self.args.backward,
            chunk=self.args.head_chunk,
            anchor_tokens=self.args.anchor_tokens,
            is_sharded=bool(self.is_fsdp_enabled or self.is_deepspeed_enabled),
        )

    # --- evaluation, logging, saving -----------------------------------------------------------------------------------

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Loss and per-view metrics on held-out quads, over all of them and all ranks."""
        steps = self._eval_steps
        if eval_dataset is not None and eval_dataset is not steps:
            tokens = self._tokens(
                eval_dataset, self.processing_class, self.accelerator.unwrap_model(self.model), self.args, "eval"
            )  # type: ignore[arg-type]
            assert tokens is not None
            policy.require_tried(self.accelerator.unwrap_model(self.model), self.layout, self._longest, tokens.longest)
            steps = self._steps(tokens, self.args)  # type: ignore[arg-type]
        if steps is None:
            raise UserError("eval_dataset: got none, expected held-out quads to evaluate on")
        if steps.reference is None:
            self._require_initial_policy()
            self.fill_reference(self.model, steps)
        model = self.model_wrapped if self.is_in_train else self.model
        start = time.perf_counter()
        statistics = self._evaluate_steps(model, steps)
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in describe(statistics).items()}
        alpha = self.alpha_source.value(self._progress())
        metrics[f"{metric_key_prefix}_loss"] = self._mixed_loss(metrics, metric_key_prefix, alpha)
        metrics[f"{metric_key_prefix}_runtime"] = time.perf_counter() - start
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def held_out_margins(self) -> list[dict[View, float]]:
        """Per held-out quad the margin of each of its views, with the model as it is; none without held-out quads."""
        from bvpo.training.held_out import margins

        steps = self._eval_steps
        if steps is None:
            return []
        if steps.reference is None:
            self._require_initial_policy()
            self.fill_reference(self.model, steps)
        show = not self.args.disable_tqdm and self.is_world_process_zero()
        return margins(self.model, self._runner(), steps, show_progress=show)

    def _require_initial_policy(self) -> None:
        if self.state.global_step and self._uses_cache:
            raise UserError("eval_dataset: give it to the trainer at the start, its reference needs the initial policy")

    def _mixed_loss(self, metrics: dict[str, float], prefix: str, alpha: float) -> float:
        """alpha * trace + (1 - alpha) * empty + anchor, of the held-out means."""

        def mean(name: str) -> Tensor:
            return torch.tensor(metrics.get(f"{prefix}_{name}", 0.0), dtype=torch.float64)

        means: dict[View, Tensor] = {"trace": mean("trace/loss"), "empty": mean("empty/loss")}
        one_each = Weights.of(alpha, {"trace": 1, "empty": 1}, self.args.anchor_weight)
        return float(mix_views(means, one_each, mean("trace/anchor")))

    def _evaluate_steps(self, model: nn.Module, steps: StepDataset) -> Tensor:
        total = torch.zeros(2, len(STATISTICS), device=self.accelerator.device, dtype=torch.float64)
        runner = self._runner()
        weights = Weights(views={"trace": 0.0, "empty": 0.0}, anchor=0.0)
        model.eval()
        with torch.no_grad():
            for inputs in self._loader(steps):
                for micro_batch in inputs["step"].micro_batches:
                    _, statistics, _ = runner.loss(model, micro_batch.to(self.accelerator.device), weights)
                    if not micro_batch.is_filler:
                        total += statistics
        return self.accelerator.reduce(total, reduction="sum")  # type: ignore[return-value]

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the metrics gathered on the device since the last entry: one synchronisation per entry."""
        if "loss" in logs and self._statistics is not None:
            statistics: Any = self.accelerator.reduce(self._statistics.double(), reduction="sum")
            count = torch.tensor(float(self._tokens_seen), device=self.accelerator.device)
            tokens = float(cast(Tensor, self.accelerator.reduce(count, reduction="sum")))
            elapsed, self._clock = time.perf_counter() - self._clock, time.perf_counter()
            logs |= describe(statistics)  # type: ignore[arg-type]
            logs |= {"alpha": self._alpha, "tokens_per_second": tokens / elapsed}
            logs |= self._utilisation(tokens / elapsed) | self.telemetry.report()
            self._statistics, self._tokens_seen = None, 0
        if "train_loss" in logs:  # of the whole run; transformers' own is of the steps since resuming
            logs["train_loss"] = self._total_loss_scalar / max(1, self.state.global_step)
        _require_finite(logs, may_skip_steps=self.args.fp16)
        super().log(logs, start_time)

    def _utilisation(self, tokens_per_second: float) -> dict[str, float]:
        peak = peak_flops(self.accelerator.device)
        if peak is None:
            return {}
        flops = 6.0 * num_dense_parameters(self.accelerator.unwrap_model(self.model)) * tokens_per_second
        return {"mfu": flops / (peak * max(1, self.args.world_size))}

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """6 x parameters x tokens of this rank's share (attention excluded, as in transformers)."""
        tokens = sum(m.layout.num_tokens for m in inputs["step"].micro_batches if not m.is_filler)
        return int(6 * num_dense_parameters(self.accelerator.unwrap_model(self.model)) * tokens)

    def _track_num_input_tokens(self, inputs: dict[str, Any]) -> None:
        if self.args.include_num_input_tokens_seen != "no":
            tokens = sum(m.layout.num_tokens for m in inputs["step"].micro_batches if not m.is_filler)
            self.state.num_input_tokens_seen += tokens * max(1, self.args.world_size)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """As in transformers, but whole or none, and never of a model that has diverged: it would be resumed from."""
        _require_finite({"loss": float(self._last_loss)}, may_skip_steps=False)
        root = Path(self._get_output_dir(trial))
        folder, is_main = root / f"checkpoint-{self.state.global_step}", self.is_world_process_zero()
        progress = self._gather_progress()
        if is_main:
            checkpoints.discard(folder)  # a damaged or unfinished one of this step
        self.accelerator.wait_for_everyone()
        limit, self.args.save_total_limit = self.args.save_total_limit, None  # older ones go once this one is whole
        try:
            with checkpoints.full_disk(folder, "saving a checkpoint"):
                super()._save_checkpoint(model, trial)
        except UserError:
            checkpoints.discard(folder)
            raise
        finally:
            self.args.save_total_limit = limit
        self.accelerator.wait_for_everyone()
        if is_main:
            with checkpoints.full_disk(folder, "saving a checkpoint"):
                checkpoints.seal(folder, self.identity(), progress)
        if self.args.push_to_hub:
            super()._push_from_checkpoint(str(folder))
        if is_main:
            checkpoints.rotate(root, limit, self.state.best_model_checkpoint)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """transformers uploads a checkpoint before it has its marker, without which nobody could resume from it."""

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As in transformers."""
        with checkpoints.full_disk(Path(output_dir or self.args.output_dir), "saving the model"):
            super().save_model(output_dir, _internal_call)

    # --- what belongs to a checkpoint ----------------------------------------------------------------------------------

    def _gather_progress(self) -> dict[str, Any]:
        """Of all ranks, what is summed up between two log entries and over the run, which transformers' state lacks."""
        gather: Any = self.accelerator.gather
        device, found = self.accelerator.device, {"step": self.state.global_step, "telemetry": self.telemetry.state()}
        found |= {"total_loss": self._total_loss_scalar, "last_logged": self._globalstep_last_logged}
        found["loss"] = gather(self._tr_loss.detach().reshape(1)).tolist()
        found["tokens_seen"] = gather(torch.tensor([self._tokens_seen], device=device)).tolist()
        if self._statistics is not None:
            found["statistics"] = gather(self._statistics.detach()[None]).tolist()
            found["dtype"] = str(self._statistics.dtype).removeprefix("torch.")
        return found

    def restore_progress(self) -> None:
        """What a resumed run had summed up; nothing of an earlier run otherwise. The loop has just set its own to zero."""
        self._statistics, self._tokens_seen, found = None, 0, self._resumed
        if not found:
            return
        device, size = self.accelerator.device, max(1, self.args.world_size)
        self._total_loss_scalar, self._globalstep_last_logged = found["total_loss"], found["last_logged"]
        same = len(found["loss"]) == size
        own = self.args.process_index if same else 0
        losses = torch.tensor(found["loss"])  # averaged over ranks when logged; the others are sums over ranks
        self._tr_loss = (losses[own] if same else losses.mean()).to(device)
        is_counted = same or self.args.process_index == 0
        if is_counted:
            self._tokens_seen = found["tokens_seen"][own] if same else sum(found["tokens_seen"])
        if "statistics" in found:
            statistics = torch.tensor(found["statistics"], dtype=getattr(torch, found["dtype"]))
            mine = statistics[own] if same else statistics.sum(0)
            self._statistics = (mine if is_counted else torch.zeros_like(mine)).to(device)

    def identity(self) -> dict[str, Any]:
        """Everything that decides the run's numbers: a checkpoint of another identity is not resumed."""
        data = "" if self._train_steps is None else self._train_steps.tokens.fingerprint
        found: dict[str, Any] = {"layout": self.layout, "train_data": data}
        found["reference_weights"] = self._reference_weights
        if adapter := adapter_settings(self.accelerator.unwrap_model(self.model)):
            found["adapter"] = adapter
        return decisive_arguments(cast(BVPOConfig, self.args)) | found | self.telemetry.identity()


def _say_router_loss(model: Any, args: BVPOConfig) -> None:
    config = model.config.get_text_config()
    if (
        hasattr(config, "output_router_logits")
        and getattr(config, "router_aux_loss_coef", 0.0)
        and not args.process_index
    ):
        logger.warning("%s: its routers' load-balancing loss is not added", type(model).__name__)


# Fields of a model's configuration that do not change its log-probs (or, as dtype, have their own part in the key).
_NO_NUMBERS = frozenset({"_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version", "use_cache"})


def _require_finite(logs: dict[str, float], *, may_skip_steps: bool) -> None:
    """``train_loss`` comes at the end and covers the steps after the last log entry; fp16's loss scaling skips steps
    whose gradient overflows, which is no divergence."""
    for name in ("loss", "trace/loss", "empty/loss", "train_loss", *(() if may_skip_steps else ("grad_norm",))):
        value = logs.get(name, 0.0)
        if not math.isfinite(value):
            raise UserError(
                f"{name} is {value} since the last log entry: training has diverged; lower the learning rate, or look for "
                "a broken response in the data (log every step with logging_steps = 1)"
            )
