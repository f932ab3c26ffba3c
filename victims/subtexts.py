"""Two short relatives of a caption: one that says less of the same, one that says something else.

The *positive* keeps the subject, its verb or preposition and the object, with their articles; where
nothing is said of the subject, the noun and an attribute. The *negative* is the caption with one
noun, verb or adjective replaced by another of its kind, drawn from all captions by its share of
them. Both are alternative captions of a view (`PositiveText`, `NegativeText`), and `eligible` tells
which captions have them. Openers (``a photo of``) are set aside first, as no part of what is said,
and put back in front of both: the opener must not be what tells a positive from a negative.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from functools import lru_cache
from itertools import accumulate, pairwise
from typing import ClassVar, Final, NamedTuple, final

import numpy as np
import numpy.typing as npt

from victims.draws import numpy_rng
from victims.eda import delete
from victims.keys import digest
from victims.speech import (
    ADJECTIVE,
    ARTICLES,
    KINDS,
    NOUN,
    PREPOSITIONS,
    VERB,
    Tag,
    tagger,
)
from victims.words import OPENERS, synonyms


class Parser(StrEnum):
    """`wordnet` looks words up in a dictionary, `spacy` asks its small English model; `deletion`
    does not parse: positives lose words at random, negatives exchange any word for any other."""

    WORDNET = "wordnet"
    DELETION = "deletion"
    SPACY = "spacy"


class NegativeKind(StrEnum):
    """Which part of speech a negative exchanges."""

    ANY = "any"
    NOUN = "noun"
    VERB = "verb"
    ADJECTIVE = "adjective"


# A parsed positive keeps about half of the words, and so does one by deletion.
DELETED = 0.5
_WORD = "word"  # the kind of every word where nothing is parsed
_WORDS = re.compile(r"[a-z]+(?:['\u2019-][a-z]+)*", re.IGNORECASE)
_SHOWN = {opener.split()[1] for opener in OPENERS if opener.endswith(" of")}
_SHOWN |= {"painting", "illustration", "view", "shot", "close-up", "closeup", "close up"}
_SHOWN |= {other for word in _SHOWN for other in synonyms(word)}
_OPENER: Final = re.compile(
    rf"\s*(?:(?:an?|the)\s+)?(?:{'|'.join(sorted(_SHOWN, key=len, reverse=True))})\s+of\s+"
    r"|\s*(?:there|this|that|here)\s+(?:is|are)\s+",
    re.IGNORECASE,
)


class Spot(NamedTuple):
    """A word of a caption that can be exchanged: where it stands, and what it is."""

    start: int
    stop: int
    kind: str
    lemma: str


class Sentence(NamedTuple):
    """A parsed caption: its opener, then its words in lower case with their spans and tags."""

    caption: str
    opener: str
    words: tuple[str, ...]
    spans: tuple[tuple[int, int], ...]
    tags: tuple[Tag, ...]

    @property
    def spots(self) -> list[Spot]:
        parts = zip(self.spans, self.tags, strict=True)
        return [Spot(*span, tag.kind, tag.lemma) for span, tag in parts if tag.kind is not None]

    @property
    def says_something(self) -> bool:
        """Does it hold more than a noun alone?"""
        return sum(tag.kind is not None for tag in self.tags) >= 2

    def telling(self, places: Sequence[int]) -> str:
        """The words at ``places`` behind the opener, an article as a new neighbour asks."""
        kept = [self.words[place] for place in places]
        for at, (place, following) in enumerate(pairwise(places)):
            if kept[at] in ("a", "an") and following != place + 1:
                kept[at] = "an" if kept[at + 1][0] in "aeiou" else "a"
        return self.opener + " ".join(kept)


# --- positives


def positive(sentence: Sentence) -> str:
    """The caption cut down to its core; the caption itself where there is nothing to leave out."""
    kept = _core(sentence.words, [tag.kind for tag in sentence.tags])
    return sentence.telling(kept) if kept else sentence.caption


def _core(words: Sequence[str], kinds: Sequence[str | None]) -> list[int]:
    """The places of the words to keep; none where nothing is said of a noun."""
    if NOUN not in kinds or sum(kind is not None for kind in kinds) < 2:
        return []
    head = _end(kinds, kinds.index(NOUN))
    subject, behind = _phrase(words, kinds, head), range(head + 1, len(words))
    verbs = [place for place in behind if kinds[place] == VERB]
    relations = verbs or [place for place in behind if words[place] in PREPOSITIONS]
    for relation in relations[:1]:
        named = [p for p in behind if p > relation and kinds[p] in (NOUN, ADJECTIVE)]
        # Behind a preposition an adjective can stand for a noun: "on blue".
        objects = _phrase(words, kinds, _end(kinds, named[0])) if named else []
        between = range(relation + 1, objects[0]) if objects else ()
        if objects or verbs:
            joined = [place for place in between if words[place] in PREPOSITIONS]
            return [*subject, relation, *joined, *objects]
    others = [place for place in behind if kinds[place] == NOUN]
    if others:
        return list(range(subject[0], _end(kinds, others[0]) + 1))
    return _phrase(words, kinds, head, attribute=True)


def _end(kinds: Sequence[str | None], start: int) -> int:
    """Where the phrase that ``start`` is in ends: adjectives, then nouns."""
    stop = start
    while stop + 1 < len(kinds) and kinds[stop + 1] in (kinds[stop], NOUN):
        stop += 1
    return stop


def _phrase(
    words: Sequence[str], kinds: Sequence[str | None], head: int, attribute: bool = False
) -> list[int]:
    """A noun with the nouns that make one name with it and its article, perhaps an adjective."""
    start = head
    while start and kinds[start - 1] == NOUN and kinds[head] == NOUN:
        start -= 1
    kept = list(range(start, head + 1))
    while start and kinds[start - 1] == ADJECTIVE:
        start -= 1
    if attribute and start < kept[0]:
        kept = [kept[0] - 1, *kept]
    if start and words[start - 1] in ARTICLES:
        kept = [start - 1, *kept]
    return kept


# --- negatives


@final
class Pool:
    """All words of one part of speech, as often as the captions say them."""

    def __init__(self, counts: Mapping[tuple[str, str], int]) -> None:
        """``counts`` by (lemma, word)."""
        ordered = sorted(counts)
        self._words = [word for _, word in ordered]
        self._ends = list(accumulate(counts[pair] for pair in ordered))
        self._block: dict[str, tuple[int, int]] = {}
        for (lemma, _), end, pair in zip(ordered, self._ends, ordered, strict=True):
            begun = self._block.get(lemma, (end - counts[pair], 0))[0]
            self._block[lemma] = (begun, end)

    def other(self, lemma: str, at: float) -> str | None:
        """The word at ``at`` in [0, 1) of all that are not forms of ``lemma``; None if all are."""
        begun, end = self._block.get(lemma, (0, 0))
        left = (self._ends[-1] if self._ends else 0) - (end - begun)
        if not left:
            return None
        place = int(at * left)
        return self._words[
            bisect_right(self._ends, place if place < begun else place + end - begun)
        ]


@final
class SubTexts:
    """The sub-texts of some captions under one parser."""

    def __init__(self, captions: Sequence[str], parser: Parser, source: str) -> None:
        openers = [_OPENER.match(caption) for caption in captions]
        starts = [found.end() if found else 0 for found in openers]
        found = [
            list(_WORDS.finditer(caption, start))
            for caption, start in zip(captions, starts, strict=True)
        ]
        words = [tuple(m[0].lower() for m in matches) for matches in found]
        if parser is Parser.DELETION:
            tags = [[Tag(_WORD, word) for word in row] for row in words]
        else:
            tags = tagger(parser, source)(words)
        self.parser = parser
        self.sentences = [
            Sentence(caption, caption[:start], row, tuple(m.span() for m in matches), tuple(tagged))
            for caption, start, row, matches, tagged in zip(
                captions, starts, words, found, tags, strict=True
            )
        ]
        counts: dict[str, Counter[tuple[str, str]]] = {kind: Counter() for kind in (*KINDS, _WORD)}
        for sentence in self.sentences:
            for word, tag in zip(sentence.words, sentence.tags, strict=True):
                if tag.kind is not None:
                    counts[tag.kind][tag.lemma, word] += 1
        self._counts = counts
        self._known: dict[
            tuple[NegativeKind, str], tuple[Mapping[str, Pool], list[list[list[Spot]]]]
        ] = {}

    def positives(self, rng: np.random.Generator) -> list[str]:
        if self.parser is not Parser.DELETION:
            return [positive(sentence) for sentence in self.sentences]
        return [
            s.opener + " ".join(delete(list(s.words), rng, DELETED)) if s.words else s.caption
            for s in self.sentences
        ]

    def negatives(self, kind: NegativeKind, forbidden: str, rng: np.random.Generator) -> list[str]:
        """Each caption with one word exchanged; as it came where none can be. Every row takes
        three numbers: for the part of speech, for the word and for what takes its place."""
        pools, able_N = self._choices(kind, forbidden)
        drawn = rng.random((len(able_N), 3)).tolist()
        texts = []
        for sentence, able, (which, where, what) in zip(self.sentences, able_N, drawn, strict=True):
            caption = sentence.caption
            if able:
                spots = able[int(which * len(able))]
                spot = spots[int(where * len(spots))]
                word = pools[spot.kind].other(spot.lemma, what)
                caption = f"{caption[: spot.start]}{word}{caption[spot.stop :]}"
            texts.append(caption)
        return texts

    def eligible(self, kind: NegativeKind | None, forbidden: str) -> npt.NDArray[np.bool_]:
        """Which captions say more than a noun and, if a kind is asked, have a negative of it."""
        says_N = [sentence.says_something for sentence in self.sentences]
        if kind is not None:
            able_N = self._choices(kind, forbidden)[1]
            says_N = [says and bool(able) for says, able in zip(says_N, able_N, strict=True)]
        return np.array(says_N, dtype=bool)

    def _choices(
        self, kind: NegativeKind, forbidden: str
    ) -> tuple[Mapping[str, Pool], list[list[list[Spot]]]]:
        """What may take a word's place and, for each caption, the words that can be exchanged, by
        part of speech."""
        if (kind, forbidden) not in self._known:
            banned = set(forbidden.lower().split())
            pools = {
                pos: Pool({pair: n for pair, n in counts.items() if banned.isdisjoint(pair)})
                for pos, counts in self._counts.items()
            }
            wanted = tuple(pools) if kind is NegativeKind.ANY else (kind.value,)
            able_N = []
            for sentence in self.sentences:
                spots = [s for s in sentence.spots if pools[s.kind].other(s.lemma, 0) is not None]
                by_kind = [[spot for spot in spots if spot.kind == pos] for pos in wanted]
                able_N.append([spots for spots in by_kind if spots])
            self._known[kind, forbidden] = pools, able_N
        return self._known[kind, forbidden]


@lru_cache(maxsize=4)
def _parsed(captions: tuple[str, ...], parser: Parser, source: str) -> SubTexts:
    return SubTexts(captions, parser, source)


def parse(captions: Sequence[str], parser: Parser, source: str) -> SubTexts:
    """The parse, made once for the same captions: every epoch asks again."""
    return _parsed(tuple(captions), parser, source)


def parser_digest(parser: Parser, source: str) -> str:
    """Which parser it is: part of the identity of its sub-texts."""
    tags = "words" if parser is Parser.DELETION else tagger(parser, source).digest
    return f"{tags}+{digest(_OPENER.pattern)[:16]}"


# --- as alternative captions of a view


@dataclass(frozen=True, slots=True, kw_only=True)
class PositiveText:
    name: ClassVar[str] = "positive_text"
    version: ClassVar[int] = 1

    parser: Parser
    source: str = field(metadata={"keyed": False})
    source_digest: str
    seed: int

    @property
    def per_epoch(self) -> bool:
        """Only deletion draws anything."""
        return self.parser is Parser.DELETION

    def rewrite(self, captions: Sequence[str], epoch: int) -> list[str]:
        rng = numpy_rng(self.seed, "positive", epoch)
        return parse(captions, self.parser, self.source).positives(rng)


@dataclass(frozen=True, slots=True, kw_only=True)
class NegativeText:
    """``forbidden`` words, separated by spaces, never take another's place."""

    name: ClassVar[str] = "negative_text"
    version: ClassVar[int] = 1

    parser: Parser
    source: str = field(metadata={"keyed": False})
    source_digest: str
    kind: NegativeKind
    forbidden: str
    seed: int

    @property
    def per_epoch(self) -> bool:
        return True

    def rewrite(self, captions: Sequence[str], epoch: int) -> list[str]:
        rng = numpy_rng(self.seed, "negative", epoch)
        return parse(captions, self.parser, self.source).negatives(self.kind, self.forbidden, rng)
