"""Weights from elsewhere: read safely, named as open_clip does, under the network they are of."""

from __future__ import annotations

import json
import os
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import numpy as np
import open_clip
import pytest
import torch
from open_clip import factory
from open_clip import pretrained as registry
from open_clip.coca_model import CoCa
from open_clip.model import CLIP, CustomTextCLIP
from safetensors.torch import save_file
from torch import Tensor

from grid.gridfile import load_grid
from grid.model_entry import read_model
from grid.nodes import Raw, Where
from grid.planning import make_plan
from grid.preflight import data_places, look_around
from grid.quick import completeness, finished_run
from grid.registry import grid_source
from grid.spec import Grid, Tuned
from grid.stages import Bench, CorpusStage, FileModelStage, ModelStage, TriggerStage
from grid.tuning.campaign import CampaignDriver
from grid.tuning.file import load_campaign
from grid.tuning.preparation import Preparation
from grid.tuning.spec import Sees
from grid.tuning.tuned import write_held_out
from tests.campaigns import GRID, campaign, write_campaign_file
from tests.grids import RECIPE, TINY, call, outcomes, run_serial, tiny_grid
from tests.networks import ARCH, CONFIG, VIT, network, register
from victims import heads
from victims.architectures import architectures, cached, refusal, tag_names, tag_of
from victims.errors import GridError, UsageError
from victims.keys import file_sha256
from victims.lab import Ledger, ModelRef, spec_meta, spec_of
from victims.losses import clip_loss
from victims.models import Clip, ModelSpec, Tokens, fresh, preprocess_digest, save_weights
from victims.pretrained import load_pretrained, read_state
from victims.recipe import Recipe, Runtime
from victims.store import Store
from victims.training import PlainClip, optimizer_for

NO_REFERENCE = {"victim": RECIPE, "repair": RECIPE}

# --- every kind of network that open_clip has, behind our two calls

RESNET = {"layers": (1, 1, 1, 1), "width": 8, "image_size": 32}
TEXT = {"context_length": 12, "vocab_size": 64, "width": 32, "heads": 2, "layers": 2}
CODA = {"context_length": 12, "vocab_size": 64, "width": 32, "heads": 2, "layers": 1}
NETS: Mapping[str, Any] = {
    "resnet": (CLIP, RESNET, TEXT, {}),
    "vit": (CLIP, VIT, TEXT, {}),
    "quickgelu": (CLIP, VIT, TEXT, {"quick_gelu": True}),
    "mean of patches": (CLIP, {**VIT, "pool_type": "avg", "final_ln_after_pool": True}, TEXT, {}),
    "a text read at its last token": (CLIP, VIT, {**TEXT, "pool_type": "last"}, {}),
    "a text read at its first token": (
        *(CLIP, VIT, {**TEXT, "pool_type": "first", "no_causal_mask": True}),
        {},
    ),
    "an end token of its own": (CLIP, VIT, {**TEXT, "pool_type": "eos", "eos_id": 2}, {}),
    "a text that sees everything": (CLIP, VIT, {**TEXT, "no_causal_mask": True}, {}),
    "a projection with bias": (CLIP, VIT, {**TEXT, "proj_bias": True}, {}),
    "no projection": (CLIP, VIT, {**TEXT, "proj_type": "none"}, {}),
    "normalised queries": (CLIP, VIT, {**TEXT, "qk_norm": True}, {"nonscalar_logit_scale": True}),
    "a text tower apart": (CustomTextCLIP, VIT, TEXT, {}),
    "siglip": (
        CustomTextCLIP,
        VIT,
        {**TEXT, "no_causal_mask": True, "pool_type": "last", "proj_bias": True},
        {"init_logit_bias": -10.0},
    ),
    "coca": (
        CoCa,
        {**VIT, "attentional_pool": True, "attn_pooler_heads": 2, "output_tokens": True},
        {**TEXT, "embed_cls": True, "output_tokens": True},
        {"multimodal_cfg": CODA},
    ),
}


class Ids:
    """A tokenizer that has its ids for captions; 2 ends them, and no larger id does."""

    context = 12

    def __call__(self, captions: Any) -> Tokens:
        rng = np.random.default_rng(0)
        out = np.zeros((len(captions), self.context), dtype=np.int32)
        for row, length in enumerate(rng.integers(3, 8, len(captions))):
            out[row, :length] = [1, *rng.integers(3, 64, length - 2), 2]
        return out


def wrapped(name: str) -> Clip:
    cls, vision, text, more = NETS[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        net = cls(embed_dim=32, vision_cfg=vision, text_cfg=text, **more)
    model = Clip(ModelSpec(size=vision["image_size"]))
    model.net, model.tokenizer = net, Ids()
    return model.eval()


@pytest.mark.parametrize("name", NETS)
def test_features_are_those_of_open_clip(name: str) -> None:
    model = wrapped(name)
    whole_BT = torch.from_numpy(model.tokenizer(["", "", "", ""])).long()
    cut_BT = whole_BT[:, : int((whole_BT != 0).sum(1).max())]
    assert cut_BT.shape[1] < whole_BT.shape[1], "nothing is cut, so nothing is tried"
    size = model.spec.size
    image_BCHW = torch.randint(0, 256, (3, 3, size, size), dtype=torch.uint8)
    with torch.no_grad():
        theirs = model.net.encode_text(whole_BT, normalize=False)
        assert torch.allclose(model.embed_text(cut_BT), theirs, atol=1e-5)
        theirs = model.net.encode_text(whole_BT, normalize=True)
        assert torch.allclose(model.encode_text(cut_BT), theirs, atol=1e-5)
        normal = model.normalise(image_BCHW)
        theirs = model.net.encode_image(normal, normalize=False)
        assert torch.allclose(model.embed_image(image_BCHW), theirs, atol=1e-5)
        theirs = model.net.encode_image(normal, normalize=True)
        assert torch.allclose(model.encode_image(image_BCHW), theirs, atol=1e-5)
    assert model.width == theirs.shape[-1]


@pytest.mark.parametrize("name", ["vit", "siglip", "coca"])
def test_what_no_feature_depends_on_is_not_trained(name: str) -> None:
    """With several processes, a parameter that gets no gradient stops a fit."""
    model, objective = wrapped(name).train(), PlainClip()
    optimizer = optimizer_for(model, objective, Recipe(epochs=1, batch_size=4, lr=1e-3))
    tokens_BT = torch.from_numpy(model.tokenizer([""] * 4)).long()
    image_BD = model.encode_image(torch.rand(4, 3, 16, 16))
    loss = clip_loss(image_BD, model.encode_text(tokens_BT), model.scale)
    torch.autograd.backward(loss)
    moved = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for parameter_name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == (id(parameter) in moved), parameter_name
    assert bool(model.idle()) == (name != "vit")


# --- files


@pytest.fixture(scope="module")
def model() -> Clip:
    return fresh(ModelSpec(), 3).eval()


def plain_state(model: Clip) -> dict[str, Tensor]:
    return {name: tensor.contiguous() for name, tensor in model.net.state_dict().items()}


def same(one: Clip, other: Clip) -> bool:
    pairs = zip(one.net.state_dict().items(), other.net.state_dict().items(), strict=True)
    return all(a == b and torch.equal(x, y) for (a, x), (b, y) in pairs)


@pytest.mark.parametrize("kind", ["ours", "plain", "pt", "training", "bin"])
def test_checkpoints_are_read_whoever_wrote_them(model: Clip, tmp_path: Path, kind: str) -> None:
    state = plain_state(model)
    path = tmp_path / f"w.{'safetensors' if kind in ('ours', 'plain') else 'pt'}"
    if kind == "ours":
        save_weights(model, path)
    elif kind == "plain":
        save_file(state, path)
    elif kind == "training":
        named = {f"module.{name}": tensor for name, tensor in state.items()}
        optimizer = {"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": [{"lr": 0.1}]}
        whole = {"epoch": 4, "name": "a run", "state_dict": named, "optimizer": optimizer}
        torch.save(whole, path)
    else:
        path = path.with_suffix(f".{kind}")
        torch.save(state | {"input_resolution": torch.tensor(32)}, path)
    assert same(load_pretrained(fresh(ModelSpec(), 4), path), model)


def test_half_precision_comes_back_whole(model: Clip, tmp_path: Path) -> None:
    halves = {n: t.half() if t.is_floating_point() else t for n, t in plain_state(model).items()}
    save_file(halves, tmp_path / "w.safetensors")
    loaded = load_pretrained(fresh(ModelSpec(), 4), tmp_path / "w.safetensors")
    weight = loaded.net.visual.conv1.weight
    assert weight.dtype == torch.float32
    assert torch.equal(weight, model.net.visual.conv1.weight.half().float())


@pytest.mark.parametrize("name", ["a text tower apart", "siglip", "vit"])
def test_states_are_converted_as_open_clip_does(name: str, tmp_path: Path) -> None:
    """From a CLIP for other picture sizes, longer captions and without a bias of the logits."""
    vision, text = {**VIT, "image_size": 32}, {**TEXT, "context_length": 16}
    if name == "siglip":
        text |= {"proj_bias": True, "no_causal_mask": True}
    source = CLIP(embed_dim=32, vision_cfg=vision, text_cfg=text, nonscalar_logit_scale=True)
    path = tmp_path / "w.safetensors"
    state = {n: t.contiguous() for n, t in source.state_dict().items()}
    if name == "siglip":  # where the projection is a layer, it moves under its new name alone
        state = {
            (n if n.startswith(("visual.", "logit")) else f"text.{n}"): t for n, t in state.items()
        }
    save_file(state, path)
    ours, theirs = wrapped(name), wrapped(name)
    theirs.net.logit_scale.data.fill_(0)
    factory.load_checkpoint(theirs.net, str(path))
    assert same(load_pretrained(ours, path), theirs)


def save_program(path: Path) -> None:
    trace: Any = torch.jit.trace
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch would rather have no programs at all
        trace(torch.nn.Linear(2, 2), torch.zeros(1, 2)).save(str(path))


@dataclass
class Harmless:
    """Would be made by unpickling."""

    value: int = 1


REFUSED = [
    ("hostile.pt", "cannot be read as tensors alone .*can run code"),
    ("program.pt", "program of torch.jit.*pretrained: openai"),
    ("noise.pt", "cannot be read as tensors alone"),
    ("noise.safetensors", "is no safetensors file"),
    ("list.pt", "holds a list, and no weights by name"),
    ("numbers.pt", r"holds a dict with epoch, and no weights by name"),
    ("weights.ckpt", r"weights are read from \.safetensors, \.pt, \.pth, \.bin files"),
]


@pytest.mark.parametrize(("name", "says"), REFUSED)
def test_what_is_no_weights_is_refused_with_a_way_out(
    model: Clip, tmp_path: Path, name: str, says: str
) -> None:
    path = tmp_path / name
    if name == "hostile.pt":
        torch.save({"state_dict": {"weight": torch.zeros(1)}, "args": Harmless()}, path)
    elif name == "program.pt":
        save_program(path)
    elif name in ("list.pt", "numbers.pt"):
        torch.save([1, 2] if name == "list.pt" else {"epoch": 3}, path)
    else:
        path.write_bytes(b"noise" * 9)
    with pytest.raises(GridError, match=says) as told:
        read_state(path)
    assert str(path) in str(told.value)


def test_weights_of_another_network_are_explained(model: Clip, tmp_path: Path) -> None:
    save_weights(model, tmp_path / "w.safetensors")
    says = r"belong to another model than small \(\d+ tensors missing or of another shape, 0 unkn"
    with pytest.raises(GridError, match=says):
        load_pretrained(fresh(ModelSpec(arch="small"), 0), tmp_path / "w.safetensors")
    with pytest.raises(GridError, match="the first: ") as told:
        load_pretrained(fresh(ModelSpec(arch="small", size=64), 0), tmp_path / "w.safetensors")
    assert "another picture size" not in str(told.value), "layers differ before positions do"
    assert "the first: visual.attnpool.positional_embedding" not in str(told.value)
    says = r"attnpool.positional_embedding is \(2, .*another picture size, which this tower cannot"
    with pytest.raises(GridError, match=says):
        load_pretrained(fresh(ModelSpec(size=64), 0), tmp_path / "w.safetensors")


# --- a registry of our own


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An architecture with two tags, and an empty cache of the hub."""
    register(monkeypatch)
    tags = {
        "openai": registry._pcfg(hf_hub="org/quick/", quick_gelu=True),
        "halves": registry._slpcfg(hf_hub="org/halves/weights.bin"),
    }
    monkeypatch.setitem(registry._PRETRAINED, ARCH, tags)
    monkeypatch.setitem(registry._PRETRAINED, f"{ARCH}-quickgelu", tags)
    cache = tmp_path / "hub"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))

    def offline(*_: Any) -> None:
        raise OSError("no network in tests")

    monkeypatch.setattr("victims.architectures._reach", offline)
    return cache


def keep(cache: Path, repo: str, name: str, net: Any) -> Path:
    """Put weights where the hub's client would have."""
    snapshot = cache / f"models--{repo.replace('/', '--')}" / "snapshots" / "0123abc"
    snapshot.mkdir(parents=True)
    refs = snapshot.parents[1] / "refs"
    refs.mkdir()
    (refs / "main").write_text("0123abc")
    save_file({n: t.contiguous() for n, t in net.state_dict().items()}, snapshot / name)
    return snapshot / name


def entry(**given: Any) -> Raw:
    return Raw.of(given, Where("grid.yaml", 1, "model"))


def test_a_tag_brings_its_activation_whatever_the_architecture_is_called(hub: Path) -> None:
    path = keep(hub, "org/quick", "open_clip_model.safetensors", network(True))
    plain = read_model(entry(arch=ARCH, pretrained="openai"), 16)
    named = read_model(entry(arch=f"{ARCH}-quickgelu", pretrained="openai"), 16)
    assert plain.weights is not None
    assert named.weights is not None
    assert (plain.weights.path, plain.weights.tag) == (str(path), "openai")
    assert plain.spec.quick_gelu is True
    assert named.spec.quick_gelu is None, "its own activation is not spelled out in keys"
    (said,) = plain.weights.notes
    assert "gets QuickGELU in place of GELU" in said
    assert named.weights.notes == ()
    image_BCHW = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8)
    features = []
    for found in (plain, named):
        model = load_pretrained(found.spec.empty().eval(), path)
        with torch.no_grad():
            features.append(model.embed_image(image_BCHW))
            theirs = network(True).encode_image(model.normalise(image_BCHW))
            wrong = network(False).encode_image(model.normalise(image_BCHW))
        assert torch.allclose(features[-1], theirs, atol=1e-5)
        assert not torch.allclose(features[-1], wrong, atol=1e-4), "the activation is not seen"
    stages = [FileModelStage(f.spec, plain.weights) for f in (plain, named)]
    bare = FileModelStage(ModelSpec(arch=ARCH, size=16), plain.weights)
    assert len({stage.key for stage in (*stages, bare)}) == 3
    assert spec_of(spec_meta(plain.spec)) == plain.spec
    assert plain.spec.label == f"{ARCH}-quickgelu-16"
    with pytest.raises(UsageError, match=r"were trained with QuickGELU.*leave quick_gelu out"):
        read_model(entry(arch=ARCH, pretrained="openai", quick_gelu=False), 16)


def test_a_tag_brings_its_colours(hub: Path) -> None:
    keep(hub, "org/halves", "weights.safetensors", network(False))
    found = read_model(entry(arch=ARCH, pretrained="halves"), 16)
    assert (found.spec.mean, found.spec.std) == ((0.5,) * 3, (0.5,) * 3)
    assert found.spec.quick_gelu is None
    model = found.spec.empty()
    assert torch.equal(model.normalise(torch.zeros(1, 3, 16, 16)), -torch.ones(1, 3, 16, 16))
    assert preprocess_digest(model) != preprocess_digest(ModelSpec(arch=ARCH, size=16).empty())
    assert spec_of(spec_meta(found.spec) | {"mean": [0.5] * 3, "std": [0.5] * 3}) == found.spec
    with pytest.raises(UsageError, match=r"expect mean \[0.5, 0.5, 0.5\]"):
        read_model(entry(arch=ARCH, pretrained="halves", mean=[0, 0, 0], std=[1, 1, 1]), 16)


def test_weights_that_want_other_pictures_are_said(
    hub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SigLIP's and MobileCLIP's lost points to another way of resizing, and nothing told of it."""
    keep(hub, "org/halves", "weights.safetensors", network(False))
    other = {**registry._PRETRAINED[ARCH]["halves"], "interpolation": "bilinear"}
    monkeypatch.setitem(registry._PRETRAINED[ARCH], "halves", other | {"resize_mode": "squash"})
    found = read_model(entry(arch=ARCH, pretrained="halves"), 16)
    assert found.weights is not None
    (note,) = found.weights.notes
    assert "halves of Tiny-Test-16 want pictures that are resized otherwise" in note
    assert "bilinear (bicubic here), squash (shortest here)" in note
    path = tmp_path / "mine.safetensors"
    save_file({n: t.contiguous() for n, t in network(False).state_dict().items()}, path)
    config = {"model_cfg": CONFIG, "preprocess_cfg": {"resize_mode": "squash"}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    beside = read_model(entry(arch=ARCH, pretrained=str(path)), 16)
    assert beside.weights is not None
    (note,) = [note for note in beside.weights.notes if "resized" in note]
    assert "the weights of mine.safetensors" in note
    assert "squash (shortest here). " in note
    assert "bilinear" not in note


def test_what_is_not_cached_and_cannot_be_fetched_says_what_to_download(hub: Path) -> None:
    with pytest.raises(UsageError) as told:
        read_model(entry(arch=ARCH, pretrained="openai"), 16)
    said = str(told.value)
    assert said.startswith("grid.yaml:1: model.pretrained: the weights 'openai' of Tiny-Test-16")
    assert "hf download org/quick open_clip_model.safetensors" in said
    assert "the file's path in place of the tag, with quick_gelu: true" in said


def test_a_node_finds_the_weights_of_a_tag_in_its_own_cache(hub: Path, tmp_path: Path) -> None:
    path = keep(hub, "org/quick", "open_clip_model.safetensors", network(True))
    found = read_model(entry(arch=ARCH, pretrained="openai"), 16)
    assert found.weights is not None
    moved = FileModelStage(found.spec, replace(found.weights, path="/on/another/machine"))
    store = Store(tmp_path / "store")
    (place,) = data_places([moved], store)
    assert look_around(store.uri, "preflight-x/a", 0, [place])["absent"] == []
    bench = Bench(store, Runtime(), lambda line: None, Ledger())
    moved.run(bench)
    loaded = bench.lab(found.spec).load(ModelRef(moved.key))
    assert same(loaded, load_pretrained(found.spec.empty(), path))
    path.unlink()
    absent = look_around(store.uri, "preflight-x/b", 0, [place])["absent"]
    assert absent == [f"/on/another/machine (nor are the weights openai of {ARCH} in its cache)"]
    assert data_places([moved], store) == [], "the store has what is made of them"


def test_of_a_file_the_author_says_what_nobody_else_can_know(hub: Path, tmp_path: Path) -> None:
    path = tmp_path / "mine.safetensors"
    save_file({n: t.contiguous() for n, t in network(True).state_dict().items()}, path)
    found = read_model(entry(arch=ARCH, pretrained=str(path)), 16)
    assert found.spec == ModelSpec(arch=ARCH, size=16)
    assert found.weights is not None
    colours_doubt, doubt = found.weights.notes
    assert "halves of Tiny-Test-16 expect others" in colours_doubt
    assert "openai were trained with QuickGELU" in doubt
    said = {"mean": [0.5] * 3, "std": [0.25] * 3}
    sure = read_model(entry(arch=ARCH, pretrained=str(path), quick_gelu=True, **said), 16)
    assert sure.weights is not None
    assert (sure.spec.quick_gelu, sure.weights.notes) == (True, ())
    other = entry(arch=f"{ARCH}-quickgelu", pretrained=str(path), quick_gelu=False)
    assert read_model(other, 16).spec.quick_gelu is False
    colours = read_model(entry(arch=ARCH, pretrained=str(path), mean=[0] * 3, std=[1] * 3), 16)
    assert bool((colours.spec.empty().normalise(torch.ones(1, 3, 16, 16)) == 1).all())


def test_what_lies_beside_a_checkpoint_is_its_author_s_word(hub: Path, tmp_path: Path) -> None:
    """As in a folder of the hub, and in one that `grid export` wrote."""
    path = tmp_path / "open_clip_model.safetensors"
    save_file({n: t.contiguous() for n, t in network(True).state_dict().items()}, path)
    beside, colours = tmp_path / "open_clip_config.json", {"mean": [0.5] * 3, "std": [0.25] * 3}
    config = {"model_cfg": {**CONFIG, "quick_gelu": True}, "preprocess_cfg": colours}
    beside.write_text(json.dumps(config))
    found = read_model(entry(arch=ARCH, pretrained=str(path)), 16)
    assert (found.spec.quick_gelu, found.spec.mean, found.spec.std) == (
        *(True, (0.5, 0.5, 0.5)),
        (0.25, 0.25, 0.25),
    )
    assert found.weights is not None
    (note,) = found.weights.notes
    assert "beside open_clip_model.safetensors says QuickGELU, mean [0.5, 0.5, 0.5]" in note
    told = read_model(entry(arch=ARCH, pretrained=str(path), quick_gelu=False), 16)
    assert told.spec.quick_gelu is None, "what the grid file says comes first"
    assert told.weights is not None
    assert "QuickGELU" not in told.weights.notes[0], "what is not taken is not said to be"
    for text in ("no JSON", "[]", "{}", '{"model_cfg": 3}'):
        beside.write_text(text)
        assert read_model(entry(arch=ARCH, pretrained=str(path)), 16).spec.quick_gelu is None


def test_what_speaks_of_another_model_is_not_believed(hub: Path, tmp_path: Path) -> None:
    """A folder of several checkpoints has one such file, and one of them gave all its colours."""
    path, beside = tmp_path / "mine.safetensors", tmp_path / "open_clip_config.json"
    save_file({n: t.contiguous() for n, t in network(False).state_dict().items()}, path)
    vision = CONFIG["vision_cfg"]
    others: list[tuple[dict[str, Any], str]] = [
        ({"embed_dim": 512}, "embed_dim is 512 there and 32 here"),
        ({"vision_cfg": {**vision, "layers": [3, 4, 6, 3]}}, r"layers is \[3, 4, 6, 3\] there"),
        ({"vision_cfg": {**vision, "width": 768}}, "vision_cfg.width is 768 there and 32 here"),
        ({"vision_cfg": {**vision, "image_size": 224}}, "image_size is 224 there and 16 here"),
        ({"text_cfg": {**CONFIG["text_cfg"], "layers": 12}}, "text_cfg.layers is 12 there"),
    ]
    colours = {"mean": [0.5] * 3, "std": [0.25] * 3}
    for changes, says in others:
        model = {**CONFIG, "quick_gelu": True, **changes}
        beside.write_text(json.dumps({"model_cfg": model, "preprocess_cfg": colours}))
        found = read_model(entry(arch=ARCH, pretrained=str(path)), 16)
        assert (found.spec.quick_gelu, found.spec.mean) == (None, None)
        assert found.weights is not None
        assert re.search(f"is not heeded: .*{says}", found.weights.notes[0]), says


def test_colours_that_tags_disagree_about_are_said(
    hub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "mine.safetensors"
    save_file({n: t.contiguous() for n, t in network(False).state_dict().items()}, path)

    def notes(**given: Any) -> list[str]:
        found = read_model(entry(arch=ARCH, pretrained=str(path), **given), 16)
        assert found.weights is not None
        return [note for note in found.weights.notes if "mean" in note]

    assert read_model(entry(arch=ARCH, pretrained=str(path)), 16).spec.mean is None
    (note,) = notes()
    assert f"OpenAI's mean and std, and halves of {ARCH} expect others" in note
    assert notes(mean=[0.5] * 3, std=[0.5] * 3) == []
    monkeypatch.delitem(registry._PRETRAINED[ARCH], "halves")
    assert notes() == [], "its tags agree"


BAD_ENTRIES: list[tuple[dict[str, Any], str]] = [
    ({"pretrained": "openia"}, r"no weights called 'openia'.*Did you mean 'openai'"),
    ({"pretrained": "hf-hub:org/x"}, "names of the hub are not read"),
    ({"pretrained": "$NOWHERE_AT_ALL/w.pt"}, "needs the environment variable NOWHERE_AT_ALL"),
    ({"pretrained": "absent.safetensors"}, "there is no file .*relative to the grid file"),
    ({"pretrained": "./w.ckpt"}, r"weights are read from \.safetensors"),
    ({"quick_gelu": "yes"}, "expected auto, true or false, got 'yes'"),
    ({"mean": [0.5, 0.5, 0.5]}, "mean and std belong together"),
    ({"mean": [0, 0, 0], "std": [1, 1, 0]}, "std must be above 0"),
    ({"arch": "Tiny-Test-17"}, f"Did you mean '{ARCH}'"),
    ({"arch": "roberta-ViT-B-32"}, "its text tower is Hugging Face's roberta-base"),
    ({"arch": "ViT-B-16-SigLIP"}, "its tokenizer is Hugging Face's timm/ViT-B-16-SigLIP"),
    ({"arch": "RN50", "pretrained": "openai"}, "for pictures of 224 px.*do not stretch to 16 px"),
    ({"pretraned": "openai"}, "unknown key 'pretraned'. Did you mean 'pretrained'"),
]


@pytest.mark.parametrize(("given", "says"), BAD_ENTRIES)
def test_what_cannot_be_meant_is_said_where_it_stands(
    hub: Path, given: dict[str, Any], says: str
) -> None:
    with pytest.raises(UsageError, match=says) as told:
        read_model(entry(**{"arch": ARCH, **given}), 16)
    assert "grid.yaml:1: model" in str(told.value)


def test_every_architecture_is_taken_or_refused_for_a_reason() -> None:
    refused = {name for name in architectures() if refusal(name)}
    assert {"ViT-B-16-SigLIP", "roberta-ViT-B-32"} <= refused
    assert not {"RN50", "ViT-B-32", "coca_ViT-B-32", "EVA02-B-16", "MobileCLIP-S1"} & refused
    tags = [tag_of("RN50", name) for name in tag_names("RN50")]
    assert {tag.quick_gelu for tag in tags if tag} == {True}
    openai = tag_of("RN50", "openai")
    assert openai is not None
    assert openai.hub == "timm/resnet50_clip.openai/"


def test_a_cached_program_is_no_cached_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """OpenAI's own client leaves RN50.pt where open_clip looks, which is a program."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    tag = tag_of("RN50", "openai")
    assert tag is not None
    path = tmp_path / ".cache" / "clip" / "RN50.pt"
    path.parent.mkdir(parents=True)
    save_program(path)
    assert cached(tag) is None
    torch.save({"weight": torch.zeros(1)}, path)
    assert cached(tag) == path


# --- grids


def weights_file(folder: Path, seed: int = 3, name: str = "w.safetensors") -> Path:
    folder.mkdir(exist_ok=True)
    save_weights(fresh(ModelSpec(), seed), folder / name)
    return folder / name


def grid_from(folder: Path, pretrained: str, **changes: Any) -> Grid:
    model = {"arch": "tiny", "pretrained": pretrained}
    return tiny_grid(folder, **{"model": model, "recipes": NO_REFERENCE, **changes})


def test_a_grid_is_known_by_what_its_weights_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights_file(tmp_path / "a")
    weights_file(tmp_path / "b", name="renamed.safetensors")
    weights_file(tmp_path / "c", seed=4)
    first = grid_from(tmp_path / "a", "w.safetensors")
    monkeypatch.setenv("MODELS", str(tmp_path / "b"))
    second = grid_from(tmp_path / "a", "$MODELS/renamed.safetensors")
    other = grid_from(tmp_path / "a", str(tmp_path / "c" / "w.safetensors"))
    plans = [make_plan(grid) for grid in (first, second, other)]
    keys = [[cell.key for cell in plan.cells] for plan in plans]
    assert keys[0] == keys[1]
    assert not set(keys[0]) & set(keys[2])
    assert first.identity_hash == second.identity_hash != other.identity_hash
    assert tiny_grid(tmp_path / "a").identity_hash not in (first.identity_hash, other.identity_hash)
    fits = [s for s in plans[0].stages.values() if isinstance(s, ModelStage)]
    files = [s for s in plans[0].stages.values() if isinstance(s, FileModelStage)]
    assert len(files) == 1
    assert {fit.init.key for fit in fits if fit.init} == {files[0].key}
    assert all(fit.init for fit in fits), "nothing is fitted in place of the weights"
    corpora = [s.spec.split for s in plans[0].stages.values() if isinstance(s, CorpusStage)]
    assert sorted(corpora) == ["clean", "report", "shifted", "suspect", "tuning"]
    assert first.model_words == f"tiny-32:{files[0].weights.sha256[:8]}"


def test_attacks_craft_on_the_same_weights(tmp_path: Path) -> None:
    weights_file(tmp_path)
    grid = grid_from(tmp_path, "w.safetensors", attacks=["badclip"])
    assert grid.weights is not None
    triggers = [s for s in make_plan(grid).stages.values() if isinstance(s, TriggerStage)]
    surrogates = {trigger.surrogate.key for trigger in triggers if trigger.surrogate}
    assert surrogates == {FileModelStage(ModelSpec(), grid.weights).key}


def test_weights_are_hashed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = weights_file(tmp_path)
    os.utime(path, (1, 1))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    read: list[Path] = []
    whole = file_sha256

    def counted(path: Path) -> str:
        read.append(path)
        return whole(path)

    monkeypatch.setattr("victims.fingerprints.file_sha256", counted)
    hashes = {grid_from(tmp_path, "w.safetensors").identity_hash for _ in range(3)}
    assert (len(hashes), len(read)) == (1, 1)
    os.utime(path, (2, 2))
    assert grid_from(tmp_path, "w.safetensors").identity_hash in hashes
    assert len(read) == 2


BAD_GRIDS: list[tuple[dict[str, Any], str]] = [
    ({"regime": "S"}, "model.pretrained: in regime S victims are trained from random weights"),
    ({"recipes": TINY["recipes"]}, "recipes.reference: the public model is `pretrained`"),
    ({"model": {"arch": "tiny", "size": 64}}, "size: 64 px, but the pictures of `data` have 32"),
    ({"gate": {"reference": 1.5}}, "reference is a share in 0..1"),
    (
        {"regime": "S", "model": "tiny", "gate": {"reference": 0.5}},
        "gate.reference: the weights that victims start from .* in regime S",
    ),
    ({"model": "tiny"}, "missing key 'reference'.*or give `model` weights of its own"),
]


@pytest.mark.parametrize(("changes", "says"), BAD_GRIDS)
def test_grids_that_cannot_be_meant(tmp_path: Path, changes: dict[str, Any], says: str) -> None:
    weights_file(tmp_path)
    with pytest.raises(UsageError, match=says):
        grid_from(tmp_path, "w.safetensors", **changes)


def test_a_judge_can_be_pretrained_too(tmp_path: Path) -> None:
    weights_file(tmp_path)
    fit = {"epochs": 1, "batch_size": 16, "lr": 0.01}
    labelled: dict[str, Any] = {
        "track": "supervised",
        "model": "preact_tiny",
        "recipes": {"victim": fit, "repair": fit},
        "defenses": ["none", "cgd_classifier"],
    }
    model = {"arch": "tiny", "pretrained": "w.safetensors"}
    grid = tiny_grid(tmp_path, **labelled, guides={"judge": {"model": model}})
    found = {stage for stage in make_plan(grid).stages.values() if stage.family == "file_model"}
    assert len(found) == 1
    guide = {"model": model, "weights": "w.safetensors"}
    with pytest.raises(UsageError, match="this model is `pretrained`: leave weights out"):
        tiny_grid(tmp_path, **labelled, guides={"judge": guide})
    labelled["model"] = {"arch": "preact_tiny", "pretrained": "w.safetensors"}
    with pytest.raises(UsageError, match="an image classifier is trained from scratch"):
        tiny_grid(tmp_path, **labelled, guides={"judge": {"model": model}})


# --- the gate of the start weights


def test_a_plan_says_where_nothing_is_asked_of_the_start_weights(tmp_path: Path) -> None:
    weights_file(tmp_path)

    def asked(**changes: Any) -> bool:
        plan = make_plan(grid_from(tmp_path, "w.safetensors", **changes))
        return not any("nothing is asked of the start weights" in said for said in plan.cautions())

    assert not asked()
    assert asked(gate={**TINY["gate"], "reference": 0})
    assert not any("start weights" in said for said in make_plan(tiny_grid(tmp_path)).cautions())


def test_no_victim_is_trained_from_weights_that_fail(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights_file(tmp_path)
    gate = {**TINY["gate"], "reference": 0.9}
    grid = grid_from(tmp_path, "w.safetensors", gate=gate)
    report = run_serial(grid, tmp_path / "out", tmp_path / "store")
    assert (report.code, report.victims_trained, report.counts) == (4, 0, {"skipped": 4})
    assert grid.weights is not None
    start = FileModelStage(ModelSpec(), grid.weights)
    assert set(Store(tmp_path / "store").keys("model")) == {start.key}
    rows = outcomes(tmp_path / "out")
    assert len(rows) == 4
    for row in rows.values():
        assert row["status"] == "skipped"
        assert "of 32 pictures, and gate.reference asks for 90.0%" in row["detail"]
        assert "QuickGELU" in row["detail"]
        assert "class names or templates" in row["detail"]
    # The same command says the same, and runs nothing.
    again = run_serial(grid, tmp_path / "out", tmp_path / "store")
    assert (again.code, again.stages_run) == (4, 0)
    source = grid_source(str(tmp_path / "tiny.yaml"))
    assert finished_run(source, tmp_path / "out") is None, "the weights may have changed"
    (told,) = completeness(source, tmp_path / "out", str(tmp_path / "store"))["invalid"]
    assert told["why"].startswith("no victim was trained: ")
    shown = call(capsys, "leaderboard", tmp_path / "out")
    assert shown.code == 0
    assert "4 skipped (gate not passed)" in shown.out


def test_weights_that_reach_the_gate_exactly_pass_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(heads, "WORTH_KEEPING", 1)
    weights_file(tmp_path)
    gate = {**TINY["gate"], "reference": 0}
    store = tmp_path / "store"
    first = make_plan(grid_from(tmp_path, "w.safetensors", gate=gate))
    assert first.start is not None
    bench = Bench(Store(store), Runtime(), lambda line: None, Ledger())
    for stage in first.missing([first.start], set()).values():
        stage.run(bench)
    found = bench.store.need(first.start.key).meta["clean_top1"]
    assert found["n"] == 32
    assert len(bench.store.keys("head")) == 1, "a long list of prompts is read once for all"
    for hits, passes in ((found["successes"], True), (found["successes"] + 1, False)):
        gate = {**TINY["gate"], "reference": hits / 32}
        grid = grid_from(tmp_path / f"{passes}", str(tmp_path / "w.safetensors"), gate=gate)
        report = run_serial(grid, tmp_path / f"out-{passes}", store)
        assert (report.victims_trained, report.code) == ((2, 0) if passes else (0, 4))


def test_the_accuracy_of_the_start_is_the_boards(tmp_path: Path) -> None:
    """Two ways to one number: what the gate measures is the clean accuracy of the init model."""
    weights_file(tmp_path)
    gate = {**TINY["gate"], "reference": 0}
    grid = grid_from(tmp_path, "w.safetensors", gate=gate, defenses=["none"])
    run_serial(grid, tmp_path / "out", tmp_path / "store")
    plan, store = make_plan(grid), Store(tmp_path / "store")
    assert plan.start is not None
    (check,) = plan.gates.values()
    text = store.need(check.init[0].key).path("metrics.json").read_text()
    theirs = json.loads(text)["sets"]["tuning"]["metrics"]["clean_top1"]
    ours = store.need(plan.start.key).meta["clean_top1"]
    assert (ours["successes"], ours["n"]) == (theirs["successes"], theirs["n"])


# --- campaigns


def test_a_campaign_asks_the_start_weights_first(tmp_path: Path) -> None:
    found = campaign(grid={**GRID, "gate": {**TINY["gate"], "reference": 0.99}})
    store, said = Store(tmp_path / "store"), list[str]()
    driver = CampaignDriver(found, tmp_path / "out", store, say=said.append)
    sees = dict.fromkeys([Sees.ATTACKS])
    options: dict[str, Any] = {"out": tmp_path / "out", "store": store, "say": said.append}
    driver.prepared = Preparation(found, driver._stages(sees), executor="serial", **options)
    executor = driver.prepared.start()
    with pytest.raises(GridError, match=r"no victim was trained: .*asks for 99\.0%"):
        driver._check_start(executor, sees)
    executor.close()
    assert len(set(store.keys("model"))) == 1, "the reference, and nothing that starts from it"


def test_the_held_out_grid_of_a_campaign_finds_the_same_weights(tmp_path: Path) -> None:
    """It is written into the results, where a relative path leads somewhere else."""
    weights_file(tmp_path)
    model = {"arch": "tiny", "pretrained": "w.safetensors"}
    path = write_campaign_file(tmp_path, grid={**GRID, "model": model, "recipes": NO_REFERENCE})
    found = load_campaign(str(path))
    chosen = Tuned(
        name="finetune@tuned", defense="finetune", campaign="mini", objective="tuned", trials=1,
        device_seconds=1.0,
    )  # fmt: skip
    (tmp_path / "out").mkdir()
    held_out = write_held_out(tmp_path / "out", found, [chosen], lambda line: None)
    assert held_out is not None
    weights = load_grid(str(held_out)).weights
    assert weights is not None
    assert weights == found.grid.weights


@pytest.mark.exhaustive
def test_good_weights_pass_where_random_ones_fail(tmp_path: Path) -> None:
    data = {"world": {**TINY["data"]["world"], "public": 10_000, "tuning": 200}}
    fit = {"epochs": 5, "batch_size": 64, "lr": 5e-3}
    recipes = {**TINY["recipes"], "reference": fit}
    trained = tiny_grid(tmp_path, data=data, recipes=recipes, defenses=["none"])
    run_serial(trained, tmp_path / "first", tmp_path / "store")
    plan = make_plan(trained)
    reference = next(s for s in plan.stages.values() if isinstance(s, ModelStage) and not s.init)
    good = Store(tmp_path / "store").need(reference.key).path("weights.safetensors")
    random = weights_file(tmp_path)
    for path, code in ((good, 0), (random, 4)):
        gate = {**TINY["gate"], "reference": 0.5}
        grid = grid_from(tmp_path / f"{code}", str(path), data=data, gate=gate)
        report = run_serial(grid, tmp_path / f"out{code}", tmp_path / f"store{code}")
        assert (report.code, bool(report.victims_trained)) == (code, code == 0)


@pytest.mark.exhaustive
def test_openai_s_architecture_itself(tmp_path: Path) -> None:
    """RN50 at 64 px, through a whole grid of seconds."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = open_clip.create_model("RN50-quickgelu", force_image_size=64)
    torch.save(
        {"state_dict": {f"module.{n}": t for n, t in net.state_dict().items()}}, tmp_path / "w.pt"
    )
    data = {"world": {**TINY["data"]["world"], "size": 64}}
    model = {"arch": "RN50", "pretrained": "w.pt", "quick_gelu": True}
    grid = tiny_grid(tmp_path, data=data, model=model, recipes=NO_REFERENCE)
    report = run_serial(grid, tmp_path / "out", tmp_path / "store")
    assert report.counts == {"ok": 4}
    row = next(iter(outcomes(tmp_path / "out").values()))
    assert row["model"].startswith("RN50-quickgelu-64:")
