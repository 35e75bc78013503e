"""`fedlora-server`: the coordinator's command line. Thin: it reads arguments and prints results."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import click
import typer
from rich.console import Console
from rich.table import Table

from fedlora.common.errors import BadInput, FedloraError
from fedlora.common.identity import PublicIdentity
from fedlora.common.statement import shown_epsilon

app = typer.Typer(
    help="A federation's coordinator: it plans rounds, adds what institutions send, and can see nobody's text.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
TYPER_INTERRUPTED = 130  # what typer makes of Ctrl-C
console = Console(highlight=False, soft_wrap=True)
errors = Console(stderr=True, highlight=False)

HERE = Path("coordinator")
Folder = Annotated[Path, typer.Option("--coordinator", help="The coordinator's folder.")]


@app.command()
def init(
    folder: Annotated[Path, typer.Argument(help="The folder to make.")],
    federation: Annotated[str, typer.Option(help="The federation's short name.")],
    host: Annotated[str, typer.Option(help="Where institutions reach this machine.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="The port that they connect to.")] = 9443,
    superlink_port: Annotated[
        int, typer.Option(help="SuperLink's own port, behind a proxy; 0: no proxy, the same port.")
    ] = 0,
) -> None:
    """Make a working coordinator's folder: keys, authority, certificates, invitation, examples."""
    from fedlora.server.directory import Directory, Settings

    directory = Directory.create(folder, Settings(federation, host, port, superlink_port or port))
    console.print(f"hand {folder / 'invitation.json'} to institutions, and read out on the telephone:")
    console.print(f"  coordinator: {directory.identity.public.fingerprint}", markup=False)


@app.command()
def renew(coordinator: Folder = HERE) -> None:
    """A new server certificate from the same authority; start SuperLink again to use it."""
    from fedlora.server.directory import Directory

    Directory.open(coordinator, expired=True).renew()


@app.command()
def enrol(
    request: Annotated[Path, typer.Argument(help="An institution's enrolment.json.")],
    coordinator: Folder = HERE,
) -> None:
    """Make an institution a member; compare its fingerprint by telephone first."""
    from fedlora.server.directory import Directory

    found = Directory.open(coordinator).registry.enrol(_text(request), request.name)
    console.print(f"{found.name} ({found.organisation}): {found.identity.fingerprint}", markup=False)


@app.command()
def revoke(name: Annotated[str, typer.Argument(help="A member's name.")], coordinator: Folder = HERE) -> None:
    """Remove a member; it counts from the next attempt on."""
    from fedlora.server.directory import Directory

    Directory.open(coordinator).registry.revoke(name)


@app.command()
def run(
    config: Annotated[Path, typer.Argument(help="The run's configuration; see training.toml.")],
    coordinator: Folder = HERE,
) -> None:
    """Carry out a new run."""
    from fedlora.server import federation
    from fedlora.server.directory import Directory

    directory = Directory.open(coordinator)
    _carry_out(directory, federation.begin(directory, config))


@app.command()
def resume(coordinator: Folder = HERE) -> None:
    """Go on with the last run from its last committed round, in a new Flower run."""
    from fedlora.server import federation
    from fedlora.server.directory import Directory

    directory = Directory.open(coordinator)
    _carry_out(directory, federation.last(directory))


@app.command()
def status(
    coordinator: Folder = HERE,
    follow: Annotated[bool, typer.Option("--follow", help="Stay, and show what changes.")] = False,
) -> None:
    """Rounds, members, and the ε that each of them states."""
    from fedlora.server.directory import Directory
    from fedlora.server.status import show

    show(Directory.open(coordinator), console, follow)


@app.command()
def export(
    folder: Annotated[Path, typer.Argument(help="The folder to make.")], coordinator: Folder = HERE
) -> None:
    """Write the last run's adapter with a model card and every institution's signed statement."""
    from fedlora.server.directory import Directory
    from fedlora.server.release import write_release

    directory = Directory.open(coordinator)
    write_release(directory, directory.runs()[-1] if directory.runs() else None, folder)
    console.print(f"export  {folder}")


@app.command()
def verify(
    folder: Annotated[Path, typer.Argument(help="An export.")],
    key: Annotated[
        Path | None, typer.Option(help="The coordinator's public key, from a source that you trust.")
    ] = None,
) -> None:
    """Check an export offline: every file, every signature."""
    from fedlora.server.release import check_release

    expected = PublicIdentity.from_text(_text(key), key.name) if key is not None else None
    for line in check_release(folder, expected):
        console.print(line, markup=False)


def main() -> None:
    """Entry point: errors are one line to a fault, and the exit code says what kind they are."""
    try:
        code = app(standalone_mode=False)
        if code == TYPER_INTERRUPTED:
            raise KeyboardInterrupt
        sys.exit(code if isinstance(code, int) else 0)
    except FedloraError as error:
        for line in str(error).splitlines():
            errors.print(f"fedlora-server: {line}", markup=False, soft_wrap=True)
        sys.exit(error.exit_code)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (KeyboardInterrupt, click.Abort):
        words = sys.argv[sys.argv.index("--coordinator") :][:2] if "--coordinator" in sys.argv else []
        again = shlex.join(["fedlora-server", "resume", *words])
        errors.print(f"\nstopped at the last committed round; go on with: {again}", markup=False)
        sys.exit(1)


def _carry_out(directory: Any, folder: Path) -> None:
    from fedlora.server.federation import carry_out

    console.print(f"run     {folder}")
    summary = carry_out(directory, folder, _print_round)
    table = Table(show_header=False, box=None, pad_edge=False)
    for name in ("accuracy", "perplexity", "loss", "rounds", "seconds"):
        if summary.get(name) is not None:
            value = summary[name]
            table.add_row(name, f"{value:.4g}" if isinstance(value, float) else str(value))
    if summary.get("epsilon") is not None:
        table.add_row("epsilon", shown_epsilon(summary["epsilon"]))
    console.print(table)


def _print_round(line: Mapping[str, Any]) -> None:
    shown = {name: line[name] for name in ("accuracy", "loss") if isinstance(line.get(name), float)}
    figures = "  ".join(f"{name} {value:.4g}" for name, value in shown.items())
    epsilon = f"  ε {shown_epsilon(line['epsilon'])}" if line.get("epsilon") is not None else ""
    answered = f"{line['replies']} of {line['asked']}"
    console.print(f"round {line['round']:4d}  {answered} in {line['seconds']:.1f} s  {figures}{epsilon}")
    for name, reason in line.get("failures") or ():
        console.print(f"            {name}: {reason}", markup=False)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"{path}: can't be read as UTF-8 text ({error})") from error


if __name__ == "__main__":
    main()
