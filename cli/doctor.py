"""Define `tokdyn doctor`."""

from __future__ import annotations

from dataclasses import asdict

import typer

from .arguments import split
from .frame import command
from .output import Json, as_json
from .pages import definitions

_MARKS = {True: "+", False: "!", None: " "}


def register(app: typer.Typer) -> None:
    """Add the command."""

    @command(app, "doctor", examples=["tokdyn doctor", "tokdyn doctor --json"])
    def doctor(ctx: typer.Context, json: Json = False) -> str:
        """Examine this installation and machine.

        Shows versions, devices, attention kernels, number types, caches and optional packages: what works here, and
        what to install for the rest. The exit code is 1 if something that tokdyn needs is missing or broken.
        """
        from tokdyn.doctor import examine

        split(ctx.args).no_settings().take()
        found = examine()
        broken = [each for each in found if each.broken]
        if json:
            as_json({"works": not broken, "findings": [asdict(each) for each in found]})
        else:
            for section in dict.fromkeys(each.section for each in found):
                rows = [(f"{_MARKS[each.works]} {each.name}", each.value) for each in found if each.section == section]
                typer.echo("\n".join([f"{section[0].upper()}{section[1:]}:", *definitions(rows), ""]))
            advice = [(each.name, each.advice) for each in found if each.advice]
            if advice:
                typer.echo("\n".join(["To do:", *definitions(advice), ""]))
            typer.echo("tokdyn works here." if not broken else "tokdyn does not work here before this is mended:")
            for each in broken:
                typer.echo("\n".join(definitions([(each.name, each.advice)])))
        if broken:
            raise typer.Exit(1)
        return "tokdyn demo"
