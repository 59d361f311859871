"""``bvpo train CONFIG.toml``: from quads to an aligned checkpoint.

Reads the quads that ``[data]`` names (or ``quads.jsonl`` of the experiment folder), tokenises them once, says what the
run will cost, trains, and leaves in ``ROOT/NAME/train``: checkpoints, ``metrics.jsonl``, ``summary.json``, ``final/``, a
plain Hugging Face model folder, and ``held_out.jsonl``, what that model says of the held-out quads. Run again, it resumes
from the newest finished checkpoint; under a changed config it refuses. SIGTERM and ctrl-C end it behind a checkpoint.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import shutil
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from bvpo.command import StageOptions, parse_command
from bvpo.config import ExperimentConfig, dump_toml
from bvpo.experiment.manifest import begin_stage, check_stage, finish_stage, forget_stage, read_manifest
from bvpo.files import folder_lock, make_folder, sync_file, sync_folder, write_atomically
from bvpo.records import VIEWS
from bvpo.strict import UserError, parse_json, write_jsonl

logger = logging.getLogger(__name__)

ABOUT = "Align the model on quads. Prints what the run will cost, trains, resumes when run again."
HELD_OUT = "held_out.jsonl"


def main(argv: Sequence[str]) -> int | None:
    config, options = parse_command("train", argv, ABOUT)
    run(config, options)
    from bvpo.training.loading import end_process

    end_process()
    return None


def run(config: ExperimentConfig, options: StageOptions) -> None:
    """One training run, the only one in its folder."""
    folder = Path(config.root) / config.name
    config = _with_data(config, folder, options)
    make_folder(folder / "train")
    with contextlib.ExitStack() as stack:
        stop = stack.enter_context(_stopping())
        if not options.dry_run and int(os.environ.get("RANK", "0")) == 0:
            refusal = "another bvpo train is at work in this folder; wait for it, or give the experiment another name"
            stack.enter_context(folder_lock(folder / "train", "train", refusal=refusal))
        _run(config, options, folder, stop)


class _Stop:
    """What a signal asks for: an end behind the step at work while steps are taken, at once otherwise. Ctrl-C in ``bvpo
    run`` reaches a worker twice, as SIGINT and as the SIGTERM that ends it: only the same signal again is impatience."""

    trainer: Any = None
    number = 0

    def __call__(self, number: int, frame: Any) -> None:
        name = signal.Signals(number).name
        takes_steps = getattr(self.trainer, "takes_steps", False)
        if takes_steps and self.number and number != self.number:
            return
        if takes_steps and not self.number:
            self.number, self.trainer.stop_asked = number, True
            os.write(2, f"{name}: ending after this step, with a checkpoint\n".encode())  # a handler must not log
            return
        self.number = number
        self.leave()

    def leave(self) -> None:
        """Ends with the exit code that shells give a process killed by this signal: 130 for ctrl-C, 143 for SIGTERM."""
        if self.number == signal.SIGINT:
            raise KeyboardInterrupt
        logger.info("SIGTERM      training ended; running the same command again resumes")
        raise SystemExit(128 + self.number)


@contextlib.contextmanager
def _stopping() -> Iterator[_Stop]:
    """Signals can be handled in the main thread only; elsewhere they stay whose they are."""
    stop = _Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _run(config: ExperimentConfig, options: StageOptions, folder: Path, stop: _Stop) -> None:
    """Everything heavy is imported here, after the config has been checked."""
    from transformers.utils import logging as transformers_logging

    from bvpo.training.arguments import arguments_from
    from bvpo.training.estimate import require_fit

    transformers_logging.disable_progress_bar()  # one bar: ours
    output = folder / "train"
    args = arguments_from(
        config.train,
        output_dir=str(output),
        seed=config.seed,
        reasoning_format=config.model.format,
        custom_format=config.model.custom_format,
    )
    model_config = _load_config(config)
    tokenizer = _load_tokenizer(config)
    train_tokens, eval_tokens, held_out = _tokens(config, args, tokenizer, model_config)
    estimate = _estimate(config, args, model_config, train_tokens)
    if args.process_index == 0:
        _say(config, args, estimate, train_tokens, eval_tokens)
    require_fit(estimate, args.device)
    if options.dry_run:
        return
    trainer = _trainer(config, args, tokenizer, train_tokens, eval_tokens)
    if _is_done(folder, trainer, output, eval_tokens):
        return
    checkpoint = trainer.newest_checkpoint()
    if args.process_index == 0:
        _begin(folder, config, trainer, output, checkpoint)
    seconds = _train(trainer, output, checkpoint, stop)
    _write_held_out(trainer, output, eval_tokens, held_out, checkpoint)
    if trainer.is_world_process_zero():
        _finish(trainer, output, seconds, train_tokens, eval_tokens)
    if args.push_to_hub:
        trainer.push_to_hub()


def _load_config(config: ExperimentConfig) -> Any:
    from transformers import AutoConfig

    return _load(AutoConfig, config)


def _estimate(config: ExperimentConfig, args: Any, model_config: Any, tokens: Any) -> Any:
    """What the run will cost."""
    from bvpo.training.estimate import estimate_run
    from bvpo.training.objective import Objective

    objective = Objective(args.loss_config(), args.trace_estimator, args.anchor_config())
    lora_rank = config.train.lora.rank if config.train.lora.enabled else None
    held = args.reference == "held" or (objective.needs_kl and lora_rank is None)
    return estimate_run(model_config, tokens, args, lora_rank=lora_rank, needs_held_reference=held)


def _train(trainer: Any, output: Path, checkpoint: str, stop: _Stop) -> float:
    """All steps, and the final model; the seconds they took. Asked to stop, it leaves behind a checkpoint."""
    from bvpo.training.callbacks import Stopped

    started = time.perf_counter()
    stop.trainer = trainer
    try:
        trainer.train(resume_from_checkpoint=checkpoint or None)
    except Stopped:
        state = trainer.state
        if trainer.is_world_process_zero():
            logger.info("stopped      checkpoint saved at step %d of %d", state.global_step, state.max_steps)
        stop.leave()
    _save_final(trainer, output)
    return time.perf_counter() - started


def _is_done(folder: Path, trainer: Any, output: Path, eval_tokens: Any) -> bool:
    """Whether the very same run ended here before; then nothing is changed. The first rank looks, for all."""
    from bvpo.training.loading import agree

    def steps() -> str:
        entry = check_stage(folder, "train", config=_settings(trainer))
        summary = output / "summary.json"
        if entry is None or entry.finished is None or not summary.is_file() or not (output / "final").is_dir():
            return ""
        found = parse_json(summary.read_text(encoding="utf-8"), str(summary))
        held_out = None if eval_tokens is None else eval_tokens.fingerprint
        return str(found.get("optimizer_steps", "")) if found.get("held_out") == held_out else ""

    num_steps = agree(trainer.args, steps)
    if num_steps and trainer.is_world_process_zero():
        logger.info("done before  %s steps, model in %s; nothing is changed", num_steps, output / "final")
    return bool(num_steps)


def _settings(trainer: Any) -> dict[str, Any]:
    return json.loads(json.dumps(trainer.identity(), default=str))


def _save_final(trainer: Any, output: Path) -> None:
    """The model beside the checkpoints, under its name only once it is whole."""
    draft, final = output / "_final", output / "final"  # transformers uploads nothing that starts so
    is_main = trainer.is_world_process_zero()
    if is_main:
        shutil.rmtree(draft, ignore_errors=True)
    trainer.accelerator.wait_for_everyone()
    trainer.save_model(str(draft))
    trainer.accelerator.wait_for_everyone()
    if is_main:
        for path in draft.rglob("*"):
            sync_file(path) if path.is_file() else sync_folder(path)
        shutil.rmtree(final, ignore_errors=True)
        draft.rename(final)
        sync_folder(output)


def _with_data(config: ExperimentConfig, folder: Path, options: StageOptions) -> ExperimentConfig:
    """The experiment's own quads unless others are named, and ``--limit``."""
    data = config.data
    if not (data.quads or data.trace or data.empty):
        own = folder / "quads.jsonl"
        if not own.is_file():
            raise UserError(
                f"data: nothing to train on; set data.quads, or data.trace and data.empty, or make {own} first"
            )
        data = dataclasses.replace(data, quads=str(own))
    if options.limit is not None:
        data = dataclasses.replace(data, limit=options.limit)
    return dataclasses.replace(config, data=data)


def _load(auto_class: Any, config: ExperimentConfig, **kwargs: Any) -> Any:
    model = config.model
    try:
        return auto_class.from_pretrained(
            model.path, revision=model.revision, trust_remote_code=model.trust_remote_code, **kwargs
        )
    except (OSError, ValueError) as error:
        raise UserError(
            f"model.path: {model.path!r} cannot be loaded ({str(error).strip().splitlines()[0]})"
        ) from error


def _load_tokenizer(config: ExperimentConfig) -> Any:
    """The named tokenizer, or the model's own at the model's revision (chat templates change between revisions)."""
    from transformers import AutoTokenizer

    from bvpo.training.loading import load_tokenizer

    named = config.model.tokenizer
    return load_tokenizer(named, None) if named else _load(AutoTokenizer, config)


def _tokens(config: ExperimentConfig, args: Any, tokenizer: Any, model_config: Any) -> tuple[Any, Any, Any]:
    """Training and held-out quads in tokens, and the held-out quads themselves."""
    from bvpo.formats import resolve_format
    from bvpo.training.data import load_quads
    from bvpo.training.tokenizing import TokenSettings, prepare_tokens

    fmt = resolve_format(tokenizer, config.model.format, config.model.custom_format)
    sets = load_quads(config.data, fmt, seed=config.seed)
    if config.data.eval_fraction and config.train.eval == "no" and not any(True for _ in sets.eval or ()):
        logger.info("held out     no quad: data.eval_fraction is a share of the prompts, and these are few")
        sets = dataclasses.replace(sets, eval=None)
    settings = TokenSettings(
        max_length=args.max_length,
        over_long=args.over_long,
        score_empty_block=args.score_empty_block,
        vocab_size=model_config.get_text_config().vocab_size,
        keep_groups=args.trace_estimator == "traces",
        answer_only=args.trace_estimator != "joint",
    )
    found = []
    with args.main_process_first(local=False, desc="tokenising"):
        for source in (sets.train, sets.eval):
            target = Path(args.output_dir) / "_tokens"  # transformers uploads nothing that starts so
            found.append(None if source is None else prepare_tokens(source, tokenizer, fmt, settings, target))
    return found[0], found[1], sets.eval


def _trainer(config: ExperimentConfig, args: Any, tokenizer: Any, train_tokens: Any, eval_tokens: Any) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    from bvpo.training.trainer import BVPOTrainer

    dtype = torch.bfloat16 if args.precision == "pure_bf16" else torch.float32
    model = _load(AutoModelForCausalLM, config, dtype=dtype, use_safetensors=True)
    return BVPOTrainer(model, args, train_tokens, eval_tokens, tokenizer, peft_config=_peft_config(config))


def _peft_config(config: ExperimentConfig) -> Any:
    lora = config.train.lora
    if not lora.enabled:
        return None
    from peft import LoraConfig

    targets: Any = lora.target_modules[0] if len(lora.target_modules) == 1 else list(lora.target_modules)
    return LoraConfig(
        r=lora.rank, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=targets, task_type="CAUSAL_LM"
    )


def _begin(folder: Path, config: ExperimentConfig, trainer: Any, output: Path, checkpoint: str) -> None:
    """Refuses to go on with other settings than the folder's run was started with, then records these."""
    if not checkpoint and not (output / "final").is_dir():
        forget_stage(folder, "train")  # nothing of an earlier try is left that could be mixed up
    begin_stage(folder, "train", config=_settings(trainer))
    write_atomically(folder / "config.toml", dump_toml(config))
    if checkpoint:
        logger.info("resuming from %s", checkpoint)


def _say(config: ExperimentConfig, args: Any, estimate: Any, train_tokens: Any, eval_tokens: Any) -> None:
    logger.info("bvpo train   %s -> %s", config.model.path, args.output_dir)
    logger.info(
        "objective    %s, alpha %g (%s), trace estimator %s, anchor %s",
        args.loss, args.alpha, args.alpha_schedule, args.trace_estimator, args.anchor,
    )  # fmt: skip
    if args.alpha_schedule == "auto" and (doubt := _doubt_of_sampling(config)):
        logger.warning("alpha 'auto': %s", doubt)
    for line in estimate.lines():
        logger.info("%s", line)
    if args.alpha_schedule == "constant" and args.alpha in (0, 1) and len(config.data.views) == 2:
        view = VIEWS[0] if args.alpha == 1 else VIEWS[1]
        logger.info("note         the other view has no weight; data.views = [%r] saves its compute", view)
    for name, tokens in (("train", train_tokens), ("eval", eval_tokens)):
        if tokens is not None:
            views = tokens.group_has_view.sum(axis=0)
            dropped = ", ".join(f"{reason} {count:,}" for reason, count in sorted(tokens.drops.items())) or "none"
            logger.info("%-12s %d trace pairs, %d empty pairs; dropped: %s", name, views[0], views[1], dropped)


def _doubt_of_sampling(config: ExperimentConfig) -> str | None:
    """From the manifest beside the quads, where an experiment made them."""
    from bvpo.method.online_alpha import doubt_of_sampling

    entry = read_manifest(Path(config.data.quads).parent).stage("sample") if config.data.quads else None
    return None if entry is None else doubt_of_sampling(entry.config.get("sample", {}))


def _write_held_out(trainer: Any, output: Path, tokens: Any, quads: Any, checkpoint: str | None) -> None:
    """``held_out.jsonl``, by the final model. A finished run that is run again takes no step and keeps what it wrote."""
    from bvpo.evaluation.held_out import held_out_pairs

    path, summary = output / HELD_OUT, output / "summary.json"
    is_main, steps = trainer.is_world_process_zero(), trainer.state.global_step
    if tokens is None:
        if is_main:
            path.unlink(missing_ok=True)
        return
    if checkpoint and checkpoint.endswith(f"-{steps}") and path.is_file() and summary.is_file():
        before = parse_json(summary.read_text(encoding="utf-8"), str(summary))
        if before.get("held_out") == tokens.fingerprint and before.get("optimizer_steps") == steps:
            return
    margins = trainer.held_out_margins()
    if is_main:
        write_jsonl(path, held_out_pairs(margins, tokens, quads))


def _finish(trainer: Any, output: Path, seconds: float, tokens: Any, eval_tokens: Any) -> None:
    """``summary.json`` for machines, a few lines for people."""
    entries = [entry for entry in trainer.state.log_history if "loss" in entry]
    evaluations = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
    summary = {
        "optimizer_steps": trainer.state.global_step,
        "quads": tokens.num_groups,
        "pairs": dict(zip(VIEWS, map(int, tokens.group_has_view.sum(axis=0)), strict=True)),
        "tokens": round(float(tokens.num_sequence_tokens.sum()) * float(trainer.state.epoch or 0)),
        "dropped_pairs": dict(tokens.drops),
        "seconds": round(seconds, 3),
        "last": entries[-1] if entries else {},
        "eval": evaluations[-1] if evaluations else {},
        "held_out": None if eval_tokens is None else eval_tokens.fingerprint,
    }
    write_atomically(output / "summary.json", json.dumps(summary, indent=1, default=float) + "\n")
    counts = {"optimizer_steps": trainer.state.global_step, "quads": tokens.num_groups}
    finish_stage(output.parent, "train", counts=counts)
    logger.info("done         %d steps in %.1f s, model in %s", trainer.state.global_step, seconds, output / "final")
    for view in ("trace", "empty"):
        last = next((entry for entry in reversed(entries) if f"{view}/loss" in entry), None)
        if last:
            logger.info(
                "%-12s loss %.4f, margin %.4f, accuracy %.3f (step %s)", view, last[f"{view}/loss"],
                last[f"{view}/rewards/margins"], last[f"{view}/rewards/accuracies"], last.get("step"),
            )  # fmt: skip
