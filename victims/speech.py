"""Parts of speech of a caption's words, from a dictionary or from spaCy.

A dictionary knows what a word can be, and its neighbours decide what it is: an adjective stands in
front of something, a noun ends its phrase, a verb follows a noun and is inflected. That is enough
for captions, which are one short phrase or sentence; it is no tagger for English. Our own lexicon
knows the words of the world and some common words of captions, WordNet knows the language; a word
that neither knows is a noun. Irregular forms (``rode``) are not looked up.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Mapping, Sequence
from typing import Any, Final, NamedTuple, Protocol, final

from victims.eda import STOP_WORDS
from victims.errors import UsageError
from victims.keys import digest
from victims.rewrite import pinned_source
from victims.wordnet import WordNet, base_forms
from victims.words import COLOURS, LEXICON, SIZES, TEXTURES

NOUN, VERB, ADJECTIVE = "noun", "verb", "adjective"
KINDS: Final = (NOUN, VERB, ADJECTIVE)
SPACY_MODEL = "en_core_web_sm"
# The version of how neighbours decide.
RULES: Final = 1

ARTICLES: Final = frozenset({"a", "an", "the"})
_BETWEEN = """
about above across after against along among around at before behind below beneath beside between by
down for from in inside into near of off on onto out outside over past through to toward towards
under up upon with
"""
_AUXILIARY = "am are be been being has have had is was were"
_CLOSED = """
one two three four five six seven eight nine ten another every many several their its there next
"""
PREPOSITIONS: Final = frozenset(_BETWEEN.split())
AUXILIARIES: Final = frozenset(_AUXILIARY.split())
CLOSED: Final = STOP_WORDS | PREPOSITIONS | AUXILIARIES | set(_CLOSED.split())

_VERBS = """
bite blow build carry catch chase climb cook cover cross cut dance decorate drink drive eat enjoy
fill fly follow graze grow hang hit hold jump kick lean look make paint park perform play pose pull
push read rest ride run sail sell serve shine show sing sit skate sleep smile stack stand stare surf
swim swing take talk throw touch travel try use wait walk wash watch wear work write
"""
_ADJECTIVES = """
beautiful bright clean cold colorful colourful dark dirty dry empty fresh happy hot long modern new
old open short snowy sunny tall vintage wet wild wooden young
"""


class Tag(NamedTuple):
    """What a word is: one of ``KINDS``, or None for words of no meaning of their own."""

    kind: str | None
    lemma: str


class Tagger(Protocol):
    """Anything that tells the parts of speech of lower-case words."""

    def __call__(self, sentences: Sequence[Sequence[str]]) -> list[list[Tag]]: ...

    @property
    def digest(self) -> str:
        """Which parts of speech it tells: part of the identity of whatever is made with it."""
        ...


def tagger(parser: str, synonyms: str) -> Tagger:
    """``spacy``, or the dictionary that the source of synonyms makes."""
    if parser == "spacy":
        return Spacy()
    source = pinned_source(synonyms)
    return ByDictionary(source) if isinstance(source, WordNet) else ByDictionary(OWN_WORDS)


# --- dictionaries


class Dictionary(Protocol):
    def base(self, pos: str, word: str) -> str | None:
        """The base form of ``word`` as a ``noun``, ``verb`` or ``adj``, or None if it is none."""
        ...

    @property
    def digest(self) -> str: ...


@final
class OwnWords:
    """The lexicon, whose groups are of adjectives or of nouns, and some words of captions."""

    def __init__(self) -> None:
        named = {*SIZES, *TEXTURES, *COLOURS, *_ADJECTIVES.split()}
        adjectives = named | {other for word in named for other in LEXICON.synonyms(word)}
        listed = {word for group in LEXICON.groups for word in group}
        self._words: Mapping[str, set[str]] = {
            "adj": adjectives,
            "verb": set(_VERBS.split()),
            "noun": listed - adjectives,
        }

    def base(self, pos: str, word: str) -> str | None:
        return next((form for form in base_forms(pos, word) if form in self._words[pos]), None)

    @property
    def digest(self) -> str:
        words = {pos: sorted(forms) for pos, forms in self._words.items()}
        return digest(words)[:16]


OWN_WORDS: Final = OwnWords()
_POS = {NOUN: "noun", VERB: "verb", ADJECTIVE: "adj"}
_DOUBLED = re.compile(r"(.+([bdgklmnprt]))\2(?:ing|ed)")


@final
class ByDictionary:
    """Tags from what the words can be and where they stand."""

    def __init__(self, words: Dictionary) -> None:
        self._words = words
        self._known: dict[str, dict[str, str]] = {}

    @property
    def digest(self) -> str:
        """Of all that decides: the words, those of no meaning, and how neighbours are read."""
        return digest([RULES, sorted(CLOSED), self._words.digest])[:16]

    def __call__(self, sentences: Sequence[Sequence[str]]) -> list[list[Tag]]:
        return [self._tags(words) for words in sentences]

    def _able(self, word: str) -> dict[str, str]:
        """The base form of a word for each part of speech that it can be."""
        if word not in self._known:
            bases = {kind: self._words.base(pos, word) for kind, pos in _POS.items()}
            doubled = _DOUBLED.fullmatch(word)
            if bases[VERB] is None and doubled:
                bases[VERB] = self._words.base("verb", doubled[1])
            self._known[word] = {kind: base for kind, base in bases.items() if base is not None}
        return self._known[word]

    def _tags(self, words: Sequence[str]) -> list[Tag]:
        tags: list[Tag] = []
        for place, word in enumerate(words):
            able = {} if word in CLOSED else self._able(word)
            adverb = not able and word.endswith("ly") and VERB in [tag.kind for tag in tags]
            if word in CLOSED or adverb:
                tags.append(Tag(None, word))
                continue
            ends = place + 1 == len(words) or words[place + 1] in CLOSED
            if self._acts(words, tags):
                kind = VERB
            elif ADJECTIVE in able and not (ends and NOUN in able):
                kind = ADJECTIVE
            else:
                kind = NOUN
            tags.append(Tag(kind, able.get(kind, word)))
        return tags

    def _acts(self, words: Sequence[str], tags: Sequence[Tag]) -> bool:
        """Is the word behind ``tags`` the verb of the caption?"""
        word, kinds = words[len(tags)], [tag.kind for tag in tags]
        if NOUN not in kinds or VERB in kinds:
            return False
        if kinds[-1] != NOUN and words[len(tags) - 1] not in AUXILIARIES:
            return False
        able = self._able(word)
        if not able:
            return word.endswith(("ing", "ed"))
        plural = tags[-1].lemma != words[len(tags) - 1] or tags[-1].lemma == "people"
        return VERB in able and (able[VERB] != word or plural)


# --- spaCy


@final
class Spacy:
    """spaCy's small English model, which is imported and loaded when it is asked for."""

    def __init__(self) -> None:
        install = (
            f"Run `pip install spacy` and `python -m spacy download {SPACY_MODEL}`, or take"
            " parser: wordnet, which needs neither."
        )
        try:
            spacy = importlib.import_module("spacy")
        except ImportError as error:
            raise UsageError(f"parser: spacy is not installed. {install}") from error
        try:
            self._nlp: Any = spacy.load(SPACY_MODEL, exclude=["ner"])
        except OSError as error:
            raise UsageError(f"parser: spacy lacks its model {SPACY_MODEL}. {install}") from error
        self._doc: Any = importlib.import_module("spacy.tokens").Doc

    @property
    def digest(self) -> str:
        return f"{SPACY_MODEL}-{self._nlp.meta['version']}"

    def __call__(self, sentences: Sequence[Sequence[str]]) -> list[list[Tag]]:
        named = {"NOUN": NOUN, "PROPN": NOUN, "VERB": VERB, "ADJ": ADJECTIVE}
        docs = (self._doc(self._nlp.vocab, words=list(words)) for words in sentences)
        return [
            [Tag(named.get(token.pos_), token.lemma_.lower()) for token in doc]
            for doc in self._nlp.pipe(docs)
        ]
