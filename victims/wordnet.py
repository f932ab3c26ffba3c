"""WordNet's synonyms, from its database files in Princeton's plain-text format.

Pure Python and lazy: nothing is read before a word is asked for, and then a few pages.
"""

from __future__ import annotations

import hashlib
import mmap
import string
from collections.abc import Iterator
from pathlib import Path
from typing import Final, final

from victims.errors import GridError

WORDNET_FOLDER: Final = Path("/usr/share/wordnet")
_LETTERS = frozenset(string.ascii_lowercase)

# Endings that a plural, a past or a comparison adds, and what stands there in the base form.
_ENDINGS: dict[str, tuple[tuple[str, str], ...]] = {
    "noun": (
        *(("s", ""), ("ses", "s"), ("ves", "f"), ("xes", "x"), ("zes", "z")),
        *(("ches", "ch"), ("shes", "sh"), ("men", "man"), ("ies", "y")),
    ),
    "verb": (
        *(("s", ""), ("ies", "y"), ("es", "e"), ("es", "")),
        *(("ed", "e"), ("ed", ""), ("ing", "e"), ("ing", "")),
    ),
    "adj": (("er", ""), ("est", ""), ("er", "e"), ("est", "e")),
    "adv": (),
}


@final
class WordNet:
    """Synonyms from a folder of WordNet database files in Princeton's plain-text format.

    ``index.POS`` has one line per word in byte order, found by bisection; it ends in the byte
    offsets of the word's synonym sets in ``data.POS``, one line each. Files are mapped when first
    asked, so a lookup reads a few pages. Regular inflections are looked up under their base form
    too; the exception lists (``geese``) are not read.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        wanted = [f"{kind}.{pos}" for pos in _ENDINGS for kind in ("index", "data")]
        missing = [name for name in wanted if not (self.path / name).is_file()]
        if missing:
            raise GridError(
                f"synonyms from WordNet: {self.path} lacks {', '.join(missing)}. It must be a "
                "folder of WordNet's database files. Install the package wordnet-base, name "
                "another folder as 'wordnet:/path', or use 'lexicon', which needs no files."
            )
        self._maps: dict[str, mmap.mmap] = {}
        self._known: dict[str, tuple[str, ...]] = {}

    @property
    def digest(self) -> str:
        """Digest of all its files."""
        hashed = hashlib.sha256()
        for name in sorted(f"{kind}.{pos}" for pos in _ENDINGS for kind in ("index", "data")):
            hashed.update((self.path / name).read_bytes())
        return hashed.hexdigest()[:16]

    def synonyms(self, word: str) -> tuple[str, ...]:
        """All words that share a synonym set with ``word`` in any part of speech, sorted.

        Compounds are given with spaces; words with anything but letters in them are left out.
        """
        if word not in self._known:
            found = {other for pos in _ENDINGS for other in self._alike(pos, word)}
            self._known[word] = tuple(sorted(found - {word}))
        return self._known[word]

    def base(self, pos: str, word: str) -> str | None:
        """The first base form of ``word`` that is listed as ``noun``, ``verb``, ``adj`` or ``adv``,
        or None."""
        return next((form for form in base_forms(pos, word) if self._offsets(pos, form)), None)

    def _alike(self, pos: str, word: str) -> Iterator[str]:
        for form in base_forms(pos, word.replace(" ", "_")):
            for offset in self._offsets(pos, form):
                for member in self._members(pos, offset):
                    spaced = member.replace("_", " ").replace("-", " ").lower()
                    if _LETTERS.issuperset(spaced.replace(" ", "")):
                        yield spaced

    def _offsets(self, pos: str, word: str) -> list[int]:
        """Byte offsets in ``data.POS`` of the synonym sets that hold ``word``.

        The line: lemma pos synset_cnt p_cnt ptr_symbol*p_cnt sense_cnt tagsense_cnt offset...
        """
        index, lemma = self._map(f"index.{pos}"), word.encode()
        low, high = 0, len(index)
        while low < high:
            start = index.rfind(b"\n", 0, (low + high) // 2) + 1
            stop = index.find(b"\n", start)
            stop = len(index) if stop < 0 else stop
            fields = index[start:stop].split(b" ")
            # The licence at the top is indented, so its lemma is empty and comes first.
            if fields[0] == lemma and lemma:
                return [int(field) for field in fields[6 + int(fields[3]) :] if field]
            if fields[0] < lemma:
                low = stop + 1
            else:
                high = start
        return []

    def _members(self, pos: str, offset: int) -> list[str]:
        """The words of one synonym set.

        The line: offset lex_filenum ss_type w_cnt (word lex_id)*w_cnt p_cnt ..., where w_cnt is
        hexadecimal and an adjective may carry a marker of its place, as in ``galore(ip)``.
        """
        data = self._map(f"data.{pos}")
        stop = data.find(b"\n", offset)
        fields = data[offset : len(data) if stop < 0 else stop].decode("latin-1").split(" ")
        if fields[0] != f"{offset:08d}":
            raise GridError(
                f"{self.path / f'data.{pos}'}: byte {offset} starts with {fields[0]!r}, not with "
                f"the synonym set {offset:08d} that index.{pos} names. The two files are not of "
                "one WordNet version, or their line ends were changed; unpack them again."
            )
        return [member.partition("(")[0] for member in fields[4 : 4 + 2 * int(fields[3], 16) : 2]]

    def _map(self, name: str) -> mmap.mmap:
        if name not in self._maps:
            with (self.path / name).open("rb") as file:
                self._maps[name] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        return self._maps[name]


def base_forms(pos: str, word: str) -> list[str]:
    """The word, then what its regular endings leave."""
    forms = [word]
    for ending, base in _ENDINGS[pos]:
        if word.endswith(ending) and len(word) > len(ending) + 1:
            forms.append(word.removesuffix(ending) + base)
    return forms
