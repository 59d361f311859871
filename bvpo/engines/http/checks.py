"""The checks an endpoint must pass, what each failure costs, and what the user may waive or insist on.

In: problems that a preflight found (see ``preflight``), or none. Out: findings, "ok", "refused" or "downgraded", and a
:class:`Report` per endpoint. It measures nothing itself; a failed check is never ignored, it is refused or told.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from bvpo.engines.base import Caps
from bvpo.engines.http.wire import Talk
from bvpo.strict import UserError


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One thing that is measured: what happens if it fails, and whether the user may decide otherwise."""

    on_failure: Literal["refuse", "downgrade"]
    may_allow: bool
    lost: str  # what a run loses without it


CHECKS: dict[str, Check] = {
    "prompt_tokens": Check(
        on_failure="refuse", may_allow=False, lost="the server reads other prompt tokens than training will use"
    ),
    "token_ids": Check(on_failure="refuse", may_allow=False, lost="training would score tokens that were not sampled"),
    "vocabulary": Check(
        on_failure="refuse", may_allow=True, lost="the served model has another tokenizer than the one named"
    ),
    "greedy": Check(on_failure="refuse", may_allow=False, lost="temperature 0 is not honoured"),
    "temperature": Check(
        on_failure="refuse",
        may_allow=False,
        lost="all samples of a prompt are the same: temperature or seed is ignored",
    ),
    "wide_seeds": Check(on_failure="downgrade", may_allow=True, lost="seeds are reduced to 31 bits"),
    "same_seed": Check(on_failure="refuse", may_allow=True, lost="a sample cannot be drawn again from its seed"),
    "concurrency": Check(
        on_failure="downgrade", may_allow=True, lost="a sample may depend on what else the server is doing"
    ),
    "stop": Check(on_failure="refuse", may_allow=False, lost="responses do not end where the model ended them"),
    "max_tokens": Check(on_failure="refuse", may_allow=False, lost="the length limit is not honoured"),
    "n": Check(on_failure="downgrade", may_allow=True, lost="nothing here: bvpo always sends n = 1"),
    "logprobs": Check(on_failure="downgrade", may_allow=True, lost="samples carry no log-probabilities"),
    "top_p": Check(on_failure="downgrade", may_allow=True, lost="requests with top_p below 1 are refused"),
    "top_k": Check(on_failure="downgrade", may_allow=True, lost="requests with top_k are refused"),
    "reasoning_apart": Check(
        on_failure="refuse", may_allow=False, lost="a chat endpoint that mixes trace and answer cannot serve any view"
    ),
    "prefix": Check(
        on_failure="downgrade",
        may_allow=True,
        lost="the empty view is refused: the server does not continue its prefix",
    ),
    "agreement": Check(
        on_failure="refuse", may_allow=True, lost="endpoints sample differently: another model, precision or version"
    ),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """The outcome of one check; ``outcome`` is "ok", "refused" or "downgraded"."""

    check: str
    outcome: Literal["ok", "refused", "downgraded"]
    detail: str

    def line(self) -> str:
        return (
            f"{self.check}: {self.detail} ({CHECKS[self.check].lost})" if self.outcome != "ok" else f"{self.check}: ok"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """``allow`` turns refusals into downgrades, ``require`` downgrades into refusals; names are those of :data:`CHECKS`."""

    allow: tuple[str, ...] = ()
    require: tuple[str, ...] = ()
    allow_retokenise: bool = False

    def __post_init__(self) -> None:
        for option, names in (("allow", self.allow), ("require", self.require)):
            for name in names:
                if name not in CHECKS:
                    near = difflib.get_close_matches(name, CHECKS, n=1)
                    hint = f"did you mean {near[0]!r}?" if near else f"valid: {', '.join(CHECKS)}"
                    raise UserError(f"openai engine: {option}: unknown check {name!r}; {hint}")
        for name in self.allow:
            if not CHECKS[name].may_allow:
                hint = " (see allow_retokenise)" if name == "token_ids" else ""
                raise UserError(f"openai engine: allow: the check {name!r} cannot be waived: {CHECKS[name].lost}{hint}")
            if name in self.require:
                raise UserError(f"openai engine: the check {name!r} is in allow and in require; choose one")

    def finding(self, check: str, problem: str | None) -> Finding:
        """``problem`` None means that the check passed."""
        if problem is None:
            return Finding(check=check, outcome="ok", detail="")
        refused = check in self.require or (CHECKS[check].on_failure == "refuse" and check not in self.allow)
        return Finding(check=check, outcome="refused" if refused else "downgraded", detail=problem)


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What the preflight of one endpoint found. ``signature`` hashes what it sampled, ``None`` where that varies."""

    url: str
    findings: tuple[Finding, ...]
    caps: Caps
    wire: Talk | None
    signature: str | None = None

    def failed(self, check: str) -> bool:
        return any(f.check == check and f.outcome != "ok" for f in self.findings)

    @property
    def refusals(self) -> list[Finding]:
        return [f for f in self.findings if f.outcome == "refused"]


@dataclass(slots=True)
class Notes:
    """Findings collected while a preflight runs."""

    policy: Policy
    findings: list[Finding] = field(default_factory=list)

    def add(self, check: str, problem: str | None) -> bool:
        self.findings.append(self.policy.finding(check, problem))
        return problem is None

    @property
    def refused(self) -> bool:
        return any(f.outcome == "refused" for f in self.findings)

    def ok(self, check: str) -> bool:
        return any(f.check == check and f.outcome == "ok" for f in self.findings)


def agreement(reports: Sequence[Report], policy: Policy) -> Finding | None:
    """Whether endpoints that are each reproducible sample the same; ``None`` with fewer than two of them."""
    signed = [r for r in reports if r.signature is not None]
    if len(signed) < 2:
        return None
    odd = [r.url for r in signed if r.signature != signed[0].signature]
    problem = f"{', '.join(odd)} and {signed[0].url} answer the same request differently" if odd else None
    return policy.finding("agreement", problem)
