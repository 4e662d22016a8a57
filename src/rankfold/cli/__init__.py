"""The command line: `rankfold measure | plan | compress | train | report | export | demo`."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from typing import Annotated, ParamSpec

import typer

from rankfold.cli import _commands
from rankfold.errors import RankfoldError

__all__ = ["app", "main"]

P = ParamSpec("P")
# What a user can put right. Anything else is a bug of ours and keeps its traceback.
CLEAR = (RankfoldError, OSError, ImportError, UnicodeDecodeError)

app = typer.Typer(
    name="rankfold",
    help="Make PyTorch networks small and fast by low-rank and tensor decompositions.",
    epilog="Files that exist are replaced only with --force, and always whole. Errors end with exit code 2.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _clear_errors(function: Callable[P, None]) -> Callable[P, None]:
    """End a command with one line and exit code 2 where the user can help, with 130 after Ctrl-C."""

    @functools.wraps(function)
    def guarded(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            function(*args, **kwargs)
        except CLEAR as problem:
            typer.echo(f"error: {' '.join(str(problem).split())}", err=True)
            raise typer.Exit(2) from problem
        except KeyboardInterrupt as problem:
            typer.echo("interrupted", err=True)
            raise typer.Exit(130) from problem

    return guarded


for _command in (
    _commands.demo,
    _commands.measure,
    _commands.plan,
    _commands.compress,
    _commands.train,
    _commands.report,
    _commands.export,
):
    app.command()(_clear_errors(_command))


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"rankfold {version('rankfold')}")
        raise typer.Exit()


@app.callback()
def _options(
    _: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    pass


@contextmanager
def _own_stdout() -> Iterator[None]:
    """Keep standard output for what the commands print; whatever else writes to it goes to standard error.

    Compiled libraries write to the descriptor itself (the solver behind `scipy.optimize.milp` has a line of debugging
    left in it), which would spoil the JSON that a program reads.
    """
    sys.stdout.flush()
    ours = sys.stdout
    with os.fdopen(os.dup(1), "w", encoding=ours.encoding, errors=ours.errors) as sys.stdout:
        os.dup2(2, 1)
        try:
            yield
        finally:
            sys.stdout.flush()
            os.dup2(sys.stdout.fileno(), 1)
            sys.stdout = ours


def main() -> None:
    """Run the command line."""
    with _own_stdout():
        app()
