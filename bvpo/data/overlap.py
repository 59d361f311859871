"""Word overlap between texts: near duplicates within a list, and copies of benchmark items.

In: texts as lists of words (:func:`words`, :func:`words_and_operators`). Out: for each text, the earlier text it nearly
repeats, or the benchmark item it contains. Both are exact up to collisions of 64-bit hashes, depend on nothing but the
texts and their order, and handle 60,000 prompts in seconds. Which texts to compare, and what to drop, is not decided here.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt

Hashes = npt.NDArray[np.uint64]
Ints = npt.NDArray[np.int64]

# scripts written without spaces: each character counts as a word
_CJK = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\u0e00-\u0e7f"
_WORD = re.compile(rf"[{_CJK}]|[^\W_{_CJK}]+")
_WORD_OR_OPERATOR = re.compile(rf"[{_CJK}]|[^\W_{_CJK}]+|[-+*/=<>^%!|~±×÷\u2190-\u22ff]")

_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)
_WHOLE_TEXT_WORDS = 8  # benchmark items shorter than this are found only as the whole prompt


def words(text: str) -> list[str]:
    """Lower-case words and numbers; punctuation, spacing and mark-up are left out."""
    return _WORD.findall(unicodedata.normalize("NFKC", text).casefold())


def words_and_operators(text: str) -> list[str]:
    """Like :func:`words`, with operators kept: ``3 + 5`` and ``3 - 5`` are different questions."""
    return _WORD_OR_OPERATOR.findall(unicodedata.normalize("NFKC", text).casefold())


@dataclass(frozen=True, slots=True)
class NearDuplicate:
    """Text ``index`` repeats the earlier text ``of``: ``similarity`` is the Jaccard index of their shingle sets."""

    index: int
    of: int
    similarity: float


def near_duplicates(
    texts: Sequence[list[str]], *, threshold: float, shingle: int, groups: Sequence[Hashable] | None = None
) -> list[NearDuplicate]:
    """Texts whose word ``shingle``-grams agree with those of an earlier, kept text to at least ``threshold``.

    Texts of different ``groups`` are never compared. This is an exact set-similarity join by prefix filtering (as in
    AllPairs and PPJoin), where MinHash would miss a share of the pairs: two sets with Jaccard index t or more must
    share one of their ``|x| - ceil(t |x|) + 1`` rarest members, so only texts that share a rare shingle are compared.
    """
    assert 0 < threshold <= 1 and shingle >= 1
    sets, prefixes = _shingle_sets(texts, threshold, shingle, groups)
    kept_with: dict[int, list[int]] = {}
    found: list[NearDuplicate] = []
    for index, (members, prefix) in enumerate(zip(sets, prefixes, strict=True)):
        near = None
        for other in sorted({other for value in prefix for other in kept_with.get(value, ())}):
            similarity = _jaccard(members, sets[other], threshold)
            if similarity >= threshold:
                near = NearDuplicate(index, other, similarity)
                found.append(near)
                break
        if near is None:
            for value in prefix:
                kept_with.setdefault(value, []).append(index)
    return found


def _jaccard(first: Hashes, second: Hashes, threshold: float) -> float:
    """The Jaccard index of two sorted sets; 0 where their sizes alone rule out the threshold."""
    small, large = sorted((len(first), len(second)))
    if small < threshold * large - 1e-9:
        return 0.0
    common = len(np.intersect1d(first, second, assume_unique=True))
    return common / (len(first) + len(second) - common)


def _shingle_sets(
    texts: Sequence[list[str]], threshold: float, shingle: int, groups: Sequence[Hashable] | None
) -> tuple[list[Hashes], list[list[int]]]:
    """Per text: its sorted shingle set, and the rare members that a similar text must share (singletons left out)."""
    hashes, starts = _hash_words(texts)
    wanted = np.minimum(shingle, np.diff(starts))  # a text shorter than a shingle is one shingle
    values, text = _runs_of_length(hashes, starts, wanted)
    if groups is not None:
        salts = _hash_strings([repr(group) for group in groups])
        values = values ^ salts[text]
    order = np.lexsort((values, text))
    values, text = values[order], text[order]
    new = np.ones(len(values), dtype=bool)
    new[1:] = (values[1:] != values[:-1]) | (text[1:] != text[:-1])
    values, text = values[new], text[new]
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    count = counts[inverse]
    bounds = np.searchsorted(text, np.arange(len(texts) + 1))
    sizes = np.diff(bounds)
    rank_order = np.lexsort((values, count, text))
    rank = np.arange(len(values)) - bounds[text]
    prefix_size = sizes - np.ceil(threshold * sizes - 1e-9).astype(np.int64) + 1
    in_prefix = (rank < prefix_size[text]) & (count[rank_order] > 1)
    prefix_text, prefix_values = text[in_prefix], values[rank_order][in_prefix]
    prefix_bounds = np.searchsorted(prefix_text, np.arange(len(texts) + 1))
    sets = [values[a:b] for a, b in pairwise(bounds)]
    prefixes = [prefix_values[a:b].tolist() for a, b in pairwise(prefix_bounds)]
    return sets, prefixes


@dataclass(frozen=True, slots=True)
class Overlap:
    """Text ``index`` contains words ``start`` to ``stop`` in common with benchmark item ``item``."""

    index: int
    item: int
    start: int
    stop: int


class OverlapIndex:
    """Benchmark items to look for; ``find`` says which texts contain a run of ``ngram`` words of one of them.

    An item with fewer words than ``ngram`` must occur whole; with fewer than 8 words it must be the whole text, because
    such short runs of words occur everywhere.
    """

    def __init__(self, items: Sequence[list[str]], ngram: int) -> None:
        shortest = min(_WHOLE_TEXT_WORDS, ngram)
        lengths = np.array([min(len(item), ngram) for item in items], dtype=np.int64)
        hashes, starts = _hash_words(items)
        self._runs: dict[int, tuple[Hashes, Ints]] = {}
        for length in sorted({int(n) for n in lengths if n >= shortest}):
            values, item = _runs_of_length(hashes, starts, np.where(lengths == length, length, 0))
            values, first = np.unique(values, return_index=True)  # the first item that holds the run
            self._runs[length] = values, item[first]
        short = [i for i, item in enumerate(items) if 0 < len(item) < shortest]
        self._whole: dict[tuple[str, ...], int] = {}
        for i in short:
            self._whole.setdefault(tuple(items[i]), i)

    def find(self, texts: Sequence[list[str]]) -> list[Overlap]:
        """One overlap of each text that has any: the first of the longest."""
        found: dict[int, Overlap] = {}
        hashes, starts = _hash_words(texts)
        for length, values, text, position in _growing_runs(hashes, starts, max(self._runs, default=0)):
            if length not in self._runs:
                continue
            known, item = self._runs[length]
            place = np.minimum(np.searchsorted(known, values), len(known) - 1)
            hits = np.flatnonzero(known[place] == values)
            indices, first = np.unique(text[hits], return_index=True)
            for index, hit in zip(indices.tolist(), hits[first].tolist(), strict=True):
                start = int(position[hit] - starts[index])
                found[index] = Overlap(index, int(item[place[hit]]), start, start + length)
        if self._whole:
            for index, text_words in enumerate(texts):
                if index not in found and (match := self._whole.get(tuple(text_words))) is not None:
                    found[index] = Overlap(index, match, 0, len(text_words))
        return [found[index] for index in sorted(found)]


def _hash_words(texts: Sequence[Iterable[str]]) -> tuple[Hashes, Ints]:
    """All words of all texts as 64-bit hashes, and where each text starts (one more entry: where the last one ends)."""
    numbers: dict[str, int] = {}
    flat = [numbers.setdefault(word, len(numbers)) for text in texts for word in text]
    vocabulary = _hash_strings(list(numbers))
    starts = np.zeros(len(texts) + 1, dtype=np.int64)
    np.cumsum([len(text) for text in texts], out=starts[1:])  # type: ignore[arg-type]
    return vocabulary[np.array(flat, dtype=np.int64)], starts


def _hash_strings(strings: Sequence[str]) -> Hashes:
    digests = b"".join(hashlib.blake2b(s.encode("utf-8", "surrogatepass"), digest_size=8).digest() for s in strings)
    return np.frombuffer(digests, dtype="<u8").astype(np.uint64)


def _growing_runs(hashes: Hashes, starts: Ints, longest: int) -> Iterator[tuple[int, Hashes, Ints, Ints]]:
    """For each length from 1 to ``longest``: hashes of all runs of so many words within a text, texts, positions."""
    text = np.repeat(np.arange(len(starts) - 1), np.diff(starts))
    position = np.arange(len(hashes))
    values = np.zeros(len(hashes), dtype=np.uint64)
    for length in range(1, longest + 1):
        inside = position + length <= starts[text + 1]
        text, position, values = text[inside], position[inside], values[inside]
        # a polynomial in the word hashes, so order counts; overflow is the arithmetic meant
        values = (values + hashes[position + length - 1]) * _MULTIPLIER
        yield length, values ^ (values >> np.uint64(29)), text, position


def _runs_of_length(hashes: Hashes, starts: Ints, lengths: Ints) -> tuple[Hashes, Ints]:
    """Hashes of all runs of ``lengths[text]`` words, and the text of each; a length of 0 gives none."""
    values, texts = [np.empty(0, np.uint64)], [np.empty(0, np.int64)]
    for length, value, text, _ in _growing_runs(hashes, starts, int(lengths.max(initial=0))):
        chosen = lengths[text] == length
        values.append(value[chosen])
        texts.append(text[chosen])
    return np.concatenate(values), np.concatenate(texts)
