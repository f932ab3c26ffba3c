"""Prompts by name: OpenAI's list to the letter, and lists of one's own."""

from __future__ import annotations

import hashlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

from victims.errors import GridError, UsageError
from victims.label_readers import DATASETS
from victims.prompts import TEMPLATE_LISTS, default_templates, prompt_templates
from victims.retrieval_sets import RETRIEVAL_SETS

LINEAGE = "594f98a56e7af82b48805f2801515b385496071266ec194bc78fb0fdf2ee3377"


def test_the_80_templates_are_those_of_the_lineage_in_its_order() -> None:
    found = prompt_templates("imagenet80")
    said = "\n".join(template.format("X") for template in found)
    assert hashlib.sha256(said.encode()).hexdigest() == LINEAGE
    assert len(set(found)) == len(found) == 80


def test_other_templates_than_openai_s_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """A library that swaps two of them, or a word, would change every number."""
    from open_clip import zero_shot_metadata

    own = zero_shot_metadata.OPENAI_IMAGENET_TEMPLATES
    for changed in ((own[1], own[0], *own[2:]), (lambda c: f"an image of {c}.", *own[1:])):
        monkeypatch.setattr(zero_shot_metadata, "OPENAI_IMAGENET_TEMPLATES", changed)
        with pytest.raises(GridError, match="not OpenAI's 80 in their order"):
            prompt_templates("imagenet80")


@pytest.mark.parametrize("name", TEMPLATE_LISTS)
def test_every_list_is_a_list_that_one_could_write(name: str) -> None:
    found = prompt_templates(name)
    assert prompt_templates(list(found)) == found


def test_every_set_has_prompts() -> None:
    assert {default_templates(dataset) for dataset in DATASETS} <= set(TEMPLATE_LISTS)
    assert default_templates("imagenet") == "imagenet80"
    assert default_templates("image_folder") == "photo"
    assert prompt_templates("photo") == ("a photo of a {}.",)
    assert prompt_templates("label") == ("{}",)
    assert prompt_templates("review") == ("a {} review of a movie.",)
    assert prompt_templates("car") == (
        *("a photo of a {}.", "a photo of the {}.", "a photo of my {}.", "i love my {}!"),
        *("a photo of my dirty {}.", "a photo of my clean {}.", "a photo of my new {}."),
        "a photo of my old {}.",
    )
    cifar = prompt_templates("cifar")
    assert len(cifar) == 18
    assert {"a photo of a {}.", "a low contrast photo of the {}.", "a photo of the big {}."} <= {
        *cifar
    }


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("imagenet_80", r"no list of templates called 'imagenet_80'\. Did you mean 'imagenet80'"),
        ([], "the list is empty"),
        (["a photo"], r"'a photo' must have \{\} once"),
        (["{} and {}"], "once"),
        (["{0.__class__} {}"], "once"),
        (["a {}", "a {}"], "one is there twice"),
    ],
)
def test_what_cannot_be_meant_is_refused(given: str | list[str], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        prompt_templates(given)


def test_every_set_and_every_list_is_in_the_documents() -> None:
    text = (Path(__file__).parents[1] / "docs" / "real-data.md").read_text()
    told = set(re.findall(r"`(\w+)`", text))
    assert {*DATASETS, *RETRIEVAL_SETS, *TEMPLATE_LISTS} <= told
    rows = [line.split("|") for line in text.splitlines() if line.startswith("| `")]
    for dataset in DATASETS:
        (row,) = (row for row in rows if f"`{dataset}`" in row[1])
        assert f"`{default_templates(dataset)}`" in row[4], dataset


def test_importing_them_imports_nothing_heavy() -> None:
    code = "import sys, victims.prompts; print({'torch', 'open_clip'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
