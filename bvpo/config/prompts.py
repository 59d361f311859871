"""[prompts]: where prompts come from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from bvpo.config.ranges import FILLED, SHARE, Problems, all_filled, at_least, below
from bvpo.strict import show


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptsConfig:
    """Where prompts come from, which of them are dropped, and how the rest is split."""

    sources: Annotated[tuple[str, ...], all_filled("file names or Hub names")] = ()
    """JSON-lines, JSON, CSV, Parquet or text files (one prompt per line), folders of datasets.save_to_disk, or Hub names.
    A source may end in its own options: 'org/set?split=train_sft&column=prompt&id=prompt_id&config=main'."""
    split: Annotated[str, FILLED] = "train"
    """Split of sources that have splits."""
    column: Annotated[str, FILLED] = "auto"
    """Column that holds the prompt: a text or a list of messages. 'auto' takes the first usual name that is there."""
    id_column: str = ""
    """Column that names a prompt; empty names each by the hash of its content."""
    last_assistant: Literal["drop", "strip"] = "drop"
    """Conversations that end with an assistant turn: drop them, or strip that turn."""
    max_chars: Annotated[int | None, at_least(1)] = None
    """Drop prompts with more characters, >= 1; none keeps all."""
    max_tokens: Annotated[int | None, at_least(1)] = None
    """Drop prompts with more tokens of the model's tokenizer, chat markup not counted, >= 1; none keeps all."""
    near_duplicates: Annotated[float | None, SHARE] = 0.8
    """Drop prompts whose word shingles agree with an earlier prompt's to this Jaccard index, in (0, 1]; none keeps them.
    Questions that differ in one number of many words count as near duplicates."""
    shingle_words: Annotated[int, at_least(1)] = 3
    """Words in a row that make one shingle, >= 1."""
    decontaminate: Annotated[tuple[str, ...], all_filled("file names or patterns")] = ()
    """Benchmark files (JSON lines, JSON, CSV, Parquet, text; * is a pattern): prompts that contain an item are dropped."""
    decontaminate_fields: Annotated[tuple[str, ...], all_filled("names of fields")] = ()
    """Fields of the benchmark files that hold texts; empty takes the usual names of questions."""
    ngram_words: Annotated[int, at_least(2)] = 13
    """Words in a row shared with a benchmark item that make a prompt contaminated, >= 2. Shorter items must occur whole,
    and items under 8 words must be the whole prompt."""
    validation_fraction: Annotated[float, below(0, 1)] = 0.0
    """Share of prompts in the split 'validation', in [0, 1); chosen by content and seed, so adding prompts moves none."""
    test_fraction: Annotated[float, below(0, 1)] = 0.0
    """Share of prompts in the split 'test', in [0, 1)."""
    count: Annotated[int | None, at_least(1)] = None
    """Keep only this many of the prompts that pass every check, >= 1, chosen by content and seed; none keeps all."""

    def contradictions(self) -> Problems:
        if self.decontaminate_fields and not self.decontaminate:
            yield "decontaminate_fields", "set, but no benchmark files are: set decontaminate or leave it out"
        if self.validation_fraction + self.test_fraction >= 1:
            problem = f"got {show(self.test_fraction)}, which with validation_fraction leaves nothing to train on"
            yield "test_fraction", problem
