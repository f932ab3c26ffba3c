"""What a run writes of defenses that judge rows, choose a learning rate and tell of their run."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pyarrow.feather as feather
import pytest
import torch

from analysis.board import load_board
from analysis.render import percent, render
from defenses.base import Case, Defended, Defense, Fidelity, Need, Phase
from grid.data import WorldData
from grid.planning import make_plan
from grid.spec import DefenseEntry
from tests.grids import TINY, records, run_serial, tiny_grid
from victims.errors import UsageError
from victims.lab import Lab
from victims.measuring import text_head
from victims.store import Store
from victims.world import CLASSES, TEMPLATES


@dataclass(frozen=True, slots=True, kw_only=True)
class Judge(Defense):
    """Flags the first half of the rows and suspects the last most; two findings, two numbers."""

    name: ClassVar[str] = "judge"
    version: ClassVar[int] = 1
    paper: ClassVar[str] = "none"
    phase: ClassVar[Phase] = Phase.FILTERING
    needs: ClassVar[frozenset[Need]] = frozenset({Need.VICTIM, Need.SUSPECT_DATA})
    fidelity: ClassVar[Fidelity] = Fidelity.EXACT
    variants: ClassVar[Mapping[str, Mapping[str, Any]]] = {}

    def apply(self, lab: Lab, case: Case) -> Defended:
        num_rows, model = len(case.suspect_data), lab.load(case.victim)
        cpu = torch.device("cpu")
        head_KD = text_head(model, model.tokenizer, CLASSES, TEMPLATES, cpu)
        place = np.arange(num_rows)
        return Defended(
            case.victim,
            flagged=place < num_rows // 2,
            suspicion=place.astype(np.float32),
            sets={"low": place < 8},
            scores={"turned": -place.astype(np.float32)},
            triggered_alike=head_KD[[CLASSES.index("circle")] * 3].numpy(),
            notes={"stopped_at": 17, "gain": 0.25},
        )


DEFENSES = [
    "none",
    {"finetune": {"recipe": {"lr": {"rates": [1e-3, 1e-2], "floor": 8}, "batch_size": 8}}},
    {"random_filter": {"fraction": 0.25}},
    {"par": {"variant": "paper_rate", "recipe": {"lr": {"rates": [1e-3, 1e-2], "floor": 8}}}},
]
ADAPTIVE = {"adaptive_blend": {"alpha": 0.25, "alpha_train": 0.2, "cell": 2, "levels": 2}}


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A grid with covers, a selected rate, a filter, and a defense that only judges."""
    folder = tmp_path_factory.mktemp("judged")
    attacks = [*TINY["attacks"], {**ADAPTIVE}]
    grid = tiny_grid(folder, defenses=DEFENSES, attacks=attacks)
    judge = DefenseEntry(
        label="judge", method=Judge(), recipe=grid.repair, victim_recipe=grid.victim
    )
    grid = replace(grid, defenses=(*grid.defenses, judge))
    assert make_plan(grid).refused == []
    run_serial(grid, folder / "out", folder / "store")
    return folder / "out"


def rows_of(out: Path, defense: str, attack: str = "badnet", rate: str = "0.1") -> dict[str, Any]:
    return {
        row["metric"]: row
        for row in records(out, "rows")
        if (row["defense"], row["attack"], row["rate_text"]) == (defense, attack, rate)
    }


def test_findings_are_measured_by_name(ran: Path) -> None:
    found = rows_of(ran, "judge")
    names = {name for name in found if name.startswith("found_")}
    counted = {"recall", "leak", "precision", "precision_bound", "clean_removed", "contamination"}
    ranked = {"auroc", "auprc", "base_rate", "tpr_at_fpr1", "tpr_at_fpr5", "fpr_at_tpr95"}
    alike = {"found_alike_target", "found_alike_others"}
    assert names == alike | {
        f"found_{prefix}{metric}"
        for kind, name in ((counted, "low_"), (ranked, "turned_"))
        for prefix in ("", name)
        for metric in kind
    }
    assert found["found_recall"]["n"] == 6
    assert {row["eval_set"] for name, row in found.items() if name in names} == {"suspect"}
    # It hands back the target's own prompt.
    assert found["found_alike_target"]["value"] == pytest.approx(1)
    assert found["found_alike_others"]["value"] < found["found_alike_target"]["value"] - 1e-3
    area, turned = (found[name]["value"] for name in ("found_auroc", "found_turned_auroc"))
    assert area == pytest.approx(1 - turned)
    assert found["found_auroc"]["low"] <= area <= found["found_auroc"]["high"]
    assert json.loads(found["cell"]["notes"]) == {"gain": 0.25, "stopped_at": 17.0}


def test_clean_pairs_of_the_suspect_pool_are_counted_where_they_are_poisoned(
    tmp_path: Path,
) -> None:
    world = TINY["data"]["world"]
    shared = {"world": {**world, "clean": {"rows": 48, "pool": "overlap"}}}
    grid = tiny_grid(tmp_path, data=shared, defenses=["none", "finetune", "random_filter"])
    assert isinstance(grid.data, WorldData)
    assert grid.data.captioned("clean") == replace(grid.data.captioned("suspect"), num_rows=48)
    run_serial(grid, tmp_path / "out", tmp_path / "store")
    found = rows_of(tmp_path / "out", "finetune")["found_clean_pool_edited"]
    cell = next(c for c in make_plan(grid).cells if c.cell.rate == "0.1")
    poisoned = cell.measure.defended.poisoned
    assert poisoned is not None
    edits = Store(tmp_path / "store").need(poisoned.key).path("edits.arrow")
    rows = feather.read_table(edits)["row"].to_numpy()
    assert 0 < found["value"] == pytest.approx((rows < 48).sum() / 48)
    for defense in ("none", "random_filter"):
        assert "found_clean_pool_edited" not in rows_of(tmp_path / "out", defense)
    assert "found_clean_pool_edited" not in rows_of(tmp_path / "out", "finetune", rate="0")


def test_disjoint_is_the_default_and_the_same_grid(tmp_path: Path) -> None:
    world = TINY["data"]["world"]
    spelled = {"world": {**world, "clean": {"rows": world["clean"], "pool": "disjoint"}}}
    assert tiny_grid(tmp_path / "a").identity_hash == (
        tiny_grid(tmp_path / "b", data=spelled).identity_hash
    )
    shared = {"world": {**world, "clean": {"rows": 65, "pool": "overlap"}}}
    with pytest.raises(UsageError, match=r"clean: 65 rows of pool overlap.*has 64"):
        tiny_grid(tmp_path / "c", data=shared)


def test_without_poison_nothing_is_found(ran: Path) -> None:
    assert not [n for n in rows_of(ran, "judge", rate="0") if n.startswith("found_")]


def test_cover_rows_are_left_out_and_counted_as_poison_on_a_second_line(ran: Path) -> None:
    found = rows_of(ran, "judge", "adaptive_blend")
    covers = found["cell"]["cover_count"]
    assert covers > 0
    assert found["found_recall"]["n"] == found["cell"]["count"]
    assert found["found_with_cover_recall"]["n"] == found["cell"]["count"] + covers
    assert not [n for n in rows_of(ran, "judge") if "cover" in n], "where there are none"


def test_a_selected_rate_is_in_the_row_with_its_curve(ran: Path) -> None:
    row = rows_of(ran, "finetune")["cell"]
    (choice,) = json.loads(row["lr_curve"])
    assert row["lr_rule"] == "select"
    assert row["lr"] == choice["chosen"]
    assert choice["rates"] == [1e-3, 1e-2]
    assert len(choice["metric"]) == 2
    assert choice["held_out"] == 8
    # Both fits are paid for: 24 rows in batches of 8, twice.
    assert row["pair_views"] == 2 * 24
    plain = rows_of(ran, "random_filter")["cell"]
    assert (plain["lr"], plain["lr_rule"], plain["lr_curve"]) == (2e-3, "fixed", None)
    own = rows_of(ran, "par")["cell"]
    assert (own["lr"], own["lr_rule"]) == (None, "own"), "its fields go before the recipe's rates"
    idle = rows_of(ran, "none")["cell"]
    assert (idle["lr"], idle["lr_rule"], idle["notes"]) == (None, None, None)


def test_the_board_shows_rates_and_findings_and_heads_lines_by_needs(ran: Path) -> None:
    board = load_board(ran)
    lines = {(r.defense, r.attack, r.rate): r for r in board.lines}
    judge = lines["judge", "badnet", 0.1]
    assert judge.found_recall == rows_of(ran, "judge")["found_recall"]["value"]
    assert judge.found_auroc == rows_of(ran, "judge")["found_auroc"]["value"]
    bound = rows_of(ran, "judge")["found_precision_bound"]["value"]
    assert judge.found_precision_bound == bound
    chosen = rows_of(ran, "finetune")["cell"]["lr"]
    assert (lines["finetune", "badnet", 0.1].lr, lines["finetune", "badnet", 0.1].lr_rule) == (
        [chosen],
        "select",
    )
    text = render(board, "table", 160)
    assert f" / {percent(judge.found_precision)} of {percent(bound)} " in text
    assert "after `of`, the highest precision" in text.replace("\n", " ")
    assert " given victim + clean\n" in text
    assert " given suspect + victim\n" in text
    assert f"{chosen:.0e}".replace("e-0", "e-") + " ?" in text
    assert "never by attack success" in text
    narrow = render(board, "table", 100)
    assert "given victim + clean" in narrow, "in every width"
