"""How the two views of a model differ: the measurements of the paper's Tables 3, 4 and 5, on any samples.

In: per sample its prompt, view, tokens and log-probabilities (:class:`Measures`). Out: one :class:`Comparison` per quantity,
with prompt-clustered intervals, and what was left out and why. Pure; the seed is an argument.
docs/looking.md has the definitions, and docs/decisions.md why the forced closing marker of the empty view counts as it does.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt

from bvpo.records import VIEWS, View
from bvpo.stats import Floats, Interval, Statistic, bootstrap_interval, mean, ratio, ratio_of_means, variance

_NONE = float("nan")


@dataclass(slots=True)
class Measures:
    """Samples as columns of numbers, filled one by one; 57 bytes a sample. Failed samples do not belong in here."""

    prompts: dict[str, int] = field(default_factory=dict)  # id -> number
    prompt: array[int] = field(default_factory=lambda: array("i"))
    view: array[int] = field(default_factory=lambda: array("b"))  # index into VIEWS
    tokens: array[int] = field(default_factory=lambda: array("i"))
    forced_tokens: array[int] = field(default_factory=lambda: array("i"))
    logp: array[float] = field(default_factory=lambda: array("d"))  # nan: the engine gave none
    forced_logp: array[float] = field(default_factory=lambda: array("d"))  # nan: unknown
    trace_tokens: array[int] = field(default_factory=lambda: array("i"))  # -1: no end of the trace, or not looked for
    trace_logp: array[float] = field(default_factory=lambda: array("d"))
    cut: array[int] = field(default_factory=lambda: array("b"))
    closed: array[int] = field(default_factory=lambda: array("b"))

    def add(
        self,
        *,
        prompt_id: str,
        view: View,
        logprobs: Sequence[float] | None,
        num_tokens: int,
        answer_from: int | None,
        cut: bool,
        closed: bool,
        forced_tokens: int = 0,
        forced_logp: float | None = None,
    ) -> None:
        """One sample. ``answer_from`` is the index of its first answer token, ``None`` where it is unknown; ``forced`` is
        what training scores and nobody sampled, the empty view's closing marker."""
        self.prompt.append(self.prompts.setdefault(prompt_id, len(self.prompts)))
        self.view.append(VIEWS.index(view))
        self.tokens.append(num_tokens)
        self.logp.append(_NONE if logprobs is None else float(np.sum(logprobs)))
        self.trace_tokens.append(-1 if answer_from is None else answer_from)
        known = logprobs is not None and answer_from is not None
        self.trace_logp.append(float(np.sum(logprobs[:answer_from])) if known and logprobs is not None else _NONE)
        self.forced_tokens.append(forced_tokens)
        self.forced_logp.append((_NONE if forced_tokens else 0.0) if forced_logp is None else forced_logp)
        self.cut.append(cut)
        self.closed.append(closed)

    def columns(self) -> Columns:
        """In an order of their own: prompts by id, samples of a prompt by what is known of them. A store keeps samples in
        the order in which they arrived, which a killed run changes; neither sums nor resamples may depend on it."""
        ranks = np.empty(len(self.prompts), dtype=np.int64)
        ranks[[self.prompts[name] for name in sorted(self.prompts)]] = np.arange(len(self.prompts))
        columns = Columns(
            num_prompts=len(self.prompts),
            prompt=ranks[np.array(self.prompt, dtype=np.int64)],
            view=np.array(self.view, dtype=np.int64),
            tokens=np.array(self.tokens, dtype=np.float64),
            forced_tokens=np.array(self.forced_tokens, dtype=np.float64),
            forced_logp=np.array(self.forced_logp, dtype=np.float64),
            logp=np.array(self.logp, dtype=np.float64),
            trace_tokens=np.array(self.trace_tokens, dtype=np.float64),
            trace_logp=np.array(self.trace_logp, dtype=np.float64),
            cut=np.array(self.cut, dtype=bool),
            closed=np.array(self.closed, dtype=bool),
        )
        names = ("trace_logp", "trace_tokens", "cut", "closed", "forced_logp", "forced_tokens", "logp", "tokens")
        order = np.lexsort([getattr(columns, name) for name in (*names, "view", "prompt")])
        return replace(columns, **{name: getattr(columns, name)[order] for name in (*names, "view", "prompt")})


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Columns:
    """:class:`Measures` as arrays ``[N]``."""

    num_prompts: int
    prompt: npt.NDArray[np.int64]
    view: npt.NDArray[np.int64]
    tokens: Floats
    forced_tokens: Floats
    forced_logp: Floats
    logp: Floats
    trace_tokens: Floats
    trace_logp: Floats
    cut: npt.NDArray[np.bool_]
    closed: npt.NDArray[np.bool_]

    def of(self, view: View) -> npt.NDArray[np.bool_]:
        return self.view == VIEWS.index(view)

    @property
    def has_forced(self) -> bool:
        """Whether every log-probability of what was forced is known, so that it can be counted."""
        return bool(np.isfinite(self.forced_logp).all())

    def scored(self) -> tuple[Floats, Floats]:
        """Log-probability and number of the tokens that likelihoods speak of: with those that were forced if they are known
        for all, else without; ``[N]`` each."""
        if self.has_forced:
            return self.logp + self.forced_logp, self.tokens + self.forced_tokens
        return self.logp, self.tokens

    def sums(self, values: Floats | None, mask: npt.NDArray[np.bool_]) -> Floats:
        """Sum per prompt ``[P]`` over the masked samples; counts them where ``values`` is ``None``."""
        weights = None if values is None else values[mask]
        return np.bincount(self.prompt[mask], weights=weights, minlength=self.num_prompts).astype(np.float64)


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """One quantity on two ``sides``, and ``ratio``: the first over the second. ``dropped`` counts what was left out, by
    reason."""

    name: str
    table: int  # of the paper
    label: str
    unit: str
    sides: tuple[str, str] = ("trace view", "empty view")
    first: Interval
    second: Interval | None = None
    ratio: Interval | None = None
    num_prompts: int
    num_samples: int
    dropped: dict[str, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """How intervals are made."""

    num_resamples: int = 2000
    level: float = 0.95
    seed: int = 0


def compare_views(columns: Columns, settings: Settings) -> list[Comparison]:
    """Every quantity that these samples allow, in the order of the paper's tables."""
    made = _Maker(columns, settings)
    logp, scored = columns.scored()
    lengths = columns.tokens + columns.forced_tokens
    return [
        made.within("var_logp_within", "variance of log p, within prompts", logp, "nats²"),
        made.within("var_length_within", "variance of length, within prompts", lengths, "tokens²"),
        made.overall("var_logp_all", "variance of log p, all samples", logp, "nats²"),
        made.overall("var_length_all", "variance of length, all samples", lengths, "tokens²"),
        made.averaged("length", "length of a response", lengths, "tokens"),
        made.averaged("nll", "NLL per token", -_over(logp, scored), "nats"),
        made.nll_pooled(logp, scored),
        made.trace_share(),
        made.trace_share_pooled(),
        made.nll_parts(),
        made.nll_parts_pooled(),
    ]


def _over(values: Floats, tokens: Floats) -> Floats:
    """Per token; not a number where there is none."""
    return np.divide(values, tokens, out=np.full_like(values, _NONE), where=tokens > 0)


class _Maker:
    """Builds comparisons. Every quantity has a generator of its own, so that adding one changes no other."""

    def __init__(self, columns: Columns, settings: Settings) -> None:
        self.c, self.settings = columns, settings

    def within(self, name: str, label: str, values: Floats, unit: str) -> Comparison:
        """Variance over the samples of a prompt, averaged over prompts."""
        known, per_view = np.isfinite(values), []
        centre = float(values[known].mean()) if known.any() else 0.0
        for view in VIEWS:
            mask = known & self.c.of(view)
            n = self.c.sums(None, mask)
            # two passes: around each prompt's own mean, so that nothing cancels
            means = np.divide(self.c.sums(values - centre, mask), n, out=np.zeros_like(n), where=n > 0)
            squares = self.c.sums((values - centre - means[self.c.prompt]) ** 2, mask)
            per_view.append((n, np.divide(squares, n - 1, out=np.zeros_like(n), where=n > 1)))
        (n_t, var_t), (n_e, var_e) = per_view
        keep = (n_t > 1) & (n_e > 1)
        rows = np.column_stack([var_t, var_e, np.ones_like(var_t)])[keep]
        return self._comparison(
            name, 3, label, unit, rows, (mean(0, 2), mean(1, 2)), n_t + n_e, keep, known,
            "fewer than two samples in a view",
        )  # fmt: skip

    def overall(self, name: str, label: str, values: Floats, unit: str) -> Comparison:
        """Variance over all samples of all prompts."""
        known, parts = np.isfinite(values), []
        for view in VIEWS:
            mask = known & self.c.of(view)
            centred = values - (values[mask].mean() if mask.any() else 0.0)
            parts += [self.c.sums(None, mask), self.c.sums(centred, mask), self.c.sums(centred**2, mask)]
        keep = (parts[0] > 0) & (parts[3] > 0)
        rows = np.column_stack(parts)[keep]
        views = (variance(0, 1, 2), variance(3, 4, 5))
        return self._comparison(
            name, 3, label, unit, rows, views, parts[0] + parts[3], keep, known, "samples of one view only"
        )

    def averaged(self, name: str, label: str, values: Floats, unit: str) -> Comparison:
        """Mean over the samples of a prompt, averaged over prompts."""
        known = np.isfinite(values)
        (n_t, mean_t), (n_e, mean_e) = (self._means(values, known & self.c.of(view)) for view in VIEWS)
        keep = (n_t > 0) & (n_e > 0)
        rows = np.column_stack([mean_t, mean_e, np.ones_like(mean_t)])[keep]
        return self._comparison(
            name, 4, label, unit, rows, (mean(0, 2), mean(1, 2)), n_t + n_e, keep, known, "samples of one view only"
        )

    def nll_pooled(self, logp: Floats, tokens: Floats) -> Comparison:
        known, parts = np.isfinite(logp), []
        for view in VIEWS:
            mask = known & self.c.of(view)
            parts += [self.c.sums(-logp, mask), self.c.sums(tokens, mask), self.c.sums(None, mask)]
        keep = (parts[2] > 0) & (parts[5] > 0)
        rows = np.column_stack([parts[0], parts[1], parts[3], parts[4]])[keep]
        return self._comparison(
            "nll_pooled", 4, "NLL per token, tokens pooled", "nats", rows, (mean(0, 1), mean(2, 3)), parts[2] + parts[5],
            keep, known, "samples of one view only",
        )  # fmt: skip

    def trace_share(self) -> Comparison:
        mask, dropped = self._closed()
        n, share = self._means(_over(self.c.trace_tokens, self.c.tokens), mask & (self.c.tokens > 0))
        rows = np.column_stack([share, np.ones_like(share)])[n > 0]
        return self._share("trace_share", "share of the trace in a response's tokens", rows, mask, dropped)

    def trace_share_pooled(self) -> Comparison:
        mask, dropped = self._closed()
        columns = [self.c.sums(self.c.trace_tokens, mask), self.c.sums(self.c.tokens, mask)]
        rows = np.column_stack(columns)[self.c.sums(None, mask) > 0]
        return self._share("trace_share_pooled", "share of the trace, tokens pooled", rows, mask, dropped)

    def _share(
        self, name: str, label: str, rows: Floats, mask: npt.NDArray[np.bool_], dropped: dict[str, int]
    ) -> Comparison:
        share = self._interval(name, rows, mean(0, 1))
        return Comparison(
            name=name, table=5, label=label, unit="", first=share, num_prompts=len(rows), num_samples=int(mask.sum()),
            dropped=dropped,
        )  # fmt: skip

    def nll_parts(self) -> Comparison:
        """NLL per token of the trace, and of the answer after it."""
        mask, parts, dropped = self._parts()
        rates = [-_over(logp, tokens) for logp, tokens in parts]
        both = mask & np.isfinite(rates[0]) & np.isfinite(rates[1])
        (n, trace), (_, answer) = (self._means(rate, both) for rate in rates)
        rows = np.column_stack([trace, answer, np.ones_like(trace)])[n > 0]
        if lacking := int((mask & ~both).sum()):
            dropped["samples without a token in either part"] = lacking
        return self._trace_and_answer(
            "nll_parts", "NLL per token of trace and of answer", rows, ((0, 2), (1, 2)), both, dropped
        )

    def nll_parts_pooled(self) -> Comparison:
        mask, parts, dropped = self._parts()
        columns = [self.c.sums(values, mask) for logp, tokens in parts for values in (-logp, tokens)]
        rows = np.column_stack(columns)[self.c.sums(None, mask) > 0]
        return self._trace_and_answer(
            "nll_parts_pooled", "NLL of trace and of answer, tokens pooled", rows, ((0, 1), (2, 3)), mask, dropped
        )

    def _parts(self) -> tuple[npt.NDArray[np.bool_], list[tuple[Floats, Floats]], dict[str, int]]:
        """The samples whose parts are known; log p and tokens of the trace and of the answer; what was left out."""
        closed, dropped = self._closed()
        known = np.isfinite(self.c.trace_logp)
        if without := int((closed & ~known).sum()):
            dropped["samples without log-probabilities"] = without
        c = self.c
        parts = [(c.trace_logp, c.trace_tokens), (c.logp - c.trace_logp, c.tokens - c.trace_tokens)]
        return closed & known, parts, dropped

    def _trace_and_answer(
        self,
        name: str,
        label: str,
        rows: Floats,
        columns: tuple[tuple[int, int], tuple[int, int]],
        mask: npt.NDArray[np.bool_],
        dropped: dict[str, int],
    ) -> Comparison:
        trace, answer = columns
        return Comparison(
            name=name, table=5, label=label, unit="nats", sides=("trace", "answer"),
            first=self._interval(name, rows, mean(*trace)), second=self._interval(name, rows, mean(*answer)),
            ratio=self._interval(name, rows, ratio_of_means(trace, answer)),
            num_prompts=len(rows), num_samples=int(mask.sum()), dropped=dropped,
        )  # fmt: skip

    def _means(self, values: Floats, mask: npt.NDArray[np.bool_]) -> tuple[Floats, Floats]:
        """Per prompt: how many samples are masked, and their mean (0 where there is none); ``[P]`` each."""
        n = self.c.sums(None, mask)
        return n, np.divide(self.c.sums(values, mask), n, out=np.zeros_like(n), where=n > 0)

    def _closed(self) -> tuple[npt.NDArray[np.bool_], dict[str, int]]:
        """The trace view's samples whose trace is known to end, and how many are not."""
        view = self.c.of("trace")
        mask = view & (self.c.trace_tokens >= 0)
        unclosed, unknown = int((view & ~self.c.closed).sum()), int((view & self.c.closed & ~mask).sum())
        counts = {"samples without an end of the trace": unclosed, "samples not looked into": unknown}
        return mask, {reason: count for reason, count in counts.items() if count}

    def _comparison(
        self,
        name: str,
        table: int,
        label: str,
        unit: str,
        rows: Floats,
        views: tuple[Statistic, Statistic],
        counts: Floats,
        keep: npt.NDArray[np.bool_],
        known: npt.NDArray[np.bool_],
        lacking: str,
    ) -> Comparison:
        dropped = {
            f"prompts with {lacking}": int((~keep & (counts > 0)).sum()),
            "samples without log-probabilities": int((~known).sum()),
            "prompts without any": int((counts == 0).sum()),
        }
        return Comparison(
            name=name,
            table=table,
            label=label,
            unit=unit,
            first=self._interval(name, rows, views[0]),
            second=self._interval(name, rows, views[1]),
            ratio=self._interval(name, rows, ratio(*views)),
            num_prompts=int(keep.sum()),
            num_samples=int(counts[keep].sum()),
            dropped={reason: count for reason, count in dropped.items() if count},
        )

    def _interval(self, name: str, rows: Floats, statistic: Statistic) -> Interval:
        seed = [self.settings.seed, *name.encode()]
        return bootstrap_interval(
            rows,
            statistic,
            np.random.default_rng(seed),
            num_resamples=self.settings.num_resamples,
            level=self.settings.level,
        )
