"""The command line: `rankfold measure | plan | compress | train | report | export | demo`."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import MISSING, fields
from inspect import Parameter, Signature
from typing import Annotated, Any, ParamSpec, get_type_hints

import typer

from rankfold import __version__
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


def _with_options(function: Callable[[Any], None]) -> Callable[..., None]:
    """Return the command with the fields of its one object as its parameters, where typer looks for options."""
    (kind,) = (hint for name, hint in get_type_hints(function).items() if name != "return")
    hints = get_type_hints(kind, include_extras=True)
    options = [field for field in fields(kind) if field.name != "typed"]

    def command(ctx: typer.Context, **given: Any) -> None:
        sources = {name: ctx.get_parameter_source(name) for name in given}
        typed = {name for name, source in sources.items() if source is not None and source.name != "DEFAULT"}
        function(kind(typed=frozenset(typed), **given))

    wanted = [
        Parameter(
            field.name,
            Parameter.KEYWORD_ONLY,
            default=Parameter.empty if field.default is MISSING else field.default,
            annotation=hints[field.name],
        )
        for field in options
    ]
    context = Parameter("ctx", Parameter.POSITIONAL_OR_KEYWORD, annotation=typer.Context)
    command.__name__, command.__doc__ = function.__name__, function.__doc__
    command.__annotations__ = {"ctx": typer.Context} | {one.name: one.annotation for one in wanted}
    command.__signature__ = Signature([context, *wanted])  # type: ignore[attr-defined]
    return command


for _command in (
    _commands.demo,
    _commands.measure,
    _commands.plan,
    _commands.compress,
    _commands.train,
    _commands.report,
    _commands.export,
):
    app.command()(_clear_errors(_with_options(_command)))


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"rankfold {__version__}")
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
