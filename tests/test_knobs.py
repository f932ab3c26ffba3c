"""Several settings of one defense, in a grid file and on the board; the spread of ASR."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from analysis.inference import variance_components
from analysis.knobs import Setting, least
from analysis.leaderboard import Asked, load, text
from analysis.spread import spread
from analysis.standing import Standing
from grid.schema.writing import write_grid, write_rows
from tests.boards import steady, write_board
from tests.grids import run_serial, tiny_grid
from tests.rows import cell_columns, cell_rows
from victims.errors import UsageError

ATTACKS = ("badnet", "blended")


def knob(value: str) -> str:
    return json.dumps({"of": "anp", "name": "threshold", "value": value})


def write_knob(folder: Path) -> Path:
    """Three settings of one defense: the more accuracy they cost, the safer."""
    numbers = {
        "none": (0.9, 0.60),
        "anp@threshold=1": (0.5, 0.595),
        "anp@threshold=2": (0.2, 0.585),
    }
    numbers |= {"anp@threshold=3": (0.1, 0.50)}
    rows, cells = [], []
    for attack in ATTACKS:
        for seed in range(3):
            for defense, (asr, clean) in numbers.items():
                where = cell_columns(attack, "0.01", defense, seed)
                cells.append(where)
                made = cell_rows(attack, "0.01", defense, seed, clean=clean, asr=asr, n=1000)
                about = {"knob": knob(defense[-1])} if defense != "none" else {}
                rows += [{**row, **about} for row in made]
    write_rows(folder, rows)
    write_grid(folder, "knobs", "0", cells, classes=20)
    return folder


def test_the_board_says_what_a_knob_can_buy(tmp_path: Path) -> None:
    found = load(write_knob(tmp_path), Asked())
    (one,) = found.knobs
    assert (one.defense, one.name, one.missing) == ("anp", "threshold", 0)
    assert [best and (best.value, round(best.asr, 9)) for best in one.best] == [
        ("1", 0.5),
        ("2", 0.2),
        ("2", 0.2),
    ]
    said = text(found, Asked(), "table", 160)
    assert "50.0 at 1" in said
    assert "20.0 at 2" in said
    assert "no result of a defense" in said
    body = json.loads(text(found, Asked(), "json"))
    at_2 = body["knobs"]["rows"][0]["at_2"]
    assert at_2 == {"value": "2", "asr": pytest.approx(0.2), "loss": pytest.approx(0.015)}


def test_no_setting_within_a_limit_is_no_number() -> None:
    settings = [Setting("1", 0.5, 0.03), Setting("2", 0.5, 0.02), Setting("3", 0.1, 0.2)]
    assert least(settings, 0.01) is None
    assert least(settings, 0.02) == settings[1]
    assert least(settings, 0.05) == settings[1], "of equals the one that loses less"
    assert least(settings, 1) == settings[2]


def test_each_value_is_an_entry_of_its_own(tmp_path: Path) -> None:
    grid = tiny_grid(
        tmp_path,
        defenses=["none", {"finetune": {"as": "ft", "along": {"recipe.lr": [0.0001, 0.0002]}}}],
    )
    first, second = grid.defenses[1:]
    assert (first.label, second.label) == ("ft@recipe.lr=0.0001", "ft@recipe.lr=0.0002")
    assert (first.recipe.lr, second.recipe.lr) == (0.0001, 0.0002)
    run_serial(grid, tmp_path / "out", tmp_path / "store")
    found = load(tmp_path / "out", Asked())
    assert found.tiers is None or [k.defense for k in found.knobs] == ["ft"]
    same = tiny_grid(
        tmp_path / "b", defenses=["none", {"finetune": {"as": "x", "recipe": {"lr": 0.0001}}}]
    )
    assert same.defenses[1].recipe == first.recipe


@pytest.mark.parametrize(
    ("along", "says"),
    [
        ({"threshold": [0.1]}, "two or more values"),
        ({"threshold": [0.1, 0.1]}, "all different"),
        ({"a": [1, 2], "b": [1, 2]}, "one knob at a time"),
        ({"threshhold": [0.1, 0.2]}, "unknown key 'threshhold'"),
        ({"share": [[1], [2]]}, "numbers or words"),
    ],
)
def test_a_knob_that_cannot_be_is_refused(
    along: dict[str, object], says: str, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=says):
        tiny_grid(tmp_path, defenses=["none", {"local_outlier": {"along": along}}])


def test_a_knob_is_given_in_one_place(tmp_path: Path) -> None:
    entry = {"finetune": {"recipe": {"lr": 0.1}, "along": {"recipe.lr": [0.1, 0.2]}}}
    with pytest.raises(UsageError, match=r"recipe.lr is the knob of `along`"):
        tiny_grid(tmp_path, defenses=["none", entry])


# --- spread


def test_the_spread_is_told_by_what_differs(tmp_path: Path) -> None:
    rows, cells = [], []
    shares = {(0, 0): 0.50, (0, 1): 0.54, (1, 0): 0.60, (1, 1): 0.64, (2, 0): 0.70, (2, 1): 0.74}
    for (seed, nested), asr in shares.items():
        for defense, number in (("none", 0.9), ("finetune", asr)):
            where: dict[str, Any] = {"defense_seed": nested, "cell": f"{defense}-{seed}-{nested}"}
            cells.append(cell_columns("badnet", "0.01", defense, seed, **where))
            rows += cell_rows("badnet", "0.01", defense, seed, asr=number, n=1000, **where)
    write_rows(tmp_path, rows)
    write_grid(tmp_path, "spread", "0", cells)
    found = load(tmp_path, Asked()).tiers
    assert found is not None
    assert found.spread is not None
    # Of the undefended all are equal: half of each variance of fine-tuning is left.
    within = 2 * 0.02**2
    between = 0.1**2 - within / 2
    assert found.spread.defenses == pytest.approx((within / 2) ** 0.5)
    assert found.spread.victims == pytest.approx((between / 2) ** 0.5)
    models = sum(asr * (1 - asr) for asr in shares.values()) / len(shares)
    sampled = (models / 1000 + 0.9 * 0.1 / 1000) / 2
    assert found.spread.pictures == pytest.approx(sampled**0.5)
    words = next(note for note in found.notes() if note.startswith("Standard deviation"))
    assert "6.9 between victim seeds, 2.0 between defense seeds of one victim" in words


def test_one_seed_tells_of_pictures_alone() -> None:
    import numpy as np

    found = spread([variance_components(np.array([[0.5]]), 100)])
    assert found is not None
    assert (found.victims, found.defenses) == (None, None)
    assert found.words().count(" of the pictures of one model") == 1
    assert spread([]) is None


# --- bounds of accuracy


def line_of(folder: Path, defense: str) -> Standing:
    tiers = load(folder, Asked()).tiers
    assert tiers is not None
    return next(line for line in tiers.lines if line.defense == defense)


@pytest.mark.parametrize(("classes", "floor"), [(20, 0.05), (None, 0.0)])
def test_a_missing_cell_may_have_lost_nothing_or_all_but_chance(
    classes: int | None, floor: float, tmp_path: Path
) -> None:
    gone = {("roclip", "badnet", "0.01", seed): "failed_method" for seed in range(3)}
    asr = {"none": steady(0.9), "roclip": steady(0.1)}
    clean = {"none": steady(0.6), "roclip": steady(0.55)}
    write_board(tmp_path, asr, attacks=ATTACKS, clean=clean, status=gone)
    document = json.loads((tmp_path / "grid.json").read_text())
    write_grid(tmp_path, "made", "0", document["cells"], classes)
    line = line_of(tmp_path, "roclip")
    assert line.loss_bounds is not None
    best, worst = line.loss_bounds
    assert best == pytest.approx((0.05 + 0) / 2)
    assert worst == pytest.approx((0.05 + 0.6 - floor) / 2)
