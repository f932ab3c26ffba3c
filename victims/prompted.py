"""Labelled sets on disk that a CLIP is judged on: the same pictures, with prompts of one's own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

from victims.errors import UsageError
from victims.labelled_files import LabelledChunk, LabelledFiles


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptedFiles:
    """A split of a labelled set; ``templates`` make a prompt of the name of a class."""

    name: ClassVar[str] = "prompted_files"
    version: ClassVar[int] = 1

    of: LabelledFiles
    templates: tuple[str, ...]

    def __post_init__(self) -> None:
        check_templates(self.templates)

    @property
    def split(self) -> str:
        return self.of.split

    @property
    def num_rows(self) -> int:
        return self.of.num_rows

    @property
    def classes(self) -> Sequence[str]:
        return self.of.classes

    def chunks(self) -> Iterator[LabelledChunk]:
        return self.of.chunks()


def check_templates(templates: Sequence[str]) -> None:
    """Every template has one place for the name of a class, ``{}``, and no other braces."""
    if not templates:
        raise UsageError("templates: give at least one, such as 'a photo of a {}.'")
    for template in templates:
        rest = template.replace("{}", "", 1)
        if rest == template or "{" in rest or "}" in rest:
            raise UsageError(
                f"templates: {template!r} must hold {{}} once, for the name of the class, and no"
                " other braces"
            )
