"""Per-pair preference losses, and the anchor terms that can be added to any of them.

In: sequence log-probabilities of a batch of pairs (:class:`PairLogps`) and keyword-only hyperparameters. Out: one loss
per pair (:class:`PairLoss`). Nothing is reduced here: the trainer alone averages, by the global number of pairs of each
view (:mod:`bvpo.method.mixing`). Losses do not know which view their pairs come from.

A loss is one pure function plus one line in :data:`LOSSES`; docs/extending.md is the worked example and
docs/losses.md the reference. Shapes: B pairs; N tokens; V vocabulary.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from bvpo.config import LossConfig
from bvpo.config.ranges import Range, marks
from bvpo.strict import UserError, did_you_mean, show


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PairLogps:
    """Log-probabilities of B pairs, each *summed* over the scored tokens of one response (natural log).

    ``ref_*`` may be ``None`` only for losses with ``needs_reference=False``. ``*_lengths`` count the scored tokens, the
    same tokens that the sums run over. float32 or float64: the differences that matter are lost in half precision.
    """

    chosen: Tensor
    rejected: Tensor
    chosen_lengths: Tensor
    rejected_lengths: Tensor
    ref_chosen: Tensor | None = None
    ref_rejected: Tensor | None = None

    def __post_init__(self) -> None:
        assert (self.ref_chosen is None) == (self.ref_rejected is None), "one reference log-prob without the other"
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value is None:
                continue
            assert value.ndim == 1 and value.shape == self.chosen.shape, (
                f"{field.name}: expected shape [B], one per pair"
            )
            if not field.name.endswith("_lengths"):
                assert value.dtype in (torch.float32, torch.float64), f"{field.name}: {value.dtype}, sum in float32"

    def swap(self) -> PairLogps:
        """The same pairs with the opposite preference."""
        return PairLogps(
            chosen=self.rejected,
            rejected=self.chosen,
            chosen_lengths=self.rejected_lengths,
            rejected_lengths=self.chosen_lengths,
            ref_chosen=self.ref_rejected,
            ref_rejected=self.ref_chosen,
        )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PairLoss:
    """One value per pair. ``loss`` carries the gradient; the implicit rewards are detached and only for metrics.

    Rewards are ``beta * (logp - ref_logp)`` for losses with a reference and ``beta * logp / length`` for SimPO, so that
    runs with different losses can be compared; margins and offsets of the loss itself are not part of them.
    """

    loss: Tensor
    chosen_rewards: Tensor
    rejected_rewards: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Loss:
    """A registry entry.

    ``params`` names the :class:`bvpo.config.LossConfig` fields that ``fn`` takes as keywords.
    ``zero_trace_bias_at_reference``: with traces drawn from the reference at T = 1, the expected gradient of the trace
    view's loss at policy = reference equals the gradient of the marginal loss (b_t = 0; docs/losses.md gives the reason
    for each loss, and a test enumerates it exactly).
    ``at_reference`` gives the loss of every pair at policy = reference from the same keywords; None where it depends on more
    than these. The first loss of a run is checked against it.
    """

    fn: Callable[..., PairLoss]
    params: tuple[str, ...]
    needs_reference: bool
    zero_trace_bias_at_reference: bool
    at_reference: Callable[..., float] | None = None
    doc: str


# --- the losses ------------------------------------------------------------------------------------------------------


def dpo(logps: PairLogps, *, beta: float, label_smoothing: float = 0.0) -> PairLoss:
    """Direct preference optimization; ``label_smoothing`` is the assumed chance that a label is wrong (cDPO)."""
    check_ranges(beta=beta, label_smoothing=label_smoothing)
    chosen, rejected = log_ratios(logps)
    # Rafailov et al. 2023 (arXiv 2305.18290), eq. 7; with smoothing: Mitchell 2023 (ericmitchell.ai/cdpo.pdf), eq. 3
    loss = _smoothed_log_loss(beta * (chosen - rejected), label_smoothing)
    return _pair_loss(loss, beta * chosen, beta * rejected)


def dpo_norm(logps: PairLogps, *, beta: float) -> PairLoss:
    """DPO on *length-averaged* log-ratios; ``beta`` is larger than DPO's by about the length of a response."""
    check_ranges(beta=beta)
    chosen, rejected = log_ratios(logps)
    delta = _per_token(chosen, logps.chosen_lengths) - _per_token(rejected, logps.rejected_lengths)
    # Lambert et al. 2024 (Tulu 3, arXiv 2411.15124), eq. 6
    return _pair_loss(_smoothed_log_loss(beta * delta, 0.0), beta * chosen, beta * rejected)


def ipo(logps: PairLogps, *, beta: float) -> PairLoss:
    """Identity preference optimization on *length-averaged* log-ratios, as in TRL; ``beta`` is the paper's tau.

    The paper writes sequence log-ratios. TRL 1.16 divides each by the number of completion tokens (a choice that its
    source attributes to the paper's authors), which makes the target 1 / (2 tau) a margin *per token*.
    """
    check_ranges(beta=beta)
    chosen, rejected = log_ratios(logps)
    delta = _per_token(chosen, logps.chosen_lengths) - _per_token(rejected, logps.rejected_lengths)
    # Azar et al. 2023 (arXiv 2310.12036), eq. 17
    return _pair_loss((delta - 1 / (2 * beta)) ** 2, beta * chosen, beta * rejected)


def hinge(logps: PairLogps, *, beta: float) -> PairLoss:
    """Hinge on the DPO margin: zero loss, and no gradient, once the margin passes 1."""
    check_ranges(beta=beta)
    chosen, rejected = log_ratios(logps)
    # Zhao et al. 2023 (SLiC-HF, arXiv 2305.10425), on log-ratios: "hinge-norm" of Liu et al. 2024 (arXiv 2309.06657)
    return _pair_loss(torch.relu(1 - beta * (chosen - rejected)), beta * chosen, beta * rejected)


def robust(logps: PairLogps, *, beta: float, label_smoothing: float = 0.0) -> PairLoss:
    """Provably robust DPO: unbiased for the clean-label DPO loss when labels flip with chance ``label_smoothing``.

    Unlike the smoothed DPO loss it is unbounded below: a correct pair keeps a pull of at least
    eps / (1 - 2 eps) * beta however large its margin.
    """
    check_ranges(beta=beta, label_smoothing=label_smoothing)
    chosen, rejected = log_ratios(logps)
    margin, eps = beta * (chosen - rejected), label_smoothing
    # Chowdhury et al. 2024 (arXiv 2403.00409): ((1 - eps) L(w, l) - eps L(l, w)) / (1 - 2 eps)
    loss = (eps * F.logsigmoid(-margin) - (1 - eps) * F.logsigmoid(margin)) / (1 - 2 * eps)
    return _pair_loss(loss, beta * chosen, beta * rejected)


def rdpo(logps: PairLogps, *, beta: float, length_weight: float = 0.0) -> PairLoss:
    """Length-regularised DPO: ``length_weight`` (nats per token) is what one more token costs a response.

    It answers the objective  E[reward - length_weight * tokens] - beta * KL,  whose optimum has
    reward = beta * log-ratio + length_weight * tokens + const: a chosen response that is longer needs less margin.
    """
    check_ranges(beta=beta, length_weight=length_weight)
    chosen, rejected = log_ratios(logps)
    extra_tokens = (logps.chosen_lengths - logps.rejected_lengths).to(chosen.dtype)
    # Park et al. 2024 (arXiv 2403.19159), the R-DPO objective: + alpha |y_w| - alpha |y_l| inside the sigmoid
    loss = _smoothed_log_loss(beta * (chosen - rejected) + length_weight * extra_tokens, 0.0)
    return _pair_loss(loss, beta * chosen, beta * rejected)


def simpo(logps: PairLogps, *, beta: float, gamma: float = 1.0) -> PairLoss:
    """SimPO: no reference, log-probs per token, and a target margin ``gamma`` subtracted inside the sigmoid.

    ``gamma`` is the paper's margin, as in TRL's ``simpo_gamma``; the authors' own code takes the ratio gamma / beta.
    """
    check_ranges(beta=beta, gamma=gamma)
    chosen = beta * _per_token(logps.chosen, logps.chosen_lengths)
    rejected = beta * _per_token(logps.rejected, logps.rejected_lengths)
    # Meng et al. 2024 (arXiv 2405.14734), eq. 6
    return _pair_loss(_smoothed_log_loss(chosen - rejected - gamma, 0.0), chosen, rejected)


def log_ratios(logps: PairLogps) -> tuple[Tensor, Tensor]:
    """log pi/ref of the chosen and of the rejected responses, summed over tokens; two tensors [B]."""
    assert logps.ref_chosen is not None and logps.ref_rejected is not None, "this loss needs reference log-probs"
    return logps.chosen - logps.ref_chosen, logps.rejected - logps.ref_rejected


def _smoothed_log_loss(margin: Tensor, eps: float) -> Tensor:
    # logsigmoid, not log(sigmoid): exact and with finite gradients at any margin
    return -(1 - eps) * F.logsigmoid(margin) - eps * F.logsigmoid(-margin)


def _per_token(sums: Tensor, lengths: Tensor) -> Tensor:
    # a response always has a scored token; the clamp only keeps a padded, empty row from dividing by zero
    return sums / lengths.clamp(min=1).to(sums.dtype)


def _pair_loss(loss: Tensor, chosen_rewards: Tensor, rejected_rewards: Tensor) -> PairLoss:
    return PairLoss(loss=loss, chosen_rewards=chosen_rewards.detach(), rejected_rewards=rejected_rewards.detach())


def _log_two(**_: float) -> float:
    return math.log(2)  # -log sigmoid(0), whichever way the labels are smoothed


# --- the registry ----------------------------------------------------------------------------------------------------

LOSSES: dict[str, Loss] = {
    "dpo": Loss(
        fn=dpo,
        params=("beta", "label_smoothing"),
        needs_reference=True,
        zero_trace_bias_at_reference=True,
        at_reference=_log_two,
        doc="DPO: -log sigmoid of the beta-scaled log-ratio margin; label_smoothing makes it conservative (cDPO)",
    ),
    "dpo_norm": Loss(
        fn=dpo_norm,
        params=("beta",),
        needs_reference=True,
        zero_trace_bias_at_reference=False,  # 1 / length of each sampled trace weights its gradient
        at_reference=_log_two,
        doc="length-normalised DPO: -log sigmoid of the beta-scaled margin of per-token log-ratios",
    ),
    "ipo": Loss(
        fn=ipo,
        params=("beta",),
        needs_reference=True,
        zero_trace_bias_at_reference=False,  # 1 / length of each sampled trace weights its gradient
        at_reference=lambda beta: 1 / (2 * beta) ** 2,
        doc="IPO: squared distance of the per-token log-ratio margin from 1 / (2 beta)",
    ),
    "hinge": Loss(
        fn=hinge,
        params=("beta",),
        needs_reference=True,
        zero_trace_bias_at_reference=True,
        at_reference=lambda beta: 1.0,
        doc="hinge (SLiC / RSO): max(0, 1 - the DPO margin)",
    ),
    "robust": Loss(
        fn=robust,
        params=("beta", "label_smoothing"),
        needs_reference=True,
        zero_trace_bias_at_reference=True,
        at_reference=_log_two,
        doc="robust DPO: unbiased under labels that flip with chance label_smoothing",
    ),
    "rdpo": Loss(
        fn=rdpo,
        params=("beta", "length_weight"),
        needs_reference=True,
        zero_trace_bias_at_reference=False,  # the slope depends on the sampled traces' lengths
        doc="length-regularised DPO: each token of a response costs length_weight",
    ),
    "simpo": Loss(
        fn=simpo,
        params=("beta", "gamma"),
        needs_reference=False,
        zero_trace_bias_at_reference=False,  # no reference to cancel the traces' own log-probs, and 1 / length
        doc="SimPO: reference-free, per-token log-probs, target margin gamma inside the sigmoid",
    ),
}


def pair_loss(loss: LossConfig | str, logps: PairLogps) -> PairLoss:
    """The named loss of B pairs; a plain name means that loss with ``LossConfig``'s defaults."""
    entry, values = resolve_loss(LossConfig(name=loss) if isinstance(loss, str) else loss)
    if entry.needs_reference and logps.ref_chosen is None:
        raise UserError(f"loss needs reference log-probs: got none, expected ref_chosen and ref_rejected ({entry.doc})")
    return entry.fn(logps, **values)


def resolve_loss(config: LossConfig) -> tuple[Loss, dict[str, float]]:
    """The registry entry and its hyperparameters, checked; call it once before a run to fail early."""
    if config.name not in LOSSES:
        raise UserError(f"field 'loss.name': no loss {config.name!r}{did_you_mean(config.name, LOSSES)}")
    entry = LOSSES[config.name]
    fields = {field.name: field for field in dataclasses.fields(config) if field.name != "name"}
    for name in entry.params:
        if name not in fields:
            raise UserError(f"loss {config.name!r} reads {name!r}: no such field of LossConfig ({', '.join(fields)})")
    for name, field in fields.items():
        value = getattr(config, name)
        if name not in entry.params and value != field.default:
            raise UserError(
                f"field 'loss.{name}': got {show(value)}, but loss {config.name!r} does not read it "
                f"(it reads {', '.join(entry.params)}); leave it out"
            )
    values = {name: getattr(config, name) for name in entry.params}
    check_ranges(**values)
    return entry, values


def check_ranges(**values: float) -> None:
    """Refuse hyperparameters that are not finite or outside the range that :class:`LossConfig` gives them."""
    ranges = marks(LossConfig, Range)
    for name, value in values.items():
        known = ranges.get(name, Range(math.isfinite, "a finite number"))
        if not (math.isfinite(value) and known.passes(value)):
            raise UserError(f"field 'loss.{name}': got {show(value)}, expected {known.expected}")


# --- anchor terms ----------------------------------------------------------------------------------------------------

AnchorTokens = Literal["trace", "answer", "both"]


def nll_anchor(trace_sum: Tensor, answer_sum: Tensor, tokens: AnchorTokens) -> Tensor:
    """Negative log-likelihood of the chosen responses, summed over the named tokens; [B], in nats.

    ``trace_sum`` and ``answer_sum`` [B] are the policy's log-probs of the chosen response summed up to and including
    the closing marker, and after it. Needs no reference.
    """
    if tokens == "trace":
        return -trace_sum
    if tokens == "answer":
        return -answer_sum
    if tokens == "both":
        return -(trace_sum + answer_sum)
    raise UserError(f"field 'anchor.tokens': got {show(tokens)}, expected trace, answer or both")


def kl_from_logits(ref_logits: Tensor, policy_logits: Tensor) -> Tensor:
    """KL(reference || policy) of the next-token distributions at N positions; [N, V] twice in, [N] out, in nats.

    sum_v p_ref (log p_ref - log p_policy), the expectation over the whole vocabulary rather than an estimate from the
    sampled token. No gradient reaches the reference. Holds [N, V] in memory: pass chunks.
    """
    dtype = torch.promote_types(torch.promote_types(ref_logits.dtype, policy_logits.dtype), torch.float32)
    ref_logps = F.log_softmax(ref_logits.detach().to(dtype), dim=-1)
    policy_logps = F.log_softmax(policy_logits.to(dtype), dim=-1)
    # a token the reference cannot produce (logit -inf) adds 0, not 0 * inf
    possible = ref_logps > -math.inf
    gap = torch.where(possible, ref_logps - policy_logps, 0.0)
    return (ref_logps.exp() * gap).sum(dim=-1)
