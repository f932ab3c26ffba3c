"""Which of open_clip's architectures can be a model here, counted, for docs/real-data.md."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

WORDS = {
    "its text tower": "refused: the text tower is one of Hugging Face's `transformers`",
    "its tokenizer": "refused: the tokenizer is one of Hugging Face's",
}


def parts() -> dict[str, Callable[[], str]]:
    return {"architectures": counted}


def counted() -> str:
    """Architectures by whether they can be named, and why not."""
    import open_clip

    from docs.tables import table
    from victims.architectures import architectures, refusal

    names = architectures()
    found = Counter((refusal(name) or "can be named").partition(" is ")[0] for name in names)
    lines = [[WORDS.get(why, why), str(count)] for why, count in found.most_common()]
    told = table(["of open_clip's architectures", "number"], [*lines, ["all", str(len(names))]])
    made = f"open_clip {open_clip.__version__}"
    return f"{told}\n{made}; `grid models --all` lists each with its reason.\n"
