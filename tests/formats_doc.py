"""The generated parts of ``docs/formats.md``: the table of families and the golden tables.

``python -m tests.formats_doc`` rewrites them; ``tests/unit/test_formats.py`` fails when they are stale.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from bvpo.formats import FORMATS, ReasoningFormat, completion_ids, view_prompt
from bvpo.records import Message, Pair, Quad, Response, View
from bvpo.training.tokenizing import TokenSettings, tokenize_views
from tests.formats_fixtures import FAMILIES, format_of, tokenizer_of

DOC = Path(__file__).parent.parent / "docs" / "formats.md"
EXAMPLE = (Message(role="user", content="Hi"),)
_TAIL = 6


def golden_lines(name: str) -> list[str]:
    """What one fixture scores in each view: the last unscored tokens, a bar, every scored token, as text(id)."""
    family, tokenizer, fmt = FAMILIES[name], tokenizer_of(name), format_of(name)

    def shown(ids: Sequence[int]) -> str:
        return " ".join(str(tokenizer.decode([i])).replace("\n", "\\n") + f"({i})" for i in ids)

    cases: list[tuple[str, View, bool]] = [("trace", "trace", True), ("empty", "empty", True)]
    cases.append(("empty, block unscored", "empty", False))
    lines = []
    for label, view, score_block in cases:
        prompt = view_prompt(tokenizer, fmt, EXAMPLE, view, score_block)
        texts = (family.trace, family.answer) if view == "trace" else (None, family.empty_answer)
        ids = prompt.prompt_ids + completion_ids(tokenizer, fmt, view, *texts, finished=True)
        start = prompt.completion_start
        lines.append(f"{label}\n   … {shown(ids[max(0, start - _TAIL) : start])}\n   ║ {shown(ids[start:])}")
    unclosed, silent = rejected_silence(name)
    return [*lines, f"trace, unclosed\n   ║ {shown(unclosed)}", f"empty, no answer\n   ║ {shown(silent)}"]


def rejected_silence(name: str) -> tuple[Sequence[int], Sequence[int]]:
    """What training scores of a rejected trace that never closed and of a rejected empty answer, from sampled ids on."""
    family, tokenizer, fmt = FAMILIES[name], tokenizer_of(name), format_of(name)
    said = completion_ids(tokenizer, fmt, "trace", family.trace, family.answer, finished=True)
    close = fmt.find_close(str(tokenizer.decode(list(said))))
    assert close is not None
    before = max(n for n in range(len(said)) if len(str(tokenizer.decode(list(said[:n])))) <= close[0])
    silence = completion_ids(tokenizer, fmt, "empty", None, "", True)
    sampled: dict[View, Sequence[int]] = {"trace": said[:before], "empty": silence}
    pairs: dict[View, Pair] = {}
    for view, rejected in sampled.items():
        prompt = view_prompt(tokenizer, fmt, EXAMPLE, view)
        chosen = said if view == "trace" else completion_ids(tokenizer, fmt, view, None, family.empty_answer, True)
        pairs[view] = Pair(
            view=view,
            chosen=Response(answer=family.answer, token_ids=tuple(chosen)),
            rejected=Response(answer="", token_ids=tuple(rejected)),
            prompt_ids=tuple(prompt.prompt_ids),
            completion_start=prompt.completion_start,
        )
    quad = Quad(id="q", messages=EXAMPLE, trace=pairs["trace"], empty=pairs["empty"])
    found = tokenize_views(quad, tokenizer, fmt, TokenSettings(max_length=500))
    assert found.quad is not None and not found.drops, found.drops
    trace, empty = found.quad.branches[1], found.quad.branches[3]
    assert trace is not None and empty is not None
    return trace.ids[trace.scored_from :].tolist(), empty.ids[empty.scored_from :].tolist()


def golden_section() -> str:
    blocks = [f"### `{name}`\n\n```text\n" + "\n".join(golden_lines(name)) + "\n```\n" for name in FAMILIES]
    return "\n".join(blocks)


def family_table() -> str:
    def code(*texts: str) -> str:
        cells = (t.replace("\n", "\\n").replace("|", "\\|") for t in texts if t)
        return " or ".join(f"`{cell}`" for cell in cells) or "none"

    def plain(text: str) -> str:
        return text.replace("<", "\\<") or "none"

    def switch(fmt: ReasoningFormat) -> str:
        parts = [f"{key}={value}" for key, value in fmt.empty_kwargs.items()]
        if fmt.empty_system:
            parts.append(f"system: {fmt.empty_system}")
        return code(*parts)

    rows = [
        "| format | models | trace prompt ends | closing marker | empty block | switch | verified on | leads |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for fmt in FORMATS.values():
        block = f"{fmt.empty_open}·{fmt.empty_close}" if fmt.empty_open + fmt.empty_close else ""
        markers = (code(fmt.open), code(*fmt.close), code(block), switch(fmt))
        cells = (f"`{fmt.name}`", fmt.models, *markers, plain(fmt.verified), plain(fmt.lead))
        rows.append("| " + " | ".join(cells) + " |")
    return "\n".join(rows) + "\n"


def with_generated_parts(doc: str) -> str:
    """The page with its two generated parts replaced."""
    for part, text in (("families", family_table()), ("golden", golden_section())):
        begin, end = f"<!-- {part}: generated -->\n", f"<!-- {part}: end -->"
        pattern = re.escape(begin) + ".*?" + re.escape(end)
        assert re.search(pattern, doc, flags=re.DOTALL), f"{DOC.name} lost its {part} part"
        doc = re.sub(pattern, lambda _, new=begin + text + end: new, doc, flags=re.DOTALL)
    return doc


if __name__ == "__main__":
    DOC.write_text(with_generated_parts(DOC.read_text(encoding="utf-8")), encoding="utf-8")
