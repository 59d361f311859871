"""Which format a model uses: by name, by looking at its tokenizer, or by the user's own definition.

Detection renders a probe conversation and compares endings; it answers only when exactly one format fits, and says
what it saw otherwise. Nothing is guessed: a wrong format trains on the wrong tokens without any other sign.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from bvpo.formats.prompts import EndlessTemplate, encode, render, template_source
from bvpo.formats.registry import FORMATS
from bvpo.formats.spec import ReasoningFormat
from bvpo.records import Message
from bvpo.strict import UserError, did_you_mean, from_dict

_PROBE = (Message(role="user", content="Hi there"),)
_SWITCHES_OFF = {"enable_thinking": False, "thinking": False, "thinking_budget": 0}


@dataclass(frozen=True, slots=True, kw_only=True)
class FormatSpec:
    """A user's own format: fields of :class:`ReasoningFormat` that differ from ``base``'s.

    Without a ``base``, ``open`` and ``close`` are required; the empty block is then ``open`` + the first ``close``.
    """

    name: str = "custom"
    base: str | None = None
    open: str | None = None
    close: tuple[str, ...] | None = None
    empty_open: str | None = None
    empty_close: str | None = None
    answer_close: str | None = None
    turn_end: str | None = None
    trace_kwargs: dict[str, Any] | None = None
    empty_kwargs: dict[str, Any] | None = None
    trace_system: str | None = None
    empty_system: str | None = None
    trace_user_suffix: str | None = None
    empty_user_suffix: str | None = None
    template_tails: tuple[str, ...] | None = None


def get_format(name: str) -> ReasoningFormat:
    """The registered format of this name."""
    if name not in FORMATS:
        raise UserError(f"model.format: unknown reasoning format {name!r}{did_you_mean(name, FORMATS)}")
    return FORMATS[name]


def define_format(data: Mapping[str, Any], where: str = "model.custom_format") -> ReasoningFormat:
    """A user's format from a table of :class:`FormatSpec` fields; unknown keys and wrong types are refused."""
    spec = from_dict(FormatSpec, data, where)
    given = {f.name: v for f in fields(spec) if f.name != "base" and (v := getattr(spec, f.name)) is not None}
    if spec.name in FORMATS:
        raise UserError(f"{where}: field 'name': {spec.name!r} is a registered format; choose another name")
    if not given.get("open", "x").strip():
        raise UserError(f"{where}: field 'open': got {given['open']!r}, expected a marker with visible characters")
    if "close" in given and not (given["close"] and all(marker.strip() for marker in given["close"])):
        raise UserError(f"{where}: field 'close': expected one or more markers with visible characters")
    if spec.base is None:
        for key in ("open", "close"):
            if key not in given:
                raise UserError(f"{where}: missing field {key!r}; give it, or name a base format")
        block = {"empty_open": given["open"], "empty_close": given["close"][0]}
        return ReasoningFormat(**{**block, **given})
    if spec.base not in FORMATS:
        raise UserError(f"{where}: field 'base': unknown format {spec.base!r}{did_you_mean(spec.base, FORMATS)}")
    base = FORMATS[spec.base]
    fmt = replace(base, **{"models": "", "verified": "", "lead": "", "detect": None, **given})
    same = fmt.open.strip() == base.open.strip() and fmt.close[0].strip() == base.close[0].strip()
    if not same and not {"empty_open", "empty_close"} <= given.keys():
        raise UserError(f"{where}: other markers than those of {spec.base!r} need 'empty_open' and 'empty_close' too")
    return fmt


def detect_format(tokenizer: Any) -> ReasoningFormat:
    """The one registered format that this tokenizer's chat template and vocabulary fit."""
    fits = [fmt for fmt in FORMATS.values() if _fits(tokenizer, fmt)]
    if len(fits) == 1:
        return fits[0]
    if fits:
        reason, names = "several formats fit", [fmt.name for fmt in fits]
    else:
        reason, names = f"none fits ({_what_was_seen(tokenizer)})", list(FORMATS)
    raise UserError(
        f"cannot tell the reasoning format from the tokenizer: {reason}. Name one with model.format, "
        f"one of: {', '.join(names)}; or define your own (docs/formats.md)"
    )


def resolve_format(tokenizer: Any, name: str = "auto", custom: Mapping[str, Any] | None = None) -> ReasoningFormat:
    """The format a configuration asks for: the user's own table if there is one, a name, or ``auto`` = detect."""
    if custom:
        if name not in ("auto", custom.get("name", "custom")):
            raise UserError(f"model.format: got {name!r} beside a format of your own; leave it at 'auto'")
        return define_format(custom)
    return detect_format(tokenizer) if name == "auto" else get_format(name)


def _fits(tokenizer: Any, fmt: ReasoningFormat) -> bool:
    """Every condition of :class:`Detection`; a format without a switch must moreover meet a template without one."""
    look = fmt.detect
    if look is None or not all(len(encode(tokenizer, token)) == 1 for token in look.tokens):
        return False
    asked = fmt if fmt.empty_kwargs or fmt.empty_system else replace(fmt, empty_kwargs=_SWITCHES_OFF)
    try:
        source = template_source(tokenizer)
        trace, empty = (render(tokenizer, asked, _PROBE, view) for view in ("trace", "empty"))
    except EndlessTemplate:  # as it would be for every other family, each for as long
        raise
    except UserError:  # this family's switches do not suit the template (no system role, ...): another family's
        return False
    named = all(text in source for text in look.template_has)
    return named and trace.endswith(look.trace_ends) and empty.endswith(look.empty_ends)


def _what_was_seen(tokenizer: Any) -> str:
    plain = ReasoningFormat(name="probe", open="<think>", close=("</think>",), empty_open="", empty_close="")
    try:
        ending = render(tokenizer, plain, _PROBE, "trace")[-50:]
    except UserError as error:
        return str(error)
    return f"its chat template ends a prompt with {ending!r}"
