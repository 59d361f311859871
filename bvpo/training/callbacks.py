"""What happens around the steps of a run: reshuffling, metrics on disk, stopping, and one readable log line.

In: the trainer's state at transformers' callback hooks. Out: ``metrics.jsonl`` (machines), a progress bar with one short
line per log entry (people), and the end of a run that was asked to stop, behind a checkpoint.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from transformers import PrinterCallback, ProgressCallback, TrainerCallback

from bvpo.files import disk_errors, write_atomically
from bvpo.strict import UserError

METRICS_FILE = "metrics.jsonl"


class Stopped(Exception):
    """Training ended behind a checkpoint because it was asked to."""


class Trained(Protocol):
    """What of the trainer is used here."""

    model: Any
    model_wrapped: Any
    takes_steps: bool

    @property
    def lacks_reference(self) -> bool: ...
    @property
    def reference_is_cached(self) -> bool: ...
    def fill_reference(self, model: Any) -> None: ...
    def restore_progress(self) -> None: ...
    def start_clock(self, now: float) -> None: ...
    def start_epoch(self, epoch: int) -> None: ...
    def is_asked_to_stop(self) -> bool: ...
    def ends_epoch(self, step: int, control: Any) -> bool: ...


class Bookkeeping(TrainerCallback):
    """Reshuffles each epoch, fills the reference of sharded models, writes metrics.jsonl, stops when asked to."""

    def __init__(self, trainer: Trained) -> None:
        self._trainer = trainer
        self._owes_save = self._is_stopping = False
        self._padding: dict[int, Any] = {}

    def on_init_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._padding = {id(config): config.pad_token_id for config in _token_configs(self._trainer.model)}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        trainer = self._trainer
        # transformers has just copied the tokenizer's padding token into the model's configs; one that the model has no
        # embedding for (tokenizers may add their own) would make a checkpoint that cannot be loaded
        size = trainer.model.get_input_embeddings().weight.shape[0]
        for config in _token_configs(trainer.model):
            if config.pad_token_id is not None and config.pad_token_id >= size:
                config.pad_token_id = self._padding.get(id(config))
        trainer.start_clock(time.perf_counter())
        if state.is_world_process_zero:
            _rewrite(Path(args.output_dir) / METRICS_FILE, state.log_history)
        if trainer.lacks_reference:
            # Sharded models come here resumed, too, with trained weights: then only the cache can give the reference.
            if state.global_step and not trainer.reference_is_cached:
                raise UserError("reference log-probs: the first run's cache is gone, and this model is trained already")
            trainer.fill_reference(trainer.model_wrapped)
        trainer.restore_progress()
        if state.global_step:
            args.eval_on_start = False  # it was evaluated at the start
        self._owes_save = self._is_stopping = False
        trainer.takes_steps = True

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._trainer.start_epoch(int(state.epoch or 0))

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._is_stopping = self._trainer.is_asked_to_stop()
        control.should_save |= self._is_stopping
        if control.should_save and self._trainer.ends_epoch(state.global_step, control):
            # What belongs to the epoch's end (an evaluation, a log entry) comes first: a run resumed from this
            # checkpoint begins with the next epoch.
            self._owes_save, control.should_save = True, False

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_save |= self._owes_save
        self._owes_save = False

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if state.is_world_process_zero and logs:
            path = Path(args.output_dir) / METRICS_FILE
            path.parent.mkdir(parents=True, exist_ok=True)
            with disk_errors(path, "adding an entry"), path.open("a", encoding="utf-8") as file:
                file.write(_line({"step": state.global_step, "epoch": state.epoch, **logs}))

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._is_stopping:
            raise Stopped

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._trainer.takes_steps = False


def _rewrite(path: Path, history: Sequence[Mapping[str, Any]]) -> None:
    """The entries that the checkpoint knows of, none for a fresh run: a killed one logs past its last checkpoint."""
    if history or path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, "".join(_line({"step": e["step"], "epoch": e.get("epoch"), **e}) for e in history))


def _line(entry: Mapping[str, Any]) -> str:
    return json.dumps(entry, default=float) + "\n"


def _token_configs(model: Any) -> list[Any]:
    """The configs that name a padding token."""
    found = (model.config, getattr(model, "generation_config", None))
    return [config for config in found if config is not None and hasattr(config, "pad_token_id")]


class ConciseProgress(ProgressCallback):
    """transformers' progress bar, with a short line in place of a dictionary of thirty numbers."""

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        line = summary_line(state.global_step, logs or {})
        if state.is_world_process_zero and self.training_bar is not None and line:
            self.training_bar.write(line)


def use_concise_progress(trainer: Any) -> None:
    """Swaps transformers' printing callbacks for ours; without a bar, metrics.jsonl has every number."""
    for callback in list(trainer.callback_handler.callbacks):
        if isinstance(callback, PrinterCallback):
            trainer.remove_callback(callback)
        elif type(callback) is ProgressCallback:
            trainer.remove_callback(callback)
            trainer.add_callback(ConciseProgress())


def summary_line(step: int, logs: dict[str, Any]) -> str:
    """The numbers one watches, of a training or an evaluation entry; empty for any other."""
    prefix = next((p for p in ("eval_", "") if f"{p}loss" in logs), None)
    if prefix is None:
        return ""
    parts = [f"step {step:>5}", f"{prefix or ''}loss {logs[f'{prefix}loss']:.4f}"]
    for view in ("trace", "empty"):
        if f"{prefix}{view}/loss" in logs:
            margin, accuracy = logs[f"{prefix}{view}/rewards/margins"], logs[f"{prefix}{view}/rewards/accuracies"]
            parts.append(f"{view} margin {margin:+.3f} acc {accuracy:.2f}")
    if "learning_rate" in logs:
        parts.append(f"lr {logs['learning_rate']:.2e}")
    if "tokens_per_second" in logs:
        parts.append(f"{logs['tokens_per_second']:,.0f} tok/s")
    return "  ".join(parts)
