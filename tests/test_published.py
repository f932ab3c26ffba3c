"""Published figures: none without its variant, and never among ours."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

import pytest

from analysis.published import lines, published, read
from analysis.render import render
from attacks import ATTACKS
from defenses import DEFENSES
from grid.schema.errors import ResultsError, SchemaError
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
    "geometry",
    "relation",
    "value",
    "source",
]
FOREIGN_ATTACKS = {"any of 11", "backdoor", "natural backdoor"}
FOREIGN_DEFENSES = {"linear probe"}
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
            "crop",
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
    # A misspelt name would never stand beside ours.
    assert {f.attack for f in found} - {*ATTACKS} == FOREIGN_ATTACKS
    assert {f.defense for f in found} - {*DEFENSES} == FOREIGN_DEFENSES


def test_geometry_is_told_only_of_code_that_is_known_to_squash() -> None:
    """The CleanCLIP lineage squashes what it stamps and crops what it does not."""
    told = {(f.table, f.metric, f.geometry) for f in published() if f.geometry != "not stated"}
    where = "utils/asr_hyper.py"
    assert told == {(where, "asr_top1", "squash"), (where, "clean_top1", "crop")}


def test_local_outliers_as_their_authors_tell_them() -> None:
    found = [f for f in published() if f.paper == "arXiv 2502.01385"]
    assert [(f.defense, f.metric, f.value) for f in found] == [
        ("none", "asr_top1", 0.988),
        ("none", "clean_top1", 0.17),
        ("local_outlier", "auroc", 1.0),
    ]
    assert lines({"backdoor"}, {"local_outlier"}) == [
        "backdoor, local_outlier (DAO, images only, batches of 128, k 16, 4 triggered among 49,950"
        " images): AUROC 1.000 (counted over: test images; geometry: not stated) [not stated,"
        " ImageNet, arXiv 2502.01385, notebook]"
    ]


def test_a_sound_row_is_read() -> None:
    (figure,) = read(table(), "here")
    assert (figure.value, figure.variant, figure.relation) == (0.9, "all images", "=")
    assert figure.geometry == "crop"
    (area,) = read(table(metric="auroc", variant="training rows"), "here")
    assert (area.metric, area.variant) == ("auroc", "training rows")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"variant": ""}, r"variant is empty; variant '' of asr_top1; allowed: all images"),
        ({"variant": "top-1"}, r"variant 'top-1' of asr_top1; allowed: all images, non-target"),
        ({"geometry": ""}, r"geometry is empty; geometry ''; allowed: crop, squash, not stated"),
        ({"geometry": "stretch"}, "geometry 'stretch'; allowed: crop, squash, not stated"),
        ({"metric": "auroc"}, "variant 'all images' of auroc; allowed: training rows, test images"),
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
    without = [",".join(HEAD).replace(",geometry", ""), table()[1].replace(",crop", "")]
    with pytest.raises(SchemaError, match=r"the columns must be .*, variant, geometry, relation"):
        read(without, "here")
    with pytest.raises(SchemaError, match="is given twice"):
        read([*table(), table(value="0.8")[1]], "here")


def test_a_bound_is_told_as_one() -> None:
    assert lines({"any of 11"}, {"cgd"}) == [
        "any of 11, cgd: ASR < 1.0 % (counted over: not stated; geometry: not stated)"
        " [classifier, 4 data sets, 11 attacks, arXiv 2507.05113, abstract]"
    ]


def test_they_stand_in_grey_below_the_board_and_are_no_rows(tmp_path: Path) -> None:
    board = board_of(tmp_path, cell_rows(), cell_rows(defense="cleanclip", asr=0.3))
    plain, with_them = (render(board, "table", 120, True, published=p) for p in (False, True))
    assert with_them.startswith(plain)
    added = with_them.removeprefix(plain).splitlines()
    assert "not comparable with the lines above" in added[1]
    assert all(line.startswith("\x1b[90m") for line in added[1:])
    assert "badnet, cleanclip: CA 55.9 % (geometry: not stated), ASR 14.0 % (counted" in with_them
    assert "blended" not in with_them, "of attacks on the board alone"
    assert "- badnet, cleanclip: CA" in render(board, "md", published=True)
    for form in ("csv", "json"):
        with pytest.raises(ResultsError, match=f"join a table or md, not {form}: they are no rows"):
            render(board, form, published=True)


def test_the_file_has_no_quotes_to_get_wrong() -> None:
    text = resources.files("analysis").joinpath("published.csv").read_text("utf-8")
    assert "\r" not in text
    assert text.endswith("\n")
