"""The ``fishkern`` command: the application, its errors and its exit status. :mod:`fishkern.commands` has the rest."""

from __future__ import annotations

import inspect
import os
import re
import sys
import traceback
import warnings
from collections.abc import Callable
from typing import Annotated, NoReturn

try:
    import rich  # noqa: F401 - typer prints with it
    import typer
except ModuleNotFoundError:  # main says what to install
    typer = None


def main(arguments: list[str] | None = None) -> NoReturn:
    """Run the command and exit: with 0 if all went well, with 2 and one line on standard error if not.

    Args:
        arguments: Instead of ``sys.argv[1:]``.
    """
    if typer is None:
        sys.exit('fishkern: the command needs typer and rich: pip install "fishkern[cli]"')
    arguments = sys.argv[1:] if arguments is None else arguments
    debug = "--debug" in arguments  # before or after the subcommand
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _note
            status = application()(
                [argument for argument in arguments if argument != "--debug"],
                prog_name="fishkern",
                standalone_mode=False,  # else typer draws a box around an error
            )
    except (typer.Abort, KeyboardInterrupt):
        status = 130
    except BrokenPipeError:  # the reader of the output has closed it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else Python complains when it ends
        sys.exit(141)
    except Exception as error:
        if debug:
            traceback.print_exc()
        else:
            print(f"fishkern: {_in_one_line(error)}", file=sys.stderr)
        status = 2
    if status == 130:
        print("fishkern: interrupted; no file is left half written.", file=sys.stderr)
    sys.exit(status)


def application() -> typer.Typer:
    """Make the typer application of :data:`fishkern.commands.COMMANDS`.

    Returns:
        The application.
    """
    app = typer.Typer(
        rich_markup_mode="rich",
        add_completion=False,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    from fishkern.commands import COMMANDS

    app.callback(invoke_without_command=True, epilog="Start with:  [bold]fishkern demo --seconds 10[/bold]")(_options)
    for command, examples in COMMANDS.items():
        lines = [f"Example:  [bold]{example}[/bold]" for example in examples.splitlines()]
        app.command(help=_help(command), epilog="\n\n".join(lines))(command)
    return app


def _help(command: Callable[..., int | None]) -> str:
    """Give a command's docstring with a line for each paragraph, which the terminal wraps; typer keeps line breaks."""
    paragraphs = inspect.getdoc(command).split("\n\n")
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in paragraphs)


def _options(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the whole traceback of an error.")] = False,
) -> None:
    """Exact per-example Fisher information of PyTorch models."""
    if version:
        from fishkern import __version__

        print(f"fishkern {__version__}")
        raise typer.Exit
    if context.invoked_subcommand is None:
        print(context.get_help())


def _note(message: Warning | str, category: type[Warning], *place: object) -> None:
    """Show a warning in one line, without its place in the code; ignore those for developers."""
    if not issubclass(category, DeprecationWarning | FutureWarning | PendingDeprecationWarning):
        print(f"note: {_worded(' '.join(str(message).split()))}", file=sys.stderr)


def _in_one_line(error: Exception) -> str:
    """Say what went wrong, and what to install if a package is missing."""
    if isinstance(error, ModuleNotFoundError):
        from fishkern.commands.doctor import EXTRAS

        package = (error.name or "").partition(".")[0]
        for extra, packages in EXTRAS.items():
            if package in packages:
                return f'this needs {package}: pip install "fishkern[{extra}]"'
    message = error.format_message() if hasattr(error, "format_message") else str(error)
    message = re.sub(r"^\[Errno \d+\] ", "", " ".join(message.split())) or type(error).__name__
    if context := getattr(error, "ctx", None):  # an error of typer: an unknown command or option
        return f"{message.removesuffix('.')} (see {context.command_path} --help)"
    return _worded(message)


def _worded(message: str) -> str:
    """Name options where the library names its arguments."""
    from fishkern.commands.wording import in_options
    from fishkern.files import in_brief

    return in_brief(in_options(message), 10_000)  # without the control characters that a file or a path may contain
