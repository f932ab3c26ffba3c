"""What a CLIP is judged on: labelled pictures asked about with prompts, in disjoint splits.

Unlike `victims.labelled_files`, which cuts a set for training, these splits take what measuring
needs: all test pictures, and a few training pictures of each class. Only their files are read.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import ClassVar, Final, Literal

import numpy as np
import numpy.typing as npt

from victims.corpora import Rows
from victims.draws import numpy_rng
from victims.errors import UsageError, unknown
from victims.fingerprints import digest_files
from victims.label_readers import DATASETS
from victims.labelled_files import LabelledChunk, absolute, find_set, with_names
from victims.picture_files import Found, Part, fit_rows
from victims.prompts import default_templates, prompt_templates

PER_CLASS: Final = 5  # pictures of each class for tuning
PROBED: Final = 50  # and for a linear probe
_CHUNK_ROWS: Final = 256

PartName = Literal["train", "test"]
Numbers = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationSet:
    """Pictures of a set, shuffled by ``seed``: of each class those from place ``skip`` on, at most
    ``per_class`` (0: all), and of these ``num_rows``.

    ``part`` is where they come from; ``fingerprint`` the digest of the files of these very
    pictures, which must still be the same when they are read. `evaluation_splits` makes them.
    """

    name: ClassVar[str] = "evaluation_set"
    version: ClassVar[int] = 1

    dataset: str
    root: str = field(metadata={"keyed": False})
    fingerprint: str
    size: int
    split: str
    part: PartName
    num_rows: int
    skip: int = 0
    per_class: int = 0
    seed: int = 0
    templates: tuple[str, ...]

    def __post_init__(self) -> None:
        if self.dataset not in DATASETS:
            raise unknown("evaluation set", self.dataset, DATASETS)
        prompt_templates(self.templates)

    @property
    def classes(self) -> Sequence[str]:
        return _classes(self.dataset, self.root, self.fingerprint)

    @property
    def caution(self) -> str | None:
        """What a reader of the board must know of these pictures."""
        if self.part == "train" or self.split == "report":
            return None
        return (
            f"{self.dataset}: its {self.split} pictures were cut from the test pictures, and the"
            " report leaves them out: its numbers are not those of the whole test set"
        )

    def chunks(self) -> Iterator[LabelledChunk]:
        found = find_set(self.dataset, self.root)
        part = part_of(found, self.part)
        rows = _rows(part.labels, self.part, self.skip, self.per_class, self.seed)[: self.num_rows]
        if _digest(found, part, rows) != self.fingerprint:
            raise UsageError(
                f"{self.dataset}: the files in {self.root} are not those that were planned with "
                f"(fingerprint {self.fingerprint[:16]}): plan again, or put those files back."
            )
        for start in range(0, len(rows), _CHUNK_ROWS):
            some = rows[start : start + _CHUNK_ROWS]
            labels = part.labels[some]
            captions = [found.classes[label] for label in labels.tolist()]
            yield LabelledChunk(fit_rows(part, some, self.size), labels, captions)


def evaluation_splits(
    dataset: str,
    root: str,
    size: int,
    *,
    templates: str | Sequence[str] | None = None,
    tuning: int = PER_CLASS,
    probe: int = 0,
    report: int | None = None,
    tuning_from: PartName = "train",
    seed: int = 0,
) -> dict[str, EvaluationSet]:
    """The report split of a set, and ``tuning`` and ``clean`` with so many pictures per class.

    ``clean`` is what a linear probe is trained on (``probe`` at most; 0: none). Both come from the
    training pictures; where there are none, ``tuning_from="test"`` cuts them from the test
    pictures, and the report has the others.
    """
    if tuning < 0 or probe < 0 or (report is not None and report < 1):
        raise UsageError(f"{dataset}: none may be negative, and report needs rows")
    found = find_set(dataset, root)
    own = default_templates(dataset) if templates is None else templates
    asked = {"tuning": (tuning_from, 0, tuning), "clean": (tuning_from, tuning, probe)}
    asked = {split: about for split, about in asked.items() if about[2]}
    held = tuning + probe if tuning_from == "test" else 0
    splits, parts = dict[str, EvaluationSet](), dict[PartName, Part]()
    for split, (name, skip, per_class) in {**asked, "report": ("test", held, 0)}.items():
        part = parts[name] if name in parts else part_of(found, name)
        parts[name] = part
        rows = _rows(part.labels, name, skip, per_class, seed)
        if split == "report" and report is not None:
            if report > len(rows):
                raise UsageError(f"{dataset}: report {report} rows of {len(rows)} test pictures")
            rows = rows[:report]
        least = {"tuning": tuning, "clean": 1}.get(split, 0)
        _require_rows(dataset, split, part.labels, rows, least, len(found.classes))
        splits[split] = EvaluationSet(
            dataset=dataset,
            root=str(absolute(root)),
            fingerprint=_digest(found, part, rows),
            size=size,
            split=split,
            part=name,
            num_rows=len(rows),
            skip=skip,
            per_class=per_class,
            seed=seed,
            templates=prompt_templates(own),
        )
    return splits


def part_of(found: Found, part: PartName) -> Part:
    return found.test() if part == "test" else found.train()


def _rows(labels: Rows, part: str, skip: int, per_class: int, seed: int) -> Numbers:
    """Rows in a drawn order, those at the wanted places among the rows of their class."""
    order = numpy_rng(seed, EvaluationSet.name, part).permutation(len(labels)).astype(np.int64)
    if not skip and not per_class:
        return order
    by_class = order[np.argsort(labels[order], kind="stable")]
    counts = np.bincount(labels)
    first = np.repeat(np.cumsum(counts) - counts, counts)
    place = np.empty(len(labels), dtype=np.int64)
    place[by_class] = np.arange(len(labels)) - first
    wanted = (place >= skip) & (place < skip + per_class if per_class else True)
    return order[wanted[order]]


def _require_rows(
    dataset: str, split: str, labels: Rows, rows: Numbers, least: int, num_classes: int
) -> None:
    have = np.bincount(labels[rows], minlength=num_classes)
    if (short := np.flatnonzero(have < least)).size:
        raise UsageError(
            f"{dataset}: {split} needs {least} pictures of each class, and class {int(short[0])}"
            f" has {int(have[short[0]])} left ({short.size} such). Ask for fewer."
        )
    if not len(rows):
        raise UsageError(f"{dataset}: nothing is left for {split}. Hold out fewer pictures.")


def _digest(found: Found, part: Part, rows: Numbers) -> str:
    """Of the files behind these rows, or of the whole set where pictures have no files."""
    files = dict(part.files[row] for row in rows.tolist()) if part.files else found.files
    return with_names(digest_files(files), found)


@lru_cache
def _classes(dataset: str, root: str, fingerprint: str) -> tuple[str, ...]:
    """Asked for often; another fingerprint asks again."""
    return find_set(dataset, root).classes
