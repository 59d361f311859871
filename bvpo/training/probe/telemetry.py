"""Noise telemetry of a run: how much of each view's gradient is noise, and which alpha that asks for.

Every N optimizer steps :mod:`bvpo.training.probe.samples` takes the gradients of some of the step's quads, before it. In:
the model and the step. Out: the numbers ``noise/...`` and ``alpha_hat`` of docs/training.md, and for ``alpha = "auto"``
the weight itself. Training is not touched otherwise: the weights are the same bits with and without looks.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import nn

from bvpo.config import AnchorConfig
from bvpo.method.mixing import AlphaSource, ScheduledAlpha
from bvpo.method.online_alpha import PREFIX, OnlineAlpha, StepPairs, cosine, ingredients, products
from bvpo.strict import UserError
from bvpo.training.arguments import BVPOConfig, why_biased
from bvpo.training.gradients import StepRunner
from bvpo.training.objective import Objective
from bvpo.training.probe import samples as looks
from bvpo.training.steps import StepBatch, StepDataset

logger = logging.getLogger(__name__)

NUM_SIBLINGS = 4  # quads of a look that are compared with another pair of their prompt, where there is one


class Telemetry:
    """The looks of one run: when they are due, what they found, and the estimate of alpha that they feed."""

    def __init__(self, args: BVPOConfig) -> None:
        self.is_auto = args.alpha_schedule == "auto"
        self._every = (self.is_auto and args.alpha_every) or args.telemetry_steps
        self._args = args
        self._has_rule = why_biased(args) is None
        # Neither alpha nor the anchor is part of a view's own gradient.
        self._objective = Objective.of(args, AnchorConfig())
        self.online = OnlineAlpha(args.alpha, beta=args.beta)
        self._found: dict[str, float] = {}
        self._is_off = self._has_warned = False

    def alpha_source(self) -> AlphaSource:
        """The estimate itself for ``auto``, else the configured schedule."""
        return self.online if self.is_auto else ScheduledAlpha(self._args.alpha_config())

    def before_step(
        self, model: nn.Module, runner: StepRunner, steps: StepDataset, step: StepBatch, number: int
    ) -> dict[str, float]:
        """The findings of a look if step ``number`` (from 0) is due for one; alpha 'auto' has taken note of them."""
        if self._is_off or not self._every or number % self._every:
            return {}
        reason = self._why_not(model, runner, steps)
        if reason is not None:
            self._is_off = True
            if self.is_auto:
                raise UserError(f"alpha 'auto' cannot look at the gradients: {reason}")
            _say(runner, "noise telemetry is off: %s", reason)
            return {}
        found = self._look(model, runner, steps, step, number)
        self.online.observe(found)
        self._found = found | self._averaged() if found else {}
        if self.is_auto and self.online.has_drifted and not self._has_warned:
            self._has_warned = True
            _say(runner, "alpha 'auto': the policy has left the reference's neighbourhood (noise/drift %.3g nats), where "
                 "the estimate holds; alpha is %g while that lasts", self.online.drift, self.online.start)  # fmt: skip
        return found

    def _look(
        self, model: nn.Module, runner: StepRunner, steps: StepDataset, step: StepBatch, number: int
    ) -> dict[str, float]:
        quads_per_row = runner.accelerator.num_processes if looks.is_sharded(model) else 1
        rng = np.random.default_rng([self._args.seed, number])
        plan = looks.choose(step.indices, steps.tokens.group_has_view, quads_per_row, rng)
        if plan is None:
            return {}
        if quads_per_row == 1 and "trace" in plan.views:
            found = ((row, looks.same_prompt(steps, quad)) for row, quad in enumerate(plan.quads))
            siblings = tuple((row, quad) for row, quad in found if quad is not None)
            plan = dataclasses.replace(plan, siblings=siblings[:NUM_SIBLINGS])
        alone = dataclasses.replace(runner, objective=self._objective)
        rows = looks.take(model, alone, steps, plan, seed=(self._args.seed, number))
        measured = measure(rows, plan, expected_pairs(steps, self._args.quads_per_step or 1))
        if not self._objective.needs_reference:
            measured.pop(f"{PREFIX}drift", None)
        return measured

    def _averaged(self) -> dict[str, float]:
        """What only all looks together can tell."""
        averages, estimate = self.online.averages, self.online.estimate
        angle = None if averages is None else cosine(averages)
        found = {} if angle is None else {f"{PREFIX}cosine": angle}
        return found | ({"alpha_hat": estimate} if self._has_rule and estimate is not None else {})

    def _why_not(self, model: nn.Module, runner: StepRunner, steps: StepDataset) -> str | None:
        least = 2 * (runner.accelerator.num_processes if looks.is_sharded(model) else 1)
        if (self._args.quads_per_step or 1) < least:
            return f"a step of {self._args.quads_per_step} quads has too few to compare (at least {least})"
        if self.is_auto and not steps.tokens.group_has_view.all(axis=1).any():
            return "no quad has a pair in both views"
        return looks.why_impossible(model, runner)

    def report(self) -> dict[str, float]:
        """The numbers of the last look, once."""
        found, self._found = self._found, {}
        return found

    def state(self) -> dict[str, dict[str, float]]:
        """What was learned, and the numbers of the last look that no log entry has had yet."""
        return {"online": self.online.state(), "found": self._found}

    def restore(self, state: Mapping[str, Mapping[str, float]]) -> None:
        """Goes on from :meth:`state` of a checkpoint, or anew from an empty one."""
        self.online.restore(state.get("online", {}))
        self._found, self._has_warned = dict(state.get("found", {})), False

    def identity(self) -> dict[str, Any]:
        """What of this decides the run's numbers."""
        return {"alpha_every": self._every if self.is_auto else None}


def measure(rows: looks.Rows, plan: looks.Plan, pairs: StepPairs) -> dict[str, float]:
    """A look in numbers, by the names of the log, for optimizer steps of that many pairs."""
    num = plan.quads_per_row
    trace, empty = (rows.sketches.get(view) for view in ("trace", "empty"))
    own = [None if view is None else products(view, view, quads_per_group=num) for view in (trace, empty)]
    between = None if trace is None or empty is None else products(trace, empty, quads_per_group=num)
    found = ingredients(own[0], own[1], between, pairs) | {f"{PREFIX}quads": float(len(plan.quads))}
    if trace is not None:
        found[f"{PREFIX}drift"] = float(rows.drift.mean())
    if trace is not None and own[0] is not None and own[0].covariance > 0 and plan.siblings:
        apart = trace[[row for row, _ in plan.siblings]] - rows.siblings
        # two pairs of one prompt differ by twice the variance within prompts
        found[f"{PREFIX}same_prompt"] = float((apart**2).sum(1).mean() / 2 / own[0].covariance)
    return found


def expected_pairs(steps: StepDataset, quads_per_step: int) -> StepPairs:
    """Pairs of an average step: the data set's shares of views times the quads of a step, over all ranks."""
    has_view = steps.tokens.group_has_view
    trace, empty = (float(share) for share in has_view.mean(axis=0))
    both = float(has_view.all(axis=1).mean())
    return StepPairs(trace=quads_per_step * trace, empty=quads_per_step * empty, both=quads_per_step * both)


def _say(runner: StepRunner, message: str, *values: Any) -> None:
    if runner.accelerator.is_main_process:
        logger.warning(message, *values)
