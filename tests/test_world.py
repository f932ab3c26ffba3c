"""The embedded world and its words: reproducible, disjoint, spoken in its own vocabulary.

``python tests/test_world.py`` writes the golden file anew, after a wanted change of the world
and of ``World.version``.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from victims import words
from victims.errors import GridError, UsageError
from victims.shapes import atlas
from victims.wordnet import WordNet
from victims.words import LEXICON, synonym_source, synonyms, world_vocabulary
from victims.world import CLASSES, SPLITS, TEMPLATES, Rendered, World, render, render_chunks

GOLDEN = Path(__file__).parent / "golden" / "world.npz"


@pytest.fixture(scope="module")
def public() -> Rendered:
    return render(World(), "public", 2000)


def _same(left: Rendered, right: Rendered) -> bool:
    return (
        np.array_equal(left.image_BCHW, right.image_BCHW)
        and np.array_equal(left.labels, right.labels)
        and left.captions == right.captions
    )


def _first(rendered: Rendered, num_rows: int) -> Rendered:
    return Rendered(*(column[:num_rows] for column in rendered))  # type: ignore[arg-type]


def test_the_same_seed_gives_the_same_bytes(public: Rendered) -> None:
    assert _same(render(World(), "public", 2000), public)
    assert not _same(render(World(seed=1), "public", 2000), public)


@pytest.mark.parametrize("num_rows", [0, 1, 17, 256, 300])
def test_a_shorter_draw_is_a_prefix(public: Rendered, num_rows: int) -> None:
    assert _same(render(World(), "public", num_rows), _first(public, num_rows))


def test_a_shorter_draw_is_a_prefix_where_a_block_takes_many_passes() -> None:
    world = World(size=97)
    assert _same(render(world, "shifted", 21), _first(render(world, "shifted", 40), 21))


def test_chunks_are_the_rows_in_order(public: Rendered) -> None:
    chunks = list(render_chunks(World(), "public", 2000, chunk=768))
    assert [len(chunk.captions) for chunk in chunks] == [768, 768, 464]
    images = np.concatenate([chunk.image_BCHW for chunk in chunks])
    labels = np.concatenate([chunk.labels for chunk in chunks])
    captions = [caption for chunk in chunks for caption in chunk.captions]
    assert _same(Rendered(images, labels, captions), public)


def test_the_number_of_threads_changes_nothing(public: Rendered) -> None:
    before = torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            assert _same(render(World(), "public", 600), _first(public, 600))
    finally:
        torch.set_num_threads(before)


def test_no_picture_is_in_two_splits() -> None:
    seen: Counter[bytes] = Counter()
    for split in SPLITS:
        images = render(World(), split, 1000).image_BCHW
        seen.update(hashlib.sha256(image.tobytes()).digest() for image in images)
    assert len(seen) == 1000 * len(SPLITS)


@pytest.mark.parametrize("size", [32, 64, 224])
def test_a_size_is_the_same_scene_in_other_pixels(size: int, public: Rendered) -> None:
    rendered = render(World(size=size), "public", 24)
    assert rendered.image_BCHW.shape == (24, 3, size, size)
    assert rendered.image_BCHW.dtype == np.uint8
    assert rendered.labels.dtype == np.int64
    assert rendered.captions == public.captions[:24]
    assert np.array_equal(rendered.labels, public.labels[:24])
    small = torch.nn.functional.adaptive_avg_pool2d(
        torch.from_numpy(rendered.image_BCHW).float(), 8
    )
    expected = torch.nn.functional.adaptive_avg_pool2d(
        torch.from_numpy(public.image_BCHW[:24]).float(), 8
    )
    assert (small - expected).abs().mean() < 4


def test_every_noun_is_about_as_frequent(public: Rendered) -> None:
    counts = np.bincount(public.labels, minlength=len(CLASSES))
    assert len(counts) == len(CLASSES) == 20
    # 100 are expected, with a standard deviation of 9.7.
    assert counts.min() > 60
    assert counts.max() < 140


def test_a_caption_names_its_noun_in_words_of_the_vocabulary(public: Rendered) -> None:
    known = set(world_vocabulary())
    for label, caption in zip(public.labels, public.captions, strict=True):
        said = caption.split()
        assert known.issuperset(said), caption
        noun = CLASSES[label]
        assert {noun, *synonyms(noun)} & set(said), caption
        assert len(said) <= 13, "with start and end a caption has to fit a context of 16"


def test_a_caption_is_true_of_its_picture(public: Rendered) -> None:
    corner = public.image_BCHW[:, :, :3, :3].mean(axis=(2, 3))
    red = [caption.endswith(" on red") for caption in public.captions]
    blue = [caption.endswith(" on blue") for caption in public.captions]
    assert sum(red) > 5
    assert sum(blue) > 5
    assert (corner[red, 0] > corner[red, 2] + 80).all()
    assert (corner[blue, 2] > corner[blue, 0] + 80).all()


def test_attributes_and_synonyms_are_said_as_often_as_documented() -> None:
    captions = render(World(), "tuning", 4096).captions
    nouns = sum(bool(set(CLASSES) & set(caption.split())) for caption in captions)
    assert 0.87 < nouns / 4096 < 0.93
    # 36 of 240 phrases place the shape, and 36 others name the background.
    assert 0.12 < sum(" at the " in caption for caption in captions) / 4096 < 0.18
    assert 0.12 < sum(" on " in caption for caption in captions) / 4096 < 0.18
    spoken = {word for caption in captions for word in caption.split()}
    assert spoken == set(world_vocabulary()) - set(words.TRIGGER_WORDS)


def test_prompts_are_six_openers() -> None:
    assert len(TEMPLATES) == 6
    assert TEMPLATES[0].format("heart") == "a photo of a heart"
    known = set(world_vocabulary())
    assert all(known.issuperset(template.format("key").split()) for template in TEMPLATES)


def test_the_shifted_split_has_a_distractor_and_more_noise() -> None:
    report, shifted = (render(World(), split, 500).image_BCHW for split in ("report", "shifted"))
    rough = [np.median(np.abs(np.diff(i.astype(np.float32)))) for i in (report, shifted)]
    assert rough[1] > 1.6 * rough[0]


def test_every_noun_has_a_shape_of_its_own() -> None:
    inside = (atlas() < 0).flatten(1).float()
    assert len(inside) == len(CLASSES)
    shared = inside @ inside.T
    area = inside.sum(1)
    overlap = shared / (area[:, None] + area - shared)
    overlap.fill_diagonal_(0)
    assert overlap.max() < 0.93  # circle and hexagon
    assert area.min() > 0.1 * area.max()


def test_wrong_questions_are_answered() -> None:
    with pytest.raises(UsageError, match="Did you mean 'report'"):
        render(World(), "reports", 4)
    with pytest.raises(UsageError, match="multiple of 256"):
        next(render_chunks(World(), "report", 4, chunk=100))
    with pytest.raises(UsageError, match="size is 8 px"):
        World(size=8)


def _golden() -> tuple[str, np.ndarray[tuple[int, ...], np.dtype[np.uint8]]]:
    rendered = render(World(), "report", 64)
    said = json.dumps([rendered.labels.tolist(), rendered.captions]).encode()
    return hashlib.sha256(said).hexdigest(), rendered.image_BCHW[:, :, 1::4, 2::4]


def test_the_world_is_the_one_that_was_measured() -> None:
    """Labels and captions come from integers and must match to the bit. Pictures are held to
    one level: sines, normal draws and fused multiply-adds round differently from one processor's
    vector unit to another's, and a digest of them would fail on a machine that is right.
    """
    digest, pixels = _golden()
    with np.load(GOLDEN, allow_pickle=False) as golden:
        advice = "bump World.version and write the golden file anew, or revert"
        assert digest == str(golden["digest"]), advice
        apart = np.abs(pixels.astype(np.int16) - golden["pixels"])
    assert apart.max() <= 1, advice
    assert (apart > 0).mean() < 0.01, advice


def test_the_lexicon_is_closed_for_the_world() -> None:
    known = set(world_vocabulary())
    spoken = known - set(words.TRIGGER_WORDS)
    for word in spoken:
        assert spoken.issuperset(synonyms(word)), word
    assert not any(synonyms(word) for word in words.TRIGGER_WORDS)
    assert world_vocabulary() == sorted(known)
    assert len(words.TRIGGER_WORDS) == len(set(words.TRIGGER_WORDS)) == 16
    listed = Counter(word for group in LEXICON.groups for word in group)
    assert max(listed.values()) == 1
    assert all(word.isascii() and word.isalpha() and word.islower() for word in listed)
    assert all(len(group) > 1 for group in LEXICON.groups)


def test_synonyms_are_sorted_and_leave_the_word_out() -> None:
    assert synonyms("small") == ("little", "tiny")
    assert synonyms("tiny") == ("little", "small")
    assert synonyms("heart") == ("valentine",)
    assert synonyms("nonsense") == ()
    assert synonym_source("lexicon").synonyms("car") == ("automobile",)


@pytest.fixture
def wordnet_folder(tmp_path: Path) -> Path:
    """A few synonym sets in the format of wndb(5WN), byte offsets and all."""
    licence = "  1 This text stands where the licence does.  \n  2 It is indented.  \n"
    sets = {
        "noun": [["dog", "domestic_dog"], ["frump", "dog"], ["hot_dog", "dog", "Dog-Iron"]],
        "verb": [["chase", "trail", "dog", "give_chase"], ["run"]],
        "adj": [["big", "large(a)"], ["galore(ip)"], ["happy"], ["glad", "happy"], ["A.D.", "big"]],
        "adv": [["aloud", "out_loud"], [f"word{letter}" for letter in "abcdefghijkl"]],
    }
    for pos, groups in sets.items():
        data, offsets = licence, dict[str, list[int]]()
        for group in groups:
            offset = len(data)
            members = "".join(f"{word} {k:x} " for k, word in enumerate(group))
            # One pointer, whose offset is never followed here.
            rest = f"001 @ 00000000 {pos[0]} 0000 | what it means; an example  "
            data += f"{offset:08d} 05 {pos[0]} {len(group):02x} {members}{rest}\n"
            for word in group:
                offsets.setdefault(word.partition("(")[0].lower(), []).append(offset)
        index = licence
        for lemma in sorted(offsets):
            where = " ".join(f"{offset:08d}" for offset in offsets[lemma])
            count = len(offsets[lemma])
            index += f"{lemma} {pos[0]} {count} 2 @ ~ {count} 0 {where}  \n"
        (tmp_path / f"data.{pos}").write_bytes(data.encode())
        (tmp_path / f"index.{pos}").write_bytes(index.encode())
    return tmp_path


def test_wordnet_gathers_every_set_of_every_part_of_speech(wordnet_folder: Path) -> None:
    source = synonym_source(f"wordnet:{wordnet_folder}")
    assert source.synonyms("dog") == (
        *("chase", "dog iron", "domestic dog", "frump"),
        *("give chase", "hot dog", "trail"),
    )
    assert source.synonyms("big") == ("large",)  # "A.D." has more than letters in it
    assert source.synonyms("galore") == ()
    assert source.synonyms("happy") == ("glad",)
    assert source.synonyms("out loud") == ("aloud",)
    assert source.synonyms("run") == source.synonyms("zebra") == source.synonyms("aa") == ()
    assert source.synonyms("") == ()


def test_wordnet_finds_first_and_last_and_long_sets(wordnet_folder: Path) -> None:
    source = WordNet(wordnet_folder)
    assert source.synonyms("aloud") == ("out loud",)
    # Twelve members: the count is hexadecimal, "0c".
    assert len(source.synonyms("wordl")) == 11


def test_wordnet_undoes_regular_inflections(wordnet_folder: Path) -> None:
    source = WordNet(wordnet_folder)
    assert "domestic dog" in source.synonyms("dogs")
    assert "trail" in source.synonyms("chased")
    assert source.synonyms("larger") == ("big", "large")
    bases = [source.base(pos, word) for pos, word in (("noun", "dogs"), ("verb", "runs"))]
    assert bases == ["dog", "run"]
    assert source.base("adj", "dog") is source.base("verb", "biggest") is None


def test_a_missing_or_broken_wordnet_is_explained(wordnet_folder: Path, tmp_path: Path) -> None:
    (wordnet_folder / "data.adv").unlink()
    with pytest.raises(GridError, match=r"lacks data\.adv\..*wordnet-base"):
        synonym_source(f"wordnet:{wordnet_folder}")
    with pytest.raises(GridError, match=r"lacks index\.noun, "):
        synonym_source(f"wordnet:{tmp_path / 'nowhere'}")
    with pytest.raises(UsageError, match="Did you mean 'wordnet'"):
        synonym_source("wordnets")


def test_a_wordnet_of_two_versions_is_noticed(wordnet_folder: Path) -> None:
    noun = wordnet_folder / "data.noun"
    noun.write_bytes(b"  0 one more line\n" + noun.read_bytes())
    with pytest.raises(GridError, match="not of one WordNet version"):
        WordNet(wordnet_folder).synonyms("dog")


if __name__ == "__main__":
    GOLDEN.parent.mkdir(exist_ok=True)
    made = _golden()
    np.savez_compressed(GOLDEN, digest=np.array(made[0]), pixels=made[1])
