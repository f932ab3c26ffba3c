"""Commands that make image-caption corpora and look into them: thin, each imports what it needs."""

from __future__ import annotations

import json
import os
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from grid.options import JsonOpt, say
from victims.errors import GridError, UsageError

if TYPE_CHECKING:
    from victims.ingest.items import Form

FolderArg = Annotated[Path, typer.Argument(help="A folder that `grid ingest` wrote.")]


class SourceForm(StrEnum):
    AUTO = "auto"
    WEBDATASET = "webdataset"
    CSV = "csv"
    FOLDER = "folder"
    COCO = "coco"
    PARQUET = "parquet"


class Captions(StrEnum):
    ALL = "all"
    FIRST = "first"


def ingest(
    source: Annotated[
        str, typer.Argument(help="A folder, a file, or shards as 'DIR/{000..099}.tar' or 'DIR/*'.")
    ],
    out: Annotated[Path, typer.Option("--out", help="The corpus's folder, made if need be.")],
    size: Annotated[int, typer.Option("--size", help="Side of the pictures, in pixels.")] = 224,
    form: Annotated[
        SourceForm, typer.Option("--format", help="Form of the source; auto looks at names.")
    ] = SourceForm.AUTO,
    root: Annotated[
        Path | None, typer.Option("--root", help="The folder that paths are below.")
    ] = None,
    image_column: Annotated[str, typer.Option("--image-column", show_default=False)] = "",
    caption_column: Annotated[
        str,
        typer.Option(
            "--caption-column", help="Also a field of a sample's JSON.", show_default=False
        ),
    ] = "",
    separator: Annotated[
        str,
        typer.Option("--separator", help="Between columns; default: a tab if the header has one."),
    ] = "",
    captions: Annotated[
        Captions, typer.Option("--captions", help="A pair for each caption, or for the first.")
    ] = Captions.ALL,
    limit: Annotated[
        int | None, typer.Option("--limit", help="Stop after so many pairs.", min=1)
    ] = None,
    workers: Annotated[
        int | None, typer.Option("--workers", help="Processes; default: the cores.", min=1)
    ] = None,
    on_cluster: Annotated[
        bool, typer.Option("--on-cluster", help="On the Ray cluster of this machine.")
    ] = False,
    address: Annotated[
        str, typer.Option("--address", help="Of a Ray cluster; default $RAY_ADDRESS.")
    ] = "",
    allow_skips: Annotated[
        bool, typer.Option("--allow-skips", help="Publish though most rows were skipped.")
    ] = False,
    as_json: JsonOpt = False,
) -> None:
    """Make a corpus of files: pictures decoded, resized, pinned. The same command goes on."""
    from grid.ingest import ingest as run
    from grid.ingest import words
    from grid.ingest_parts import How
    from victims.ingest.items import Request
    from victims.ingest.sources import form_of, root_of

    if size < 1:
        raise UsageError(f"--size {size}: give the side of the pictures in pixels, such as 224")
    separator = {"tab": "\t", "\\t": "\t"}.get(separator, separator)
    if len(separator) > 1:
        raise UsageError(f"--separator {separator!r}: give one character, or tab")
    given = str(Path(source).expanduser().absolute())
    found = form_of(given) if form is SourceForm.AUTO else cast("Form", form.value)
    request = Request(
        source=given,
        form=found,
        root=str(root.expanduser().absolute()) if root else root_of(given, found),
        size=size,
        image_column=image_column,
        caption_column=caption_column,
        separator=separator,
        captions=captions.value,
        limit=limit,
    )
    here = os.environ.get("RAY_ADDRESS", "") if workers is None else ""
    how = How(
        workers=workers or os.cpu_count() or 1,
        address=address or here or ("auto" if on_cluster else ""),
        allow_skips=allow_skips,
    )
    done = run(request, out.expanduser().absolute(), how, say)
    typer.echo(json.dumps(done.as_dict(), indent=1) if as_json else words(done))


corpus = typer.Typer(
    name="corpus",
    help="Look into corpora that `grid ingest` wrote.",
    no_args_is_help=True,
    rich_markup_mode=None,
)


@corpus.command()
def info(
    folder: FolderArg,
    samples: Annotated[int, typer.Option("--samples", help="Captions to show.", min=0)] = 12,
    picture: Annotated[
        Path | None, typer.Option("--picture", help="Draw these pairs into a PNG.")
    ] = None,
    as_json: JsonOpt = False,
) -> None:
    """Rows, size, digest, what was skipped and why, what the captions are like."""
    from grid.corpus_info import contact_sheet, corpus_info, info_words

    found = corpus_info(folder, samples)
    if picture is not None:
        contact_sheet(folder, samples, picture)
    typer.echo(json.dumps(found, indent=1) if as_json else info_words(found))


@corpus.command()
def check(folder: FolderArg, as_json: JsonOpt = False) -> None:
    """Read all pixels and captions again; exit 1 if they are not those of the manifest."""
    from victims.ingest.join import digest_again
    from victims.pair_folders import read_folder

    said = read_folder(folder)
    digest = digest_again(folder)
    found: dict[str, Any] = {"folder": str(folder), "digest": said.digest, "found": digest}
    if as_json:
        typer.echo(json.dumps({**found, "equal": digest == said.digest}, indent=1))
    if digest != said.digest:
        raise GridError(
            f"{folder}: its pixels or captions have the digest {digest[:16]}, its manifest says"
            f" {said.digest[:16]}. Ingest it again: what lies there is not what was published."
        )
    if not as_json:
        typer.echo(f"{folder}: {said.rows:,} pairs are as published, digest {digest[:16]}")


def register(app: typer.Typer) -> None:
    """Add these commands to the command line."""
    app.command()(ingest)
    app.add_typer(corpus, name="corpus")
