"""Reasoning formats: how each model family opens, closes and empties its trace, in text and in token ids.

``get_format`` / ``detect_format`` / ``resolve_format`` choose one; ``view_prompt`` makes a view's prompt,
``fmt.split`` takes a response apart, ``completion_ids`` writes one, ``answer_offset`` finds where its answer begins.
Pure: strings, ids and a tokenizer in, values out. The facts and golden tables are in ``docs/formats.md``.
"""

from bvpo.formats.prompts import PROMPT_DATE, ViewPrompt, render, view_prompt
from bvpo.formats.registry import FORMATS
from bvpo.formats.responses import answer_offset, completion_ids, decode_completion, end_ids
from bvpo.formats.select import FormatSpec, define_format, detect_format, get_format, resolve_format
from bvpo.formats.spec import Detection, ReasoningFormat, Split

__all__ = [
    "FORMATS",
    "PROMPT_DATE",
    "Detection",
    "FormatSpec",
    "ReasoningFormat",
    "Split",
    "ViewPrompt",
    "answer_offset",
    "completion_ids",
    "decode_completion",
    "define_format",
    "detect_format",
    "end_ids",
    "get_format",
    "render",
    "resolve_format",
    "view_prompt",
]
