"""``bvpo analyze --gradients``: would mixing the views help this model on these quads, and with which alpha?

In: a model, a quads file, and how many of its quads to look at. Out: a :class:`GradientReport`: noise and signal of both
views' gradients, their angle, and alpha at several batch sizes, with intervals over prompts
(:mod:`bvpo.method.gradient_noise`), as lines for people and as a dictionary. Nothing is trained or kept. It takes
single pairs' gradients in the way the trainer's own telemetry does (:mod:`bvpo.training.probe.samples`).
"""

from __future__ import annotations

import dataclasses
import heapq
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from bvpo.data.preferences import prompt_key
from bvpo.keys import hash_int
from bvpo.method.gradient_noise import GradientNoise, analyze
from bvpo.method.online_alpha import doubt_of_sampling, is_far
from bvpo.records import VIEWS, Quad
from bvpo.stats import Interval
from bvpo.strict import UserError
from bvpo.training.probe import samples as looks

BATCHES = (1, 8, 32, 128, 512)
BUCKETS = 2048  # of the sketches: products within about 3 %
_CHUNK = 8  # quads between two moves of the progress bar
_WORTH = 0.05  # a lower error than this is called nothing


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What to look at. ``reference``: the model that wrote the data, when it is not the model itself (one that has been
    trained already). ``limit`` quads are drawn by prompt, so that those of a prompt stay together. ``sampling``: how the
    responses were drawn, where that is known."""

    model: str
    quads: str
    reference: str | None = None
    limit: int = 256
    beta: float = 0.1
    batch: int = 128
    format: str = "auto"
    max_length: int = 4096
    seed: int = 0
    num_resamples: int = 2000
    sampling: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class GradientReport:
    """What was found. ``dropped`` counts drawn quads without use; ``drift``: mean |log-ratio to the reference|."""

    request: Request
    noise: GradientNoise
    drift: float
    dropped: dict[str, int]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return dataclasses.asdict(self) | {"doubts": self.doubts(), "answer": self.answer()}

    def answer(self) -> str:
        """The practitioner's question in a sentence."""
        at = next(one for one in self.noise.batches if one.quads_per_step == self.request.batch)
        start = f"At {at.quads_per_step} quads per step"
        if at.error.low is None or at.error.high is None:
            return f"{start}: cannot be told from {self.noise.num_prompts} prompts."
        finding = (
            f"alpha {_shown(at.alpha)} brings the gradient's mean squared error to {_percent(at.error)} of the trace view's "
            f"own (0.5: {_percent(at.error_half)})."
        )
        if at.error.high < 1 - _WORTH:
            return f"{start} mixing helps: {finding}"
        if at.error.low > 1 - _WORTH:
            return f"{start} mixing hardly helps: {finding}"
        return f"{start} it is not clear that mixing helps: {finding} More quads would tell (--limit)."

    def lines(self) -> list[str]:
        """Tables and the answer."""
        noise, request = self.noise, self.request
        rows = [
            ("trace view: quads at which noise equals signal", _shown(noise.noise_trace)),
            ("empty view: quads at which noise equals signal", _shown(noise.noise_empty)),
            ("noise of the trace view over the empty view's", _shown(noise.noise_ratio)),
            ("cosine of the views' expected gradients", _shown(noise.cosine)),
        ]
        if noise.same_prompt is not None:
            rows.append(("share of the trace view's noise within prompts", _shown(noise.same_prompt)))
        header = ("quads per step", "best alpha", "its error (alpha 1: 100 %)", "error of alpha 0.5")
        table = [
            (f"{one.quads_per_step:,}", _shown(one.alpha), _percent(one.error), _percent(one.error_half))
            for one in noise.batches
        ]
        level = f"{100 * noise.cosine.level:g}"
        reference = request.reference or "the model itself"
        return [
            f"model: {request.model}; reference: {reference}; dpo, beta {request.beta:g}",
            f"quads: {noise.num_quads:,} of {noise.num_prompts:,} prompts from {request.quads}"
            + "".join(f", {num:,} left out ({reason})" for reason, num in self.dropped.items()),
            *(f"note: {doubt}." for doubt in self.doubts()),
            "",
            *_aligned(rows),
            "",
            *_aligned([header, *table]),
            "",
            self.answer(),
            "",
            f"[low, high]: {level} % interval over {request.num_resamples:,} resamples of prompts. Errors are those of the "
            "gradient as an",
            "estimate of the marginal loss's near the reference; a smaller one need not mean a better model.",
        ]

    def doubts(self) -> list[str]:
        """Why the numbers may be off, as far as is known."""
        found = [doubt] if (doubt := doubt_of_sampling(self.request.sampling)) else []
        if is_far(self.drift, self.request.beta):
            found.append(
                f"the model is far from its reference (mean |log-ratio| {self.drift:.3g} nats): its trace view is biased, "
                "and alpha comes out too high"
            )
        return found


def report(request: Request, *, show_progress: bool = False) -> GradientReport:
    """Takes the gradients and analyses them. Everything heavy is imported here."""
    with tempfile.TemporaryDirectory(prefix="bvpo-analyze-") as folder:
        trainer, prompts, dropped = _prepare(request, folder)
        trainer.fill_reference(trainer.model)
        trainer.model.eval()  # dropout is noise of another kind
        tokens = trainer.train_tokens
        places = np.flatnonzero(tokens.has_view.all(axis=1))
        rows = []
        for chunk in _with_bar(np.array_split(places, -(-len(places) // _CHUNK)), show_progress):
            plan = looks.Plan(views=VIEWS, quads=tuple(int(i) for i in chunk))
            rows.append(trainer.look(plan, (request.seed,), BUCKETS))
        names = [prompts[tokens[int(i)].id] for i in places]
    return GradientReport(
        request=request,
        noise=analyze(
            np.concatenate([row.sketches["trace"] for row in rows]),
            np.concatenate([row.sketches["empty"] for row in rows]),
            names,
            sorted({*BATCHES, request.batch}),
            seed=request.seed,
            num_resamples=request.num_resamples,
        ),
        drift=float(np.concatenate([row.drift for row in rows]).mean()),
        dropped=dropped,
    )


def _prepare(request: Request, folder: str) -> tuple[Any, dict[str, str], dict[str, int]]:
    """A trainer that will not train, the prompt of every quad, and what was dropped."""
    from bvpo.config import LossConfig, TrainConfig
    from bvpo.formats import resolve_format
    from bvpo.training.arguments import arguments_from
    from bvpo.training.data import quads_from
    from bvpo.training.loading import load_policy, load_tokenizer
    from bvpo.training.trainer import BVPOTrainer

    settings = TrainConfig(max_length=request.max_length, loss=LossConfig(beta=request.beta), hf={"disable_tqdm": True})
    args = arguments_from(settings, output_dir=folder, seed=request.seed, reasoning_format=request.format)
    tokenizer = load_tokenizer(None, request.model)
    source = quads_from(request.quads, resolve_format(tokenizer, request.format, None), "QUADS")
    quads = draw(source, request.limit, request.seed)
    prompts = {quad.id: prompt_key(quad.messages) for quad in quads}
    held = None if request.reference is None else load_policy(request.reference, args)
    trainer = BVPOTrainer(request.model, args, quads, processing_class=tokenizer, ref_model=held)
    tokens = trainer.train_tokens
    assert tokens is not None
    usable = np.flatnonzero(tokens.has_view.all(axis=1))
    if len({prompts[tokens[int(i)].id] for i in usable}) < 2:
        raise UserError(f"{request.quads}: fewer than two prompts have quads that can be used, expected many")
    lost = len(quads) - len(usable)
    return trainer, prompts, {"too long, or dropped by tokenising": lost} if lost else {}


def draw(source: Iterable[Quad], limit: int, seed: int) -> list[Quad]:
    """Quads with both views of randomly drawn prompts, up to ``limit`` (by a hash of prompt and seed, in two passes)."""

    def complete() -> Iterable[tuple[int, Quad]]:
        for quad in source:
            if all(quad.pair(view) is not None for view in VIEWS):
                yield hash_int(f"{seed}:{prompt_key(quad.messages)}", "gradients"), quad

    chosen = heapq.nsmallest(limit, (place for place, _ in complete()))
    if not chosen:
        raise UserError("QUADS: no quad has a pair in both views, so there is nothing to compare")
    kept = [(place, quad) for place, quad in complete() if place <= chosen[-1]]
    return [quad for _, quad in sorted(kept, key=lambda item: item[0])[:limit]]


def _with_bar(chunks: Sequence[np.ndarray], show: bool) -> Iterable[np.ndarray]:
    from tqdm.auto import tqdm

    return tqdm(chunks, desc="gradients", unit=f" x {_CHUNK} quads", disable=not show)


def _shown(interval: Interval) -> str:
    if interval.value is None:
        return "not to be told from noise"
    if interval.low is None or interval.high is None:
        return f"{interval.value:.3g} [too few prompts]"
    return f"{interval.value:.3g} [{interval.low:.3g}, {interval.high:.3g}]"


def _percent(interval: Interval) -> str:
    if interval.value is None:
        return "-"
    if interval.low is None or interval.high is None:
        return f"{100 * interval.value:.0f} %"
    return f"{100 * interval.value:.0f} % [{100 * interval.low:.0f}, {100 * interval.high:.0f}]"


def _aligned(rows: Sequence[tuple[str, ...]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  " + "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    ]
