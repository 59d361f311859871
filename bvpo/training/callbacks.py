"""What happens around the steps of a run: reshuffling, metrics on disk, checkpoint identity, and one readable log line.

In: the trainer's state at transformers' callback hooks. Out: ``metrics.jsonl`` (machines), a progress bar with one short
line per log entry (people), and ``bvpo_run.json`` and ``bvpo_noise.json`` in every checkpoint.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import PrinterCallback, ProgressCallback, TrainerCallback

from bvpo.strict import UserError

if TYPE_CHECKING:
    from bvpo.training.trainer import BVPOTrainer

METRICS_FILE = "metrics.jsonl"
IDENTITY_FILE = "bvpo_run.json"
NOISE_FILE = "bvpo_noise.json"


class Bookkeeping(TrainerCallback):
    """Reshuffles each epoch, fills the reference of sharded models, writes metrics.jsonl and the checkpoint's identity."""

    def __init__(self, trainer: BVPOTrainer) -> None:
        self._trainer = trainer
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
            _forget_after(Path(args.output_dir) / METRICS_FILE, state.global_step)
        if trainer.lacks_reference:
            # Sharded models come here resumed, too, with trained weights: then only the cache can give the reference.
            if state.global_step and not trainer.reference_is_cached:
                raise UserError("reference log-probs: the first run's cache is gone, and this model is trained already")
            trainer.fill_reference(trainer.model_wrapped)

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._trainer.start_epoch(int(state.epoch or 0))

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if state.is_world_process_zero and logs:
            folder = Path(args.output_dir)
            folder.mkdir(parents=True, exist_ok=True)
            entry = {"step": state.global_step, "epoch": state.epoch, **logs}
            with (folder / METRICS_FILE).open("a", encoding="utf-8") as file:
                file.write(json.dumps(entry, default=float) + "\n")

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if state.is_world_process_zero and folder.is_dir():
            (folder / NOISE_FILE).write_text(json.dumps(self._trainer.telemetry.online.state(), indent=1))
            (folder / IDENTITY_FILE).write_text(json.dumps(self._trainer.identity(), default=str, indent=1))


def _forget_after(path: Path, step: int) -> None:
    """Drops entries of steps that are taken again: a killed run logs past its last checkpoint, a fresh one starts over."""
    if path.is_file():
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        kept = [line for line in lines if line.endswith("\n") and 0 < json.loads(line)["step"] <= step]
        path.write_text("".join(kept), encoding="utf-8")


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
