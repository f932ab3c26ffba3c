"""The command line. Every verb imports what it needs and nothing else."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Sequence
from typing import Any

import typer

from grid import (
    board_commands,
    cache_commands,
    corpus_commands,
    import_commands,
    job_commands,
    model_commands,
    operations,
)
from grid.cell_commands import check, explain
from grid.leaderboard_command import leaderboard
from grid.list_command import ls
from grid.method_commands import gallery, mock, scores
from grid.operations import compact
from grid.options import say
from grid.plan_commands import init, plan
from grid.run_commands import retry, run, tune
from victims.errors import GridError, UsageError, near

app = typer.Typer(
    name="grid",
    help="An evaluation grid for backdoor attacks and defenses on CLIP-style models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

# In the order in which `grid --help` lists them.
for command in (
    *(run, retry, tune, init, plan, check, explain),
    *(leaderboard, compact, ls, gallery, scores, mock),
):
    app.command()(command)
operations.register(app)
cache_commands.register(app)
board_commands.register(app)
import_commands.register(app)
job_commands.register(app)
model_commands.register(app)
corpus_commands.register(app)


def _known_commands() -> list[str]:
    commands = [
        command.name or command.callback.__name__
        for command in app.registered_commands
        if command.callback
    ]
    return [*commands, *(group.name for group in app.registered_groups if group.name)]


def main(argv: Sequence[str] | None = None) -> None:
    """The command ``grid``: errors in one message, exit codes as documented."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments and not arguments[0].startswith("-") and arguments[0] not in _known_commands():
        hint = near(arguments[0], _known_commands())
        say(f"grid: no command called {arguments[0]!r}.{hint} Try grid --help.")
        sys.exit(UsageError.code)
    sys.exit(_guarded(lambda: app(arguments, standalone_mode=False), arguments))


# Typer brings its own copy of click, or uses the installed one: its errors tell which.
BadCommand: Any = next(c for c in typer.BadParameter.__mro__ if c.__name__ == "ClickException")
INTERRUPTED = 130
# What Typer says of a word that is not in a list, after its library's name for such errors.
NOT_LISTED = re.compile(r"(?:Value error, )?'(?P<word>.*)' is not one of (?P<listed>'.*')\.?")


def _plainly(message: str) -> str:
    """Typer's words about a choice that there is not, as ours: with what was probably meant."""
    match = NOT_LISTED.fullmatch(message)
    if match is None:
        return message
    known = [name.strip(" '") for name in match["listed"].split(",")]
    word = match["word"]
    return f"no choice is called {word!r}.{near(word, known)} There are: {', '.join(known)}."


def _meant(message: str, arguments: Sequence[str]) -> str:
    """What to write in the place of an option that other commands have for results."""
    option = re.match(r"No such option: (--in|--grid)$", message)
    if option is None or not arguments:
        return message
    words = [part for word in arguments for part in word.split("=", 1)]
    named = words[words.index(option[1]) + 1] if option[1] in words[:-1] else "DIR"
    if arguments[0] in ("explain", "verify"):
        return f"{message}. Results are named with --grid here: --grid {named}."
    return f"{message}. Results are an argument here: grid {arguments[0]} {named}."


def _guarded(command: Callable[[], Any], arguments: Sequence[str] = ()) -> int:
    try:
        result = command()
        if result == INTERRUPTED:  # newer Typer turns Ctrl-C into an exit code itself
            raise KeyboardInterrupt
        return result if isinstance(result, int) else 0
    except GridError as error:
        say(f"grid: {error}")
        return error.code
    except BadCommand as error:
        error.message = _meant(_plainly(error.message), arguments)
        error.show()
        return UsageError.code
    except (typer.Abort, KeyboardInterrupt):
        say("grid: interrupted; the same command goes on where this one stopped")
        return INTERRUPTED
    except BrokenPipeError:
        return 0


if __name__ == "__main__":
    main()
