"""What decides a training run's numbers, and so which checkpoints it may go on from.

In: the arguments of a run, a checkpoint folder; out: the deciding arguments by name, and what the checkpoint's looks at the
gradients had found. A checkpoint of another identity is refused with the differences. Nothing is written here.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import TrainingArguments

from bvpo.strict import OtherSettings, UserError
from bvpo.training.arguments import BVPOConfig
from bvpo.training.callbacks import IDENTITY_FILE, NOISE_FILE

# Fields outside of BVPOConfig's own that change the numbers of a run.
DECIDES = frozenset(
    {f.name for f in dataclasses.fields(BVPOConfig)}
    - {f.name for f in dataclasses.fields(TrainingArguments)}
    - {"reference_cache", "layout", "head_chunk", "telemetry_steps", "alpha_every"}
) | {
    "learning_rate",
    "lr_scheduler_type",
    "warmup_steps",
    "weight_decay",
    "optim",
    "optim_args",
    "lr_scheduler_kwargs",
    "num_train_epochs",
    "max_steps",
    "bf16",
    "fp16",
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "max_grad_norm",
    "seed",
    "data_seed",
}


def decisive_arguments(args: BVPOConfig) -> dict[str, Any]:
    """Everything in the arguments that decides the run's numbers."""
    return {f.name: getattr(args, f.name) for f in dataclasses.fields(BVPOConfig) if f.name in DECIDES}


def check_checkpoint(folder: str | None, identity: Mapping[str, Any]) -> dict[str, float]:
    """Refuses a checkpoint of another run; returns what its looks at the gradients had found."""
    path = Path(folder or "") / IDENTITY_FILE
    if folder is None or not path.is_file():
        if folder is not None and Path(folder).is_dir():
            raise UserError(
                f"{folder}: no {IDENTITY_FILE}, so not a finished checkpoint of bvpo; delete it or name another"
            )
        return {}  # transformers says what is missing
    before, now = json.loads(path.read_text()), json.loads(json.dumps(dict(identity), default=str))
    changed = [f"{k}: {before.get(k)!r} -> {now.get(k)!r}" for k in sorted(before | now) if before.get(k) != now.get(k)]
    if changed:
        raise OtherSettings(f"{folder}: checkpoint of another run, cannot resume ({'; '.join(changed)})")
    noise = path.with_name(NOISE_FILE)
    return json.loads(noise.read_text()) if noise.is_file() else {}
