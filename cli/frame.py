"""Give all commands the same exit codes, the same pages of help, and a last line that says what to try next."""

from __future__ import annotations

import errno
import inspect
import os
import re
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, ClassVar

import typer
from typer.core import TyperCommand, TyperGroup

from tokdyn.errors import TokdynError
from tokdyn.reading import printable

from . import pages

if TYPE_CHECKING:
    from pydantic import BaseModel

    from tokdyn.team import Team

HELP = ["-h", "--help"]
HELP_ALL = "--help-all"
CONTEXT = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": HELP}
EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130  # 128 + SIGINT, as shells count
_EXAMPLES = 3  # shown by --help; --help-all shows all


class Command(TyperCommand):
    """A command that prints one sentence on stderr and exits with code 2 if its input is wrong.

    The function of a command returns the command line to try next, which is printed on stderr, so that stdout holds the
    result alone; nothing is printed if the result is JSON.

    Attributes:
        words: positional words in the usage line.
        settings: function that returns the pydantic model of the settings; None for a command without settings.
        of_pipelines: the same for the settings that the command has when it is given a pipeline; None if it takes none.
        shown: keys of the settings that --help explains; --help-all explains all of them.
        examples: command lines that the help shows.
        together: whether processes that torchrun or accelerate have started share the work of the command; its function
            gets them from `team_of`.
    """

    words: ClassVar[tuple[str, ...]] = ()
    settings: ClassVar[Any] = None
    of_pipelines: ClassVar[Any] = None
    shown: ClassVar[tuple[str, ...]] = ()
    examples: ClassVar[tuple[str, ...]] = ()
    together: ClassVar[bool] = False

    def parse_args(self, ctx: Any, args: list[str]) -> Any:
        """Parse the arguments; with --help-all print the whole help and exit."""
        if HELP_ALL in args and not ctx.resilient_parsing:
            typer.echo(self.page(ctx, whole=True))
            ctx.exit()
        return super().parse_args(ctx, args)

    def invoke(self, ctx: Any) -> None:
        """Run the command; a TokdynError or an error of the system exits with code 2, Ctrl-C with 130.

        Of several processes that share the work, the first one says it for all of them.
        """

        def say(text: str) -> None:
            if ctx.obj is None or ctx.obj.speaks:
                typer.echo(text, err=True)

        try:
            with warnings.catch_warnings(), self._joined(ctx):
                warnings.showwarning = _print_warning
                following = super().invoke(ctx)
        except TokdynError as error:
            say(f"{ctx.command_path}: {printable(str(error))}")
            raise typer.Exit(EXIT_USER_ERROR) from error
        except OSError as error:
            if error.errno in (None, errno.EPIPE):  # not an error of the system, or the reader of a pipe has closed it
                raise
            place = "" if error.filename is None else f"{error.filename}: "
            say(f"{ctx.command_path}: {printable(f'{place}{error.strerror}')}.")
            raise typer.Exit(EXIT_USER_ERROR) from error
        except KeyboardInterrupt as stop:
            say("Interrupted.")
            raise typer.Exit(EXIT_INTERRUPTED) from stop
        if following and not ctx.params.get("json"):
            say(f"Next: {following}")

    @contextmanager
    def _joined(self, ctx: Any) -> Iterator[None]:
        """Join the other processes, if the command is one that is shared; a context manager."""
        if not (self.together and "WORLD_SIZE" in os.environ):  # one process says what is wrong before torch is loaded
            yield
            return
        from tokdyn.team import joining

        with joining() as ctx.obj:
            yield

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        """Return the parts of the usage line: positional words, settings, options."""
        pieces = [*self.words, *(["[KEY=VALUE]..."] if self.settings else [])]
        return [*pieces, *super().collect_usage_pieces(ctx)]

    def get_help(self, ctx: Any) -> str:
        """Return the page of --help, which fits a screen."""
        return self.page(ctx, whole=False)

    def page(self, ctx: Any, whole: bool) -> str:
        """Return the page of --help, or with `whole` that of --help-all: all examples and all settings."""
        usage = f"Usage: {ctx.command_path} "
        lines = pages.wrapped(" ".join(self.collect_usage_pieces(ctx)), usage, " " * 8)
        lines += ["", *pages.paragraphs(inspect.cleandoc(self.help or ""), "  ")]
        shown = self.examples if whole else self.examples[:_EXAMPLES]
        lines += pages.section("Examples", (line for example in shown for line in pages.command_line(example)))
        lines += pages.section("Options", pages.definitions([*_options(self, ctx), (HELP_ALL, self._everything())]))
        return "\n".join([*lines, *self._settings(whole)])

    def _everything(self) -> str:
        """Return what --help-all shows."""
        if not self.settings:
            return "Show all examples too."
        from .settings import rows

        of_pipelines = ", and those of pipelines" if self.of_pipelines else ""
        return f"Explain all {len(list(rows(self.settings())))} settings{of_pipelines}."

    def _settings(self, whole: bool) -> list[str]:
        """Return the lines about the settings."""
        if not self.settings:
            return []
        from .settings import brief_rows, rows

        title = "Settings (key=value, --key=value or --key value)"
        if whole:
            lines = pages.section(title, pages.definitions(rows(self.settings())))
            if self.of_pipelines:
                lines += pages.section(
                    "Settings with a pipeline of diffusers", pages.definitions(rows(self.of_pipelines()))
                )
            return lines
        known = brief_rows(self.settings())
        return pages.section(title, pages.definitions((key, known[key]) for key in self.shown or known))


class Group(TyperGroup):
    """A group of commands, whose help lists them with a line each."""

    def get_help(self, ctx: Any) -> str:
        """Return the page of --help."""
        usage = f"Usage: {ctx.command_path} "
        lines = pages.wrapped(" ".join(self.collect_usage_pieces(ctx)), usage, " " * 8)
        lines += ["", *pages.paragraphs(inspect.cleandoc(self.help or ""), "  ")]
        commands = [(name, self.get_command(ctx, name)) for name in self.list_commands(ctx)]
        summaries = [(name, _summary(command)) for name, command in commands if command and not command.hidden]
        lines += pages.section("Commands", pages.definitions(summaries))
        lines += pages.section("Options", pages.definitions(_options(self, ctx)))
        return "\n".join(lines)


def team_of(ctx: Any) -> Team:
    """Return the processes that share the work of a command."""
    from tokdyn.team import ALONE

    return ctx.obj or ALONE


def _summary(command: Any) -> str:
    """Return the first sentence of the help of a command, without its full stop."""
    return str(inspect.cleandoc(command.help or "").partition("\n")[0].rstrip("."))


def _options(command: Any, ctx: Any) -> list[tuple[str, str]]:
    """Return the options of a command, each with its meaning."""
    records = [record for param in command.get_params(ctx) if (record := param.get_help_record(ctx))]
    return [(re.sub(r" <.*>$", " TEXT", option), meaning) for option, meaning in records]


def _print_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    """Print a warning on one line of stderr, without its place in the code."""
    typer.echo(f"Warning: {printable(str(message))}", err=True)


def command(
    app: typer.Typer,
    name: str,
    *,
    words: Iterable[str] = (),
    settings: Callable[[], type[BaseModel]] | None = None,
    of_pipelines: Callable[[], type[BaseModel]] | None = None,
    main: Iterable[str] = (),
    examples: Iterable[str] = (),
    together: bool = False,
) -> Callable[[Callable[..., str | None]], Callable[..., str | None]]:
    """Return a decorator that adds a function to an app as a command.

    The function returns the command line to try next, or None if there is none.

    Args:
        app: the application or group.
        name: name of the command.
        words: positional words as the usage line shows them.
        settings: returns the pydantic model of the settings. It is called only if needed, so that `tokdyn --help`
            loads no model code.
        of_pipelines: the same for the settings that the command has when it is given a pipeline.
        main: keys of the settings that --help explains; empty for all of them.
        examples: command lines for the help; --help shows the first three.
        together: whether processes that torchrun or accelerate have started share its work.
    """
    members = {
        "words": tuple(words),
        "settings": staticmethod(settings) if settings else None,
        "of_pipelines": staticmethod(of_pipelines) if of_pipelines else None,
        "shown": tuple(main),
        "examples": tuple(examples),
        "together": together,
    }
    return app.command(name, cls=type("Command", (Command,), members), context_settings=CONTEXT)


def group(name: str, text: str, completion: bool = False) -> typer.Typer:
    """Return an empty group of commands.

    Args:
        name: name of the group.
        text: help of the group.
        completion: offer options that install completion for the user's shell; for the outermost group.
    """
    return typer.Typer(
        name=name,
        cls=Group,
        help=text,
        no_args_is_help=not completion,
        add_completion=completion,
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": HELP},
    )
