"""Exported models: open_clip itself loads them, and their cards say what they are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from safetensors.torch import save_file

from grid.export import _notes, export_cell
from tests.finished import Finished
from tests.grids import OPEN_GATE, RECIPE, call, outcomes, records, run_serial, tiny_grid
from tests.networks import ARCH, network, register
from victims.errors import UsageError
from victims.lab import Lab, ModelRef
from victims.models import Clip, ModelSpec, WordTokenizer
from victims.recipe import Runtime
from victims.store import Store

CELL = "badnet/0.1/finetune/s0"


def exported(finished: Finished, folder: Path, cell: str = CELL, victim: bool = False) -> Any:
    return export_cell(finished.out, cell, folder, str(finished.store), victim=victim)


def ours(store: Path, key: str, spec: ModelSpec | None = None) -> Clip:
    return Lab(Store(store), spec or ModelSpec(), Runtime()).load(ModelRef(key))  # type: ignore[arg-type]


def assert_alike(model: Clip, net: Any, tokens_BT: torch.Tensor, mean: Any, std: Any) -> None:
    """Features of the store's model and of open_clip's, each with its own normalisation."""
    size = model.spec.size
    image_BCHW = torch.randint(0, 256, (4, 3, size, size), dtype=torch.uint8)
    mean_C, std_C = (torch.tensor(values).view(3, 1, 1) for values in (mean, std))
    with torch.no_grad():
        theirs = net.encode_image((image_BCHW.float() / 255 - mean_C) / std_C)
        assert torch.allclose(model.embed_image(image_BCHW), theirs, atol=1e-6)
        assert torch.allclose(model.embed_text(tokens_BT), net.encode_text(tokens_BT), atol=1e-6)


def test_open_clip_loads_what_was_defended_and_what_was_attacked(
    finished: Finished, tmp_path: Path
) -> None:
    rows = outcomes(finished.out)
    store, keys = Store(finished.store), set()
    for victim in (False, True):
        folder = tmp_path / f"victim-{victim}"
        found = exported(finished, folder, victim=victim)
        defended = store.need(rows[CELL]["defended_key"]).meta["model_key"]
        assert found.model_key == (rows[CELL]["victim_key"] if victim else defended)
        keys.add(found.model_key)
        net, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{folder}")
        model = ours(finished.store, found.model_key)
        words = json.loads((folder / "word_tokenizer.json").read_text())
        captions = ["a photo of a red circle", "nobody says this about a star"]
        # The tokenizer, written from its file alone.
        tokens = []
        for caption in captions:
            kept = caption.lower().split()[: words["context"] - 2]
            ids = [words["ids"].get(word, words["unknown"]) for word in kept]
            row = [words["start"], *ids, words["end"]]
            tokens.append(row + [words["padding"]] * (words["context"] - len(row)))
        assert tokens == model.tokenizer(captions).tolist()
        read = WordTokenizer.read(folder / "word_tokenizer.json")
        assert read(captions).tolist() == tokens
        assert "WordTokenizer.read(" in (folder / "README.md").read_text()
        normal = preprocess.transforms[-1]
        tokens_BT = torch.tensor(tokens)
        assert_alike(model, net.eval(), tokens_BT, list(normal.mean), list(normal.std))
        path = str(folder / "open_clip_model.safetensors")
        names = set(open_clip.factory.load_state_dict(path))
        assert names == set(model.net.state_dict())
    assert len(keys) == 2


def test_the_card_says_what_the_rows_say(finished: Finished, tmp_path: Path) -> None:
    exported(finished, tmp_path / "a")
    exported(finished, tmp_path / "b", victim=True)
    exported(finished, tmp_path / "c", cell="badnet/0/none/s0")
    cards = [json.loads((tmp_path / n / "model_card.json").read_text()) for n in "abc"]
    texts = [(tmp_path / n / "README.md").read_text() for n in "abc"]
    row = outcomes(finished.out)[CELL]
    (asr,) = [
        r
        for r in records(finished.out, "rows")
        if (r["cell"], r["eval_set"], r["metric"]) == (row["cell"], "report", "asr_top1")
    ]
    (told,) = [
        m for m in cards[0]["measured"] if (m["eval_set"], m["metric"]) == ("report", "asr_top1")
    ]
    assert {name: told[name] for name in ("value", "low", "high", "n", "clean_victim")} == {
        name: asr[name] for name in ("value", "low", "high", "n", "clean_victim")
    }
    assert cards[0]["data"]["evaluation"]["report"] == asr["eval_digest"]
    assert cards[0]["data"]["suspect_pairs"] == row["corpus_digest"]
    assert {row["victim_key"], row["defended_key"], row["trigger_key"]} <= set(cards[0]["stages"])
    assert cards[0]["attack"]["poisoned_rows"] == 6
    assert cards[0]["defense"]["name"] == "finetune"
    assert cards[0]["grid"]["hash"] == finished.grid.identity_hash
    assert f"{100 * asr['low']:.1f} to {100 * asr['high']:.1f} %" in texts[0]
    assert "was backdoored on purpose" in texts[0]
    assert "THIS MODEL IS BACKDOORED on purpose, by badnet (6 poisoned rows" in texts[1]
    assert cards[1]["cell"]["label"] == "badnet/0.1/none/s0", "the victim's own numbers"
    assert "BACKDOORED" not in texts[2]
    assert all("Licence" in text and "word_tokenizer.json" in text for text in texts)
    assert str(tmp_path) not in texts[0] + json.dumps(cards)


def test_twice_is_once_and_other_contents_stay(finished: Finished, tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "model"
    assert not exported(finished, folder).was_there
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert exported(finished, folder).was_there
    assert sorted(path.name for path in folder.parent.iterdir()) == ["model"], "scratch is left"
    with pytest.raises(UsageError, match=r"holds something else .*nothing was changed"):
        exported(finished, folder, victim=True)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(UsageError, match=r"holds something else \(notes.txt"):
        exported(finished, folder)
    (tmp_path / "empty").mkdir()
    assert not exported(finished, tmp_path / "empty").was_there
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="is a file"):
        exported(finished, tmp_path / "file")


def test_cells_and_runs_that_are_not_there(
    finished: Finished, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = ("--out", tmp_path / "model", "--store", finished.store)
    wrong = call(capsys, "export", "badnet/0.1/finetun/s0", "--in", finished.out, *out)
    assert wrong.code == 2
    assert f"Did you mean '{CELL}'?" in wrong.err
    assert call(capsys, "export", CELL, "--in", tmp_path, *out).code == 2
    nowhere = ("--out", tmp_path / "model", "--store", tmp_path / "none")
    lost = call(capsys, "export", CELL, "--in", finished.out, *nowhere)
    assert "no store is there; --store names another" in lost.err
    assert not (tmp_path / "model").exists()
    done = call(capsys, "export", CELL, "--in", finished.out, *out, "--json")
    assert json.loads(done.out)["cell"] == CELL


def test_what_was_collected_is_made_again_as_the_message_says(
    finished: Finished, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mine = finished.copy(tmp_path)
    key = outcomes(mine.out)[CELL]["victim_key"]
    Store(mine.store).remove(key)
    out = ("--in", mine.out, "--out", tmp_path / "model")
    lost = call(capsys, "export", CELL, *out, "--victim")
    assert lost.code == 1
    said = lost.err.split("grid run ")[1].split("; then")[0]
    words, only = said.split(" --only ")
    assert key in lost.err
    again = call(capsys, "run", *words.split(), "--only", only.strip("'"), "--executor", "serial")
    assert again.code == 0, again.err
    assert call(capsys, "export", CELL, *out, "--victim").code == 0


def test_a_guard_s_model_is_exported_without_it_and_that_is_said() -> None:
    row = {"phase": "inference", "defense": "watcher"}
    (said,) = _notes(ModelSpec(arch="RN50"), row, False)
    assert "watcher acts when the model is used and has no weights of its own" in said
    assert _notes(ModelSpec(arch="RN50"), row, True) == []


def test_an_architecture_of_open_clip_comes_back_with_its_activation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    register(monkeypatch)
    state = {n: t.contiguous() for n, t in network(True, 32).state_dict().items()}
    save_file(state, tmp_path / "w.safetensors")
    grid = tiny_grid(
        tmp_path,
        model={
            **{"arch": ARCH, "pretrained": "w.safetensors", "quick_gelu": True},
            **{"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.25]},
        },
        recipes={"victim": RECIPE, "repair": RECIPE},
        rates=[0.1],
        defenses=["none"],
        gate={"strong": OPEN_GATE, "init_loss": 1},
        evaluate={"sets": ["report"]},
    )
    run_serial(grid, tmp_path / "out", tmp_path / "store")
    found = export_cell(tmp_path / "out", "badnet/0.1/none/s0", tmp_path / "model")
    assert "word_tokenizer.json" not in found.files
    assert isinstance(grid.model, ModelSpec)
    model = ours(tmp_path / "store", found.model_key, grid.model)
    net, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{tmp_path / 'model'}")
    tokenizer = open_clip.get_tokenizer(f"local-dir:{tmp_path / 'model'}")
    normal = preprocess.transforms[-1]
    assert (list(normal.mean), list(normal.std)) == ([0.5] * 3, [0.5, 0.5, 0.25])
    tokens_BT = tokenizer(["a photo of a circle", "sale!% off"])
    assert_alike(model, net.eval(), tokens_BT, list(normal.mean), list(normal.std))
    by_name = open_clip.create_model(
        f"{ARCH}-quickgelu",
        pretrained=str(tmp_path / "model" / "open_clip_model.safetensors"),
        force_image_size=32,
    )
    assert_alike(model, by_name.eval(), tokens_BT, list(normal.mean), list(normal.std))


# --- what there is to name


def test_models_are_listed_with_their_tags(capsys: pytest.CaptureFixture[str]) -> None:
    told = call(capsys, "models", "rn50")
    assert told.code == 0
    names = [line.split()[0] for line in told.out.splitlines() if line.startswith("RN")]
    assert {"RN50", "RN50-quickgelu", "RN50x4"} <= set(names)
    assert "openai*" in told.out
    assert "trained with QuickGELU" in told.out
    every = json.loads(call(capsys, "ls", "models", "--json").out)
    by_name = {one["arch"]: one for one in every}
    assert [one["arch"] for one in every][:2] == ["tiny", "small"]
    assert by_name["RN50"]["tags"][0]["tag"] == "openai"
    assert "tokenizer" in by_name["ViT-B-16-SigLIP"]["refused"]
    assert call(capsys, "models", "rn5o").code == 2
