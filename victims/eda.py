"""Easy data augmentation of captions: one light edit per caption.

Idea: a caption stays true when a few of its words are replaced, added, swapped or dropped.
Reference: Wei, Zou, "EDA: Easy Data Augmentation Techniques for Boosting Performance on Text
    Classification Tasks", EMNLP 2019, arXiv 1901.11196; used for captions by CleanCLIP
    (arXiv 2303.03323) and its followers.
Symbols: alpha = ``ALPHA`` (share of words edited), n = max(1, int(alpha * words)).
Where: the four edits are ``replace``, ``insert``, ``swap``, ``delete``; ``eda`` picks one of them,
    each with probability 1/4.
Differences from released code: draws do not depend on the order of string sets (distinct words and
    synonyms are sorted); every row has a random stream of its own, so editing one caption of a
    corpus leaves the draws of all others alone; a caption without any letter is returned as it
    came instead of crashing; stop words are our own short list, and give no synonym to insert
    either, as the paper has it (the released code spares them in replacement alone); the word to
    insert is drawn among the synonyms, where the released code takes whichever its set lists first.
Cost: about 10 microseconds a caption.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

import numpy as np

from victims.draws import derive

Synonyms = Callable[[str], Sequence[str]]

# Words of no meaning of their own; a dictionary knows "a" as a unit of length and a vitamin.
_SPARED = """
a about above after again all am an and any are as at be because been before behind being below
between both but by can did do does down during each few for from had has have he her here him his
how i if in into is it its just me more most my near no nor not of off on once only or other our out
over own s same she so some such t than that the their them then there these they this those through
to too under until up upon very was we were what when where which while who whom why will with you
your
"""
STOP_WORDS = frozenset(_SPARED.split())
ALPHA = 0.1
INSERT_TRIES = 10
SWAP_TRIES = 3

_APOSTROPHES = re.compile("['\u2019]")
_OTHERS = re.compile("[^a-z]+")


def letters_only(caption: str) -> str:
    """The caption in lower case with nothing but the letters a to z and single spaces."""
    return _OTHERS.sub(" ", _APOSTROPHES.sub("", caption.lower())).strip()


def _below(rng: np.random.Generator, high: int) -> int:
    # A third of the cost of rng.integers; the bias is below 2^-40 for any caption.
    return int(rng.random() * high)


def _choices(word: str, synonyms: Synonyms) -> list[str]:
    return [] if word in STOP_WORDS else sorted(set(synonyms(word)) - {word})


def replace(words: list[str], n: int, synonyms: Synonyms, rng: np.random.Generator) -> list[str]:
    """Replace every occurrence of ``n`` distinct words that have synonyms."""
    left = sorted(set(words))
    while left and n:
        word = left.pop(_below(rng, len(left)))
        if choices := _choices(word, synonyms):
            chosen = choices[_below(rng, len(choices))]
            words = [chosen if other == word else other for other in words]
            n -= 1
    return words


def insert(words: list[str], n: int, synonyms: Synonyms, rng: np.random.Generator) -> list[str]:
    """``n`` times: put a synonym of a drawn word in front of a drawn word."""
    words = list(words)
    for _ in range(n):
        for _ in range(INSERT_TRIES):
            if choices := _choices(words[_below(rng, len(words))], synonyms):
                chosen = choices[_below(rng, len(choices))]
                words.insert(_below(rng, len(words)), chosen)
                break
    return words


def swap(words: list[str], n: int, rng: np.random.Generator) -> list[str]:
    """``n`` times: exchange two drawn words; unchanged when all tries draw the same place."""
    words = list(words)
    for _ in range(n):
        first = _below(rng, len(words))
        for _ in range(SWAP_TRIES):
            second = _below(rng, len(words))
            if second != first:
                words[first], words[second] = words[second], words[first]
                break
    return words


def delete(words: list[str], rng: np.random.Generator, p: float = ALPHA) -> list[str]:
    """Drop each word with probability ``p``; when all are dropped one drawn word stays."""
    if len(words) == 1:
        return words
    kept = [word for word, drawn in zip(words, rng.random(len(words)), strict=True) if drawn >= p]
    return kept or [words[_below(rng, len(words))]]


def eda(caption: str, synonyms: Synonyms, rng: np.random.Generator) -> str:
    """The caption after one edit drawn from the four; never empty unless it came empty."""
    words = letters_only(caption).split()
    if not words:
        return caption
    n = max(1, int(ALPHA * len(words)))
    kind = _below(rng, 4)
    if kind == 0:
        words = replace(words, n, synonyms, rng)
    elif kind == 1:
        words = insert(words, n, synonyms, rng)
    elif kind == 2:
        words = swap(words, n, rng)
    else:
        words = delete(words, rng)
    return " ".join(words)


def eda_all(captions: Sequence[str], synonyms: Synonyms, seed: int | str) -> list[str]:
    """``eda`` of every caption; row i's draws are keyed by (seed, i) and by nothing else."""
    bits = np.random.Philox(key=derive(seed, "eda"))
    rng = np.random.Generator(bits)
    # Building a generator takes longer than the edit itself, so one counter-based generator is
    # moved to the start of stream i instead. The state also holds the (empty) buffer.
    state = bits.state
    edited = []
    for row, caption in enumerate(captions):
        state["state"]["counter"][3] = row
        bits.state = state
        edited.append(eda(caption, synonyms, rng))
    return edited
