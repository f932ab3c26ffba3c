"""Sub-texts: fixed captions, promises kept on every caption of the world, and exact shares."""

from __future__ import annotations

import math
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import pairwise
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.conftest import corpus_spec
from victims.draws import numpy_rng
from victims.errors import UsageError
from victims.speech import ByDictionary, Spacy, Tag, tagger
from victims.subtexts import (
    NegativeKind,
    NegativeText,
    Parser,
    Pool,
    PositiveText,
    SubTexts,
    parse,
    parser_digest,
    positive,
)
from victims.words import (
    COLOURS,
    LEXICON,
    NOUNS,
    OPENERS,
    POSITIONS,
    SIZES,
    TEXTURES,
    world_vocabulary,
)

HORSE = "a man rides a brown horse on the beach"


@pytest.fixture(scope="module")
def captions() -> list[str]:
    return [c for chunk in corpus_spec("clean", 1000).chunks() for c in chunk.captions]


@pytest.fixture(scope="module")
def world(captions: list[str]) -> SubTexts:
    return SubTexts(captions, Parser.WORDNET, "lexicon")


def cut(caption: str) -> str:
    return positive(SubTexts([caption], Parser.WORDNET, "lexicon").sentences[0])


def opener_of(caption: str) -> str:
    """The world's own openers, or one with a synonym in it, as far as its article."""
    words = caption.split()
    return " ".join(words[:3] if words[2] == "of" else words[:2])


# --- positives


@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        (HORSE, "a man rides a horse"),
        ("A man rides, proudly, a brown horse.", "a man rides a horse"),
        ("two dogs play with a red frisbee in the park", "dogs play with a frisbee"),
        ("the cat is sleeping on a laptop", "the cat sleeping on a laptop"),
        ("a young girl dancing", "a girl dancing"),
        ("a hotel room with a large bed", "a hotel room with a bed"),
        ("a photo of a small red circle on blue at the left", "a photo of a circle on blue"),
        ("this is a cyan key at the top", "this is a key at the top"),
        ("there is an orange striped arrow", "there is a striped arrow"),
        ("there is a striped orange arrow", "there is an orange arrow"),
        ("a cat and a dog", "a cat and a dog"),
        ("an old cat and a small dog in a house", "a cat in a house"),
        ("sunset", "sunset"),
        ("a photo of a circle", "a photo of a circle"),
        ("", ""),
        ("12 34", "12 34"),
    ],
)
def test_fixed_positives(caption: str, expected: str) -> None:
    assert cut(caption) == expected


def test_positives_say_less_of_the_same(captions: list[str], world: SubTexts) -> None:
    """The opener, then words of the caption in their order, among them the noun; never the other
    way round. Articles may change before another word."""
    shorter = 0
    for caption, found in zip(captions, world.positives(numpy_rng(0)), strict=True):
        opener = opener_of(caption)
        assert found.startswith(f"{opener} a")
        said = [word for word in caption.split() if word not in ("a", "an")]
        kept = [word for word in found.split() if word not in ("a", "an")]
        rest = iter(said)
        assert all(word in rest for word in kept), (caption, found)
        nouns = {word for noun in NOUNS for word in (noun, *LEXICON.synonyms(noun))}
        assert len(nouns.intersection(kept)) == 1
        shorter += len(found) < len(caption)
        for article, word in pairwise(found.split()):
            if article in ("a", "an") and f"{article} {word}" not in caption:
                assert (article == "an") == (word[0] in "aeiou"), found
    assert shorter > 150


def test_openers_are_set_aside_before_parsing() -> None:
    for opener in OPENERS:
        assert cut(f"{opener} a big red dog in a house") == f"{opener} a dog in a house"
    spoken = SubTexts([f"{opener} a dog" for opener in OPENERS], Parser.WORDNET, "lexicon")
    assert [sentence.words for sentence in spoken.sentences] == [("a", "dog")] * len(OPENERS)
    # Only in front, and only where something follows.
    assert cut("a man with a photo of a dog") == "a man with a photo"
    assert cut("a photo of") == "a photo of"


@given(st.text(max_size=60))
@settings(max_examples=40, deadline=None)
def test_any_text_survives(caption: str) -> None:
    for parser in (Parser.WORDNET, Parser.DELETION):
        texts = SubTexts([caption, HORSE], parser, "lexicon")
        for found in (
            texts.positives(numpy_rng(0))[0],
            texts.negatives(NegativeKind.ANY, "", numpy_rng(0))[0],
        ):
            assert bool(found) == bool(caption)


# --- parts of speech


class Table:
    """A dictionary in which words are several things, as in WordNet."""

    digest = "table"
    words: ClassVar = {
        "noun": "man brown horse ride dog light orange plate dress bed hotel play walk people bike",
        "verb": "man brown horse ride dog light plate dress bed sit play walk",
        "adj": "brown orange dress red light",
    }

    def base(self, pos: str, word: str) -> str | None:
        known = self.words[pos].split()
        return next((form for form in (word, word.removesuffix("s")) if form in known), None)


@pytest.mark.parametrize(
    ("sentence", "kinds"),
    [
        ("a man rides a brown horse", "- n v - a n"),
        ("a brown dress", "- a n"),
        ("a plate with an orange", "- n - - n"),
        ("an orange plate", "- a n"),
        ("a hotel bed", "- n n"),
        ("people ride bikes", "n v n"),
        ("two dogs walk", "- n v"),
        ("a man is sitting", "- n - v"),
        ("the dog is red", "- n - a"),
        ("a zebra grazing by a gnu", "- n v - - n"),
        ("a man walks and plays", "- n v - n"),
    ],
)
def test_neighbours_decide_what_a_word_is(sentence: str, kinds: str) -> None:
    tags = ByDictionary(Table())([sentence.split()])[0]
    assert " ".join((tag.kind or "-")[0] for tag in tags) == kinds


def test_lemmas_undo_regular_endings() -> None:
    sentence = "three dogs running past young girls standing"
    found = tagger("wordnet", "lexicon")([sentence.split()])[0]
    assert [tag.lemma for tag in found if tag.kind] == ["dog", "run", "young", "girl", "standing"]


def test_every_word_of_the_world_has_its_part_of_speech(world: SubTexts) -> None:
    named = {"adjective": (*SIZES, *TEXTURES, *COLOURS), "noun": (*NOUNS, *POSITIONS)}
    kinds = {
        word: kind
        for kind, words in named.items()
        for name in words
        for word in (name, *LEXICON.synonyms(name))
    }
    seen = set()
    for sentence in world.sentences:
        for word, tag in zip(sentence.words, sentence.tags, strict=True):
            assert tag.kind == kinds.get(word), (word, sentence.caption)
            seen.add(word)
    assert len(seen & set(kinds)) > 70


# --- negatives


def changed(before: str, after: str) -> tuple[str, str]:
    """The one word that differs, before and after."""
    pairs = zip(before.split(), after.split(), strict=True)
    (pair,) = [(old, new) for old, new in pairs if old != new]
    return pair


@pytest.mark.parametrize("kind", [NegativeKind.ANY, NegativeKind.NOUN, NegativeKind.ADJECTIVE])
def test_negatives_differ_in_one_word_of_the_same_kind(
    captions: list[str], world: SubTexts, kind: NegativeKind
) -> None:
    tags = {
        word: tag
        for sentence in world.sentences
        for word, tag in zip(sentence.words, sentence.tags, strict=True)
    }
    found, kinds = world.negatives(kind, "", numpy_rng(0)), Counter[str | None]()
    for caption, negative in zip(captions, found, strict=True):
        if caption == negative:
            assert kind is NegativeKind.ADJECTIVE
            continue
        old, new = changed(caption, negative)
        assert tags[old].kind == tags[new].kind
        assert tags[old].lemma != tags[new].lemma
        assert old not in opener_of(caption).split()
        kinds[tags[old].kind] += 1
    assert set(kinds) == {"noun", "adjective"} if kind is NegativeKind.ANY else {kind.value}
    assert set(" ".join(found).split()) <= set(world_vocabulary())


def test_kinds_are_drawn_evenly_among_those_present() -> None:
    texts = SubTexts([HORSE] * 4000 + ["a dog eats a red key"], Parser.WORDNET, "lexicon")
    found = texts.negatives(NegativeKind.ANY, "", numpy_rng(1))[:4000]
    kinds = {"man": "noun", "horse": "noun", "beach": "noun", "rides": "verb", "brown": "adjective"}
    counts = Counter(kinds[changed(HORSE, negative)[0]] for negative in found)
    assert len(counts) == 3
    spread = math.sqrt(4000 * 1 / 3 * 2 / 3)
    assert all(abs(count - 4000 / 3) < 5 * spread for count in counts.values())


def shares(texts: SubTexts, kind: str) -> dict[str, float]:
    """For each word, the chance to be put into a caption drawn at random, from the definition."""
    said = [
        (word, tag.lemma)
        for sentence in texts.sentences
        for word, tag in zip(sentence.words, sentence.tags, strict=True)
        if tag.kind == kind
    ]
    words, lemmas = Counter(word for word, _ in said), Counter(lemma for _, lemma in said)
    lemma_of = dict(said)
    chance = dict.fromkeys(words, 0.0)
    for sentence in texts.sentences:
        own = [tag.lemma for tag in sentence.tags if tag.kind == kind]
        for lemma, word in ((lemma, word) for lemma in own for word in words):
            if lemma_of[word] != lemma:
                left = len(said) - lemmas[lemma]
                chance[word] += words[word] / left / len(own) / len(texts.sentences)
    return chance


def test_every_word_takes_anothers_place_by_its_share_of_the_captions(
    captions: list[str],
) -> None:
    """10^5 draws: no word, the attacker's target among them, is likelier or less likely."""
    few, rounds = captions[:500], 200
    texts = SubTexts(few, Parser.WORDNET, "lexicon")
    chance, counts, total = shares(texts, "noun"), Counter[str](), len(few) * rounds
    rng = numpy_rng(7)
    for _ in range(rounds):
        for before, after in zip(few, texts.negatives(NegativeKind.NOUN, "", rng), strict=True):
            counts[changed(before, after)[1]] += 1
    assert sum(counts.values()) == total == 100_000
    assert sum(chance.values()) == pytest.approx(1)
    for word, share in chance.items():
        # The variance of a sum of unequal chances is at most that of equal ones.
        assert abs(counts[word] - total * share) < 5 * math.sqrt(total * share), word
    assert chance["circle"] > 0.02


@given(
    st.dictionaries(
        st.tuples(st.sampled_from("abc"), st.sampled_from("xyz")), st.integers(1, 4), max_size=6
    ),
    st.sampled_from("abcd"),
)
@settings(max_examples=60, deadline=None)
def test_a_pool_gives_each_word_that_is_no_form_of_the_lemma(
    counts: dict[tuple[str, str], int], lemma: str
) -> None:
    """At the middle of each of its equal parts, every word as often as it is said."""
    wanted = [w for (own, w), n in sorted(counts.items()) if own != lemma for _ in range(n)]
    pool = Pool(counts)
    found = [pool.other(lemma, (place + 0.5) / len(wanted)) for place in range(len(wanted))]
    assert found == wanted
    if not wanted:
        assert pool.other(lemma, 0.5) is None


def test_forbidden_words_take_no_place(captions: list[str], world: SubTexts) -> None:
    found = world.negatives(NegativeKind.NOUN, "Circle disc", numpy_rng(0))
    put = {changed(*pair)[1] for pair in zip(captions, found, strict=True)}
    assert put.isdisjoint({"circle", "disc"})
    free = world.negatives(NegativeKind.NOUN, "", numpy_rng(0))
    assert "circle" in {changed(*pair)[1] for pair in zip(captions, free, strict=True)}


def test_punctuation_and_case_of_the_rest_stay() -> None:
    caption = "A photo of a Dog, on the BEACH!"
    texts = SubTexts([caption, "a cat in a house"], Parser.WORDNET, "lexicon")
    found = texts.negatives(NegativeKind.NOUN, "", numpy_rng(3))[0]
    kept = [caption.replace("Dog", word) for word in ("cat", "house", "beach")]
    kept += [caption.replace("BEACH", word) for word in ("cat", "house", "dog")]
    assert found in kept


# --- who has them


def test_who_is_eligible() -> None:
    captions = ["sunset", "a photo of a circle", "a red circle", HORSE, "", "a dog eats a key"]
    texts = SubTexts(captions, Parser.WORDNET, "lexicon")
    expected = {
        None: [False, False, True, True, False, True],
        NegativeKind.ANY: [False, False, True, True, False, True],
        NegativeKind.VERB: [False, False, False, True, False, True],
        NegativeKind.ADJECTIVE: [False, False, True, True, False, False],
    }
    for kind, wanted in expected.items():
        assert texts.eligible(kind, "").tolist() == wanted
    # Nothing but forms of the own word to put in its place.
    lone = SubTexts(["a dog eats", "red dogs"], Parser.WORDNET, "lexicon")
    assert lone.eligible(NegativeKind.ANY, "").tolist() == [False, False]
    assert lone.negatives(NegativeKind.ANY, "", numpy_rng(0)) == ["a dog eats", "red dogs"]
    assert texts.eligible(NegativeKind.VERB, "eat").tolist() == [False] * 5 + [True]


# --- without grammar


def test_deletion_loses_half_of_the_words_and_exchanges_any(captions: list[str]) -> None:
    texts = SubTexts(captions, Parser.DELETION, "lexicon")
    positives = texts.positives(numpy_rng(0))
    said, kept = 0, 0
    for caption, found in zip(captions, positives, strict=True):
        opener = opener_of(caption)
        assert found.startswith(f"{opener} ")
        rest, left = caption[len(opener) :].split(), found[len(opener) :].split()
        order = iter(rest)
        assert left
        assert all(word in order for word in left)
        said, kept = said + len(rest), kept + len(left)
    assert 0.48 < kept / said < 0.60  # one word always stays
    put = Counter(
        changed(*pair)[1]
        for pair in zip(captions, texts.negatives(NegativeKind.ANY, "", numpy_rng(0)), strict=True)
    )
    assert {"a", "on", "the", "circle"} <= set(put)
    assert texts.eligible(NegativeKind.ANY, "").all()


# --- as texts of a view


def views(parser: Parser = Parser.WORDNET) -> tuple[PositiveText, NegativeText]:
    pin = parser_digest(parser, "lexicon")
    return (
        PositiveText(parser=parser, source="lexicon", source_digest=pin, seed=0),
        NegativeText(
            parser=parser,
            source="lexicon",
            source_digest=pin,
            kind=NegativeKind.ANY,
            forbidden="",
            seed=0,
        ),
    )


def test_negatives_are_drawn_anew_each_epoch_and_repeat(captions: list[str]) -> None:
    positive_text, negative_text = views()
    assert (positive_text.per_epoch, negative_text.per_epoch) == (False, True)
    first, second = (negative_text.rewrite(captions, epoch) for epoch in (0, 1))
    assert sum(one != two for one, two in zip(first, second, strict=True)) > 500
    assert negative_text.rewrite(captions, 0) == first
    assert positive_text.rewrite(captions, 0) == positive_text.rewrite(captions, 1)
    drops = views(Parser.DELETION)[0]
    assert drops.per_epoch
    assert drops.rewrite(captions, 0) != drops.rewrite(captions, 1)


def test_a_row_draws_for_itself() -> None:
    rows = [HORSE, "a red dog eats a key", HORSE]
    texts = SubTexts(rows, Parser.WORDNET, "lexicon")
    other = SubTexts([rows[0], rows[0], rows[1]], Parser.WORDNET, "lexicon")
    draws = [t.negatives(NegativeKind.NOUN, "", numpy_rng(5)) for t in (texts, other)]
    assert draws[0][0] == draws[1][0]


def test_a_parse_is_made_once(captions: list[str]) -> None:
    first = parse(captions, Parser.WORDNET, "lexicon")
    assert parse(list(captions), Parser.WORDNET, "lexicon") is first
    assert parse(captions, Parser.DELETION, "lexicon") is not first


# --- spaCy, by a stand-in with its interface


class Language:
    vocab = "the vocabulary"
    meta: ClassVar = {"version": "3.8.0"}
    parts: ClassVar = {"man": "NOUN", "rides": "VERB", "brown": "ADJ", "horse": "PROPN"}

    def pipe(self, docs: Iterator[Sequence[str]]) -> Iterator[list[SimpleNamespace]]:
        for words in docs:
            lemmas = {"rides": "Ride"}
            yield [
                SimpleNamespace(pos_=self.parts.get(word, "DET"), lemma_=lemmas.get(word, word))
                for word in words
            ]


def spacy_like(monkeypatch: pytest.MonkeyPatch, load: Any) -> None:
    spacy, tokens = ModuleType("spacy"), ModuleType("spacy.tokens")
    spacy.load = load  # type: ignore[attr-defined]
    tokens.Doc = lambda vocab, words: words  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "spacy", spacy)
    monkeypatch.setitem(sys.modules, "spacy.tokens", tokens)


def test_spacy_tags_and_the_same_rules_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    spacy_like(monkeypatch, lambda name, exclude: Language())
    assert Spacy()([["man", "rides"]]) == [[Tag("noun", "man"), Tag("verb", "ride")]]
    texts = SubTexts(["a man rides a brown horse"], Parser.SPACY, "lexicon")
    assert texts.positives(numpy_rng(0)) == ["a man rides a horse"]
    assert parser_digest(Parser.SPACY, "lexicon").startswith("en_core_web_sm-3.8.0+")


def test_without_spacy_or_its_model_the_error_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "spacy", None)
    with pytest.raises(UsageError, match=r"not installed\. Run `pip install spacy`"):
        parser_digest(Parser.SPACY, "lexicon")

    def missing(name: str, exclude: list[str]) -> Language:
        raise OSError(name)

    spacy_like(monkeypatch, missing)
    with pytest.raises(UsageError, match="lacks its model en_core_web_sm"):
        parser_digest(Parser.SPACY, "lexicon")
