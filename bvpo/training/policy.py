"""Runs a causal language model over a layout and returns log-probability sums per branch.

:func:`install` gives a Hugging Face model a second way to be called: ``model(input_ids=..., bvpo=BranchRequest(...))``
runs the backbone on the layout and the chunked head on the scored rows only. Calls without ``bvpo`` are unchanged, so
generation and saving work as before. The patch sits on the instance's ``forward``: module hooks stay outside of it,
which is what DDP, FSDP2, DeepSpeed and PEFT rely on.

:func:`choose_layout` decides how sequences are laid out by *measuring*: a layout must give the hidden states of plain single
sequences, past every length at which the model changes. What we do not know fails, and gets the next safer layout.
"""

from __future__ import annotations

import contextlib
import logging
import types
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from bvpo.strict import UserError
from bvpo.training import attention
from bvpo.training.layout import LAYOUTS, NUM_BRANCHES, Layout
from bvpo.training.logprobs import Head, HeadTransform, token_kl, token_logps
from bvpo.training.miniature import miniature, picked_keys, setting, thresholds
from bvpo.training.tokens import Branch, TokenQuad

logger = logging.getLogger(__name__)

# Columns of what a model returns per branch.
TRACE, ANSWER, KL = 0, 1, 2
LAYOUT_PREFERENCE = ("tree", "packed", "padded")
OWN_ATTENTION = ("padded", "single")  # layouts that leave the model its own attention
AFFORDABLE = 2e12  # floating-point operations of a trial on the model itself: some ten seconds of a slow CPU
QUICK_LENGTH = 512  # past it a miniature is tried first: attention alone would take long
LEAST_LENGTH = 96  # tokens of a trial where no threshold is known


@dataclass(frozen=True, slots=True, kw_only=True)
class ReferenceRows:
    """Reference side of the KL anchor: hidden states [M, H] of the scored rows in ``selected``, and the reference's head
    (None: the policy's own, which an adapter leaves frozen)."""

    hidden: Tensor
    head: Head | None


@dataclass(frozen=True, slots=True, kw_only=True)
class BranchRequest:
    """One call of an installed model. ``selected`` indexes the scored rows whose KL (or hidden state) is wanted."""

    layout: Layout
    chunk: int = 256
    want: Literal["sums", "hidden"] = "sums"
    selected: Tensor | None = None
    selected_sizes: tuple[int, ...] = ()
    reference: ReferenceRows | None = None


def install(model: nn.Module) -> None:
    """Teaches ``model`` (a causal LM, not yet wrapped by PEFT, DDP or FSDP) to answer a :class:`BranchRequest`."""
    if getattr(model, "_bvpo_installed", False):
        return
    attention.register()
    own = model.__dict__.get("forward")  # an instance's own forward, if somebody patched it before us
    transform = HeadTransform.from_config(model.config)

    def forward(self: Any, *args: Any, bvpo: BranchRequest | None = None, **kwargs: Any) -> Any:
        if bvpo is None:
            # Looked up on the instance that is called: a deep copy must not run the original's weights.
            return own(*args, **kwargs) if own is not None else type(self).forward(self, *args, **kwargs)
        return _branch_forward(self, bvpo, transform, **kwargs)

    forward.__wrapped__ = type(model).forward  # type: ignore[attr-defined]  # the signature that generate() inspects
    model.forward = types.MethodType(forward, model)
    model._bvpo_installed = True  # type: ignore[assignment]


def _branch_forward(model: Any, request: BranchRequest, transform: HeadTransform, **inputs: Any) -> Tensor:
    layout = request.layout
    inputs = {name: value for name, value in inputs.items() if value is not None and name != "labels"}
    inputs["use_cache"] = False
    _forget_lengths(model)
    if layout.lengths is not None:
        sequences = layout.input_ids_RT.split(list(layout.lengths), dim=1)
        hidden = torch.cat([_plain_hidden(model, ids) for ids in sequences], dim=1)
        return _scored(model, request, transform, hidden)
    if layout.plan is not None:
        inputs["bvpo_plan"] = layout.plan
        # A ready-made 4-D mask stops transformers from inferring packing from position jumps; our attention ignores it.
        inputs["attention_mask"] = layout.input_ids_RT.new_zeros((1, 1, 1, 1), dtype=torch.bool)
    else:
        inputs["attention_mask"] = layout.attention_mask_RT
    return _scored(model, request, transform, _backbone(model)(**inputs).last_hidden_state)


def _backbone(model: Any) -> Any:
    """The part below the head. Some classes (Llama 4) name one that they do not have, and then take themselves for it."""
    return model.base_model if model.base_model is not model else getattr(model, "model", model)


def _plain_hidden(model: Any, ids_RT: Tensor) -> Tensor:
    """What the model gives for rows of one length when nothing else is said to it."""
    _forget_lengths(model)
    return _backbone(model)(input_ids=ids_RT, use_cache=False).last_hidden_state


def _forget_lengths(model: nn.Module) -> None:
    """Dynamic rope keeps the frequencies of the longest sequence that it has seen; the next one starts afresh."""
    for module in model.modules():
        if not hasattr(module, "original_max_seq_len"):
            continue
        for name in [name for name in vars(module) if name.endswith("max_seq_len_cached")]:
            kind = name.removesuffix("max_seq_len_cached")
            own = getattr(module, f"{kind}original_inv_freq", None)
            if own is not None and getattr(module, name) != module.original_max_seq_len:
                setattr(module, name, module.original_max_seq_len)
                setattr(module, f"{kind}inv_freq", own.to(getattr(module, f"{kind}inv_freq").device))


def _scored(model: Any, request: BranchRequest, transform: HeadTransform, hidden: Tensor) -> Tensor:
    """The request's answer from the hidden states [R, T, H] of its layout."""
    rows_NH = hidden.flatten(0, 1).index_select(0, request.layout.rows_N)
    if request.want == "hidden":
        assert request.selected is not None
        return rows_NH.index_select(0, request.selected)
    return _head_module(model)(rows_NH, bvpo=HeadCall(request=request, transform=transform))


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadCall:
    """What the language-model head is asked for in place of logits."""

    request: BranchRequest
    transform: HeadTransform


def _head_module(model: Any) -> Any:
    """The head, taught to answer a :class:`HeadCall`. It is *called*, so that whatever shards its weight (FSDP, ZeRO-3)
    gathers it around the call and again for its backward."""
    module: Any = model.get_output_embeddings()
    kind = type(module)
    if not issubclass(kind, nn.Linear):
        raise UserError(
            f"{type(model).__name__}: its output layer is a {kind.__name__}, expected a plain linear layer (no adapter)"
        )
    if not getattr(module, "_bvpo_installed", False):
        module.forward = types.MethodType(_head_forward, module)
        module._bvpo_installed = True
    return module


def _head_forward(self: Any, hidden: Tensor, bvpo: HeadCall | None = None) -> Tensor:
    """[S / 2, 3]: trace sum, answer sum and KL of every present branch; logits without a call."""
    if bvpo is None:
        return type(self).forward(self, hidden)
    request, layout = bvpo.request, bvpo.request.layout
    head = Head.of(self, bvpo.transform)
    logps_N = token_logps(hidden, layout.targets_N, head, request.chunk)
    sums = _segment_sums(logps_N, layout.segment_sizes).view(-1, 2)
    if request.reference is None:
        return torch.cat([sums, sums.new_zeros(len(sums), 1)], dim=1)
    assert request.selected is not None
    chosen_rows = hidden.index_select(0, request.selected)
    # Under an adapter the reference shares the frozen head.
    ref_head = request.reference.head or head
    kl_M = token_kl(chosen_rows, head, request.reference.hidden, ref_head, request.chunk)
    return torch.cat([sums, _segment_sums(kl_M, request.selected_sizes)[:, None]], dim=1)


def _segment_sums(values_N: Tensor, sizes: tuple[int, ...]) -> Tensor:
    """Sums of consecutive segments. Not index_add: that is not deterministic on GPUs."""
    return torch.stack([part.sum() for part in values_N.split(list(sizes))])


def branch_outputs(model: nn.Module, layout: Layout, **request: Any) -> Tensor:
    """[Q, 4, 3] for a layout of Q quads: trace sum, answer sum, KL; zero where a branch is missing."""
    out = model(
        input_ids=layout.input_ids_RT,
        position_ids=layout.position_ids_RT,
        bvpo=BranchRequest(layout=layout, **request),
    )
    quads, branches = layout.slot_index
    return out.new_zeros(layout.num_quads, NUM_BRANCHES, 3).index_put((quads, branches), out)


def select_rows(layout: Layout, tokens: Literal["trace", "answer", "both"]) -> tuple[Tensor, tuple[int, ...]]:
    """Scored rows of the trace view's branches restricted to the given part, and how many each slot has."""
    selected: list[np.ndarray] = []
    sizes: list[int] = []
    cursor = 0
    for slot, (_, branch) in enumerate(layout.slots):
        num_trace, num_answer = layout.segment_sizes[2 * slot : 2 * slot + 2]
        first = cursor if tokens in ("trace", "both") else cursor + num_trace
        last = cursor + num_trace if tokens == "trace" else cursor + num_trace + num_answer
        if branch >= 2:
            last = first  # the empty view is not anchored
        selected.append(np.arange(first, last))
        sizes.append(last - first)
        cursor += num_trace + num_answer
    return torch.from_numpy(np.concatenate(selected)), tuple(sizes)


@contextlib.contextmanager
def attention_implementation(model: Any, name: str) -> Iterator[None]:
    """Runs the block under another attention implementation (for the probe; not under gradient checkpointing)."""
    before = model.config._attn_implementation
    model.set_attn_implementation(name)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def choose_layout(model: Any, wanted: str, longest: int | None = None) -> str:
    """``wanted`` if it gives the numbers of plain single sequences of up to ``longest`` tokens (None: any length); for
    ``auto``, the first of tree, packed, padded and single that does."""
    _require_known_head(model)
    if wanted == "single":
        return wanted
    trials, doubt = _trials(model, longest)
    picked = [keys for keys in picked_keys(model.config) if longest is None or keys < longest]
    if picked:  # random weights have few ties, and a trained indexer many: scores of exactly zero
        doubt = f"past {picked[0]} tokens it keeps the best keys; which of equal ones depends on the width of the row"
    candidates = LAYOUT_PREFERENCE if wanted == "auto" else (wanted,)
    for name in candidates:
        problem = doubt or _layout_problem(model, name, trials)
        if problem is None:
            return name
        if wanted != "auto":
            raise UserError(
                f"layout = {wanted!r} does not work for {type(model).__name__}: {problem}; use layout = 'auto'"
            )
        logger.warning("%s does not support the %s layout: %s", type(model).__name__, name, problem)
    return "single"


def use_layout(model: Any, name: str) -> None:
    """Gives the model the attention that the layout needs."""
    if name not in OWN_ATTENTION:
        model.set_attn_implementation(attention.IMPLEMENTATION)


def require_tried(model: Any, layout: str, tried: int, longest: int) -> None:
    """Refuses sequences past a length at which the model may compute otherwise and at which the layout was not tried."""
    crossed = [t for t in thresholds(model.config) if tried <= t < longest]
    if layout != "single" and crossed:
        raise UserError(
            f"eval_dataset: has {longest} tokens in a sequence, but layout {layout!r} was tried up to {tried} and "
            f"{type(model).__name__} changes at {crossed[0]}; give it to the trainer at the start, or use layout = 'single'"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Trial:
    """Quads and the hidden states [N, H] that plain single sequences have; what differs by more is another result."""

    model: Any
    quads: list[TokenQuad]
    expected: Tensor
    tolerance: float
    longest: int


def _trials(model: Any, longest: int | None) -> tuple[list[_Trial], str | None]:
    """On the model itself, past every threshold where that costs no more than a moment, else on a miniature of it; and
    why nothing can be said, where that is so."""
    crossed = [t for t in thresholds(model.config) if longest is None or t < longest]
    limits = [] if longest is None else [longest]
    limits += [n for n in [setting(model.config, "max_position_embeddings")] if n]
    if any(t in limits for t in crossed):  # rope that changes where the trained positions end
        limits = limits[: longest is not None]
    length = min([max([LEAST_LENGTH, *(2 * t + 16 for t in crossed)]), *limits])
    short, full = _probe_quads(model, 0), _probe_quads(model, length)
    is_affordable = _cost(model, full) <= AFFORDABLE
    if is_affordable and length <= QUICK_LENGTH and not _is_half(model):
        return [_trial(model, full)], None
    try:
        small = miniature(model)
        install(small)
        lowest = thresholds(small.config)
        on_small = _trial(small, _probe_quads(small, max([LEAST_LENGTH, *(2 * t + 16 for t in lowest)])))
        return [_trial(model, short), on_small], None
    except Exception as error:  # other people's model code raises anything
        if is_affordable or not crossed:
            return [_trial(model, full if is_affordable else short)], None
        doubt = f"it changes at {crossed[-1]} tokens, too long to try, and has no miniature: {_line(error)}"
        return [_trial(model, short)], doubt


def _trial(model: Any, quads: list[TokenQuad]) -> _Trial:
    """Runs the single sequences, and refuses a model whose numbers depend on later tokens or on earlier calls."""
    layout = LAYOUTS["single"](quads).to(model.device)
    least, most = (0.02, 0.1) if _is_half(model) else (1e-4, 1e-2)
    assert layout.lengths is not None
    sequences = layout.input_ids_RT.split(list(layout.lengths), dim=1)
    with _quiet_eval(model):
        expected = _hidden(model, layout)
        noise = 0.0
        for ids in (max(sequences, key=Tensor.numel), min(sequences, key=Tensor.numel)):
            alone, again = _plain_hidden(model, ids), _plain_hidden(model, ids)
            other = ids.clone()
            other[0, -1] = ids[0, -1] % 7 + 1 if ids[0, -1] % 7 + 1 != ids[0, -1] else 8
            later = _plain_hidden(model, other)
            noise = max(noise, float(_errors(_plain_hidden(model, torch.cat([ids, other]))[:1], alone).max()))
            tolerance = min(most, max(least, 4 * noise))
            if not _errors(later[:, :-1], alone[:, :-1]).max() <= tolerance:
                raise UserError(f"{type(model).__name__} is not causal: what it says of a token depends on later ones")
            if not _errors(again, alone).max() <= tolerance:
                raise UserError(f"{type(model).__name__}: the same sequence gives other numbers when it is run again")
        if not _errors(_hidden(model, layout), expected).max() <= tolerance:
            raise UserError(
                f"{type(model).__name__}: the numbers of a sequence depend on those that were run before it"
            )
    return _Trial(model=model, quads=quads, expected=expected, tolerance=tolerance, longest=max(layout.lengths))


def _hidden(model: Any, layout: Layout) -> Tensor:
    """[N, H] of the scored rows. Near-uniform outputs hide what hidden states show."""
    request = BranchRequest(
        layout=layout, want="hidden", selected=torch.arange(len(layout.rows_N), device=layout.rows_N.device)
    )
    return model(input_ids=layout.input_ids_RT, position_ids=layout.position_ids_RT, bvpo=request)


def _errors(ours: Tensor, expected: Tensor) -> Tensor:
    """Relative error of each row."""
    ours, expected = ours.double(), expected.double()
    return (ours - expected).norm(dim=-1) / expected.norm(dim=-1).clamp_min(1e-12)


def _is_half(model: Any) -> bool:
    return model.dtype not in (torch.float32, torch.float64)


def _cost(model: Any, quads: list[TokenQuad]) -> float:
    """Floating-point operations of the model over the quads' single sequences."""
    tokens = sum(len(quad.prefix_ids) + len(b.ids) for quad in quads for b in quad.branches if b is not None)
    return 2.0 * sum(p.numel() for p in model.parameters()) * tokens


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]


def _layout_problem(model: Any, name: str, trials: list[_Trial]) -> str | None:
    """None when ``name`` gives the hidden states of plain single sequences in all trials."""
    if name not in OWN_ATTENTION and not getattr(model, "_supports_attention_backend", False):
        return "it does not use transformers' attention interface"
    for trial in trials:
        own = trial.model.config._attn_implementation
        try:
            with (
                attention_implementation(trial.model, own if name in OWN_ATTENTION else attention.IMPLEMENTATION),
                attention.windows_seen() as windows,
                _quiet_eval(trial.model),
            ):
                layout = LAYOUTS[name](trial.quads).to(trial.model.device)
                ours = _hidden(trial.model, layout)
        except Exception as error:  # other people's model code raises anything
            return _line(error)
        missing = 0 if name in OWN_ATTENTION else _missing_windows(trial, windows)
        if missing:
            return f"{missing} of its layers have a sliding window that does not reach attention"
        problem = _difference(ours, trial, layout)
        if problem is not None:
            return problem
    return None


def _missing_windows(trial: _Trial, windows: list[int | None]) -> int:
    """Layers that the configuration calls windowed and whose attention was given no window."""
    window = setting(trial.model.config, "sliding_window")
    if not isinstance(window, int) or window >= trial.longest:
        return 0
    named = sum(kind == "sliding_attention" for kind in setting(trial.model.config, "layer_types") or ())
    return max(0, named - sum(seen is not None for seen in windows))


def _difference(ours: Tensor, trial: _Trial, layout: Layout) -> str | None:
    errors = _errors(ours, trial.expected)
    if _is_half(trial.model):
        # Rounding may send a token to another expert, so no single row decides: a leak is at both ends of a response
        # as much as a window is in its tail.
        branches = errors.split(
            [a + b for a, b in zip(layout.segment_sizes[::2], layout.segment_sizes[1::2], strict=True)]
        )
        worst = max(float(part.median()) for rows in branches for part in (rows, rows[:3], rows[-3:]))
    else:
        worst = float(errors.max())
    if not worst <= trial.tolerance:
        return f"its hidden states differ from plain single sequences by {worst:.2g} (relative)"
    return None


def _require_known_head(model: Any) -> None:
    """Refuses a model whose logits are not what our head computes from its hidden states (an unknown scaling, say)."""
    if not hasattr(model, "base_model") or _backbone(model) is model:
        raise UserError(f"{type(model).__name__}: expected a causal language model with a backbone and a linear head")
    probe = LAYOUTS["single"](_probe_quads(model, 0)).to(model.device)
    assert probe.lengths is not None
    with _quiet_eval(model):
        try:
            sequences = probe.input_ids_RT.split(list(probe.lengths), dim=1)
            logits = torch.cat([model(input_ids=ids, use_cache=False).logits[0] for ids in sequences])
            ours = branch_outputs(model, probe)[..., : ANSWER + 1].sum()
        except UserError:
            raise
        except Exception as error:  # other people's model code raises anything
            raise UserError(f"{type(model).__name__} cannot score a plain sequence: {_line(error)}") from error
        rows = logits.index_select(0, probe.rows_N)
        wide = rows.dtype if rows.dtype == torch.float64 else torch.float32
        expected = torch.log_softmax(rows.to(wide), dim=-1).gather(1, probe.targets_N[:, None]).squeeze(1)
    difference = (expected.sum() - ours).abs().item() / len(expected)
    if not difference <= (0.05 if _is_half(model) else 1e-3):
        raise UserError(
            f"{type(model).__name__}: log-probs from its hidden states differ from its own logits by {difference:.2g} nats "
            "a token; this head is not supported"
        )


@contextlib.contextmanager
def _quiet_eval(model: nn.Module) -> Iterator[None]:
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)


def _probe_quads(model: Any, length: int) -> list[TokenQuad]:
    """A short ragged quad, and one whose longest sequence has ``length`` tokens, half of them in the prompt."""
    generator = np.random.default_rng(0)
    high = min(model.config.get_text_config().vocab_size, 1000)

    def quad(num_prefix: int, nums: Sequence[int]) -> TokenQuad:
        branches = [
            Branch(
                ids=generator.integers(1, high, n).astype(np.int32), scored_from=start, answer_from=max(start, n // 2)
            )
            for n, start in zip(nums, (0, 0, 1, 2), strict=False)
        ]
        branches += [None] * (NUM_BRANCHES - len(branches))  # type: ignore[list-item]
        prefix = generator.integers(1, high, num_prefix).astype(np.int32)
        return TokenQuad(id="probe", prefix_ids=prefix, branches=tuple(branches))  # type: ignore[arg-type]

    quads = [quad(6, (11, 7, 5, 9))]
    if length > 24:
        rest = length - length // 2
        quads.append(quad(length // 2, (7, rest) if length > 1024 else (rest, 7, rest // 2, rest - 3)))
    return quads
