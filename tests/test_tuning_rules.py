"""Who ends trials early: our test on cells, and Tune's rules on the epochs of the first cell."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest
from ray.tune.schedulers import TrialScheduler

from grid.tuning.search import Spent, _Listener, _OutOfBudget, _Rules
from grid.tuning.spec import Budget, Drop, Stop

STOP, GO_ON = TrialScheduler.STOP, TrialScheduler.CONTINUE


def result(record: str, **more: Any) -> dict[str, Any]:
    told = {"record": record, "cell": 0, "is_feasible": True, "status": "ok", **more}
    return {"score": more.get("score", 0.5), "told": json.dumps([told, []])}


class _Trial:
    """As much of Tune's trial as the rules look at."""

    def __init__(self, name: str) -> None:
        self.trial_id, self.status = name, "RUNNING"


def trial(name: str) -> Any:
    return _Trial(name)


def cells(rules: _Rules, name: str, values: list[float]) -> list[str]:
    """What the rules say after each cell of a trial."""
    return [
        rules.on_trial_result(None, trial(name), result("cell", cell=place, asr_top1=asr))
        for place, asr in enumerate(values)
    ]


def test_a_trial_that_is_worse_on_every_cell_is_dropped_once_that_is_shown() -> None:
    rules = _Rules(None, Drop(after=5, p=0.05), dict.fromkeys(range(8), 0.1))
    said = cells(rules, "worse", [0.2, 0.3, 0.4, 0.5, 0.6])
    assert said == [GO_ON] * 4 + [STOP]
    assert rules.reasons["worse"] == "worse than the best so far on 5 cells, p 0.0312"
    assert cells(rules, "mixed", [0.2, 0.0, 0.4, 0.0, 0.2, 0.1]) == [GO_ON] * 6
    assert cells(rules, "same", [0.1] * 8) == [GO_ON] * 8


def test_the_best_trial_becomes_what_others_are_compared_with() -> None:
    rules = _Rules(None, Drop(after=5, p=0.05), dict.fromkeys(range(5), 0.9))
    cells(rules, "good", [0.1] * 5)
    rules.on_trial_complete(None, trial("good"), result("trial", score=0.1))
    assert cells(rules, "next", [0.5] * 5)[-1] == STOP, "better than the default, and no more"
    cells(rules, "beyond", [0.0] * 5)
    rules.on_trial_complete(None, trial("beyond"), result("trial", score=2.1, is_feasible=False))
    assert rules.best == dict.fromkeys(range(5), 0.1), "what misses the limit is no measure"


def test_without_a_rule_nothing_is_dropped() -> None:
    rules = _Rules(None, None, dict.fromkeys(range(9), 0.0))
    assert cells(rules, "worse", [1.0] * 9) == [GO_ON] * 9


@pytest.mark.parametrize("by", ["asha", "median"])
def test_tune_s_rules_see_the_epochs_of_the_first_cell(by: Any) -> None:
    rules = _Rules(Stop(by=by, grace=1, reduction=2), None, None)
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


def test_replayed_records_end_nothing() -> None:
    rules = _Rules(Stop(), Drop(), dict.fromkeys(range(5), 0.0))
    told = result("cell", cell=4, asr_top1=1.0, replayed=True)
    assert rules.on_trial_result(None, trial("known"), told) == GO_ON


def test_what_is_under_way_when_the_budget_ends_is_on_record() -> None:
    spent, said = Spent(Budget(device_hours=1 / 3600)), list[Any]()
    listener, trials = _Listener(_Rules(None, None, None), spent, said.append), [trial("a")]
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
