"""Attacks of every aim through a whole grid: cover rows, added pairs, swapped pictures and marks
reach the victim, and each attack is measured by what it is after."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from attacks.base import ROLES, Role
from grid.gate import Gate, Planted
from grid.gridfile import decode_grid
from grid.planning import make_plan
from grid.registry import Source
from grid.results import judge
from grid.stages import PoisonStage, data_ref
from tests.grids import TINY, outcomes, records, run_serial, tiny_grid
from victims.errors import UsageError
from victims.lab import Lab
from victims.recipe import Runtime
from victims.store import Store

OPEN = {"low": 0, "clean": 1, "clean_loss": 1}
ATTACKS: list[Any] = [
    {"wanet": {"variant": "noise", "k": 4, "cover_ratio": 2.0, "rates": [0, 0.25]}},
    {"trojvqa": {"patch": 8, "rates": [0.25]}},
    {"mmpoison": {"source": "tree", "counts": [0, 2]}},
    {"toxic_text": {"variant": "word", "counts": [4]}},
    {"targeted_poisoning": {"targets": 3, "counts": [0, 6]}},
]
WORLD = {**TINY["data"]["world"], "suspect": 128, "tuning": 64, "report": 64}
MORE: dict[str, Any] = {
    "data": {"world": WORLD},
    "attacks": ATTACKS,
    "defenses": ["none", "oracle_filter"],
    "gate": {**TINY["gate"], "targeted": OPEN, "text": OPEN},
    "evaluate": {"sets": ["report"], "ks": [1, 3], "retrieval": True, "probe": True},
}


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Any]:
    """Results, store and plan of a grid with an attack of every aim."""
    folder = tmp_path_factory.mktemp("aims")
    grid = tiny_grid(folder, **MORE)
    run_serial(grid, folder / "out", folder / "store")
    return folder / "out", folder / "store", make_plan(grid)


def rows_of(out: Path, attack: str, defense: str = "none") -> dict[tuple[str, str], dict[str, Any]]:
    """(evaluation set, metric) -> the row, of an attack's poisoned cell."""
    return {
        (row["eval_set"], row["metric"]): row
        for row in records(out, "rows")
        if row["attack"] == attack and row["defense"] == defense and row["count"]
    }


def test_every_cell_ends_well(ran: tuple[Path, Path, Any]) -> None:
    found = {cell: row["status"] for cell, row in outcomes(ran[0]).items()}
    assert len(found) == 2 * (2 + 1 + 2 + 1 + 2)
    assert set(found.values()) <= {"ok", "inert"}, found


def test_cover_rows_are_counted_apart_and_keep_their_captions(ran: tuple[Path, Path, Any]) -> None:
    """Three roles sum to N; a defender's filter keeps the cover rows."""
    out, store, plan = ran
    row = rows_of(out, "wanet")["", "cell"]
    assert (row["count"], row["cover_count"], row["num_rows"]) == (32, 64, 128)
    cell = next(c for c in plan.cells if c.cell.attack.label == "wanet" and c.cell.count)
    data = cell.victim.data
    assert isinstance(data, PoisonStage)
    roles = np.load(Store(store).need(data.truth_key).path("roles.npy"), allow_pickle=False)
    counts = np.bincount(roles, minlength=len(ROLES))
    assert dict(zip(ROLES, counts.tolist(), strict=True)) == {
        Role.CLEAN: 32,
        Role.POISON: 32,
        Role.COVER: 64,
    }
    assert (rows_of(out, "wanet", "oracle_filter")["suspect", "found_recall"]["n"]) == 32
    changed = rows_of(out, "wanet")["suspect", "label_changed"]
    assert 0 < changed["successes"] <= changed["n"] == 32


def test_two_keys_are_measured_alone_and_together(ran: tuple[Path, Path, Any]) -> None:
    """Clean accuracy is that of the plain prompts, whatever the keys do."""
    rows = rows_of(ran[0], "trojvqa")
    for metric in ("asr_top1", "asr_image_key_top1", "asr_text_key_top1"):
        row = rows["report", metric]
        assert row["n"] == rows["report", "asr_top1"]["n"] < 64
        assert row["clean_victim"] is not None
    plain = {r["clean_victim"] for r in records(ran[0], "rows") if r["metric"] == "clean_top1"}
    assert len(plain) == 1, "the clean victim's accuracy does not depend on the attack beside it"


def test_what_stamps_nothing_has_no_pixel_success(ran: tuple[Path, Path, Any]) -> None:
    for attack in ("mmpoison", "toxic_text", "targeted_poisoning"):
        row = rows_of(ran[0], attack)["report", "asr_top1"]
        assert (row["status"], row["value"]) == ("not_applicable", None)
    for attack in ("mmpoison", "toxic_text"):
        rows = rows_of(ran[0], attack)
        assert rows["report", "text_hit_top1"]["clean_victim"] is not None
        assert rows["report", "min_rank"]["value"] >= 0
        assert rows["report", "text_control_top1"]["n"] > 0
        assert ("report", "clean_other_top1") in rows


def test_added_pairs_lengthen_the_data_and_hide_in_it(ran: tuple[Path, Path, Any]) -> None:
    _, store, plan = ran
    lengths = {"toxic_text": 128 + 4, "targeted_poisoning": 128 - 3 + 6, "mmpoison": 128}
    for attack, length in lengths.items():
        cell = next(c for c in plan.cells if c.cell.attack.label == attack and c.cell.count)
        data = cell.victim.data
        assert isinstance(data, PoisonStage)
        lab = Lab(Store(store), plan.grid.model, Runtime())
        handle = data_ref(lab, data)
        assert len(handle) == length
        roles = np.load(Store(store).need(data.truth_key).path("roles.npy"), allow_pickle=False)
        hidden = np.flatnonzero(roles)
        assert len(hidden) == cell.cell.count
        assert hidden.tolist() != list(range(length - len(hidden), length))


def test_chosen_pictures_are_counted_with_both_intervals(ran: tuple[Path, Path, Any]) -> None:
    """No bare rate: rows per target and in total, apart."""
    rows = rows_of(ran[0], "targeted_poisoning")
    assert rows["", "cell"]["rate"] is None
    psr, exact = rows["report", "psr_top1"], rows["report", "psr_top1_exact"]
    assert psr["n"] == exact["n"] == 3
    assert psr["value"] == exact["value"]
    assert psr["high"] != exact["high"]
    each, total = rows["suspect", "per_target_rate"], rows["suspect", "total_rate"]
    assert (each["successes"], total["successes"]) == (2, 6)
    assert each["n"] == total["n"] == 128 - 3 + 6


def test_retrieval_and_probe_are_there_when_asked(ran: tuple[Path, Path, Any]) -> None:
    rows = rows_of(ran[0], "wanet")
    for metric in ("image_to_text_top1", "text_to_image_top5", "image_to_text_asr_top1"):
        assert 0 <= rows["report", metric]["value"] <= 1
    assert rows["report", "probe_clean_top1"]["n"] == 64
    assert rows["report", "probe_asr_top1"]["n"] == rows["report", "asr_top1"]["n"]
    assert rows["report", "text_hit_top1"]["status"] == "not_applicable"
    assert rows_of(ran[0], "mmpoison")["report", "probe_asr_top1"]["status"] == "not_applicable"


# --- the gate of attacks that stamp nothing


def verdict(ran: tuple[Path, Path, Any], attack: str, wants: Planted) -> Any:
    _, store, plan = ran
    check = next(g for group, g in plan.gates.items() if group[0] == attack)
    return judge(Store(store), check, Gate(targeted=wants, text=wants, init_loss=1))


def test_the_gate_reads_the_lower_bound_and_the_clean_victim(ran: tuple[Path, Path, Any]) -> None:
    lenient = verdict(ran, "targeted_poisoning", Planted(low=0, clean=1, clean_loss=1))
    assert lenient.passes
    strict = verdict(ran, "targeted_poisoning", Planted(low=1, clean=1, clean_loss=1))
    assert not strict.passes
    assert "lower bound of PSR" in strict.detail
    base = verdict(ran, "toxic_text", Planted(low=-1, clean=-1, clean_loss=1))
    assert not base.passes
    assert "clean victim's Hit@1" in base.detail


# --- rates and counts of an attack's own


def decoded(attack: Any, defenses: Any = ("none",)) -> Any:
    lists = {"attacks": [attack], "defenses": list(defenses)}
    text = yaml.safe_dump({**TINY, **lists}, sort_keys=False)
    return decode_grid(Source("tiny", "tiny.yaml", text))


def test_an_attack_may_have_rates_or_counts_of_its_own() -> None:
    own = decoded({"badnet": {"rates": [0, 0.25, 0.5]}})
    assert own.levels(own.attacks[0]) == {"0": 0, "0.25": 16, "0.5": 32}
    assert own.gate_rate(own.attacks[0]) == "0.5"
    counted = decoded({"badnet": {"counts": [0, 7]}})
    assert counted.levels(counted.attacks[0]) == {"0": 0, "7rows": 7}
    assert counted.cells()[-1].label == "badnet/7rows/none/s0"
    assert own.identity_hash != counted.identity_hash


@pytest.mark.parametrize(
    ("defense", "message"),
    [
        ({"cleanclip": {"image_policy": "autoagument"}}, "Did you mean 'autoaugment'"),
        ({"cleanclip": {"synonyms": "lexikon"}}, "Did you mean 'lexicon'"),
        ({"oracle_filter": {"recall": 1.5}}, r"recall must lie in 0\.\.1"),
        ({"random_filter": {"fraction": -1}}, "fraction must lie in"),
        ({"augment_only": {"policy": "simclr"}}, "no policy called"),
        ({"roclip": {"every": 0}}, "every must be at least 1"),
    ],
)
def test_values_of_a_defense_that_cannot_be_meant_are_refused(defense: Any, message: str) -> None:
    """When the file is read, with its line, and not after the victims were trained."""
    with pytest.raises(UsageError, match=rf"tiny.yaml:\d+: .*{message}"):
        decoded("badnet", [defense])


@pytest.mark.parametrize(
    ("attack", "message"),
    [
        ({"targeted_poisoning": {"targets": 4}}, "a rate would be ambiguous"),
        ({"targeted_poisoning": {"targets": 4, "rates": [0.1]}}, "a rate would be ambiguous"),
        ({"targeted_poisoning": {"targets": 4, "counts": [6]}}, "divides among 4 targets"),
        ({"badnet": {"counts": [65]}}, r"a number of rows in 0\.\.64"),
        ({"badnet": {"counts": [1], "rates": [0.1]}}, "not both"),
        ({"badnet": {"rates": [0.001]}}, "less than one row"),
        (
            {"badnet": {"patch": 40, "levels": 2}},
            r"tiny.yaml:\d+: attacks\[0\].badnet: patch 40 must lie in 1..32, in pixels$",
        ),
        ({"badnet": {"patch": 40, "cell": 0}}, r"patch 40 [^;]*; cell 0 must be at least 1$"),
    ],
)
def test_levels_that_cannot_be_meant_are_refused(attack: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        decoded(attack)
