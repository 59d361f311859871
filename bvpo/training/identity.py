"""What decides a training run's numbers, and so which checkpoints it may go on from.

In: the arguments of a run. Out: the deciding arguments by name. How a step is cut into backward passes and where the
reference lives change time and memory, so a run that ran out of memory goes on with a smaller budget.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from transformers import TrainingArguments

from bvpo.training.arguments import BVPOConfig

# Fields outside of BVPOConfig's own that change the numbers of a run.
DECIDES = frozenset(
    {f.name for f in dataclasses.fields(BVPOConfig)}
    - {f.name for f in dataclasses.fields(TrainingArguments)}
    - {"layout", "head_chunk", "telemetry_steps", "alpha_every"}
    - {"tokens_per_micro_batch", "backward", "reference", "reference_cache"}
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
