"""Which samples an experiment asks for, and which of them are missing: the arithmetic behind ``bvpo sample``.

In: prompts, a tokenizer, a format, what to draw, and a way to ask whether a sample exists. Out: a :class:`SamplePlan`, one
:class:`Draw` per prompt and view with samples left to draw, each of which names its samples by key. A prompt that cannot be
written in a view is kept with the reason. It draws nothing and knows no engine, file or clock.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from bvpo.formats import ReasoningFormat, view_prompt
from bvpo.keys import content_hash, in_part, sample_key
from bvpo.records import Prompt, View
from bvpo.strict import UserError


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleSpec:
    """All that a sample's key depends on besides its prompt, view and index.

    ``sampling`` holds the sampling parameters by name; ``model_revision`` names the weights.
    """

    reasoning_format: ReasoningFormat
    model_revision: str
    sampling: Mapping[str, Any]
    run_seed: int

    def key(self, prompt_ids: Sequence[int], view: View, index: int) -> str:
        return sample_key(
            prompt_ids=prompt_ids,
            view=view,
            reasoning_format=self.reasoning_format.name,
            index=index,
            model_revision=self.model_revision,
            sampling=self.sampling,
            run_seed=self.run_seed,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Draw:
    """The missing samples of one prompt in one view; ``packed_ids`` holds the prompt's tokens at 4 bytes each."""

    prompt: Prompt
    view: View
    packed_ids: array[int]
    completion_start: int
    indices: tuple[int, ...]

    @property
    def prompt_ids(self) -> tuple[int, ...]:
        return tuple(self.packed_ids)


@dataclass(frozen=True, slots=True, kw_only=True)
class Unwritable:
    """A prompt that a view's prompt cannot be made of; ``keys`` stand for the samples it will not have."""

    prompt: Prompt
    view: View
    keys: tuple[str, ...]
    error: str


@dataclass(slots=True, kw_only=True)
class SamplePlan:
    """What is there and what is left. ``num_shared`` counts samples of prompts that read the same tokens as an earlier
    prompt: these are one and the same request, and the samples belong to the earlier prompt."""

    draws: list[Draw] = field(default_factory=list)
    unwritable: list[Unwritable] = field(default_factory=list)
    num_asked: int = 0
    num_done: int = 0
    num_failed: int = 0
    num_shared: int = 0
    prompt_tokens: int = 0
    longest_prompt: int = 0

    @property
    def num_left(self) -> int:
        return sum(len(draw.indices) for draw in self.draws)


def shard_of(text: str) -> tuple[int, int]:
    """``"i/N"`` as numbers; the empty text is the whole."""
    part, _, parts = (text or "0/1").partition("/")
    return int(part), int(parts)


def in_shard(prompt: Prompt, shard: tuple[int, int]) -> bool:
    """Whether a prompt belongs to a part. The samples of one prompt stay together, so its tokens are computed once."""
    return in_part(prompt.id, *shard)


def plan_samples(
    prompts: Iterable[Prompt],
    tokenizer: Any,
    spec: SampleSpec,
    *,
    views: Sequence[View],
    num_samples: int,
    is_done: Callable[[str], bool],
    has_failed: Callable[[str], bool],
) -> SamplePlan:
    """One pass over the prompts, in order. ``has_failed`` says which missing samples are not to be tried again."""
    plan = SamplePlan()
    seen: set[tuple[View, bytes]] = set()
    for prompt in prompts:
        for view in views:
            plan.num_asked += num_samples
            try:
                written = view_prompt(tokenizer, spec.reasoning_format, prompt.messages, view)
            except UserError as error:
                _note_unwritable(plan, prompt, view, num_samples, str(error), has_failed)
                continue
            packed = array("i", written.prompt_ids)
            if (view, packed.tobytes()) in seen:
                plan.num_shared += num_samples
                continue
            seen.add((view, packed.tobytes()))
            indices = []
            for index in range(num_samples):
                key = spec.key(written.prompt_ids, view, index)
                if is_done(key):
                    plan.num_done += 1
                elif has_failed(key):
                    plan.num_failed += 1
                else:
                    indices.append(index)
            if indices:
                plan.draws.append(
                    Draw(
                        prompt=prompt,
                        view=view,
                        packed_ids=packed,
                        completion_start=written.completion_start,
                        indices=tuple(indices),
                    )
                )
                plan.prompt_tokens += len(packed) * len(indices)
                plan.longest_prompt = max(plan.longest_prompt, len(packed))
    return plan


def _note_unwritable(
    plan: SamplePlan, prompt: Prompt, view: View, num_samples: int, error: str, has_failed: Callable[[str], bool]
) -> None:
    keys = [content_hash({"unwritable": prompt.id, "view": view, "index": index}) for index in range(num_samples)]
    new = tuple(key for key in keys if not has_failed(key))
    plan.num_failed += len(keys)
    if new:
        plan.unwritable.append(Unwritable(prompt=prompt, view=view, keys=new, error=error))


def walk(plan: SamplePlan) -> Iterator[tuple[Draw, int]]:
    """Every missing sample once, prompt by prompt, so that an engine can share a prompt's computation."""
    for draw in plan.draws:
        for index in draw.indices:
            yield draw, index
