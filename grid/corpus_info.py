"""What lies in an ingested corpus: numbers, words, samples, and a sheet of pictures."""

from __future__ import annotations

import re
import textwrap
from collections import Counter
from pathlib import Path
from typing import Any, Final

import numpy as np

from victims.draws import numpy_rng
from victims.errors import GridError, counted, size_words
from victims.pair_folders import PAIRS, ChosenCaptions, Folder, open_images, read_folder

QUANTILES: Final = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)
MOST_READ: Final = 200_000  # captions that words are counted in, evenly spaced
MOST_WORDS: Final = 20
_WORD: Final = re.compile(r"\w+")
# Words that every English corpus is full of say nothing about one.
_COMMON: Final = frozenset(
    [
        *("a", "an", "and", "are", "as", "at", "by", "for", "from", "in", "is", "it", "its"),
        *("of", "on", "or", "the", "this", "to", "was", "with"),
    ]
)
_COLUMNS, _SIDE, _GAP, _LINE, _LINES = 6, 160, 8, 13, 4


def corpus_info(root: Path, samples: int) -> dict[str, Any]:
    """What the manifest says, and what the captions are like."""
    import pyarrow as pa
    import pyarrow.compute as pc

    folder = read_folder(root)
    open_images(folder)
    with pa.memory_map(str(folder.root / PAIRS)) as file:
        captions = pa.ipc.open_file(file).read_all()["caption"]
        counts = pc.value_counts(captions).field("counts").to_numpy(zero_copy_only=False)
        step = max(1, len(captions) // MOST_READ)
        read = captions.take(np.arange(0, len(captions), step)).to_pylist()
    lengths = np.array([len(_WORD.findall(text)) for text in read])
    words = Counter(w for text in read for w in set(_WORD.findall(text.lower())))
    frequent = [(w, n) for w, n in words.most_common() if w not in _COMMON][:MOST_WORDS]
    rows = _sample(folder, samples)
    texts = ChosenCaptions(folder.root / PAIRS, rows)
    return {
        **folder.about,
        "root": str(folder.root),
        "pixel_bytes": folder.rows * 3 * folder.size**2,
        "caption_words": {f"{q:g}": float(np.quantile(lengths, q)) for q in QUANTILES},
        "captions_read": len(read),
        "frequent_words": {word: count / len(read) for word, count in frequent},
        "shared_captions": float(counts[counts > 1].sum() / folder.rows),
        "samples": [
            {"row": row, "caption": text} for row, text in zip(rows.tolist(), texts, strict=True)
        ],
    }


def _sample(folder: Folder, samples: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    count = min(samples, folder.rows)
    rows = numpy_rng(0, "corpus_info").choice(folder.rows, count, replace=False)
    return np.sort(rows).astype(np.int64)


def info_words(found: dict[str, Any]) -> str:
    """The same as text."""
    quantiles = found["caption_words"]
    told = ", ".join(f"{float(q):.0%} {quantiles[q]:g}" for q in quantiles)
    skipped = ", ".join(f"{name} {count:,}" for name, count in found["skipped"].items())
    notes = ", ".join(f"{name} {count:,}" for name, count in found["notes"].items())
    frequent = ", ".join(f"{w} {share:.1%}" for w, share in found["frequent_words"].items())
    of = f" (of {found['captions_read']:,} captions)" * (found["captions_read"] < found["rows"])
    lines = [
        f"{found['root']}: {counted(found['rows'], 'pair')}, {found['size']} x {found['size']} px,"
        f" {size_words(found['pixel_bytes'])} of pixels",
        f"digest           {found['digest']}",
        f"made             {found['made']} of {found['request']['source']}"
        f" ({found['request']['form']}, fingerprint {found['fingerprint'][:16]})",
        f"looked at        {counted(found['seen'], 'row')}; skipped: {skipped or 'none'}",
        f"among the pairs  {notes or 'nothing converted'}",
        f"pictures         {_pictures(found)}",
        f"words a caption  {told}{of}",
        f"shared captions  {found['shared_captions']:.1%} of the pairs have one that others have",
        f"frequent words   {frequent}{of}",
    ]
    return "\n".join([*lines, *(f"{s['row']:>10}  {s['caption']}" for s in found["samples"])])


def _pictures(found: dict[str, Any]) -> str:
    if "pictures" not in found:
        return "which pairs show one picture is not said: ingest again to keep them in one split"
    return f"{found['pictures']:,}, up to {counted(found['most_captions'], 'pair')} of one"


def contact_sheet(root: Path, samples: int, picture: Path) -> None:
    """Some pairs, their captions below the pictures, as one PNG."""
    from PIL import Image, ImageDraw, ImageFont

    folder = read_folder(root)
    rows = _sample(folder, max(1, samples))
    images, texts = open_images(folder), ChosenCaptions(folder.root / PAIRS, rows)
    width, height = _SIDE + _GAP, _SIDE + _LINE * _LINES + _GAP
    down = -(-len(rows) // _COLUMNS)
    sheet = Image.new(
        "RGB", (min(_COLUMNS, len(rows)) * width + _GAP, down * height + _GAP), "white"
    )
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(10)
    for place, (row, text) in enumerate(zip(rows.tolist(), texts, strict=True)):
        x, y = _GAP + place % _COLUMNS * width, _GAP + place // _COLUMNS * height
        shown = Image.fromarray(np.moveaxis(np.array(images[row]), 0, -1))
        sheet.paste(shown.resize((_SIDE, _SIDE), Image.Resampling.BICUBIC), (x, y))
        lines = textwrap.wrap(text, 30, max_lines=_LINES, placeholder=" ...")
        draw.multiline_text((x, y + _SIDE + 2), "\n".join(lines), "black", font, spacing=1)
    try:
        sheet.save(picture, format="PNG")
    except OSError as error:
        raise GridError(f"{picture}: cannot be written ({error.strerror or error})") from error
