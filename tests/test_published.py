"""Published figures: none without its variant, and never among ours."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

import pytest

from analysis.published import lines, published, read
from analysis.render import render
from attacks import ATTACKS
from defenses import DEFENSES
from grid.schema import ResultsError, SchemaError
from tests.rows import cell_rows
from tests.test_board import board_of

HEAD = [
    "paper",
    "table",
    "model",
    "data",
    "attack",
    "defense",
    "setting",
    "metric",
    "variant",
    "relation",
    "value",
    "source",
]
ROW = dict(
    zip(
        HEAD,
        [
            "arXiv 1",
            "Table 1",
            "RN50",
            "ImageNet",
            "badnet",
            "none",
            "",
            "asr_top1",
            "all images",
            "=",
            "0.9",
            "the paper",
        ],
        strict=True,
    )
)


def table(**changes: str) -> list[str]:
    return [",".join(HEAD), ",".join({**ROW, **changes}.values())]


def test_the_table_is_whole() -> None:
    found = published()
    assert len(found) > 100
    by_cell = {(f.paper, f.attack, f.defense, f.setting, f.metric): f.value for f in found}
    assert by_cell["arXiv 2409.15968", "badclip", "abd", "", "asr_top1"] == 0.3596
    assert by_cell["arXiv 2412.20392", "badclip", "cleanclip", "", "asr_top1"] == 0.897
    ours = {*ATTACKS, *DEFENSES}
    assert {f.attack for f in found} & ours
    assert {f.defense for f in found} & ours


def test_a_sound_row_is_read() -> None:
    (figure,) = read(table(), "here")
    assert (figure.value, figure.variant, figure.relation) == (0.9, "all images", "=")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"variant": ""}, r"variant is empty; variant '' of asr_top1; allowed: all images"),
        ({"variant": "top-1"}, r"variant 'top-1' of asr_top1; allowed: all images, non-target"),
        ({"source": ""}, "source is empty"),
        ({"model": ""}, "model is empty"),
        ({"metric": "accuracy"}, "metric 'accuracy'; known beginnings: clean_top"),
        ({"relation": "~"}, "relation '~'; allowed: ="),
        ({"value": "96.5"}, r"value '96.5'; a share lies in 0 to 1 \(not percent\)"),
        ({"value": "high"}, "value 'high'; a share"),
        ({"value": "nan"}, "value 'nan'; a share"),
    ],
)
def test_a_row_without_all_it_must_say_is_refused(changes: dict[str, str], says: str) -> None:
    """T48: above all, a number without its metric variant."""
    with pytest.raises(SchemaError, match=f"^here, line 2: .*{says}"):
        read(table(**changes), "here")


def test_columns_and_repeats_are_checked() -> None:
    with pytest.raises(SchemaError, match="here: the columns must be paper, table"):
        read(["paper,value", "a,1"], "here")
    with pytest.raises(SchemaError, match="is given twice"):
        read([*table(), table(value="0.8")[1]], "here")


def test_a_bound_is_told_as_one() -> None:
    assert lines({"any of 11"}, {"cgd"}) == [
        "any of 11, cgd: ASR < 1.0 % (counted over: not stated)"
        " [classifier, 4 data sets, 11 attacks, arXiv 2507.05113, abstract]"
    ]


def test_they_stand_in_grey_below_the_board_and_are_no_rows(tmp_path: Path) -> None:
    board = board_of(tmp_path, cell_rows(), cell_rows(defense="cleanclip", asr=0.3))
    plain, with_them = (render(board, "table", 120, True, published=p) for p in (False, True))
    assert with_them.startswith(plain)
    added = with_them.removeprefix(plain).splitlines()
    assert "not comparable with the lines above" in added[1]
    assert all(line.startswith("\x1b[90m") for line in added[1:])
    assert "badnet, cleanclip: CA 55.9 %, ASR 14.0 %" in with_them
    assert "blended" not in with_them, "of attacks on the board alone"
    assert "- badnet, cleanclip: CA" in render(board, "md", published=True)
    for form in ("csv", "json"):
        with pytest.raises(ResultsError, match=f"join a table or md, not {form}: they are no rows"):
            render(board, form, published=True)


def test_the_file_has_no_quotes_to_get_wrong() -> None:
    text = resources.files("analysis").joinpath("published.csv").read_text("utf-8")
    assert "\r" not in text
    assert text.endswith("\n")
