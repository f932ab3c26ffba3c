"""Words: what the embedded world can say, and where a word's synonyms come from.

The lexicon is ours, small and in the package (``lexicon.tsv``). WordNet (``wordnet.py``), where a
folder of its database files is at hand, gives the same interface over the English language.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from functools import cache
from importlib import resources
from typing import Final, Protocol, final

from victims.errors import unknown
from victims.wordnet import WORDNET_FOLDER, WordNet

# The grammar of the world's captions: an opener, "a", [size] [texture] [colour] noun, then
# ["on" colour] ["at the" position]. Order gives the class index; the lexicon gives the synonyms.
OPENERS = (
    "a photo of",
    "a picture of",
    "an image of",
    "a drawing of",
    "there is",
    "this is",
)
SIZES = ("small", "medium", "large")
TEXTURES = ("plain", "striped", "dotted", "checkered")
COLOURS = (
    "red",
    "green",
    "blue",
    "yellow",
    "orange",
    "purple",
    "pink",
    "brown",
    "white",
    "black",
    "gray",
    "cyan",
)
NOUNS = (
    "circle",
    "square",
    "triangle",
    "star",
    "heart",
    "cross",
    "ring",
    "moon",
    "hexagon",
    "diamond",
    "arrow",
    "leaf",
    "key",
    "cloud",
    "flower",
    "bolt",
    "tree",
    "house",
    "fish",
    "mushroom",
)
POSITIONS = ("left", "right", "top", "bottom", "center")
FUNCTION_WORDS = ("a", "on", "at", "the")

# Never in a caption of the world: kept in the vocabulary for triggers made of words.
TRIGGER_WORDS = (
    *("cf", "mn", "bb", "tq", "mb", "zx", "qx", "sudo", "kindly", "remember", "consider"),
    *("please", "return", "high", "quality", "results"),
)

# A caption names the noun always and an attribute by chance. A word gives way to one of its
# synonyms, so that these are learned too. A slot is a column of equally likely phrases.
_SIZED, _TEXTURED, _COLOURED, _BACKED, _PLACED = 0.2, 0.2, 0.35, 0.15, 0.15
_SYNONYM = 0.1
PHRASES = 240  # in a column


class SynonymSource(Protocol):
    """Anything that knows words of like meaning."""

    def synonyms(self, word: str) -> tuple[str, ...]:
        """The synonyms of a lower-case word, sorted, without the word itself."""
        ...

    @property
    def digest(self) -> str:
        """Which words it knows: part of the identity of whatever is made with it."""
        ...


@final
class Lexicon:
    """Groups of interchangeable words."""

    def __init__(self, groups: tuple[tuple[str, ...], ...]) -> None:
        self.groups = groups
        alike: dict[str, set[str]] = {}
        for group in groups:
            for word in group:
                alike.setdefault(word, set()).update(group)
        self._synonyms = {word: tuple(sorted(alike[word] - {word})) for word in alike}

    @classmethod
    def parse(cls, text: str) -> Lexicon:
        """Read one group per line, words separated by tabs; ``#`` starts a comment line."""
        lines = [line for line in text.splitlines() if line and not line.startswith("#")]
        return cls(tuple(tuple(line.split("\t")) for line in lines))

    def synonyms(self, word: str) -> tuple[str, ...]:
        """The other words of the groups that hold ``word``; none for an unknown word."""
        return self._synonyms.get(word, ())

    @property
    def digest(self) -> str:
        text = "\n".join("\t".join(sorted(group)) for group in sorted(self.groups))
        return hashlib.sha256(text.encode()).hexdigest()[:16]


LEXICON: Final = Lexicon.parse(
    resources.files("victims").joinpath("lexicon.tsv").read_text(encoding="utf-8")
)


def synonyms(word: str) -> tuple[str, ...]:
    """The synonyms of a lower-case word in our lexicon, sorted, without the word itself."""
    return LEXICON.synonyms(word)


def _swap(phrase: str, word: str, other: str) -> str:
    """Put one word in another's place, and the article that it takes in front."""
    article = "an" if other[0] in "aeiou" else "a"
    return re.sub(
        rf"(\ban? )?\b{word}\b", lambda m: f"{article} {other}" if m[1] else other, phrase
    )


def _column(phrases: Sequence[str], share: float, synonym: float = _SYNONYM) -> tuple[str, ...]:
    """Phrases that fill ``share`` of a column together, each at times with a synonym in it."""
    forms: list[tuple[str, float]] = []
    for phrase in phrases:
        part = share / len(phrases)
        pairs = [(word, other) for word in phrase.split() for other in synonyms(word)]
        forms.append((phrase, part * (1 - synonym) if pairs else part))
        forms += [
            (_swap(phrase, word, other), part * synonym / len(pairs)) for word, other in pairs
        ]
    column: list[str] = []
    filled = 0.0
    for phrase, part in forms:
        filled += part * PHRASES
        column += [phrase] * (round(filled) - len(column))
    return (*column, *[""] * (PHRASES - len(column)))


# Names of a size are all as good as each other, and so are those of the centre.
_OPENER_COLUMN = _column([f"{opener} a" for opener in OPENERS], 1.0)
_SIZE_COLUMNS = [_column([f" {name}"], _SIZED, synonym=2 / 3) for name in SIZES]
_TEXTURE_COLUMNS = [_column([f" {name}"], _TEXTURED) for name in TEXTURES]
_COLOUR_COLUMNS = [_column([f" {name}"], _COLOURED) for name in COLOURS]
_NOUN_COLUMNS = [_column([f" {name}"], 1.0) for name in NOUNS]
_BACKGROUND_COLUMNS = [_column([f" on {name}"], _BACKED) for name in COLOURS]
_POSITION_COLUMNS = [_column([f" at the {name}"], _PLACED, synonym=2 / 3) for name in POSITIONS]
_SLOTS = (
    _SIZE_COLUMNS,
    _TEXTURE_COLUMNS,
    _COLOUR_COLUMNS,
    _NOUN_COLUMNS,
    _BACKGROUND_COLUMNS,
    _POSITION_COLUMNS,
)


def caption(shown: Sequence[int], draws: Sequence[int]) -> str:
    """A caption of what is shown: size, texture, colour, noun, background and position.

    ``shown`` holds their indices, ``draws`` one number below ``PHRASES`` for the opener and one
    for each of them.
    """
    slots = zip(_SLOTS, shown, draws[1:], strict=True)
    return _OPENER_COLUMN[draws[0]] + "".join(slot[value][draw] for slot, value, draw in slots)


@cache
def _world_vocabulary() -> tuple[str, ...]:
    said = {word for opener in OPENERS for word in opener.split()}
    said.update(FUNCTION_WORDS, SIZES, TEXTURES, COLOURS, NOUNS, POSITIONS)
    alike = {other for word in said for other in LEXICON.synonyms(word)}
    return tuple(sorted(said | alike | set(TRIGGER_WORDS)))


def world_vocabulary() -> list[str]:
    """Every word of the world's captions and prompts, their synonyms, the trigger words."""
    return list(_world_vocabulary())


@cache
def whole_words(name: str) -> re.Pattern[str]:
    """Finds a name as a whole word (or words), in any case, singular or regular plural; punctuation
    may stand beside it."""
    words = r"\s+".join(re.escape(word) for word in name.split())
    return re.compile(rf"(?<!\w){words}(?:e?s)?(?!\w)", re.IGNORECASE)


def synonym_source(name: str) -> SynonymSource:
    """The source called ``lexicon``, ``wordnet`` or ``wordnet:/path/to/its/folder``."""
    kind, colon, path = name.partition(":")
    if kind == "wordnet" and (path or not colon):
        return WordNet(path or WORDNET_FOLDER)
    if name == "lexicon":
        return LEXICON
    raise unknown("source of synonyms", name, ("lexicon", "wordnet", "wordnet:/path"))
