"""Switches a policy's random noise off: dropout of every kind, dropped layers, noisy routers.

In: a causal language model, and the layout it trains in. Out: a model that computes in training mode what it computes in
evaluation mode, by measurement, or one line that says it cannot. An adapter's own dropout is peft's setting and stays.
"""

from __future__ import annotations

import contextlib
import logging
import random
import types
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from bvpo.strict import UserError
from bvpo.training.arguments import BVPOConfig
from bvpo.training.layout import LAYOUTS
from bvpo.training.loading import agree
from bvpo.training.policy import BranchRequest
from bvpo.training.tokens import Branch, TokenQuad

logger = logging.getLogger(__name__)


def switch_off(model: Any, layout: str, args: BVPOConfig) -> None:
    """Probabilities to 0 where modules keep them; if that is not enough, the modules stay in evaluation mode."""
    if args.dropout:
        return
    mode = agree(args, lambda: _quiet_mode(model, layout))
    _zero_probabilities(model)  # on the other ranks, too
    if mode == "evaluation":
        _stay_in_evaluation(model)
        if args.process_index == 0:
            logger.warning(
                "%s draws random numbers in training mode besides dropout: its layers train in evaluation mode "
                "(train.dropout = true would keep the noise)", type(model).__name__,
            )  # fmt: skip


def _quiet_mode(model: Any, layout: str) -> str:
    """The mode whose forward passes equal each other and those of evaluation mode as the model came."""
    was_training, target = model.training, _hidden(model, layout, training=False, seed=0)
    tolerance = 1e-4 if model.dtype in (torch.float32, torch.float64) else 5e-2
    found, distance, draws = "", 0.0, False
    for mode, prepare in (("training", _zero_probabilities), ("evaluation", _stay_in_evaluation)):
        prepare(model)
        passes = [_hidden(model, layout, training=True, seed=seed) for seed in (1, 2)]
        draws = any(drew for _, drew in passes)
        distance = max(_distance(hidden, target[0]) for hidden, _ in passes)
        # Noise of small probability may miss a short probe, but not the generator's state.
        if distance <= tolerance and (not draws or mode == "evaluation"):
            found = mode
            break
    model.train(was_training)
    if not found:
        raise UserError(
            f"{type(model).__name__}: forward passes in training mode differ from evaluation mode by {distance:.2g} "
            "(hidden states, relative) though dropout is off: it has noise that cannot be switched off, and policy and "
            "reference would differ; train.dropout = true trains with it"
        )
    return found


def _zero_probabilities(model: nn.Module) -> None:
    """``nn.Dropout`` modules, and floats that modules keep under a name like attention_dropout, resid_pdrop, layerdrop."""
    for module in _own_modules(model):
        if isinstance(module, _DropoutNd):
            module.p = 0.0
        for name, value in list(vars(module).items()):
            if "drop" in name.lower() and isinstance(value, float) and value > 0:
                setattr(module, name, 0.0)


def _stay_in_evaluation(model: nn.Module) -> None:
    """``train()`` no longer reaches the modules, but for those that only decide about gradient checkpointing by it."""
    for module in _own_modules(model):
        if not hasattr(module, "gradient_checkpointing"):
            module.train = types.MethodType(_train_children, module)
            module.training = False


def _train_children(self: Any, mode: bool = True) -> Any:
    type(self).train(self, mode)
    self.training = False
    return self


def _own_modules(model: nn.Module) -> Iterator[nn.Module]:
    """All modules but an adapter's."""
    foreign = set(_adapter_modules(model))
    return (module for module in model.modules() if module not in foreign)


def _adapter_modules(model: nn.Module) -> Iterator[nn.Module]:
    for layer in model.modules():
        if hasattr(layer, "base_layer") and hasattr(layer, "adapter_layer_names"):  # peft's BaseTunerLayer
            yield layer
            for name, child in layer.named_children():
                if name != "base_layer":
                    yield from child.modules()


def _hidden(model: Any, layout: str, *, training: bool, seed: int) -> tuple[Tensor, bool]:
    """Hidden states of a small quad, and whether a random number was drawn for them."""
    ids = (
        np.random.default_rng(0).integers(1, min(model.config.get_text_config().vocab_size, 1000), 40).astype(np.int32)
    )
    branches = tuple(Branch(ids=part, scored_from=0, answer_from=1) for part in np.split(ids[8:], [11, 18, 23]))
    quad = TokenQuad(id="probe", prefix_ids=ids[:8], branches=branches)  # type: ignore[arg-type]
    rows = LAYOUTS[layout]([quad]).to(model.device)
    request = BranchRequest(layout=rows, want="hidden", selected=torch.arange(len(rows.rows_N), device=model.device))
    model.train(training)
    for module in _adapter_modules(model):
        module.training = False
    with torch.no_grad(), _forked(model.device, seed) as states:
        before = states()
        hidden = model(input_ids=rows.input_ids_RT, position_ids=rows.position_ids_RT, bvpo=request)
        drew = states() != before
    return hidden, drew


@contextlib.contextmanager
def _forked(device: torch.device, seed: int) -> Iterator[Any]:
    """The global generators under ``seed``, put back afterwards; yields a function that reads their states."""
    devices = [device] if device.type == "cuda" else []
    python = random.getstate()
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        random.seed(seed)
        try:
            yield lambda: (
                random.getstate(), torch.get_rng_state().tolist(), *(torch.cuda.get_rng_state(d).tolist() for d in devices)
            )  # fmt: skip
        finally:
            random.setstate(python)


def _distance(hidden: Tensor, target: Tensor) -> float:
    gap = (hidden - target).abs().max() / target.abs().max().clamp(min=1e-30)
    return float(gap) if bool(torch.isfinite(gap)) else float("inf")
