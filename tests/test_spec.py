"""Grid files: what they mean, and one clear message for each thing that they cannot mean."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any, ClassVar, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attacks.badnet import BadNet
from attacks.base import GateGroup, Track
from defenses.base import Regime
from defenses.cleanclip import CleanClip
from grid.decode import decode
from grid.execution import Execution, Resources
from grid.gate import Gate
from grid.gridfile import decode_grid, load_grid
from grid.nodes import Where, parse
from grid.registry import Source
from grid.spec import Grid
from victims.errors import GridError, UsageError
from victims.patches import Pattern
from victims.recipe import Recipe, Select
from victims.rewrite import EdaMode
from victims.world import CLASSES

BASE = """
name: mine
data: {world: {suspect: 1000, clean: 500}}
model: tiny
target: 3
attacks: [badnet, {blended: {alpha: 0.3}}]
rates: [0, 0.01]
defenses:
  - none
  - finetune
  - cleanclip:
      inmodal_weight: 2
  - roclip
seeds: [0, 1]
recipes:
  reference: {epochs: 3, batch_size: 128, lr: 1e-3}
  victim: {epochs: 2, batch_size: 128, lr: 5e-4}
  repair: {epochs: 1, batch_size: 64, lr: 1.0e-5}
""".lstrip()


def grid(text: str = BASE, **changes: str) -> Grid:
    """BASE, or another text, with whole top-level keys replaced or added."""
    return decode_grid(Source("mine", "grids/mine.yaml", edited(text, **changes)))


def edited(text: str, **changes: str) -> str:
    for key, value in changes.items():
        body = textwrap.dedent(value).strip("\n")
        joint = "\n" + textwrap.indent(body, "  ") if "\n" in body else " " + body
        block = f"{key}:{joint}\n" if body else ""
        text, count = re.subn(rf"^{key}:.*\n(?:[ ].*\n)*", lambda _: block, text, flags=re.M)  # noqa: B023
        text += "" if count else block
    return text


def refusal(text: str = BASE, **changes: str) -> str:
    with pytest.raises(UsageError) as caught:
        grid(text, **changes)
    assert caught.value.code == 2
    return str(caught.value)


def test_a_grid_means_what_it_says() -> None:
    found = grid()
    assert (found.track, found.regime, found.targets) == (Track.MULTIMODAL, Regime.F, (3,))
    assert found.rates == ("0", "0.01")
    assert [entry.label for entry in found.attacks] == ["badnet", "blended"]
    assert found.attacks[0].method == BadNet()
    assert found.attacks[1].method.alpha == 0.3
    assert found.defenses[2].method == CleanClip(inmodal_weight=2.0)
    assert found.victim == Recipe(epochs=2, batch_size=128, lr=5e-4)
    assert found.repair.lr == 1e-5
    assert found.model.size == found.data.size == 32
    assert found.data.corpus("clean").num_rows == 500
    assert found.data.classes == CLASSES
    assert len(found.data.templates) > 1
    assert (found.source, found.text) == ("grids/mine.yaml", BASE)
    assert found.gate.thresholds(GateGroup.WEAK) == found.gate.weak
    assert (found.gate.rate, found.gate_rate(found.attacks[0])) == (None, "0.01")
    assert len(found.cells()) == 2 * 2 * 4 * 2
    assert found.cells()[0].label == "badnet/0/none/s0"
    assert found.cells()[-1].label == "blended/0.01/roclip/s1"


def test_load_grid_reads_a_path(tmp_path: Path) -> None:
    path = tmp_path / "other.yaml"
    path.write_text(edited(BASE, name=""))
    found = load_grid(str(path))
    assert (found.name, found.source) == ("other", str(path))
    path.write_text(BASE.replace("seeds", "seed"))
    with pytest.raises(UsageError, match=r"other\.yaml:13: unknown key 'seed'\. Did you mean 's"):
        load_grid(str(path))
    with pytest.raises(UsageError, match=r"no grid file and no preset called 'nowhere.yaml'"):
        load_grid("nowhere.yaml")


def test_labels_show_targets_and_defense_seeds_only_where_there_are_several() -> None:
    several = grid(target="", targets=f"[3, {CLASSES[0]}]", defense_seeds="[0, 1]")
    assert several.targets == (3, 0)
    labels = [cell.label for cell in several.cells()]
    assert "badnet/0.01/cleanclip/s1/t3/d0" in labels
    assert "badnet/0.01/cleanclip/s1/t0/d1" in labels
    assert len(set(labels)) == len(labels) == 2 * 2 * 2 * 2 * 4 * 2


def test_cells_of_another_track_carry_their_reason() -> None:
    cells = grid(track="supervised", model="preact_tiny", attacks="[badnet, mmpoison]").cells()
    reasons = {(c.attack.label, c.defense.label): c.not_applicable for c in cells if c.count}
    said = "{} is defined on track multimodal, the grid's is supervised"
    assert reasons["mmpoison", "none"] == said.format("mmpoison")
    assert reasons["badnet", "cleanclip"] == said.format("cleanclip")
    assert reasons["badnet", "finetune"] is None
    assert not any(cell.not_applicable for cell in grid().cells())


def test_the_undefended_victim_is_added_at_the_front() -> None:
    found = grid(defenses="[cleanclip, finetune]")
    assert [entry.label for entry in found.defenses] == ["none", "cleanclip", "finetune"]
    assert found.identity_hash == grid(defenses="[none, cleanclip, finetune]").identity_hash
    kept = grid(defenses="[cleanclip, {none: {as: undefended}}]")
    assert [entry.label for entry in kept.defenses] == ["cleanclip", "undefended"]


def test_variants_yield_to_explicit_fields() -> None:
    found = grid(
        attacks="""
        - badnet: {variant: released, as: badnet-released, legacy_range: false, patch: 4}
        - badnet
        """
    )
    assert [entry.label for entry in found.attacks] == ["badnet-released", "badnet"]
    method = found.attacks[0].method
    assert (method.pattern, method.redraw) == (Pattern.GAUSS_WRAPPED, True)
    assert (method.legacy_range, method.patch) == (False, 4)


def test_recipe_overrides_reach_the_recipe_that_a_defense_uses() -> None:
    found = grid(
        defenses="""
        - cleanclip: {recipe: {lr: 1e-4}}
        - roclip: {recipe: {epochs: 7}, eda: off}
        """
    )
    none, cleanclip, roclip = found.defenses
    assert (none.recipe, none.victim_recipe, none.overrides) == (found.repair, found.victim, {})
    assert (cleanclip.recipe.lr, cleanclip.recipe.epochs) == (1e-4, 1)
    assert cleanclip.victim_recipe == found.victim
    assert cleanclip.overrides == {"lr": 1e-4}
    assert (roclip.victim_recipe.epochs, roclip.victim_recipe.lr) == (7, 5e-4)
    assert roclip.method.eda is EdaMode.OFF


def test_a_repair_may_select_its_learning_rate() -> None:
    found = grid(
        defenses="""
        - cleanclip: {recipe: {lr: select}}
        - finetune: {recipe: {lr: {rates: [1e-4, 1e-3], floor: 50}}}
        - random_filter
        """
    )
    by_label = {entry.label: entry for entry in found.defenses}
    assert by_label["cleanclip"].recipe.lr == Select()
    assert by_label["finetune"].recipe.lr == Select(rates=(1e-4, 1e-3), floor=50)
    plain = grid(defenses="[cleanclip]")
    other = grid(defenses="[{cleanclip: {recipe: {lr: select}}}]")
    assert plain.identity_hash != other.identity_hash, "the rule is part of what was run"


def test_a_control_takes_over_the_recipe_of_what_it_imitates() -> None:
    found = grid(
        defenses="""
        - cleanclip: {recipe: {lr: 1e-4, epochs: 5}}
        - same_budget_finetune
        - augment_only: {recipe: {lr: 2e-4}}
        - same_budget_finetune: {like: finetune, as: other}
        """
    )
    by_label = {entry.label: entry for entry in found.defenses}
    assert by_label["same_budget_finetune"].recipe == by_label["cleanclip"].recipe
    assert by_label["augment_only"].overrides == {"lr": 2e-4, "epochs": 5}
    assert by_label["other"].recipe == found.repair
    two = """
        - cleanclip: {recipe: {lr: 1e-4}, as: slow}
        - cleanclip: {recipe: {lr: 1e-3}, as: fast}
        - same_budget_finetune
        """
    message = refusal(defenses=two)
    assert message.startswith("grids/mine.yaml:10: defenses[2].same_budget_finetune: like: cleanc")
    labelled = grid(defenses=two.replace("as: slow", "as: cleanclip"))
    assert labelled.defenses[-1].overrides == {"lr": 1e-4}


def test_rates_are_exact_decimals() -> None:
    found = grid(rates="[0.003, 1e-3, 0.10, 1, 2.5e-3, 0.0]")
    assert found.rates == ("0.003", "0.001", "0.1", "1", "0.0025", "0")


SAME = {
    "key order": edited(BASE, attacks="") + "attacks: [badnet, {blended: {alpha: 0.3}}]\n",
    "1 or 1.0": BASE.replace("inmodal_weight: 2", "inmodal_weight: 2.0"),
    "spelled-out defaults": edited(
        BASE,
        data="{world: {suspect: 1000, clean: 500, seed: 0, size: 32}}",
        model="{arch: tiny, size: 32}",
        defense_seeds="0",
        gate="{rate: 0.010, strong: {asr: 0.9}}",
    ),
    "target by name": edited(BASE, target=CLASSES[3]),
    "an override that changes nothing": BASE.replace(
        "inmodal_weight: 2", "inmodal_weight: 2\n      recipe: {lr: 0.00001}"
    ),
    "name and description": edited(BASE, name="other", description="words"),
    "execution": edited(BASE, execution="{lanes: 4, device: cpu, resources: {model: {cpus: 2}}}"),
    "comments": BASE + "# nothing\n",
}
OTHER = {
    "a method's field": BASE.replace("inmodal_weight: 2", "inmodal_weight: 3"),
    "rate": edited(BASE, rates="[0, 0.02]"),
    "seed": edited(BASE, seeds="[0, 2]"),
    "defense seed": edited(BASE, defense_seeds="[1]"),
    "target": edited(BASE, target="4"),
    "rows": edited(BASE, data="{world: {suspect: 1001, clean: 500}}"),
    "label": BASE.replace("inmodal_weight: 2", "inmodal_weight: 2\n      as: clean-clip"),
    "reference": BASE.replace("epochs: 3", "epochs: 4"),
    "gate": edited(BASE, gate="{strong: {asr: 0.8}}"),
    "evaluation": edited(BASE, evaluate="{ks: [1]}"),
    "regime": edited(BASE, regime="S"),
    "architecture": edited(BASE, model="small"),
}


@pytest.mark.parametrize("name", SAME)
def test_the_identity_ignores(name: str) -> None:
    assert SAME[name] != BASE
    assert grid(SAME[name]).identity_hash == grid().identity_hash


@pytest.mark.parametrize("name", OTHER)
def test_the_identity_follows(name: str) -> None:
    assert OTHER[name] != BASE
    assert grid(OTHER[name]).identity_hash != grid().identity_hash


def test_the_identity_is_twelve_digits() -> None:
    assert re.fullmatch(r"[0-9a-f]{12}", grid().identity_hash)


def test_regime_s_needs_no_reference_and_ignores_one() -> None:
    bare = re.sub(r"  reference: .*\n", "", BASE)
    assert "missing key 'reference'" in refusal(bare)
    assert grid(bare, regime="S").identity_hash == grid(regime="S").identity_hash


def test_resources_fall_back_to_the_default() -> None:
    execution = grid(
        execution="""
        resources:
          default: {cpus: 2}
          model: {gpus: 1, limit_seconds: 60}
        """
    ).execution
    assert execution.resources_for("model") == Resources(gpus=1, limit_seconds=60)
    assert execution.resources_for("trigger") == Resources(cpus=2)
    assert Execution().resources_for("trigger") == Resources()


def test_gate_thresholds_keep_what_is_not_given() -> None:
    gate = grid(gate="{strong: {asr: 0.7}, rate: 0.010}").gate
    assert gate.strong.asr == 0.7
    assert gate.strong.lift == Gate().strong.lift
    assert gate.rate == "0.01"


# What is changed -> what the message says. Line numbers are those of BASE after the change.
REFUSED: list[tuple[dict[str, str], str]] = [
    ({"attakcs": "[badnet]"}, "18: unknown key 'attakcs'. Did you mean 'attacks'? Known: name, de"),
    (
        {"attacks": ""},
        "1: missing key 'attacks'. Required here: attacks, rates, defenses, seeds, r",
    ),
    ({"attacks": "[]"}, "5: attacks: the list is empty, so the grid would have no cells"),
    ({"attacks": "badnet"}, "5: attacks: expected a list, such as ['badnet'], got 'badnet'"),
    ({"attacks": "[3]"}, "5: attacks[0]: expected a method of badnet, blended, "),
    ({"attacks": "[bandet]"}, "5: attacks[0]: no attack called 'bandet'. Did you mean 'badnet'?"),
    (
        {"attacks": "[{badnet: {patch: big}}]"},
        "5: attacks[0].badnet.patch: expected a whole number",
    ),
    ({"attacks": "[{badnet: {patch: 3.5}}]"}, "expected a whole number, got 3.5"),
    ({"attacks": "[{badnet: {redraw: 1}}]"}, "badnet.redraw: expected true or false, got 1"),
    ({"attacks": "[{badnet: {patch: true}}]"}, "patch: expected a whole number, got true"),
    (
        {"attacks": "[{badnet: {pattern: dot}}]"},
        "5: attacks[0].badnet.pattern: 'dot' is not a choice. Did you mean 'dots'? Known: static_n",
    ),
    (
        {"attacks": "[{badnet: {variant: relaesed}}]"},
        "badnet.variant: badnet has no variant 'relaesed'. Did you mean 'released'? Known: rel",
    ),
    ({"attacks": "[{badnet: 3}]"}, "5: attacks[0].badnet: expected a mapping (key: value), got 3"),
    ({"attacks": "[{badnet: {recipe: {lr: 1}}}]"}, "attacks[0].badnet: unknown key 'recipe'."),
    ({"attacks": "[{badnet: {as: a/b}}]"}, "badnet.as: 'a/b' cannot be a label. Use letters, digi"),
    (
        {"attacks": "- badnet\n- sig\n- badnet: {patch: 4}"},
        "8: attacks[2].badnet: the label 'badnet' is already that of line 6. Give one of the two"
        " another with `as`, such as {as: badnet-2}.",
    ),
    (
        {"defenses": "- none\n- cleanclip:\n    inmodal_wieght: 2"},
        "10: defenses[1].cleanclip: unknown key 'inmodal_wieght'. Did you mean 'inmodal_weight'? "
        "Known: clip_weight, ",
    ),
    (
        {"defenses": "- cleanclip:\n  inmodal_weight: 2"},
        "8: defenses[0]: expected one method per item, got cleanclip, inmodal_weight. Indent",
    ),
    ({"defenses": "[{none: {as: x}}, {finetune: {as: x}}]"}, "the label 'x' is already that of"),
    (
        {"defenses": "[{cleanclip: {recipe: {lr: -1}}}]"},
        "7: defenses[0].cleanclip.recipe: lr must not be negative, got -1",
    ),
    (
        {"defenses": "[{cleanclip: {recipe: {lr: choose}}}]"},
        "cleanclip.recipe.lr: expected a number or select, got 'choose'",
    ),
    (
        {"defenses": "[{cleanclip: {recipe: {lr: {rate: [1]}}}}]"},
        "cleanclip.recipe.lr: unknown key 'rate'. Did you mean 'rates'?",
    ),
    (
        {"defenses": "[{cleanclip: {recipe: {lr: {rates: [1e-3, 1e-3]}}}}]"},
        "cleanclip.recipe.lr: rates must be positive and distinct, got [0.001, 0.001]",
    ),
    (
        {"defenses": "[{roclip: {recipe: {lr: select}}}]"},
        "roclip.recipe.lr: only repairs choose their learning rate. Give a number",
    ),
    (
        {"defenses": "[{cleanclip: {recipe: {epoch: 1}}}]"},
        "cleanclip.recipe: unknown key 'epoch'. Did you mean 'epochs'?",
    ),
    (
        {"defenses": "[{cleanclip: {recipe: {batch_size: 501}}}]"},
        "recipe.batch_size: a batch of 501 is larger than its data, the 500 rows of 'clean'",
    ),
    (
        {"defenses": "[{roclip: {recipe: {batch_size: 1001}}}]"},
        "recipe.batch_size: a batch of 1001 is larger than its data, the 1000 rows of 'suspect'",
    ),
    (
        {"defenses": "[{roclip: {crop_scale: [0.1]}}]"},
        "defenses[0].roclip.crop_scale: expected 2 values, got 1",
    ),
    (
        {"defenses": "[{cleanclip: {recipe: {seed: 1}}}]"},
        "recipe.seed: the seed of a victim or of a defense comes from `seeds` and `defense_seeds`",
    ),
    ({"rates": "[]"}, "6: rates: the list is empty"),
    ({"rates": "[0.01, 0.010]"}, "6: rates[1]: 0.01 is given twice"),
    ({"rates": "[1.5]"}, "6: rates[0]: expected a share in 0..1 such as 0.01, got 1.5"),
    ({"rates": "[1%]"}, "6: rates[0]: expected a share in 0..1 such as 0.01, got '1%'"),
    ({"rates": "['0.01']"}, "expected a share in 0..1 such as 0.01, got '0.01'"),
    ({"rates": "[.nan]"}, "expected a share in 0..1"),
    ({"rates": "[true]"}, "expected a share in 0..1 such as 0.01, got true"),
    ({"rates": "[-0.1]"}, "6: rates[0]: a poison rate lies in 0..1, got -0.1"),
    (
        {"rates": "[0.0004]"},
        "6: rates[0]: 0.0004 of 1000 rows is less than one row. Give a rate of",
    ),
    ({"rates": "[1e-999999999]"}, "of 1000 rows is less than one row"),
    ({"seeds": "[]"}, "13: seeds: the list is empty"),
    ({"seeds": "[0, -1]"}, "13: seeds[1]: a seed is a whole number from 0 to 2^63 - 1, got -1"),
    ({"seeds": "[0, 0]"}, "13: seeds[1]: 0 is given twice"),
    ({"seeds": "[0.5]"}, "13: seeds[0]: expected a whole number or a list of them, got 0.5"),
    ({"seeds": "three"}, "13: seeds: expected a whole number or a list of them, got 'three'"),
    ({"defense_seeds": "[-3]"}, "18: defense_seeds[0]: a seed is a whole number from 0"),
    ({"target": "20"}, "4: target: class 20 is outside 0..19"),
    ({"target": "-1"}, "4: target: class -1 is outside 0..19"),
    (
        {"target": CLASSES[3][:-1]},
        f"Did you mean '{CLASSES[3]}'? Give an exact name or an index in",
    ),
    ({"target": "true"}, "4: target: expected a class name or its index, got true"),
    ({"targets": "[1]"}, "18: targets: give `target` (one class) or `targets` (a list), not both"),
    ({"target": "", "targets": f"[0, {CLASSES[0]}]"}, "targets[1]: 0 is given twice"),
    ({"target": "", "targets": "[]"}, "targets: the list is empty"),
    ({"track": "multi"}, "track: 'multi' is not a choice. Did you mean 'multimodal'? Known: multi"),
    ({"regime": "f"}, "18: regime: 'f' is not a choice. Known: F, S."),
    (
        {"name": "../up"},
        "1: name: '../up' cannot name a run's folder. Give `name`: letters, digits",
    ),
    ({"name": "7"}, "1: name: expected text, got 7. Write it in quotes: '7'"),
    ({"data": "{wrold: {}}"}, "2: data: no corpus kind called 'wrold'. Did you mean 'world'?"),
    ({"data": "{}"}, "2: data: expected one corpus kind, such as world: {}, got nothing"),
    ({"data": "{world: {}, coco: {}}"}, "2: data: expected one corpus kind"),
    ({"data": "{world: {siez: 32}}"}, "2: data.world: unknown key 'siez'. Did you mean 'size'? Kn"),
    ({"data": "{world: {size: 8}}"}, "2: data.world: world shapes: size is 8 px, and shapes need"),
    ({"data": "{world: {seed: -1}}"}, "2: data.world.seed: a seed is a whole number from 0"),
    ({"data": "{world: {clean: 0}}"}, "2: data.world: clean must be at least 1, got 0"),
    ({"data": "{world: {clean: 60}}"}, "recipes.repair.batch_size: a batch of 64 is larger than"),
    ({"model": "tinny"}, "3: model.arch: no architecture called 'tinny'. Did you mean 'tiny'?"),
    ({"model": "{size: 64}"}, "3: model.size: 64 px, but the pictures of `data` have 32 px a side"),
    ({"model": "[tiny]"}, "3: model: expected a mapping (key: value), got a list"),
    ({"recipes": "{}"}, "14: recipes: missing key 'victim'. Required here: victim, repair."),
    (
        {"gate": "{rate: 0.02}"},
        "18: gate.rate: 0.02 is not a positive rate of this grid. Known: 0.01",
    ),
    ({"gate": "{rate: 0}"}, "gate.rate: 0 is not a positive rate of this grid"),
    ({"gate": "{strong: {asr: 90}}"}, "18: gate.strong: asr is a share in 0..1, got 90"),
    ({"gate": "{inert_lift: 2}"}, "18: gate: inert_lift is a share in 0..1, got 2"),
    ({"gate": "{storng: {}}"}, "gate: unknown key 'storng'. Did you mean 'strong'?"),
    (
        {"evaluate": "{sets: [tuning]}"},
        "evaluate.sets[0]: 'tuning' is not a choice. Known: report, s",
    ),
    ({"evaluate": "{sets: []}"}, "18: evaluate: sets is empty"),
    ({"evaluate": "{sets: [report, report]}"}, "sets holds a value twice: report, report"),
    (
        {"evaluate": "{ks: [1, 0]}"},
        "18: evaluate: ks are positive and hold 1, which the gate reads",
    ),
    ({"evaluate": "{ks: [3]}"}, "ks are positive and hold 1"),
    ({"evaluate": "{ks: 1}"}, "18: evaluate.ks: expected a list, such as [1], got 1"),
    ({"execution": "{device: gpu}"}, "18: execution.device: 'gpu' is not a choice."),
    ({"execution": "{lanes: 0}"}, "18: execution: lanes must be at least 1, got 0"),
    (
        {"execution": "{resources: {modle: {}}}"},
        "no stage kind called 'modle'. Did you mean 'model'",
    ),
    (
        {"execution": "{resources: {model: {cpu: 1}}}"},
        "resources.model: unknown key 'cpu'. Did you m",
    ),
    ({"execution": "{wait_seconds: .inf}"}, "wait_seconds: expected a finite number, got .inf"),
    ({"execution": "{resources: {model: {memory_gb: 0}}}"}, "memory_gb must be positive, got 0"),
]


@pytest.mark.parametrize(("changes", "expected"), REFUSED, ids=[str(c) for c, _ in REFUSED])
def test_refused(changes: dict[str, str], expected: str) -> None:
    message = refusal(BASE, **changes)
    assert re.match(r"grids/mine\.yaml:\d+: ", message), message
    assert expected in message.removeprefix("grids/mine.yaml:")


def test_errors_inside_recipes_name_the_line_of_the_field() -> None:
    spread = BASE.replace("{epochs: 2, batch_size: 128, lr: 5e-4}", "\n    epochs: 0\n    lr: 1\n")
    message = refusal(spread)
    assert message == (
        "grids/mine.yaml:16: recipes.victim: missing key 'batch_size'. Required here: epochs,"
        " batch_size, lr."
    )
    message = refusal(spread.replace("lr: 1\n", "lr: 1\n    batch_size: 8\n"))
    assert message == "grids/mine.yaml:17: recipes.victim: epochs must be at least 1, got 0"
    assert "recipes.victim.seed: the seed of a victim" in refusal(
        BASE.replace("batch_size: 128, lr: 5e-4", "batch_size: 128, lr: 5e-4, seed: 4")
    )
    assert grid(BASE.replace("lr: 1e-3", "lr: 1e-3, seed: 4")).reference.seed == 4


# --- Texts that are no grid file ------------------------------------------------------------

BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 12)
)
NO_GRID = {
    "empty": ("", "the file is empty"),
    "comment": ("# nothing\n", "the file is empty"),
    "list": ("- 1\n- 2\n", "x.yaml:1: expected a mapping (key: value), got a list"),
    "text": ("hello\n", "x.yaml:1: expected a mapping (key: value), got 'hello'"),
    "two documents": ("a: 1\n---\nb: 2\n", "x.yaml:2: a second document"),
    "duplicate": ("a: 1\nb: 2\na: 3\n", "x.yaml:3: key 'a' is given twice (first in line 1)"),
    "python tag": (
        "a: !!python/object/apply:os.system [id]\n",
        "x.yaml:1: tag 'tag:yaml.org,2002:py",
    ),
    "own tag": ("a: !thing 1\n", "x.yaml:1: tag '!thing': a grid file has no tags"),
    "core tag": ("a: !!str 1\n", "a grid file has no tags"),
    "bomb": (BOMB, "x.yaml:5: more than 20,000 values, aliases written out"),
    "recursive": ("a: &a [*a]\n", "x.yaml:1: alias *a has no anchor before it"),
    "no anchor": ("a: *b\n", "x.yaml:1: alias *b has no anchor before it"),
    "deep": ("a: " + "[" * 500, "x.yaml:1: nested more than 20 deep"),
    "many": ("a: [" + "1, " * 21000 + "]", "x.yaml:1: more than 20,000 values"),
    "not YAML": ("a: [1\nb: 2\n", "x.yaml:2: not YAML: while parsing a flow sequence"),
    "tabs": ("a:\n\tb: 1\n", "x.yaml:2: not YAML: while scanning for the next token"),
    "control": ("a: \x00\n", "x.yaml:1: not text: special characters are not allowed"),
    "escape": ('a: "\\UFFFFFFFF"\n', "x.yaml: not YAML: "),
    "surrogate": ('a: "\\uD800"\n', "x.yaml: not YAML: "),
    "key": ("[a]: 1\n", "x.yaml:1: a key must be a word"),
    "long number": (f"a: {'9' * 5000}\n", "x.yaml:1: a number of more than 40 characters"),
    "merge": ("b: &b {c: 1}\na: {<<: *b}\n", "unknown key"),
}


@pytest.mark.parametrize("name", NO_GRID)
def test_hostile_texts_are_refused_with_one_message(name: str) -> None:
    text, expected = NO_GRID[name]
    with pytest.raises(UsageError) as caught:
        decode_grid(Source("x", "x.yaml", text))
    assert expected in str(caught.value)
    assert len(str(caught.value)) < 600


def test_hostile_files_are_refused_with_one_message(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_bytes(b"a: 1\nb: \xff\xfe\n")
    with pytest.raises(UsageError, match=r"x\.yaml:2: not UTF-8 text \(byte 8 is 0xff\)"):
        load_grid(str(path))
    path.write_bytes(b"#" * 1_000_001)
    with pytest.raises(UsageError, match=r"x\.yaml: larger than 1,000,000 bytes"):
        load_grid(str(path))
    with pytest.raises(UsageError, match=r"/dev/zero: larger than 1,000,000 bytes"):
        load_grid("/dev/zero")
    path.write_bytes(b"\xef\xbb\xbf" + BASE.encode())  # a byte order mark is no matter
    assert load_grid(str(path)).name == "mine"


# --- The decoder alone ----------------------------------------------------------------------


class Colour(StrEnum):
    RED = "red"
    OFF = "off"


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    size: float
    label: str = "p"


@dataclass(frozen=True, slots=True, kw_only=True)
class Thing:
    name: ClassVar[str] = "thing"

    count: int = 1
    share: float = 0.5
    on: bool = False
    word: str = ""
    colour: Colour = Colour.RED
    maybe: float | None = None
    either: int | str = 0
    mode: Literal["a", "b"] = "a"
    pair: tuple[float, float] = (0.0, 1.0)
    many: tuple[int, ...] = ()
    table: Mapping[str, Part] = field(default_factory=dict)
    part: Part = field(default_factory=lambda: Part(size=1.0))
    anything: Any = None


def thing(text: str) -> Thing:
    return decode(Thing, parse(text, "t.yaml"))


@pytest.mark.parametrize(
    ("text", "name", "value"),
    [
        ("share: 1e-5", "share", 1e-5),
        ("share: 1", "share", 1.0),
        ("share: .5", "share", 0.5),
        ("count: 10_000", "count", 10_000),
        ("count: 010", "count", 10),
        ("colour: off", "colour", Colour.OFF),
        ("word: yes", "word", "yes"),
        ("word: '5'", "word", "5"),
        ("word: 1:30", "word", "1:30"),
        ("on: True", "on", True),
        ("maybe: ~", "maybe", None),
        ("maybe: 2", "maybe", 2.0),
        ("either: x", "either", "x"),
        ("either: 4", "either", 4),
        ("mode: b", "mode", "b"),
        ("pair: [1, 2]", "pair", (1.0, 2.0)),
        ("many: []", "many", ()),
        ("table: {x: {size: 2}}", "table", {"x": Part(size=2.0)}),
        ("part: {label: q}", "part", Part(size=1.0, label="q")),
        ("anything: [1, {a: null}]", "anything", [1, {"a": None}]),
        ("many: &m [1, 2]\nanything: *m", "anything", [1, 2]),
    ],
)
def test_values_of_every_type(text: str, name: str, value: object) -> None:
    found = getattr(thing(text), name)
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("share: '0.1'", "t.yaml:1: share: expected a number, got '0.1'. Write it without quotes"),
        ("share: 1e999", "t.yaml:1: share: expected a finite number, got 1e999"),
        ("share: .NaN", "t.yaml:1: share: expected a finite number, got .NaN"),
        ("share: true", "t.yaml:1: share: expected a number, got true"),
        ("count: 1.0", "t.yaml:1: count: expected a whole number, got 1.0"),
        ("count: 99999999999999999999", "count: expected a whole number below 2^63, got 9999"),
        ("on: yes", "t.yaml:1: on: expected true or false, got 'yes'"),
        ("on: 0", "t.yaml:1: on: expected true or false, got 0"),
        ("word: 5", "t.yaml:1: word: expected text, got 5. Write it in quotes: '5'"),
        ("word:", "t.yaml:1: word: expected text, got nothing"),
        ("either: 1.5", "t.yaml:1: either: expected a whole number or text, got 1.5"),
        ("mode: c", "t.yaml:1: mode: 'c' is not a choice. Known: a, b."),
        ("colour: [red]", "t.yaml:1: colour: a list is not a choice. Known: red, off."),
        ("pair: 3", "t.yaml:1: pair: expected a list, such as [3], got 3"),
        ("many:\n- 1\n- x", "t.yaml:3: many[1]: expected a whole number, got 'x'"),
        ("table:\n  x:\n    size: big", "t.yaml:3: table.x.size: expected a number, got 'big'"),
        ("table: {x: {}}", "t.yaml:1: table.x: missing key 'size'. Required here: size."),
        ("name: other", "t.yaml:1: unknown key 'name'."),
        ("part: 5", "t.yaml:1: part: expected a mapping (key: value), got 5"),
        (f"mode: {'z' * 500}", "t.yaml:1: mode: 'zzzzz"),
    ],
)
def test_values_of_another_type(text: str, expected: str) -> None:
    with pytest.raises(UsageError) as caught:
        thing(text)
    assert str(caught.value).startswith(expected) or expected in str(caught.value)
    assert len(str(caught.value)) < 250


def test_plain_data_decodes_at_one_place() -> None:
    assert decode(Thing, {"share": 1, "colour": Colour.OFF}) == Thing(share=1.0, colour=Colour.OFF)
    with pytest.raises(UsageError, match=r"^trial 7: count: expected a whole number, got 'x'"):
        decode(Thing, {"count": "x"}, Where("trial 7"))


def test_a_field_that_no_file_can_give_is_the_methods_fault() -> None:
    @dataclass(frozen=True)
    class Odd:
        hook: set[int]

    with pytest.raises(GridError, match=r"hook: a field of type set\[int\] cannot be given"):
        decode(Odd, {"hook": [1]})


@given(st.floats(allow_nan=False, allow_infinity=False), st.integers(-(2**63) + 1, 2**63 - 1))
def test_numbers_survive_being_written(share: float, count: int) -> None:
    assert thing(f"share: {share!r}\ncount: {count}") == Thing(share=share, count=count)


@settings(max_examples=50)
@given(st.text(max_size=80))
def test_any_text_decodes_or_is_refused(text: str) -> None:
    try:
        decode_grid(Source("x", "x.yaml", text))
    except UsageError:
        return
    pytest.fail("no short text is a grid")
