"""Text for a terminal: headings, blocks with a bar beside them, colour where someone is looking.

In: plain text, also text that a model wrote. Out: lines in which nothing can move the cursor or change the colour but us.
Without a terminal there is no colour, and the bars and headings alone keep things apart. It prints nothing itself.
"""

from __future__ import annotations

import os
import shutil
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO, Literal

from bvpo.strict import visible

Tone = Literal["plain", "bold", "dim", "good", "bad", "title"]

_CODES: dict[Tone, str] = {
    "plain": "", "bold": "1", "dim": "2", "good": "32", "bad": "31", "title": "1;36",
}  # fmt: skip
MOST_COLUMNS = 110


@dataclass(frozen=True, slots=True, kw_only=True)
class Terminal:
    """How wide lines are, and whether they are coloured."""

    color: bool
    columns: int

    @classmethod
    def of(cls, stream: IO[str]) -> Terminal:
        """Colour only where a person looks, and NO_COLOR is not set (https://no-color.org)."""
        color = stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
        return cls(color=color, columns=min(shutil.get_terminal_size((MOST_COLUMNS, 24)).columns, MOST_COLUMNS))

    def paint(self, text: str, tone: Tone) -> str:
        code = _CODES[tone]
        return f"\x1b[{code}m{text}\x1b[0m" if self.color and code else text

    def heading(self, text: str) -> str:
        return self.paint(f"══ {text} ".ljust(self.columns, "═"), "title")

    def block(self, text: str, bar: str, tone: Tone = "plain") -> Iterator[str]:
        """The text, wrapped, with a bar on its left; every line break of the text is kept."""
        for line in visible(text).split("\n"):
            # long words (numbers, formulas) are broken: a bar on each line shows what belongs together
            wrapped = textwrap.wrap(line.expandtabs(4), max(20, self.columns - 4), drop_whitespace=False) or [""]
            for part in wrapped:
                yield self.paint(f"  {bar} ", "dim") + self.paint(part, tone)


def head(text: str, most: int) -> str:
    """The beginning of a text on one line."""
    line = " ".join(visible(text).split())
    return line if len(line) <= most else f"{line[: most - 1]}…"
