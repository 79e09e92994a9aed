"""The entry point: a lazy command table, and the one place where errors become exit codes."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Sequence
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup
from typer.exceptions import Exit, TyperException

import finectl
from finectl.cli.commands import COMMANDS, CommandGroup
from finectl.console import Console
from finectl.errors import EXIT_BUG, EXIT_INTERRUPTED, EXIT_OK, FinectlError, PeerLostError, UsageError
from finectl.registry import Entry, Registry, nearest

NEGATIVE = ("-.", *(f"-{digit}" for digit in range(10)))
"""What a negative number begins with."""
DEBUG_VARIABLE = "FINECTL_DEBUG"


class LazyGroup(TyperGroup):
    """A group that imports a subcommand's module when that subcommand is called, and for nothing else."""

    table: Registry[Entry] = COMMANDS
    path = "finectl"

    def list_commands(self, ctx: typer.Context) -> list[str]:  # type: ignore[override]
        """Return the subcommands in the order of the table."""
        return list(self.table)

    def get_command(self, ctx: typer.Context, cmd_name: str) -> Any:  # type: ignore[override]
        """Import one subcommand.

        Raises:
            UsageError: there is no such command; the message names the nearest one.
        """
        if cmd_name not in self.table:
            raise UsageError(
                f"there is no {self.table.what} {cmd_name!r}{nearest(cmd_name, self.table)}",
                expected=f"one of: {', '.join(self.table)}",
                fix=f"{self.path} --help",
            )
        return build_command(cmd_name, self.table)

    def resolve_command(self, ctx: Any, args: list[str]) -> tuple[Any, Any, list[str]]:
        """Return the subcommand of some words; a step is looked for in the word behind its command."""
        name, *rest = args
        loaded = self.table.load(name) if name in self.table else None
        if isinstance(loaded, CommandGroup) and loaded.default and rest and rest[0] in loaded.steps:
            return name, _build_group(name, loaded), rest
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """List the subcommands from the table, without importing them."""
        with formatter.section("Commands" if self.table is COMMANDS else "Steps"):
            formatter.write_dl([(name, entry.help) for name, entry in self.table.items()])


class SteppedCommand(TyperCommand):
    """A command that runs by itself, and has steps as well: its help names them."""

    steps: Registry[Entry]

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """List the options, then the steps."""
        super().format_options(ctx, formatter)
        with formatter.section("Steps"):
            formatter.write_dl([(name, entry.help) for name, entry in self.steps.items()])

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse the words that follow the command.

        Raises:
            UsageError: the first one is no artifact, and looks like a step.
        """
        first = args[0] if args else "-"
        meant = "" if first.startswith("-") or "/" in first or os.path.exists(first) else nearest(first, self.steps)
        if meant:
            raise UsageError(f"there is no {self.steps.what} {first!r}{meant}", fix=f"{ctx.command_path} --help")
        return super().parse_args(ctx, args)


def build_command(name: str, table: Registry[Entry] = COMMANDS) -> Any:
    """Return the parsed command object of one subcommand.

    Of one that has steps of its own it is the group of them, or the command that runs without a step.

    Args:
        name: A name in the table.
        table: `COMMANDS`, or the steps of one of its commands.
    """
    loaded = table.load(name)
    parser: Any = None
    if isinstance(loaded, CommandGroup):
        if not loaded.default:
            return _build_group(name, loaded)
        parser = type("Stepped", (SteppedCommand,), {"steps": loaded.steps})
        loaded = loaded.load_default()
    single = typer.Typer(rich_markup_mode=None, add_completion=False)
    settings = {"help_option_names": ["-h", "--help"], "max_content_width": 110}
    parser = parser or getattr(loaded, "parser", None)
    single.command(name, cls=parser, context_settings=settings)(loaded)
    return typer.main.get_command(single)


def _build_group(name: str, group: CommandGroup) -> Any:
    """Return a command whose subcommands are the steps of a table; they are imported when they are called."""
    steps = type("Steps", (LazyGroup,), {"table": group.steps, "path": f"finectl {name}"})
    app = typer.Typer(
        name=name,
        cls=steps,
        rich_markup_mode=None,
        add_completion=False,
        no_args_is_help=True,
        subcommand_metavar="STEP [ARGS]...",
        context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
        help=group.help,
    )

    @app.callback()
    def root() -> None:
        pass

    return typer.main.get_command(app)


def _version(wanted: bool) -> None:
    if wanted:
        sys.stdout.write(f"finectl {finectl.__version__}\n")
        raise typer.Exit


def build_app() -> Any:
    """Return the whole application; subcommands are imported when they are called."""
    app = typer.Typer(
        cls=LazyGroup,
        rich_markup_mode=None,
        add_completion=False,
        no_args_is_help=True,
        context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
        help="Initialise, adapt and merge diffusion models of any size.\n\n"
        "Every stage reads and writes artifact directories and prints the path of the one it made, so stages chain:\n\n"
        "finectl condense | finectl extract - | finectl init - --depth 4 | finectl train - | finectl evaluate -",
    )

    @app.callback()
    def root(
        version: bool = typer.Option(False, "--version", help="Print the version.", callback=_version, is_eager=True),
    ) -> None:
        pass

    return typer.main.get_command(app)


def main(argv: Sequence[str] | None = None) -> int:
    """Run finectl and return its exit code.

    Args:
        argv: The arguments after the program's name; those of the process by default.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    console = Console()
    try:
        return _flushed(_invoke(arguments))
    except FinectlError as error:
        console.error(error)
        _trace_if_wanted(arguments)
        if isinstance(error, PeerLostError):
            # Freeing what is shared with the lost process may wait for it, for half an hour.
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(error.exit_code)
        return error.exit_code
    except KeyboardInterrupt:
        console.note("interrupted")
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # keeps the interpreter's last flush silent
        return EXIT_OK
    except Exception as error:  # noqa: BLE001 - the boundary: whatever comes out here is a bug, and is said to be one
        reason = " ".join(str(error).split())
        console.error(
            FinectlError(
                f"this is a bug in finectl: {type(error).__name__}: {reason}",
                fix=f"run it again with -v and report what it prints: finectl {' '.join(arguments)} -v",
            )
        )
        _trace_if_wanted(arguments)
        return EXIT_BUG


def _invoke(arguments: list[str]) -> int:
    """Parse and run; turn the parser's own errors into usage errors."""
    try:
        code = build_app()(args=arguments, prog_name="finectl", standalone_mode=False)
    except Exit as leave:
        return leave.exit_code
    except SystemExit as leave:  # how the parser reports a closed pipe
        raise BrokenPipeError from leave
    except TyperException as error:
        context = getattr(error, "ctx", None)
        if type(error).__name__ == "NoArgsIsHelpError":
            Console().line(error.format_message())
            return UsageError.exit_code
        where = context.command_path if context else "finectl"
        # `--weights 0.1, -0.2`: the second number is taken for an option.
        number = str(getattr(error, "option_name", ""))[:2] in NEGATIVE
        fix = "write lists of numbers without spaces, such as 0.1,-0.2" if number else f"{where} --help"
        raise UsageError(error.format_message().rstrip("."), fix=fix) from error
    return code if isinstance(code, int) else EXIT_OK


def _flushed(code: int) -> int:
    """Flush stdout here, where a closed pipe is still caught."""
    sys.stdout.flush()
    return code


def _trace_if_wanted(arguments: Sequence[str]) -> None:
    if os.environ.get(DEBUG_VARIABLE) or {"-v", "--verbose"} & set(arguments):
        traceback.print_exc()


def entry_point() -> None:
    """Run finectl as the `finectl` script does."""
    sys.exit(main())
