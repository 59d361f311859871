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
from bvpo.experiment import Experiment, require_as_paired
from bvpo.files import folder_lock, hash_file, make_folder, sync_file, sync_folder, write_atomically
from bvpo.records import VIEWS
from bvpo.strict import UserError, read_json, write_jsonl

logger = logging.getLogger(__name__)

ABOUT = "Align the model on quads. Prints what the run will cost, trains, resumes when run again."


def main(argv: Sequence[str]) -> int | None:
    config, options = parse_command("train", argv, ABOUT)
    run(config, options)
    from bvpo.training.loading import end_process

    end_process()
    return None


def run(config: ExperimentConfig, options: StageOptions) -> None:
    """One training run, the only one in its folder."""
    experiment = Experiment.of(config)
    config = _with_data(config, experiment, options)
    make_folder(experiment.train)
    with contextlib.ExitStack() as stack:
        stop = stack.enter_context(_stopping())
        if not options.dry_run and int(os.environ.get("RANK", "0")) == 0:
            refusal = "another bvpo train is at work in this folder; wait for it, or give the experiment another name"
            stack.enter_context(folder_lock(experiment.train, "train", refusal=refusal))
        _run(config, options, experiment, stop)


class _Stop:
    """What a signal asks for: an end behind the step at work while steps are taken, at once otherwise. Ctrl-C in ``bvpo
    run`` reaches a worker twice, as SIGINT and as the SIGTERM that ends it: only the same signal again is impatience."""

    trainer: Any = None
    number = 0

    def __call__(self, number: int, frame: Any) -> None:
        name = signal.Signals(number).name
        trainer = self.trainer
        takes_steps = trainer is not None and trainer.takes_steps
        if takes_steps and self.number and number != self.number:
            return
        if trainer is not None and takes_steps and not self.number:
            self.number, trainer.stop_asked = number, True
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


def _run(config: ExperimentConfig, options: StageOptions, experiment: Experiment, stop: _Stop) -> None:
    """Everything heavy is imported here, after the config has been checked."""
    from transformers.utils import logging as transformers_logging

    from bvpo.models import load_tokenizer
    from bvpo.training.arguments import arguments_from
    from bvpo.training.estimate import require_fit

    transformers_logging.disable_progress_bar()  # one bar: ours
    output = experiment.train
    args = arguments_from(
        config.train,
        output_dir=str(output),
        seed=config.seed,
        reasoning_format=config.model.format,
        custom_format=config.model.custom_format,
    )
    model_config = _load_config(config)
    tokenizer = load_tokenizer(config.model)
    train_tokens, eval_tokens, held_out = _tokens(config, args, tokenizer, model_config)
    estimate = _estimate(config, args, model_config, train_tokens)
    if args.process_index == 0:
        _say(config, args, estimate, train_tokens, eval_tokens)
    require_fit(estimate, args.device)
    if options.dry_run:
        return
    trainer = _trainer(config, args, tokenizer, train_tokens, eval_tokens)
    if _is_done(experiment, trainer, eval_tokens):
        return
    checkpoint = trainer.newest_checkpoint()
    if args.process_index == 0:
        _begin(experiment, config, trainer, checkpoint)
    seconds = _train(trainer, experiment, checkpoint, stop)
    _write_held_out(trainer, experiment, eval_tokens, held_out, checkpoint)
    if trainer.is_world_process_zero():
        _finish(trainer, experiment, seconds, train_tokens, eval_tokens)
    if args.push_to_hub:
        trainer.push_to_hub()


def _load_config(config: ExperimentConfig) -> Any:
    from transformers import AutoConfig

    return _load(AutoConfig, config)


def _estimate(config: ExperimentConfig, args: Any, model_config: Any, tokens: Any) -> Any:
    """What the run will cost."""
    from bvpo.training.estimate import estimate_run
    from bvpo.training.objective import Objective

    objective = Objective.of(args)
    lora_rank = config.train.lora.rank if config.train.lora.enabled else None
    held = args.reference == "held" or (objective.needs_kl and lora_rank is None)
    return estimate_run(model_config, tokens, args, lora_rank=lora_rank, needs_held_reference=held)


def _train(trainer: Any, experiment: Experiment, checkpoint: str, stop: _Stop) -> float:
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
    _save_final(trainer, experiment)
    return time.perf_counter() - started


def _is_done(experiment: Experiment, trainer: Any, eval_tokens: Any) -> bool:
    """Whether the very same run ended here before; then nothing is changed. The first rank looks, for all."""
    from bvpo.training.loading import agree

    def steps() -> str:
        entry = experiment.check("train", config=_settings(trainer))
        summary = experiment.summary
        if entry is None or entry.finished is None or not summary.is_file() or not experiment.final.is_dir():
            return ""
        found = read_json(summary)
        held_out = None if eval_tokens is None else eval_tokens.fingerprint
        return str(found.get("optimizer_steps", "")) if found.get("held_out") == held_out else ""

    num_steps = agree(trainer.args, steps)
    if num_steps and trainer.is_world_process_zero():
        logger.info("done before  %s steps, model in %s; nothing is changed", num_steps, experiment.final)
    return bool(num_steps)


def _settings(trainer: Any) -> dict[str, Any]:
    return json.loads(json.dumps(trainer.identity(), default=str))


def _save_final(trainer: Any, experiment: Experiment) -> None:
    """The model beside the checkpoints, under its name only once it is whole."""
    draft, final = experiment.train / "_final", experiment.final  # transformers uploads nothing that starts so
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
        sync_folder(final.parent)


def fingerprint(config: ExperimentConfig) -> dict[str, Any]:
    """The data, as it is on the disk, and whether the model that came of it is there."""
    experiment = Experiment.of(config)
    data = _with_data(config, experiment, StageOptions()).data
    names = filter(None, (data.quads, data.eval_quads, data.trace, data.empty))
    return {"data": {name: _content(Path(name)) for name in names}, "model": experiment.final.is_dir()}


def _content(path: Path) -> Any:
    """Of a file, or of the files in a folder; a data set on a hub is named by its config."""
    if path.is_dir():
        return [[str(file.relative_to(path)), hash_file(file)] for file in sorted(path.rglob("*")) if file.is_file()]
    return hash_file(path) if path.is_file() else ""


def _with_data(config: ExperimentConfig, experiment: Experiment, options: StageOptions) -> ExperimentConfig:
    """The experiment's own quads unless others are named, and ``--limit``."""
    data = config.data
    if not (data.quads or data.trace or data.empty):
        own = experiment.quads()
        if not own.is_file():
            raise UserError(
                f"data: nothing to train on; set data.quads, or data.trace and data.empty, or make {own} first"
            )
        data = dataclasses.replace(data, quads=str(own))
    for quads in filter(None, (data.quads, data.eval_quads)):
        require_as_paired(Path(quads))
    if options.limit is not None:
        data = dataclasses.replace(data, limit=options.limit)
    return dataclasses.replace(config, data=data)


def _load(auto_class: Any, config: ExperimentConfig, **kwargs: Any) -> Any:
    from bvpo.models import loading

    model = config.model
    with loading(f"model.path: {model.path!r} cannot be loaded"):
        return auto_class.from_pretrained(
            model.path, revision=model.revision, trust_remote_code=model.trust_remote_code, **kwargs
        )


def _tokens(config: ExperimentConfig, args: Any, tokenizer: Any, model_config: Any) -> tuple[Any, Any, Any]:
    """Training and held-out quads in tokens, and the held-out quads themselves."""
    from bvpo.formats import resolve_format
    from bvpo.training.data import load_quads, token_dataset

    fmt = resolve_format(tokenizer, config.model.format, config.model.custom_format)
    sets = load_quads(config.data, fmt, seed=config.seed)
    if config.data.eval_fraction and config.train.eval == "no" and not any(True for _ in sets.eval or ()):
        logger.info("held out     no quad: data.eval_fraction is a share of the prompts, and these are few")
        sets = dataclasses.replace(sets, eval=None)
    size = model_config.get_text_config().vocab_size
    with args.main_process_first(local=False, desc="tokenising"):
        train = token_dataset(sets.train, tokenizer, size, args, "train")
        held_out = None if sets.eval is None else token_dataset(sets.eval, tokenizer, size, args, "eval")
    return train, held_out, sets.eval


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


def _begin(experiment: Experiment, config: ExperimentConfig, trainer: Any, checkpoint: str) -> None:
    """Refuses to go on with other settings than the folder's run was started with, then records these."""
    if not checkpoint and not experiment.final.is_dir():
        experiment.forget("train")  # nothing of an earlier try is left that could be mixed up
    experiment.begin("train", config=_settings(trainer))
    experiment.write_config(dump_toml(config))
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

    entry = Experiment(Path(config.data.quads).parent).stage("sample") if config.data.quads else None
    return None if entry is None else doubt_of_sampling(entry.section("sample"))


def _write_held_out(trainer: Any, experiment: Experiment, tokens: Any, quads: Any, checkpoint: str | None) -> None:
    """``held_out.jsonl``, by the final model. A finished run that is run again takes no step and keeps what it wrote."""
    from bvpo.evaluation.held_out import held_out_pairs

    path, summary = experiment.held_out, experiment.summary
    is_main, steps = trainer.is_world_process_zero(), trainer.state.global_step
    if tokens is None:
        if is_main:
            path.unlink(missing_ok=True)
        return
    if checkpoint and checkpoint.endswith(f"-{steps}") and path.is_file() and summary.is_file():
        before = read_json(summary)
        if before.get("held_out") == tokens.fingerprint and before.get("optimizer_steps") == steps:
            return
    margins = trainer.held_out_margins()
    if is_main:
        write_jsonl(path, held_out_pairs(margins, tokens, quads))


def _finish(trainer: Any, experiment: Experiment, seconds: float, tokens: Any, eval_tokens: Any) -> None:
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
    write_atomically(experiment.summary, json.dumps(summary, indent=1, default=float) + "\n")
    counts = {"optimizer_steps": trainer.state.global_step, "quads": tokens.num_groups}
    experiment.finish("train", counts=counts)
    logger.info("done         %d steps in %.1f s, model in %s", trainer.state.global_step, seconds, experiment.final)
    for view in ("trace", "empty"):
        last = next((entry for entry in reversed(entries) if f"{view}/loss" in entry), None)
        if last:
            logger.info(
                "%-12s loss %.4f, margin %.4f, accuracy %.3f (step %s)", view, last[f"{view}/loss"],
                last[f"{view}/rewards/margins"], last[f"{view}/rewards/accuracies"], last.get("step"),
            )  # fmt: skip
