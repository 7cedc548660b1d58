"""The entry point: parse, run one command, turn every error into words and an exit code."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from typing import Annotated

import typer

import secateur
from secateur.cli import (
    advise,
    compare,
    crew,
    criteria,
    demo,
    deploy,
    doctor,
    estimate,
    export,
    inspect,
    lottery,
    measure,
    prune,
    recipes,
    reload,
    resume,
    search,
)
from secateur.cli.console import err
from secateur.cli.failures import interrupted, told, unfinished_of
from secateur.cli.options import help_of
from secateur.cli.typed import Command
from secateur.errors import EXIT_INTERRUPTED, EXIT_OK

EXITS = (
    "Exit codes: 0 ok, 1 bug, 2 usage or recipe, 3 input refused, 4 model unsupported, 5 target not reached, "
    "6 resources, 7 finished but degraded, 130 interrupted."
)

app = typer.Typer(
    name="secateur",
    help="Prune any PyTorch model, prove that the result is right, and measure what it brings.",
    epilog=EXITS,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
COMMANDS: tuple[tuple[Callable[..., int], Sequence[str]], ...] = (
    (demo.demo, demo.EXAMPLES),
    (inspect.inspect, inspect.EXAMPLES),
    (estimate.estimate, estimate.EXAMPLES),
    (prune.prune, prune.EXAMPLES),
    (resume.resume, resume.EXAMPLES),
    (advise.advise, advise.EXAMPLES),
    (compare.compare, compare.EXAMPLES),
    (search.search, search.EXAMPLES),
    (lottery.lottery, lottery.EXAMPLES),
    (measure.measure, measure.EXAMPLES),
    (export.export, export.EXAMPLES),
    (deploy.deploy, deploy.EXAMPLES),
    (doctor.doctor, doctor.EXAMPLES),
)
for command, examples in COMMANDS:
    app.command(command.__name__, cls=Command, epilog=help_of(*examples))(command)
app.command("reload-check", cls=Command, hidden=True)(reload.reload_check)
app.add_typer(criteria.app, name="criteria")
app.add_typer(recipes.app, name="recipes")


def _version(wanted: bool) -> None:
    if wanted:
        sys.stdout.write(f"secateur {secateur.__version__}\n")
        raise typer.Exit


@app.callback()
def _root(
    called: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and stop.")
    ] = False,
) -> None:
    """Prune any PyTorch model, prove that the result is right, and measure what it brings."""
    crew.require_alone(called.invoked_subcommand or "")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: arguments without the program's name; default those of the process.

    Returns:
        the exit code; nothing is raised but SystemExit of Python itself. An interrupted process ends here.
    """
    args = list(sys.argv[1:] if argv is None else argv) or ["--help"]
    flags = args[: args.index("--")] if "--" in args else args
    as_json, verbose = "--json" in flags, not {"-v", "--verbose"}.isdisjoint(flags)
    try:
        result = typer.main.get_command(app).main(args=args, prog_name="secateur", standalone_mode=False)
    except KeyboardInterrupt:
        result = EXIT_INTERRUPTED
    except SystemExit as end:
        if not isinstance(end.__context__, BrokenPipeError):
            raise
        result = EXIT_OK  # rich ends the process where a reader, like `head`, has seen enough: that is no error
    except Exception as error:
        return told(error, args, as_json=as_json, verbose=verbose)
    code = result if isinstance(result, int) else EXIT_OK
    if code == EXIT_INTERRUPTED:
        interrupted(err(), as_json=as_json, unfinished=unfinished_of(args))
        if argv is None:
            # Python remembers an interrupt that passed through generated code and would end itself by SIGINT.
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    return code


if __name__ == "__main__":
    sys.exit(main())
