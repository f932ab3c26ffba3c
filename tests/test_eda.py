"""EDA against exact probabilities worked out by enumeration from its definition."""

from __future__ import annotations

import hashlib
import itertools
from collections import Counter, defaultdict
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare

from victims.draws import derive, numpy_rng
from victims.eda import STOP_WORDS, delete, eda, eda_all, insert, letters_only, replace, swap
from victims.words import LEXICON, synonym_source, world_vocabulary

TABLE = {"red": ("crimson", "scarlet"), "photo": ("picture",), "big": ("large", "big")}

Chances = dict[str, Fraction]


def synonyms(word: str) -> tuple[str, ...]:
    return TABLE.get(word, ())


def others(word: str) -> list[str]:
    return [other for other in synonyms(word) if other != word]


def replaced(words: list[str]) -> Chances:
    """One replacement: a uniform distinct word among those with synonyms, all occurrences."""
    able = sorted({word for word in words if others(word)})
    chances: Chances = defaultdict(Fraction)
    for word in able:
        for other in others(word):
            text = " ".join(other if found == word else found for found in words)
            chances[text] += Fraction(1, len(able) * len(others(word)))
    return chances or {" ".join(words): Fraction(1)}


def inserted(words: list[str]) -> Chances:
    """One insertion: up to ten draws of a word until one has synonyms; any place but the end."""
    length = len(words)
    able = [word for word in words if others(word)]
    missed = Fraction(length - len(able), length) ** 10
    chances: Chances = defaultdict(Fraction)
    chances[" ".join(words)] += missed
    for word, place in itertools.product(able, range(length)):
        for other in others(word):
            text = " ".join([*words[:place], other, *words[place:]])
            chances[text] += (1 - missed) / (len(able) * length * len(others(word)))
    return chances


def swapped(words: list[str]) -> Chances:
    """One swap: two uniform places; nothing happens when three draws hit the first place."""
    length = len(words)
    same = Fraction(1, length) ** 3
    chances: Chances = defaultdict(Fraction)
    chances[" ".join(words)] += same
    for i, j in itertools.permutations(range(length), 2):
        moved = list(words)
        moved[i], moved[j] = words[j], words[i]
        chances[" ".join(moved)] += (1 - same) / (length * (length - 1))
    return chances


def deleted(words: list[str]) -> Chances:
    """Every word goes with probability 1/10; one uniform word stays when all would go."""
    chances: Chances = defaultdict(Fraction)
    if len(words) == 1:
        return {words[0]: Fraction(1)}
    for keep in itertools.product((True, False), repeat=len(words)):
        chance = Fraction(9, 10) ** sum(keep) * Fraction(1, 10) ** (len(keep) - sum(keep))
        kept = [word for word, stays in zip(words, keep, strict=True) if stays]
        for text in [" ".join(kept)] if kept else words:
            chances[text] += chance if kept else chance / len(words)
    return chances


@pytest.mark.parametrize(
    "caption", ["A big red dog, red!", "Red.", "dog", "photo of dogs", "of a dog", "big big"]
)
def test_outputs_have_the_probabilities_of_the_definition(caption: str) -> None:
    words = letters_only(caption).split()
    chances: Chances = defaultdict(Fraction)
    for part in (replaced, inserted, swapped, deleted):
        for text, chance in part(words).items():
            chances[text] += chance / 4
    assert sum(chances.values()) == 1
    total = 30_000
    found = Counter(eda_all([caption] * total, synonyms, "exact"))
    assert set(found) <= {text for text, chance in chances.items() if chance}
    common = [text for text, chance in chances.items() if chance * total >= 5]
    seen = [found[text] for text in common]
    wanted = [float(chances[text] * total) for text in common]
    rest = total - sum(wanted)
    if rest > 1e-6:
        seen, wanted = [*seen, total - sum(seen)], [*wanted, rest]
    if len(seen) > 1:
        assert chisquare(seen, wanted).pvalue > 1e-4


WORDS = st.lists(st.sampled_from([*TABLE, "a", "dog", "on", "grass"]), min_size=1, max_size=45)
SEEDS = st.integers(0, 2**32)


@given(words=WORDS, seed=SEEDS)
@settings(max_examples=200, deadline=None)
def test_each_edit_keeps_its_promise(words: list[str], seed: int) -> None:
    rng = np.random.default_rng(seed)
    before = list(words)
    n = max(1, int(0.1 * len(words)))
    able = {word for word in words if others(word)}

    done = replace(words, n, synonyms, rng)
    pairs = {(old, new) for old, new in zip(words, done, strict=True) if old != new}
    assert len(pairs) == min(n, len(able))
    assert all(new in others(old) for old, new in pairs)

    done = insert(words, n, synonyms, rng)
    added = Counter(done) - Counter(words)
    assert len(done) == len(words) + added.total()
    assert added.total() <= n
    assert set(added) <= {other for word in able for other in others(word)}
    assert done[-1] == words[-1]
    rest = iter(done)
    assert all(word in rest for word in words)

    done = swap(words, n, rng)
    assert Counter(done) == Counter(words)
    assert sum(old != new for old, new in zip(words, done, strict=True)) <= 2 * n

    done = delete(words, rng)
    rest = iter(words)
    assert done
    assert all(word in rest for word in done)
    assert words == before


@given(caption=st.text(max_size=60), seed=SEEDS)
@settings(max_examples=200, deadline=None)
def test_any_text_survives(caption: str, seed: int) -> None:
    words = letters_only(caption).split()
    done = eda(caption, synonyms, np.random.default_rng(seed))
    if not words:
        assert done == caption
        return
    allowed = set(words) | {other for word in words for other in others(word)}
    assert done
    assert set(done.split()) <= allowed


def test_letters_only() -> None:
    assert letters_only("  A Dog's 2 toys -- on  GRASS! ") == "a dogs toys on grass"
    assert letters_only("123 ... \u4e2d\u6587") == ""


def test_rows_are_keyed_by_seed_and_row_alone() -> None:
    captions = ["a photo of a big red dog on the grass"] * 50
    first = eda_all(captions, synonyms, 7)
    assert first == eda_all(captions, synonyms, 7)
    assert first != eda_all(captions, synonyms, 8)
    assert len(set(first)) > 10
    changed = list(captions)
    changed[3] = "another caption, longer than the first one was, and all new"
    rest = eda_all(changed, synonyms, 7)
    assert rest[:3] + rest[4:] == first[:3] + first[4:]
    # Moving one generator from row to row equals building one for each row.
    for row in (0, 1, 49):
        bits = np.random.Philox(key=derive(7, "eda"), counter=[0, 0, 0, row])
        assert first[row] == eda(captions[row], synonyms, np.random.Generator(bits))


def test_the_order_of_synonyms_does_not_matter() -> None:
    captions = ["a big red photo"] * 100
    backwards = eda_all(captions, lambda word: [*reversed(synonyms(word))] * 2, 0)
    assert backwards == eda_all(captions, synonyms, 0)


def test_a_generator_can_be_shared() -> None:
    rng = numpy_rng(0, "shared")
    assert len({eda("a big red photo of a dog", synonyms, rng) for _ in range(50)}) > 10


# Stop words.


def wordnet_folder(folder: Path, groups: list[list[str]]) -> Path:
    """Synonym sets of nouns in the format of wndb(5WN), byte offsets and all."""
    data, index = "", list[str]()
    for group in groups:
        members = "".join(f"{word} 0 " for word in group)
        index += [f"{word} n 1 0 1 0 {len(data):08d}  \n" for word in group]
        data += f"{len(data):08d} 05 n {len(group):02x} {members}000 | what it means  \n"
    for pos in ("noun", "verb", "adj", "adv"):
        rest = "  1 The licence.  \n"
        (folder / f"data.{pos}").write_text(data if pos == "noun" else rest)
        (folder / f"index.{pos}").write_text("".join(sorted(index)) if pos == "noun" else rest)
    return folder


def test_a_dictionary_finds_no_synonym_for_a_stop_word(tmp_path: Path) -> None:
    """WordNet knows a unit of length called "a", and "in" as an inch."""
    groups = [["a", "angstrom_unit"], ["dog", "hound"], ["in", "inch"], ["photo", "photograph"]]
    source = synonym_source(f"wordnet:{wordnet_folder(tmp_path, groups)}")
    assert source.synonyms("a") == ("angstrom unit",)
    caption = "a photo of a dog in a tent"
    edited = eda_all([caption] * 400, source.synonyms, 0)
    assert "a photograph of a dog in a tent" in edited
    assert "a photo of a hound in a tent" in edited
    said = {word for text in edited for word in text.split()}
    assert said == {*caption.split(), "hound", "photograph"}


def test_stop_words_are_words_and_none_of_the_lexicon_has_a_synonym() -> None:
    assert all(letters_only(word) == word for word in STOP_WORDS)
    assert {"a", "an", "the", "of", "in", "on", "at", "is", "this", "there"} <= STOP_WORDS
    assert [word for word in STOP_WORDS if LEXICON.synonyms(word)] == []


def test_captions_under_our_lexicon_are_what_they_were_without_stop_words() -> None:
    """Digests of the edits of the version without them: sparing them is no new version."""
    rng, words = numpy_rng(0, "captions"), world_vocabulary()
    drawn = [" ".join(words[i] for i in rng.integers(0, len(words), 12)) for _ in range(2000)]
    same = ["a photo of the small red dog on a street near the old car"] * 2000
    for captions, digest in ((drawn, "dfa765c25edb0110"), (same, "32d1d8f9e7bc3d47")):
        text = "\n".join(eda_all(captions, LEXICON.synonyms, 0))
        assert hashlib.sha256(text.encode()).hexdigest()[:16] == digest
