"""Give all commands the same exit codes, usage line, and table of settings in --help."""

from __future__ import annotations

import errno
import warnings
from collections.abc import Callable, Iterable
from typing import Any, ClassVar

import typer
from pydantic import BaseModel
from typer.core import TyperCommand

from tokdyn.errors import TokdynError

CONTEXT = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": ["-h", "--help"]}
EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130  # 128 + SIGINT, as shells count


class Command(TyperCommand):
    """A command that prints one sentence on stderr and exits with code 2 if its input is wrong.

    Attributes:
        words: positional words in the usage line.
        settings: function that returns the pydantic model of the settings; None for a command without settings.
        of_pipelines: the same for the settings that the command has when it is given a pipeline; None if it takes none.
        examples: command lines that --help shows.
    """

    words: ClassVar[tuple[str, ...]] = ()
    settings: ClassVar[Any] = None
    of_pipelines: ClassVar[Any] = None
    examples: ClassVar[tuple[str, ...]] = ()

    def invoke(self, ctx: Any) -> Any:
        """Run the command; a TokdynError or an error of the system exits with code 2, Ctrl-C with 130."""
        try:
            with warnings.catch_warnings():
                warnings.showwarning = _print_warning
                return super().invoke(ctx)
        except TokdynError as error:
            typer.echo(f"{ctx.command_path}: {error}", err=True)
            raise typer.Exit(EXIT_USER_ERROR) from error
        except OSError as error:
            if error.errno in (None, errno.EPIPE):  # not an error of the system, or the reader of a pipe has closed it
                raise
            place = "" if error.filename is None else f"{error.filename}: "
            typer.echo(f"{ctx.command_path}: {place}{error.strerror}.", err=True)
            raise typer.Exit(EXIT_USER_ERROR) from error
        except KeyboardInterrupt as stop:
            typer.echo("Interrupted.", err=True)
            raise typer.Exit(EXIT_INTERRUPTED) from stop

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        """Return the parts of the usage line: positional words, settings, options."""
        pieces = [*self.words, *(["[KEY=VALUE]..."] if self.settings else [])]
        return [*pieces, *super().collect_usage_pieces(ctx)]

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        """Append examples to paste, and every setting with its type, default and meaning."""
        if self.examples:
            with formatter.section("Examples"):
                for line in self.examples:
                    formatter.write(f"{'':>{formatter.current_indent}}{line}\n")
        if self.settings:
            from .settings import rows

            with formatter.section("Settings (key=value, --key=value or --key value)"):
                formatter.write_dl(list(rows(self.settings())))
            if self.of_pipelines:
                with formatter.section("Settings with a pipeline of diffusers"):
                    formatter.write_dl(list(rows(self.of_pipelines())))


def _print_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    """Print a warning on one line of stderr, without its place in the code."""
    typer.echo(f"Warning: {message}", err=True)


def command(
    app: typer.Typer,
    name: str,
    *,
    words: Iterable[str] = (),
    settings: Callable[[], type[BaseModel]] | None = None,
    of_pipelines: Callable[[], type[BaseModel]] | None = None,
    examples: Iterable[str] = (),
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Return a decorator that adds a function to an app as a command.

    Args:
        app: the application or group.
        name: name of the command.
        words: positional words as the usage line shows them.
        settings: returns the pydantic model of the settings. It is called only if needed, so that `tokdyn --help`
            loads no model code.
        of_pipelines: the same for the settings that the command has when it is given a pipeline.
        examples: command lines for --help.
    """
    members = {
        "words": tuple(words),
        "settings": staticmethod(settings) if settings else None,
        "of_pipelines": staticmethod(of_pipelines) if of_pipelines else None,
        "examples": tuple(examples),
    }
    return app.command(name, cls=type("Command", (Command,), members), context_settings=CONTEXT)


def group(name: str, text: str) -> typer.Typer:
    """Return an empty group of commands.

    Args:
        name: name of the group.
        text: help of the group.
    """
    return typer.Typer(
        name=name,
        help=text,
        no_args_is_help=True,
        add_completion=False,
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    )
