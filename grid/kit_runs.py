"""One application of a defense in the kit's world, which all clauses about it look at."""

from __future__ import annotations

from dataclasses import dataclass

from defenses.base import Defended, Defense, Recipes
from grid.kit_base import Kit, WatchedStore, expect
from grid.stages import DefendStage, ModelStage
from victims.lab import Lab


@dataclass(frozen=True, slots=True)
class Run:
    """One application: its stage, store and lab, what came back, and what was read for it."""

    stage: DefendStage
    store: WatchedStore
    lab: Lab
    done: Defended
    read: frozenset[str]

    @property
    def made(self) -> list[str]:
        return self.lab.ledger.made

    @property
    def used(self) -> set[str]:
        """What the lab made for it, or found already made, such as the victim of rate 0."""
        return set(self.lab.ledger.costs)


def stage_of(defense: Defense, kit: Kit, victim: ModelStage | None = None) -> DefendStage:
    victim = victim or kit.victims()[0]
    return DefendStage(
        defense=defense,
        recipes=Recipes(victim=kit.recipe(epochs=2), repair=kit.recipe(epochs=1)),
        seed=0,
        victim=victim,
        clean=kit.corpus("clean"),
        suspect=kit.corpus("suspect"),
        reference=victim.init,
        guide=kit.reference if kit.labelled else None,
    )


def applied(defense: Defense, kit: Kit, stage: DefendStage | None = None) -> Run:
    """The defense, applied in a copy of the kit's store."""
    stage, store = stage or stage_of(defense, kit), kit.fresh_store()
    lab = kit.lab(store=store)
    case = stage.case(lab)
    store.read.clear()
    done = defense.apply(lab, case)
    expect(isinstance(done, Defended), f"{done!r} from apply", "a Defended")
    return Run(stage, store, lab, done, frozenset(store.read))


def run_of(defense: Defense, kit: Kit) -> Run:
    """The first application, which all clauses share."""
    key = (type(defense), stage_of(defense, kit).key)
    if key not in kit.runs:
        try:
            kit.runs[key] = applied(defense, kit)
        except Exception as error:
            kit.runs[key] = error
    found: Run | Exception = kit.runs[key]
    if isinstance(found, Exception):
        raise found
    return found
