"""`fedlora-server`: the coordinator's command line. Thin: it reads arguments and prints results."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from fedlora.common.errors import BadInput
from fedlora.common.privacy.figures import shown_epsilon
from fedlora.common.terminal import printable, run_to_end

if TYPE_CHECKING:
    from fedlora.server.coordinator.folder import Directory

app = typer.Typer(
    help=(
        "A federation's coordinator: it plans rounds, adds what institutions send, and signs what"
        " it releases."
    ),
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
STOPPED = "stopped; what was committed stays: fedlora-server resume goes on with a run"
SOON = 30  # days before a certificate's end from which every look at the members says so
console = Console(highlight=False, soft_wrap=True)
errors = Console(stderr=True, highlight=False)

Folder = Annotated[Path, typer.Option("--dir", help="The coordinator's folder.")]
HERE = Path("coordinator")


@app.command()
def init(
    folder: Annotated[Path, typer.Argument(help="The folder to make.")],
    federation: Annotated[str, typer.Option(help="The federation's short name.")],
    host: Annotated[str, typer.Option(help="The name or address that institutions dial.")],
    port: Annotated[int, typer.Option(help="The port that they dial.")] = 9443,
    superlink_port: Annotated[int, typer.Option(help="SuperLink's own port, on loopback.")] = 9300,
) -> None:
    """Make a working coordinator's folder: keys, authority, certificate, invitation, examples."""
    from fedlora.server.coordinator.folder import INVITATION, Directory

    made = Directory.create(folder, federation, host, port, superlink_port)
    _say(f"made         {made.root}")
    _say(f"hand out     {made.root / INVITATION}")
    _say(f"coordinator  {made.identity.public.fingerprint}")
    _say(f"authority    {made.authority_fingerprint}")
    _say("Institutions compare both fingerprints with you by telephone when they join.")


@app.command()
def enrol(
    request: Annotated[Path, typer.Argument(help="An institution's enrolment request.")],
    dir_: Folder = HERE,
    yes: Annotated[
        bool, typer.Option("--yes", help="The fingerprint was compared already.")
    ] = False,
) -> None:
    """Make an institution a member, once its fingerprint was compared by telephone."""
    from fedlora.common.disk.files import read_text
    from fedlora.common.trust.enrolment import request_from_text
    from fedlora.server.coordinator.folder import Directory

    directory, text = Directory.open(dir_), read_text(request, expected="a request")
    found = request_from_text(text, request.name)
    _say(f"name         {found.name}")
    _say(f"organisation {found.organisation}")
    _say(f"fingerprint  {found.identity.fingerprint}")
    if not yes:
        _confirm("enrol", "Did the institution read out this fingerprint?")
    directory.registry.enrol(text, request.name)
    _say(f"enrolled     {found.name}")


@app.command()
def rotate(
    rotation: Annotated[
        Path, typer.Argument(help="A member's new request under its old key's signature.")
    ],
    dir_: Folder = HERE,
    yes: Annotated[
        bool, typer.Option("--yes", help="The fingerprints were compared already.")
    ] = False,
) -> None:
    """Replace a member's key by the one that its old key names; it counts from the next round."""
    from fedlora.common.disk.files import read_text
    from fedlora.common.trust.rotation import rotation_from_text
    from fedlora.server.coordinator.folder import Directory

    directory, text = Directory.open(dir_), read_text(rotation, expected="a rotation")
    found = rotation_from_text(text, rotation.name)
    _say(f"name         {found.request.name}")
    _say(f"old key      {found.old.fingerprint}")
    _say(f"new key      {found.request.identity.fingerprint}")
    if not yes:
        _confirm("rotate", "Did the institution read out these fingerprints?")
    directory.registry.rotate(text, rotation.name)
    _say(f"rotated      {found.request.name}")


@app.command()
def revoke(
    name: Annotated[str, typer.Argument(help="A member's name.")], dir_: Folder = HERE
) -> None:
    """End a membership; it counts from the next round, and its key never comes back."""
    from fedlora.server.coordinator.folder import Directory

    _say(f"revoked      {Directory.open(dir_).revoke(name).name}")


@app.command()
def members(dir_: Folder = HERE) -> None:
    """Who is a member, who was, and by which keys."""
    from fedlora.server.coordinator.folder import Directory

    directory = Directory.open(dir_)
    _say(f"coordinator  {directory.identity.public.fingerprint}")
    _say(f"authority    {directory.authority_fingerprint}")
    for each in directory.registry.members():
        ended = f", {each.reason} {each.ended[:10]}" if each.ended else ""
        _say(f"{each.name}  {each.organisation}, enrolled {each.enrolled[:10]}{ended}")
        _say(f"  {each.identity.fingerprint}")
    _warn_of_expiry(directory)


@app.command()
def renew(
    dir_: Folder = HERE,
    new_key: Annotated[
        bool, typer.Option("--new-key", help="Replace the server's key too.")
    ] = False,
) -> None:
    """A new server certificate from the same authority: institutions need not do anything."""
    from fedlora.server.coordinator.folder import Directory

    directory = Directory.open(dir_)
    directory.renew(new_key=new_key)
    _say(
        f"renewed      {directory.root / 'tls' / 'server.crt'}; restart SuperLink and nginx to"
        " use it"
    )


@app.command()
def invite(dir_: Folder = HERE) -> None:
    """Print the invitation that institutions join with."""
    from fedlora.server.coordinator.folder import Directory

    sys.stdout.write(Directory.open(dir_).invitation())


@app.command()
def export(
    target: Annotated[Path, typer.Argument(help="The folder to make.")],
    dir_: Folder = HERE,
    run_: Annotated[
        int | None, typer.Option("--run", help="A run's number; the last one, if left out.")
    ] = None,
    reports: Annotated[
        Path | None, typer.Option(help="A folder of the institutions' own reports.")
    ] = None,
    merge: Annotated[Path | None, typer.Option(help="Where the merged model goes.")] = None,
    base: Annotated[str, typer.Option(help="Of --merge: where the base lies, if elsewhere.")] = "",
) -> None:
    """Write a run's adapter with model card and every institution's signed statement."""
    from fedlora.server.coordinator.folder import Directory
    from fedlora.server.release.from_run import export_run, find_run

    directory = Directory.open(dir_)
    for line in export_run(directory, find_run(directory, run_), target, reports):
        _say(line)
    _say(f"export       {target}")
    if merge is not None:
        from fedlora.common.adapter.merged import merge_released

        merge_released(target / "adapter", base, merge, "bfloat16")
        _say(f"model        {merge}")


@app.command()
def verify(
    folder: Annotated[Path, typer.Argument(help="An export.")],
    key: Annotated[
        Path | None, typer.Option(help="The coordinator's public key, from a trusted source.")
    ] = None,
) -> None:
    """Check an export offline: every file by its digest, every signature."""
    from fedlora.server.release.verify import verify_export

    for line in verify_export(folder, key):
        _say(line)


@app.command()
def run(
    config: Annotated[Path, typer.Argument(help="The run's configuration; see training.toml.")],
    dir_: Folder = HERE,
    new: Annotated[
        bool,
        typer.Option(
            "--new", help="Also where the last run has not ended: it keeps what it reserved."
        ),
    ] = False,
) -> None:
    """Carry out a new run."""
    from fedlora.server.deployment import supervise

    _carry_out(dir_, lambda directory: supervise.begin(directory, config, beside=new))


@app.command()
def resume(
    dir_: Folder = HERE,
    run_: Annotated[
        int | None, typer.Option("--run", help="A run's number; the last one, if left out.")
    ] = None,
) -> None:
    """Go on with a run from its last committed round, in a new Flower run."""
    from fedlora.server.release.from_run import find_run

    _carry_out(dir_, lambda directory: find_run(directory, run_))


@app.command()
def status(
    dir_: Folder = HERE,
    follow: Annotated[bool, typer.Option("--follow", help="Stay, and show what changes.")] = False,
) -> None:
    """Rounds, institutions, and the ε that each of them states."""
    from fedlora.server.coordinator.folder import Directory
    from fedlora.server.deployment.status import show

    show(Directory.open(dir_), console, follow)


@app.command()
def watch(
    dir_: Folder = HERE,
    run_: Annotated[
        int | None, typer.Option("--run", help="A run's number; the last one, if left out.")
    ] = None,
    port: Annotated[int, typer.Option(help="On loopback; 0: any that is free.")] = 0,
) -> None:
    """A live page of a run for this machine's browser: progress, ε, institutions, failures."""
    from fedlora.server.coordinator.folder import Directory
    from fedlora.server.deployment.status import watched
    from fedlora.server.release.from_run import find_run
    from fedlora.server.watch.live import Watching

    directory = Directory.open(dir_)
    folder = find_run(directory, run_)
    with Watching(folder, port, lambda: watched(directory, folder)) as page:
        _say(f"page         {page.url}")
        page.serve_forever()


def main() -> None:
    """Entry point: errors are one line to a fault, and the exit code says what kind they are."""
    run_to_end(app, "fedlora-server", lambda: STOPPED)


def _carry_out(folder: Path, chosen: Callable[[Directory], Path]) -> None:
    from fedlora.server.coordinator.folder import Directory
    from fedlora.server.deployment import supervise

    directory = Directory.open(folder)
    directory.check_certificate()  # before institutions are asked for anything
    place = chosen(directory)
    _say(f"{'run':12}{place}")
    with _ends_alike_on(signal.SIGTERM):
        try:
            summary = supervise.carry_out(directory, place, _print_round, _say)
        except KeyboardInterrupt:
            errors.print(
                "\nstopped; what was committed stays, and this goes on: fedlora-server resume"
                f" --dir {folder} --run {place.name}",
                markup=False,
                soft_wrap=True,
            )
            sys.exit(1)
    for name in ("accuracy", "perplexity", "loss", "rounds", "seconds"):
        if summary.get(name) is not None:
            value = summary[name]
            _say(f"{name:12}{value:.4g}" if isinstance(value, float) else f"{name:12}{value}")
    if summary.get("epsilon") is not None:
        _say(f"{'epsilon':12}{shown_epsilon(summary['epsilon'])}")


@contextmanager
def _ends_alike_on(number: signal.Signals) -> Iterator[None]:
    """The signal is Ctrl-C here: SuperLink, which was started apart, must end with this process."""

    def interrupt(*_: object) -> None:
        signal.signal(number, signal.SIG_IGN)  # a second one would cut the ending short
        raise KeyboardInterrupt

    before = signal.signal(number, interrupt)
    try:
        yield
    finally:
        signal.signal(number, before)


def _print_round(line: Mapping[str, Any]) -> None:
    shown = {name: line[name] for name in ("accuracy", "loss") if isinstance(line.get(name), float)}
    figures = "  ".join(f"{name} {value:.4g}" for name, value in shown.items())
    epsilon = f"  ε {shown_epsilon(line['epsilon'])}" if line.get("epsilon") is not None else ""
    _say(
        f"round {line['round']:4d}  {line['replies']} of {line['asked']} in {line['seconds']:.1f} s"
        f"  {figures}{epsilon}"
    )
    for name, reason in line.get("failures") or ():
        _say(f"            {name}: {reason}")


def _confirm(command: str, question: str) -> None:
    if not sys.stdin.isatty():
        raise BadInput(
            f"{command}: found no terminal to ask on, expected --yes once fingerprints were"
            " compared"
        )
    typer.confirm(question, abort=True)


def _warn_of_expiry(directory: Any) -> None:
    from fedlora.server.coordinator.certificates import days_left, read_certificate

    left = days_left(read_certificate(directory.root / "tls" / "server.crt"))
    if left < SOON:
        errors.print(
            f"fedlora-server: the server's certificate ends in {left:.0f} days: fedlora-server"
            " renew"
        )


def _say(text: str) -> None:
    console.print(printable(text), markup=False)


if __name__ == "__main__":
    main()
