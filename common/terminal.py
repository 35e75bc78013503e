"""What commands print: text from outside stays on its line, and no terminal is too poor for it.

A name that somebody else wrote could hold escape codes or line ends, and so look like what a
command says itself.
"""

from __future__ import annotations

import errno
import io
import re
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from fedlora.common.errors import BadInput, FedloraError

INTERRUPTED = 130  # what typer makes of Ctrl-C
MAX_LINE = 2_000  # characters of a reason
MOST_CAUSES = 8
# the folders of an absolute path, not those of a base64 text or a relative one
ABOVE = re.compile(r"(?<![\w./+=-])(?:~|/)(?:[^\s/:;,'\"()]+/)+|(?<![\w./+=-])~/")
SHORT_OF = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EMFILE, errno.ENFILE, errno.ENOMEM)
EXPECTED = {
    errno.EEXIST: ", expected nothing there, or a folder",
    errno.ENOTDIR: ", expected a folder",
    errno.EISDIR: ", expected a file",
    errno.EACCES: ", expected one that this user may use",
    errno.EROFS: ", expected a place that can be written",
}
INSTALLED = (
    "expected an installation with fedlora[node] for a trainer, fedlora[server] for a coordinator,"
    " or fedlora[sim]"
)


def bear_any_letter() -> None:
    """Print what the terminal's encoding lacks, ε among it, as `?`; for a command line's entry."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def printable(text: str) -> str:
    """`text` on one line, without control characters."""
    return "".join(letter if letter.isprintable() else " " for letter in text)


def one_line(text: str, most: int = MAX_LINE) -> str:
    """Text from outside as one printable line of at most `most` characters.

    It ends in logs, terminals and reports.
    """
    kept = printable(text[: most + 1])
    return kept if len(kept) <= most else kept[: most - 1] + "…"


class OneLine:
    """A text that prints on one line of bounded length, wherever it ends."""

    def fault(self, value: str, noun: str) -> str:
        """What is wrong with it, or ""."""
        fits = value == one_line(value)
        return "" if fits else f"expected one printable line of at most {MAX_LINE} characters"


def without_places(text: str) -> str:
    """Text in which an absolute path is its last part alone: where it lies is its machine's own."""
    return ABOVE.sub("…/", text)


def places(error: BaseException) -> str:
    """Where an error came from, and what caused it, without what it says: that may quote a record.

    Kind by kind, the innermost place first.
    """
    found: list[str] = []
    each: BaseException | None = error
    while each is not None and len(found) < MOST_CAUSES:
        frames = reversed(traceback.extract_tb(each.__traceback__))
        at = " < ".join(f"{Path(at.filename).name}:{at.lineno} {at.name}" for at in frames)
        found.append(f"{type(each).__name__} at {at or 'no place'}")
        each = each.__cause__ or each.__context__
    return "; after ".join(found)


def fault_lines(error: FedloraError) -> list[str]:
    """An error as it is printed: a line to a fault."""
    faults = error.faults if isinstance(error, BadInput) else str(error).splitlines()
    return [printable(fault) for fault in faults]


def explained(error: OSError) -> tuple[str, int]:
    """One line and the exit code: 2 for a wrong path, 1 where the machine ran out."""
    where = f"{error.filename}: " if error.filename else ""
    code = FedloraError.exit_code if error.errno in SHORT_OF else BadInput.exit_code
    expected = EXPECTED.get(error.errno or 0, "")
    return printable(f"{where}{error.strerror or error}{expected}"), code


def run_to_end(
    app: Callable[..., Any], name: str, stopped: Callable[[], str] = lambda: ""
) -> NoReturn:
    """A command line to its end: errors are one line to a fault, the exit code says which kind.

    `app` is typer's; `name` begins each line; `stopped` says what can be done after Ctrl-C.
    """
    import click
    import typer

    bear_any_letter()
    try:
        command = typer.main.get_command(app) if isinstance(app, typer.Typer) else app
        if isinstance(command, click.Command):
            _name_paths(command)
            _suggest_once(command)
        if isinstance(command, click.Group):
            click.version_option(package_name="fedlora", message="fedlora %(version)s")(command)
        code = command(standalone_mode=False)
        if code == INTERRUPTED:
            raise KeyboardInterrupt
        sys.exit(code if isinstance(code, int) else 0)
    except FedloraError as error:
        _print(*(f"{name}: {line}" for line in fault_lines(error)))
        sys.exit(error.exit_code)
    except OSError as error:
        line, code = explained(error)
        _print(f"{name}: {line}")
        sys.exit(code)
    except ModuleNotFoundError as error:
        if (error.name or "fedlora").split(".")[0] == "fedlora":
            raise  # a fault of ours, and not of an installation
        _print(f"{name}: found no package {error.name}, {INSTALLED}")
        sys.exit(BadInput.exit_code)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (KeyboardInterrupt, click.Abort):
        if said := stopped():
            _print(f"\n{said}")
        sys.exit(1)


def _name_paths(command: Any) -> None:
    """No path that a person gives is empty, which would mean the folder that they stand in."""
    import click

    class NamedPath(click.Path):
        def convert(self, value: Any, param: Any, ctx: Any) -> Any:
            text = str(value)
            if not text or text != text.strip():
                option = isinstance(param, click.Option)
                name = param.opts[0] if option else param.human_readable_name
                raise BadInput(f'{name} "{text}": expected a path without white space at its ends')
            return super().convert(value, param, ctx)

    for param in command.params:
        if isinstance(param.type, click.Path):
            param.type = NamedPath()
    for inner in getattr(command, "commands", {}).values():
        _name_paths(inner)


def _suggest_once(command: Any) -> None:
    """Of a mistyped command click says which is meant; typer would say the same once more."""
    command.suggest_commands = False
    for inner in getattr(command, "commands", {}).values():
        _suggest_once(inner)


def _print(*lines: str) -> None:
    sys.stderr.write("".join(line + "\n" for line in lines))
