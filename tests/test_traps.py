"""The field's known mistakes, T01 to T48 of the evaluation protocol: which test catches each.

Tests that belong to no other file are below the table.
"""

from __future__ import annotations

import ast
import inspect
from decimal import Decimal
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from attacks.badnet import BadNet
from attacks.base import (
    Attack,
    Goal,
    Knowledge,
    Role,
    poison,
    poison_count,
    poisoned_key,
    trigger_key,
)
from attacks.blended import Blended
from attacks.sig import Sig
from grid import results
from grid.gate import Gate
from grid.gridfile import load_grid
from grid.registry import grid_source, presets
from grid.schema.status import Status
from tests.conftest import corpus_spec
from victims.corpora import Reader, corpus_key, open_corpus
from victims.keys import kind_of
from victims.lab import Lab
from victims.measuring import outcomes
from victims.models import ModelSpec
from victims.patches import Place
from victims.recipe import Runtime
from victims.store import Store
from victims.world import CLASSES, TEMPLATES

HERE = Path(__file__).parent

# Trap -> the tests that catch it, as file::test.
CAUGHT: dict[str, tuple[str, ...]] = {
    # Metric definitions
    "T01": (
        "test_measuring.py::test_a_model_that_always_answers_the_target_has_all_of_it",
        "test_measuring.py::test_a_model_that_answers_the_truth_has_none_of_it",
    ),
    "T02": ("test_measuring.py::test_the_denominator_of_imagenet_is_49950",),
    "T03": ("test_board.py::test_unlawful_rows_are_refused",),
    "T04": ("test_board.py::test_unlawful_rows_are_refused",),
    "T05": ("test_aims.py::test_two_keys_are_measured_alone_and_together",),
    "T06": (
        "test_aims.py::test_what_stamps_nothing_has_no_pixel_success",
        "test_board.py::test_what_does_not_apply_is_null_and_not_zero",
    ),
    "T07": ("test_stats.py::test_der_falls_when_clean_accuracy_falls",),
    "T08": ("test_measuring.py::test_a_target_is_an_index_or_an_exact_name",),
    "T09": (
        "test_measuring.py::test_class_names_must_be_unique",
        "test_measuring.py::test_labels_cover_the_classes",
        "test_imagenet_files.py::test_labels_with_holes_are_refused",
        "test_imagenet_files.py::test_no_two_classes_have_one_name",
    ),
    "T10": ("test_retrieval.py::test_directions_are_not_swapped",),
    "T11": ("test_board.py::test_the_newest_run_of_a_cell_counts",),
    # Trigger and geometry
    "T12": (
        "test_measuring.py::test_a_stamp_of_no_strength_changes_nothing",
        "test_attacks.py::test_no_mix_leaves_the_bytes",
    ),
    "T13": ("test_attacks.py::test_the_place_at_test_may_differ_only_when_asked",),
    "T14": (
        "test_attacks.py::test_our_bytes_round_half_to_even_and_clamp",
        "test_attacks.py::test_released_bytes_truncate_and_wrap",
    ),
    "T15": (
        "test_attacks.py::test_a_stored_trigger_stamps_the_same_bytes",
        "test_models.py::test_channels_are_told_apart",
    ),
    "T16": ("test_traps.py::test_a_trigger_has_the_size_of_its_pictures",),
    "T17": ("test_corpora.py::test_reading_poison_leaves_the_corpus_as_it_was",),
    "T18": (
        "test_traps.py::test_a_gate_opens_at_its_thresholds_and_not_below",
        "test_contracts.py::test_every_attack_keeps_its_contract",
    ),
    "T19": ("test_corpora.py::test_a_row_shows_the_same_bytes_in_every_batch_and_epoch",),
    "T20": ("test_traps.py::test_no_level_wraps_and_no_change_exceeds_what_was_declared",),
    "T21": ("test_traps.py::test_no_level_wraps_and_no_change_exceeds_what_was_declared",),
    # Poison set
    "T22": ("test_traps.py::test_a_rate_poisons_exactly_its_count_or_raises",),
    "T23": (
        "test_traps.py::test_a_rate_poisons_exactly_its_count_or_raises",
        "test_attacks.py::test_a_choice_that_repeats_rows_is_refused",
    ),
    "T24": ("test_traps.py::test_the_same_rate_of_another_corpus_is_other_data",),
    "T25": (
        "test_aims.py::test_chosen_pictures_are_counted_with_both_intervals",
        "test_aims.py::test_levels_that_cannot_be_meant_are_refused",
        "test_board.py::test_unlawful_rows_are_refused",
    ),
    "T26": (
        "test_traps.py::test_nothing_about_the_data_tells_which_rows_are_poisoned",
        "test_corpora.py::test_a_batch_holds_what_belongs_to_its_rows",
        "test_lab.py::test_a_handle_is_a_key_and_a_length",
    ),
    "T27": (
        "test_aims.py::test_cover_rows_are_counted_apart_and_keep_their_captions",
        "test_traps.py::test_every_row_has_one_role",
    ),
    "T28": (
        "test_world.py::test_no_picture_is_in_two_splits",
        "test_judgements.py::test_clean_pairs_of_the_suspect_pool_are_counted_where_they_are_poisoned",
    ),
    "T29": (
        "test_corpora.py::test_the_digest_follows_pictures_captions_and_labels",
        "test_traps.py::test_the_same_rate_of_another_corpus_is_other_data",
    ),
    # Training and selection
    "T30": (
        "test_probe.py::test_a_probe_is_not_tested_on_its_training_pictures",
        "test_zero_shot_sets.py::test_flowers_are_trained_on_their_validation_part_and_tested_on_test",
    ),
    "T31": ("test_training.py::test_the_learning_rate_is_the_planned_one",),
    "T32": ("test_plan.py::test_attacks_share_the_clean_victim_and_the_reference",),
    "T33": ("test_lab.py::test_a_fit_starts_from_fresh_moments_unless_told",),
    "T34": ("test_training.py::test_the_schedule_by_hand",),
    "T35": (
        "test_corpora.py::test_a_reader_opens_its_splits_and_no_other",
        "test_lab.py::test_no_handle_opens_an_evaluation_split",
    ),
    "T36": (
        "test_benchmarks.py::test_choices_read_clean_accuracy_of_the_tuning_split_alone",
        "test_selection.py::test_the_choice_looks_at_no_other_split",
        "test_judgements.py::test_a_selected_rate_is_in_the_row_with_its_curve",
    ),
    "T37": (
        "test_training.py::test_the_seed_decides_and_nothing_else_does",
        "test_stats.py::test_labels_say_how_much_to_trust",
    ),
    "T38": ("test_corpora.py::test_a_row_shows_the_same_bytes_in_every_batch_and_epoch",),
    "T39": ("test_losses.py::test_a_term_is_its_equation",),
    "T40": (
        "test_models.py::test_the_digest_follows_what_is_done_to_pictures_and_captions",
        "test_models.py::test_levels_and_floats_are_the_same_picture",
        "test_measuring.py::test_the_digest_of_the_templates_follows_words_and_order",
    ),
    # Records
    "T41": (
        "test_keys.py::test_every_field_matters_unless_it_is_declared_not_to",
        "test_traps.py::test_data_and_triggers_are_keyed_by_all_that_made_them",
    ),
    "T42": ("test_lab.py::test_missing_weights_are_an_error_and_not_a_fresh_start",),
    "T43": ("test_traps.py::test_every_preset_poisons_something",),
    "T44": (
        "test_run.py::test_a_run_writes_rows_for_every_planned_cell",
        "test_board.py::test_every_outcome_has_its_line",
    ),
    "T45": ("test_safety.py::test_no_file_does_what_is_forbidden",),
    "T46": (
        "test_corpora.py::test_a_corpus_holds_the_rows_that_were_rendered",
        "test_further_sets.py::test_a_measurement_says_which_set_it_was",
    ),
    "T47": (
        "test_run.py::test_a_defense_that_raises_is_a_row",
        "test_run.py::test_the_machines_fault_is_tried_three_times",
    ),
    "T48": ("test_published.py::test_a_row_without_all_it_must_say_is_refused",),
}


@cache
def _names_in(name: str) -> frozenset[str]:
    tree = ast.parse((HERE / name).read_text())
    return frozenset(node.name for node in tree.body if isinstance(node, ast.FunctionDef))


def test_every_trap_has_its_test() -> None:
    assert sorted(CAUGHT) == [f"T{number:02}" for number in range(1, 49)]
    assert all(CAUGHT.values())


@pytest.mark.parametrize("trap", CAUGHT)
def test_the_tests_of_the_table_exist(trap: str) -> None:
    for place in CAUGHT[trap]:
        file, name = place.split("::")
        assert name.startswith("test_")
        assert name in _names_in(file), f"{trap}: there is no {place} any more"


# --- traps that belong to no other file

TARGET = 1
GOAL = Goal(target=TARGET, label=CLASSES[TARGET], templates=TEMPLATES)
BOUNDED: dict[str, tuple[Attack, float]] = {
    # Largest change of a level that is declared: alpha times the range, or delta.
    "blended": (Blended(), 0.2 * 255),
    "blended-redrawn": (Blended(**Blended.variants["released"]), 0.2 * 255 + 1),
    "sig": (Sig(), 60.0),
    "badnet": (BadNet(), 255.0),
}


def held(store: Store, seed: int = 0) -> Knowledge:
    corpus = open_corpus(store, corpus_key(corpus_spec("suspect")), Reader.TRAINING)
    return Knowledge(corpus=corpus, goal=GOAL, seed=seed)


def crafted(store: Store, attack: Attack, size: int = 32) -> Any:
    return attack.craft(Lab(store, ModelSpec(), Runtime()), held(store), size)


@pytest.mark.parametrize("name", BOUNDED)
def test_no_level_wraps_and_no_change_exceeds_what_was_declared(
    small_store: Store, name: str
) -> None:
    """T20, T21: white and black pictures are where sums leave the range of a byte."""
    attack, bound = BOUNDED[name]
    trigger = crafted(small_store, attack)
    levels = (0, 1, 127, 254, 255)
    plain = torch.stack([torch.full((3, 32, 32), v, dtype=torch.uint8) for v in levels])
    some = torch.from_numpy(np.array(held(small_store).corpus.images_NCHW[:64]))
    for image in (plain, some):
        for stamped in (trigger.stamp(image), trigger.stamp_train(image)):
            assert stamped.dtype == torch.uint8
            change = (stamped.int() - image.int()).abs()
            assert 0 < int(change.max()) <= bound + 0.5
            if name == "badnet":
                side = trigger.patch
                assert int((change > 0).any(1).sum((1, 2)).max()) <= side * side


def test_a_trigger_has_the_size_of_its_pictures(small_store: Store) -> None:
    """T16: a trigger is made for one size, and nothing can measure it at another."""
    sizes = [trigger_key(BadNet(), GOAL, 0, size) for size in (32, 64, 224)]
    assert len(set(sizes)) == 3
    assert [crafted(small_store, BadNet(), size).patch for size in (32, 64, 224)] == [3, 5, 16]
    assert not {"size", "resize", "scale"} & set(inspect.signature(outcomes).parameters)


@pytest.mark.parametrize("attack", [BadNet(), Blended(), Sig()], ids=lambda attack: attack.name)
def test_a_rate_poisons_exactly_its_count_or_raises(small_store: Store, attack: Attack) -> None:
    """T22, T23."""
    for rate in ("0.002", "0.05", "0.5"):
        count = poison_count(rate, 512)
        assert count == int(Decimal(rate) * 512 + Decimal("0.5")) > 0
        found = poison(attack, held(small_store), count)
        assert len(found.data.edits.rows) == len(set(found.data.edits.rows.tolist())) == count
    with pytest.raises(Exception, match="less than one row"):
        poison_count("0.0009", 512)
    clean = Sig(**Sig.variants["clean_label"])
    with pytest.raises(Exception, match=r"400 rows are to be poisoned but only \d+ qualify"):
        poison(clean, held(small_store), 400)


def test_the_same_rate_of_another_corpus_is_other_data() -> None:
    """T24, T29: what transfers between corpora is the count, so a rate alone is no identity."""
    corpora = [corpus_key(corpus_spec("suspect", rows)) for rows in (512, 1024)]
    assert len(set(corpora)) == 2
    counts = [poison_count("0.05", rows) for rows in (512, 1024)]
    keys = {
        poisoned_key(BadNet(), GOAL, count, 0, corpus, "trigger")
        for count in counts
        for corpus in corpora
    }
    assert len(keys) == 4


def test_nothing_about_the_data_tells_which_rows_are_poisoned(small_store: Store) -> None:
    """T26: not the order, not the length, not the name."""
    found = poison(BadNet(), held(small_store), 51)
    assert found.data.edits.rows.tolist() != list(range(51))
    assert found.data.edits.rows.min() < 100
    assert found.data.edits.rows.max() > 400
    corpus = corpus_key(corpus_spec("suspect"))
    assert kind_of(poisoned_key(BadNet(), GOAL, 51, 0, corpus, "trigger")) == kind_of(corpus)


def test_every_row_has_one_role(small_store: Store) -> None:
    """T27."""
    found = poison(BadNet(), held(small_store), 51)
    roles = found.truth()
    counts = np.bincount(roles, minlength=len(Role))
    assert counts.tolist() == [512 - 51, 51, 0]
    assert np.flatnonzero(roles).tolist() == found.data.edits.rows.tolist()
    assert poison(BadNet(), held(small_store), 0).truth().sum() == 0


def test_data_and_triggers_are_keyed_by_all_that_made_them() -> None:
    """T41: caches of this field forget the rate, the seed, the target or the trigger."""
    other = Goal(target=2, label=CLASSES[2], templates=TEMPLATES)
    corpus = corpus_key(corpus_spec("suspect"))
    triggers = [
        trigger_key(BadNet(), GOAL, 0, 32),
        trigger_key(BadNet(place=Place.CORNER), GOAL, 0, 32),
        trigger_key(Blended(), GOAL, 0, 32),
        trigger_key(BadNet(), other, 0, 32),
        trigger_key(BadNet(), GOAL, 1, 32),
        trigger_key(BadNet(), GOAL, 0, 64),
    ]
    data = [
        poisoned_key(BadNet(), GOAL, 10, 0, corpus, triggers[0]),
        poisoned_key(BadNet(), GOAL, 11, 0, corpus, triggers[0]),
        poisoned_key(BadNet(), GOAL, 10, 1, corpus, triggers[0]),
        poisoned_key(BadNet(), other, 10, 0, corpus, triggers[0]),
        poisoned_key(Blended(), GOAL, 10, 0, corpus, triggers[0]),
        poisoned_key(BadNet(), GOAL, 10, 0, corpus, triggers[1]),
        poisoned_key(BadNet(), GOAL, 10, 0, corpus_key(corpus_spec("public")), triggers[0]),
    ]
    assert len({*triggers, *data}) == len(triggers) + len(data)
    assert poisoned_key(BadNet(), GOAL, 0, 0, corpus, triggers[0]) == corpus


def test_another_seed_poisons_other_rows(small_store: Store) -> None:
    rows = [
        poison(BadNet(), held(small_store, seed), 51).data.edits.rows.tolist() for seed in (0, 0, 1)
    ]
    assert rows[0] == rows[1] != rows[2]


@pytest.mark.parametrize("name", presets())
def test_every_preset_poisons_something(name: str) -> None:
    """T43: a quick grid that poisons nothing looks like a perfect defense."""
    document = yaml.safe_load(grid_source(name).text)
    if "corpus" in document["data"]:  # of files that only a user has
        given, suspect = document["rates"], document["data"]["corpus"]["suspect"]
    else:
        grid = load_grid(name)
        given, suspect = grid.rates, grid.data.suspect
    rates = [str(rate) for rate in given if Decimal(str(rate)) > 0]
    assert rates
    for rate in rates:
        assert poison_count(rate, suspect) > 0


# --- the gate


@pytest.mark.parametrize(
    ("asr", "clean_asr", "clean", "changed", "init", "passes"),
    [
        (0.90, 0.00, 0.93, 1.00, 0.95, True),
        (0.90, 0.10, 0.93, 0.99, 0.95, True),
        (0.89, 0.00, 0.95, 1.00, 0.95, False),
        (0.90, 0.11, 0.95, 1.00, 0.95, False),
        (1.00, 0.00, 0.92, 1.00, 0.95, False),
        (1.00, 0.00, 0.95, 0.98, 0.95, False),
        (0.90, 0.00, 0.93, 1.00, 0.96, True),
        (1.00, 0.00, 0.93, 1.00, 0.97, False),
    ],
)
def test_a_gate_opens_at_its_thresholds_and_not_below(
    monkeypatch: pytest.MonkeyPatch,
    asr: float,
    clean_asr: float,
    clean: float,
    changed: float,
    init: float,
    passes: bool,
) -> None:
    """ASR 90, lift 80, at most 2 points of clean accuracy below the clean victim and 3 below the
    start weights; T18: the stamp shows on 99 %."""

    def shares(asr_share: float, clean_share: float, changed_share: float) -> Any:
        named = {"asr_top1": asr_share, "clean_top1": clean_share}
        metrics = {name: {"value": value} for name, value in named.items()}
        return {"sets": {"tuning": {"metrics": metrics, "changed_share": changed_share}}}

    victim = SimpleNamespace(trigger=SimpleNamespace(attack=BadNet()))
    start = SimpleNamespace()
    answers = {id(victim): shares(asr, clean, changed), id(start): shares(0.0, init, 1.0)}
    monkeypatch.setattr(
        results,
        "read_measure",
        lambda store, stage: answers.get(id(stage), shares(clean_asr, 0.95, 1.0)),
    )
    check: Any = SimpleNamespace(
        victims=[victim], clean=[SimpleNamespace()], init=[start], is_reference=True
    )
    store: Any = None
    verdict = results.judge(store, check, Gate())
    assert verdict.passes is passes, verdict.detail
    assert (verdict.status is Status.INVALID_VICTIM) is not passes
