"""Campaign files, and the entries of grid files whose settings a campaign chose."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from defenses.base import Between, OneOf
from grid.gridfile import decode_grid, load_grid
from grid.quick import names_files
from grid.registry import Source, campaigns, grid_source
from grid.spec import Grid, Tuned
from grid.tuning.file import decode_campaign, load_campaign, num_settings, values_of
from grid.tuning.scenes import Scenes
from grid.tuning.spec import Sees, Space
from grid.tuning.tuned import tuned_entry, write_held_out, write_tuned
from tests.campaigns import GRID, campaign, campaign_text
from tests.grids import TINY, write_grid_file
from victims.errors import UsageError

CLEAN = {"sees": "clean", "maximise": "change"}


def test_what_comes_with_the_tool_decodes() -> None:
    assert "tune-demo" in campaigns()
    for name in campaigns():
        found = load_campaign(name)
        assert found.name == name
        assert Sees.HELD_OUT in {rule.sees for rule in found.objectives.values()}


def test_a_file_says_what_it_says() -> None:
    found = campaign()
    assert found.tuning.attacks == ("badnet", "blended")
    (searched,) = found.defenses
    assert searched.space == {
        "recipe.lr": Between(low=1e-3, high=1e-2, log=True),
        "recipe.epochs": Between(low=1, high=3),
    }
    assert list(found.objectives) == ["tuned"], "an objective that is stated where none is given"
    assert found.named("finetune", "tuned") == "finetune@mini"
    several = campaign(objectives={"a": {"minimise": "mean_asr"}, "b": CLEAN})
    assert several.named("finetune", "b") == "finetune@mini-b"


def test_a_space_is_the_defenses_own_where_none_is_given() -> None:
    (searched,) = campaign(defenses=["cleanclip"]).defenses
    assert searched.space == dict(type(searched.entry.method).space)
    assert "inmodal_weight" in searched.space


def test_a_grid_is_named_or_lies_beside_the_file(tmp_path: Path) -> None:
    write_grid_file(tmp_path, attacks=GRID["attacks"])
    path = tmp_path / "mine.yaml"
    path.write_text(campaign_text(grid="tiny.yaml"))
    assert load_campaign(str(path)).grid.name == "tiny"
    demo = load_campaign("tune-demo").grid
    assert demo.attacks == load_grid("demo").attacks


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"held_out": {"attacks": ["badnet"]}}, "badnet is both a tuning attack and held out"),
    ({"tuning": {"attacks": ["badnets"]}}, r"tuning.*no attack 'badnets'\. Did you mean 'badnet'"),
    ({"tuning": {"attacks": []}}, "list is empty"),
    ({"tuning": {"attacks": ["badnet"], "rates": [0.2]}}, "badnet has no rate 0.2 in the grid"),
    ({"tuning": {"attacks": ["badnet"], "rates": [0]}}, "at rate 0 there is no attack"),
    ({"objectives": {}}, "no objective is named"),
    ({"objectives": {"default": CLEAN}}, "cannot name an objective"),
    ({"objectives": {"a": {"sees": "clean", "minimise": "worst_asr"}}}, r"a.*sees none"),
    ({"objectives": {"a": {"minimise": "asr"}}}, "'asr' is not a choice"),
    ({"objectives": {"a": CLEAN}, "search": {"by": "nsga2"}}, "nsga2 makes clean accuracy large"),
    ({"objectives": {"a": {"sees": "simulated", "minimise": "mean_asr"}}}, "say which in"),
    ({"search": {"by": "bayes"}}, r"'bayes' is not a choice.*random, grid, tpe, nsga2"),
    ({"search": {"by": "grid", "points": 3}}, "has 9 settings, and the budget 3 trials"),
    ({"drop": {"after": 5}}, "no trial has more than 2: nothing could be dropped"),
    ({"drop": {"after": 2}}, "cannot show p 0.05"),
    ({"stop": {"by": "asha", "grace": 0}}, "grace must be at least 1"),
    ({"budget": {}}, "give at least one"),
    ({"budget": {"trails": 3}}, "unknown key 'trails'. Did you mean 'trials'"),
    ({"budgets": {"trials": 3}}, "unknown key 'budgets'. Did you mean 'budget'"),
    ({"defenses": ["clean_model"]}, "clean_model is a control"),
    ({"defenses": ["finetune", "finetune"]}, "given twice"),
    ({"defenses": ["finetun"]}, "Did you mean 'finetune'"),
    ({"defenses": [{"finetune": {"space": {}}}]}, "no search space"),
    (
        {"defenses": [{"finetune": {"space": {"recipe.lrr": [1, 2]}}}]},
        r"unknown key 'recipe.lrr'\. Did you mean 'recipe.lr'",
    ),
    (
        {"defenses": [{"finetune": {"recipe": {"lr": 1e-3}, "space": {"recipe.lr": [1e-3]}}}]},
        "recipe.lr is given a value and searched",
    ),
    (
        {"defenses": [{"finetune": {"space": {"recipe.lr": {"low": 2, "high": 1}}}}]},
        "low lies below high",
    ),
    (
        {"defenses": [{"finetune": {"space": {"recipe.lr": {"low": 0, "high": 1, "log": True}}}}]},
        "above 0 on a log scale",
    ),
    ({"name": "a/b"}, "cannot name a folder"),
    ({"defenses": ["none"]}, "none is the undefended victim"),
    (
        {"defenses": [{"finetune": {"space": {"recipe.lr": ["a", "b"]}}}]},
        "recipe.lr cannot be a",
    ),
    (
        {"defenses": [{"finetune": {"space": {"recipe.epochs": {"low": -3, "high": 0}}}}]},
        "recipe.epochs cannot be -3",
    ),
    (
        {"defenses": [{"finetune": {"space": {"recipe.lr": {"low": 1, "high": float("inf")}}}}]},
        "finite",
    ),
    ({"stop": {"by": "asha"}}, "finetune searches recipe.epochs"),
    ({"budget": {"trials": 2, "device_hours": 0}}, "above 0"),
    ({"search": {"by": "tpe", "seed": -1}}, "seed must not be negative"),
    ({"held_out": {"attacks": ["sig"], "seeds": [0]}}, "seed 0 is both a tuning seed and held out"),
    ({"held_out": {"attacks": ["sig"], "seeds": []}}, "from 0 on, one at least"),
    ({"tuning": {"attacks": []}}, "the list is empty"),
    (
        {
            "objectives": {"s": {"sees": "simulated", "minimise": "worst_asr"}},
            "simulate": {"attacks": ["sig"]},
        },
        "sig is both simulated and held out",
    ),
    (
        {
            "objectives": {"s": {"sees": "simulated", "minimise": "worst_asr"}},
            "simulate": {"attacks": ["badnet"], "rate": 0},
        },
        "at rate 0 nothing is simulated",
    ),
    (
        {
            "grid": {**GRID, "attacks": [*GRID["attacks"], {"sig": {"delta": 60, "as": "again"}}]},
            "tuning": {"attacks": ["again"]},
        },
        "sig is again by another name",
    ),
    ({"objectives": {"c": CLEAN}, "drop": {"after": 5}}, "no objective minimises that"),
    (
        {"grid": {**GRID, "execution": {"resources": {"defended": {"workers": 2}}}}},
        "a trial runs on one device",
    ),
]


@pytest.mark.parametrize(("changes", "says"), WRONG, ids=[says[:30] for _, says in WRONG])
def test_what_a_file_cannot_mean_is_told_with_its_place(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(UsageError, match=says) as told:
        campaign(**changes)
    assert "mini.yaml" in str(told.value)


def test_an_attack_that_stamps_nothing_cannot_be_tuned_by() -> None:
    attacks = [*GRID["attacks"], {"mmpoison": {"rates": [0, 0.1]}}]
    with pytest.raises(UsageError, match="mmpoison stamps no pictures"):
        campaign(grid={**GRID, "attacks": attacks}, tuning={"attacks": ["mmpoison"]})


def test_the_values_of_a_grid() -> None:
    assert values_of(OneOf(values=("a", "b")), 9) == ["a", "b"]
    assert values_of(Between(low=1, high=3), 5) == [1, 2, 3], "whole numbers, each once"
    assert values_of(Between(low=0.0, high=1.0), 3) == [0.0, 0.5, 1.0]
    assert values_of(Between(low=1e-4, high=1e-2, log=True), 3) == pytest.approx([1e-4, 1e-3, 1e-2])
    space: Space = {"a": OneOf(values=(1, 2)), "b": Between(low=1, high=3)}
    assert num_settings(space, 3) == 6


# --- what a campaign chose, in a grid file

SETTINGS = {"recipe": {"lr": 4e-3, "epochs": 2}}
TUNED: dict[str, Any] = {
    "name": "finetune@mini",
    "defense": "finetune",
    "settings": SETTINGS,
    "campaign": "mini",
    "objective": "tuned",
    "attacks": ["badnet"],
    "trials": 3,
    "device_seconds": 12.5,
}


def grid_with(*defenses: Any, source: str = "tiny.yaml") -> Grid:
    text = yaml.safe_dump({**TINY, "defenses": list(defenses)})
    return decode_grid(Source("tiny", source, text))


def test_where_settings_come_from_changes_no_number() -> None:
    chosen = grid_with({"finetune": {"tuned": TUNED}})
    by_hand = grid_with({"finetune": {**SETTINGS, "as": "other"}})
    ours, theirs = chosen.defenses[1], by_hand.defenses[1]
    assert ours.label == "finetune@mini"
    assert isinstance(ours.tuned, Tuned)
    assert (ours.method, ours.recipe) == (theirs.method, theirs.recipe)
    relabelled = replace(chosen, defenses=(chosen.defenses[0], replace(theirs, label=ours.label)))
    assert relabelled.identity_hash == chosen.identity_hash
    keys = []
    for grid in (chosen, relabelled):
        from grid.planning import make_plan

        keys.append([cell.measure.key for cell in make_plan(grid).cells])
    assert keys[0] == keys[1]


def test_settings_are_read_from_a_file_beside_the_grid(tmp_path: Path) -> None:
    (tmp_path / "tuned").mkdir()
    (tmp_path / "tuned" / "mine.yaml").write_text(yaml.safe_dump(TUNED))
    path = write_grid_file(
        tmp_path, defenses=["none", {"finetune": {"tuned": "tuned/mine.yaml", "as": "mine"}}]
    )
    grid = load_grid(str(path))
    assert grid.defenses[1].label == "mine"
    assert grid.defenses[1].recipe.lr == 4e-3
    assert names_files(grid_source(str(path))), "the plan is another one once that file changes"
    assert not names_files(Source("tiny", "tiny.yaml", yaml.safe_dump(dict(TINY))))


@pytest.mark.parametrize(
    ("entry", "says"),
    [
        ({"cleanclip": {"tuned": TUNED}}, "settings of finetune, and the entry is cleanclip"),
        ({"finetune": {"tuned": TUNED, "recipe": {"lr": 1e-3}}}, "unknown key 'recipe'"),
        ({"finetune": {"tuned": "nowhere.yaml"}}, "no file nowhere.yaml"),
        ({"finetune": {"tuned": {**TUNED, "name": "a b"}}}, "cannot be a label"),
        ({"finetune": {"tuned": {**TUNED, "trial": 3}}}, "Did you mean 'trials'"),
        ({"finetune": {"tuned": {**TUNED, "settings": {"lr": 1}}}}, "unknown key 'lr'"),
    ],
)
def test_settings_that_cannot_be_used(entry: Any, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        grid_with(entry)


def test_what_is_chosen_is_written_and_read_back(tmp_path: Path) -> None:
    found = campaign(
        objectives={"tuned": {"minimise": "worst_asr", "ca_loss": 2}, "best": {**CLEAN}}
    )
    (searched,) = found.defenses
    numbers = {"ca": 0.9, "ca_loss": 0.01, "worst_asr": 0.2, "mean_asr": 0.1}
    chosen = {
        **{"trial": "trial-1", "settings": '{"recipe.lr": 0.004, "recipe.epochs": 2}'},
        **{"is_feasible": True, "is_default": False, **numbers},
    }
    counts = {"trials": 3, "device_seconds": 12.5}
    both = [
        tuned_entry(found, searched, name, chosen, counts, "search-1") for name in found.objectives
    ]
    path = write_tuned(tmp_path, both[0])
    assert path.name == "finetune@mini.yaml"
    grid = grid_with({"finetune": {"tuned": str(path)}})
    entry = grid.defenses[1]
    assert entry.tuned == both[0]
    assert (entry.recipe.lr, entry.recipe.epochs) == (0.004, 2)
    assert both[0].attacks == ("badnet", "blended")
    assert both[1].attacks == (), "a search that sees no attack has seen none"
    assert both[0].made["space"]["recipe.lr"] == {"low": 1e-3, "high": 1e-2, "log": True}
    assert both[0].made["recipe"]["lr"] == 0.004, "the whole recipe, what was searched among it"
    said: list[str] = []
    assert write_held_out(tmp_path, found, [], said.append) is None
    held_out = load_grid(str(write_held_out(tmp_path, found, both, said.append)))
    assert [entry.label for entry in held_out.attacks] == ["sig"]
    assert held_out.seeds == (1,)
    labels = [entry.label for entry in held_out.defenses]
    assert labels == ["none", "finetune", "finetune@mini", "finetune@mini-best"]
    assert held_out.data == found.grid.data
    (tmp_path / "held-out" / "rows").mkdir(parents=True)
    (tmp_path / "held-out" / "rows" / "x.parquet").touch()
    write_held_out(tmp_path, found, both, said.append)
    assert said == [], "the same settings may be evaluated again"
    write_held_out(tmp_path, found, both[:1], said.append)
    assert "tunes on it" in said[0]
    by_hand = Scenes(found).entry(searched, {"recipe.lr": 0.004, "recipe.epochs": 2})
    assert held_out.defenses[2].recipe == by_hand.recipe
    assert decode_campaign(Source("mini", "mini.yaml", campaign_text())).name == "mini"


def test_simulated_attacks_are_seen_ones_and_held_out_rates_are_kept(tmp_path: Path) -> None:
    found = campaign(
        grid={**GRID, "rates": [0, 0.05, 0.1]},
        objectives={"s": {"sees": "simulated", "minimise": "worst_asr"}},
        simulate={"attacks": ["badnet"]},
        held_out={"attacks": ["sig"], "rates": [0.05]},
    )
    (searched,) = found.defenses
    numbers = dict.fromkeys(("ca", "ca_loss", "worst_asr", "mean_asr"), 0.1)
    chosen = {"trial": "t", "settings": "{}", "is_feasible": True, "is_default": False, **numbers}
    counts = {"trials": 1, "device_seconds": 1.0}
    tuned = tuned_entry(found, searched, "s", chosen, counts, "search-1")
    assert tuned.attacks == ("badnet",), "a board marks them as seen"
    grid = load_grid(str(write_held_out(tmp_path, found, [tuned], print)))
    (entry,) = grid.attacks
    assert list(grid.levels(entry)) == ["0", "0.05"]
    assert grid.seeds == (1,), "by default the seed after the tuning ones"
