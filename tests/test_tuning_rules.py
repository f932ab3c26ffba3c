"""Who ends trials early: our test on cells, and Tune's rules on the epochs of the first cell."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest
from ray.tune.schedulers import TrialScheduler

from defenses.base import Between, OneOf
from grid.tuning.score import Incumbent
from grid.tuning.search import (
    MOST_FAILURES,
    Spent,
    _Listener,
    _OutOfBudget,
    _own_values,
    _Rules,
)
from grid.tuning.spec import Budget, Drop, Space, Stop

STOP, GO_ON = TrialScheduler.STOP, TrialScheduler.CONTINUE


def result(record: str, **more: Any) -> dict[str, Any]:
    told = {"record": record, "cell": 0, "is_feasible": True, "status": "ok", **more}
    return {"score": more.get("score", 0.5), "told": json.dumps([told, []])}


class _Trial:
    """As much of Tune's trial as the rules look at."""

    def __init__(self, name: str) -> None:
        self.trial_id, self.status = name, "RUNNING"
        self.config: dict[str, Any] = {}


def trial(name: str) -> Any:
    return _Trial(name)


def held(asr: dict[int, float]) -> Incumbent:
    """The default settings' cells."""
    return Incumbent(asr, 0.95)


def cells(rules: _Rules, name: str, values: list[float]) -> list[str]:
    """What the rules say after each cell of a trial."""
    return [
        rules.on_trial_result(None, trial(name), result("cell", cell=place, asr_top1=asr))
        for place, asr in enumerate(values)
    ]


def test_a_trial_that_is_worse_on_every_cell_is_dropped_once_that_is_shown() -> None:
    """Of 8 cells there are 3 looks, after 5, 6 and 7: each may err with a third of p."""
    rules = _Rules(None, Drop(after=5, p=0.05), held(dict.fromkeys(range(8), 0.1)), 8)
    said = cells(rules, "worse", [0.2, 0.3, 0.4, 0.5, 0.6, 0.7])
    assert said == [GO_ON] * 5 + [STOP]
    assert rules.reasons["worse"] == "worse than the best so far on 6 cells, p 0.0156"
    assert cells(rules, "mixed", [0.2, 0.0, 0.4, 0.0, 0.2, 0.1]) == [GO_ON] * 6
    assert cells(rules, "same", [0.1] * 8) == [GO_ON] * 8


def test_the_best_trial_becomes_what_others_are_compared_with() -> None:
    rules = _Rules(None, Drop(after=5, p=0.05), held(dict.fromkeys(range(6), 0.9)), 6)
    cells(rules, "good", [0.1] * 5)
    rules.on_trial_complete(None, trial("good"), result("trial", score=0.1))
    assert cells(rules, "next", [0.5] * 5)[-1] == STOP, "better than the default, and no more"
    cells(rules, "beyond", [0.0] * 5)
    rules.on_trial_complete(None, trial("beyond"), result("trial", score=2.1, is_feasible=False))
    assert rules.best == dict.fromkeys(range(5), 0.1), "what misses the limit is no measure"


def test_without_a_rule_nothing_is_dropped() -> None:
    rules = _Rules(None, None, held(dict.fromkeys(range(9), 0.0)), 9)
    assert cells(rules, "worse", [1.0] * 9) == [GO_ON] * 9


@pytest.mark.parametrize("by", ["asha", "median"])
def test_tune_s_rules_see_the_epochs_of_the_first_cell(by: Any) -> None:
    rules = _Rules(Stop(by=by, grace=1, reduction=2), None, None, 2)
    controller = SimpleNamespace(get_live_trials=lambda: [], get_trials=lambda: [])
    names = [f"t{n}" for n in range(6)]
    for name in names:
        rules.on_trial_add(controller, trial(name))
    trials = {name: trial(name) for name in names}
    said = {}
    for place, name in enumerate(names):  # each is worse than the one before it
        for epoch in (1, 2):
            told = result("epoch", epoch=epoch, score=0.1 * place)
            said[name] = rules.on_trial_result(controller, trials[name], told)
            if said[name] == STOP:
                break
    assert said["t0"] == GO_ON
    assert said["t5"] == STOP
    assert rules.reasons["t5"].startswith("behind others at epoch")
    later = result("epoch", cell=1, epoch=1, score=9.0)
    assert rules.on_trial_result(controller, trials["t0"], later) == GO_ON, "a later cell's"


def test_replayed_records_end_nothing_and_teach_as_they_did() -> None:
    """After a restart the known trials are told again: what is compared with them is the same."""
    for replayed in (False, True):
        rules = _Rules(None, Drop(), held(dict.fromkeys(range(6), 0.9)), 6)
        for place in range(6):
            told = result("cell", cell=place, asr_top1=0.1, replayed=replayed)
            assert rules.on_trial_result(None, trial("known"), told) == GO_ON
        end = result("trial", status="ok", is_feasible=True, score=0.1, replayed=replayed)
        rules.on_trial_complete(None, trial("known"), end)
        assert rules.best == dict.fromkeys(range(6), 0.1)
        assert cells(rules, "worse", [0.5] * 6)[4] == STOP
    bad = [result("cell", cell=place, asr_top1=1.0, replayed=True) for place in range(6)]
    said = [rules.on_trial_result(None, trial("bad"), told) for told in bad]
    assert said == [GO_ON] * 6, "what came to its end is not ended again"


@pytest.mark.parametrize("by", ["asha", "median"])
def test_replayed_epochs_teach_tune_s_rules(by: Any) -> None:
    controller = SimpleNamespace(get_live_trials=lambda: [], get_trials=lambda: [])
    said = []
    for replayed in (False, True):
        rules = _Rules(Stop(by=by, grace=1, reduction=2), None, None, 2)
        for place in range(5):
            rules.on_trial_add(controller, trial(f"t{place}"))
            told = result("epoch", epoch=1, score=0.1 * place, replayed=replayed)
            rules.on_trial_result(controller, trial(f"t{place}"), told)
        rules.on_trial_add(controller, trial("last"))
        worst = result("epoch", epoch=1, score=0.9)
        said.append(rules.on_trial_result(controller, trial("last"), worst))
    assert said == [STOP, STOP]


def test_looks_share_what_may_be_erred() -> None:
    """Of equally good trials on 20 cells about one in twenty is dropped, not one in five."""
    import random

    dice, dropped = random.Random(0), 0
    for number in range(400):
        rules = _Rules(None, Drop(), held(dict.fromkeys(range(20), 0.5)), 20)
        asrs = [0.5 + dice.gauss(0, 0.1) for _ in range(20)]
        dropped += STOP in cells(rules, f"t{number}", asrs)
    assert dropped / 400 < 0.05


def test_defaults_beyond_the_limit_are_no_incumbent() -> None:
    rules = _Rules(None, Drop(), None, 6)
    assert cells(rules, "first", [1.0] * 6) == [GO_ON] * 6


def test_a_trial_that_never_said_a_word_is_counted() -> None:
    spent, said = Spent(Budget(trials=3)), list[Any]()
    listener = _Listener(_Rules(None, None, None, 1), spent, said.append)
    lost = trial("a")
    lost.config = {"recipe.lr": 0.1}
    listener.on_trial_error(0, [lost], lost)
    (told,) = said
    assert (told.number, told.record["status"], told.record["trial"]) == (1, "failed", "")
    assert json.loads(told.record["settings"]) == {"recipe.lr": 0.1}
    assert spent.trials == 1


def test_a_search_in_which_all_fails_ends() -> None:
    spent = Spent(Budget(device_hours=100))
    listener = _Listener(_Rules(None, None, None, 1), spent, lambda told: None)
    trials = [trial(f"t{number}") for number in range(MOST_FAILURES)]
    for one in trials:
        assert not spent.is_over
        one.config = {}
        listener.on_trial_error(0, trials, one)
    assert spent.is_over


def test_earlier_settings_are_handed_over_as_the_space_has_them() -> None:
    space: Space = {
        "crop": OneOf(values=((0.08, 1.0), (0.5, 1.0))),
        "lr": Between(low=0.1, high=1.0),
    }
    found = _own_values(json.loads('{"crop": [0.5, 1.0], "lr": 0.5}'), space)
    assert found == {"crop": (0.5, 1.0), "lr": 0.5}


def test_what_is_under_way_when_the_budget_ends_is_on_record() -> None:
    spent, said = Spent(Budget(device_hours=1 / 3600)), list[Any]()
    listener, trials = _Listener(_Rules(None, None, None, 1), spent, said.append), [trial("a")]
    listener.on_trial_start(0, trials, trials[0])
    cell = result("cell", cell=0, asr_top1=0.3, device_seconds=2.0, started_at=0.0)
    stopper = _OutOfBudget(spent)
    assert not stopper.stop_all()
    listener.on_trial_result(0, trials, trials[0], cell)
    assert stopper.stop_all()
    listener.finish()
    assert [told.record["record"] for told in said] == ["cell", "trial"]
    ended = said[-1].record
    assert (ended["status"], ended["reason"]) == ("stopped", "the budget is used up")
    assert (ended["device_seconds"], ended["cell"]) == (2.0, None)
    assert (spent.trials, spent.device_seconds) == (1, 2.0)
