"""A coordinator's folder: all that a federation's server needs, made in one go or not at all.

coordinator.toml     federation, address, ports
coordinator.pub      the public key that manifests and exports are verified with
invitation.json      what institutions join with; signed
keys/coordinator.pem Ed25519, 0600: who has it speaks for the federation
ca/, tls/            certificate authority; the server's certificate
heights.json         how high each member's ledger was when it last said so
members.json         who is a member; signed, and numbered: the newest one's number is in
                     keys/members.revision
training.toml        a commented example of a run's configuration
public/              for the public files that it names
nginx.conf           lets institutions reach the Fleet API, and nothing else
superlink/           SuperLink's database and secrets
runs/N/              config, checkpoint, consents, metrics, summary and adapter of run N
"""

from __future__ import annotations

import grp
import json
import os
import pwd
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from fedlora.common.config.toml import Bounds, Pattern, literal, read_fields, read_table
from fedlora.common.disk.files import sync_folder, write_atomically
from fedlora.common.errors import BadInput
from fedlora.common.trust.enrolment import (
    FEDERATION,
    Invitation,
    certificate_fingerprint,
    invitation_to_text,
)
from fedlora.common.trust.identity import Identity
from fedlora.server.coordinator.certificates import (
    SERVER_DAYS,
    Authority,
    check_server,
    issue_server,
    read_certificate,
)
from fedlora.server.coordinator.coordinator import Coordinator
from fedlora.server.coordinator.heights import HEIGHTS, Heights
from fedlora.server.coordinator.members import Member, Registry
from fedlora.server.coordinator.superlink_files import Files

SETTINGS, MEMBERS, KEY = "coordinator.toml", "members.json", "keys/coordinator.pem"
REVISION = "keys/members.revision"
PUBLIC_KEY, INVITATION, TRAINING = "coordinator.pub", "invitation.json", "training.toml"
TEMPLATES = Path(__file__).parent / "templates"
MAX_SETTINGS_BYTES = 1 << 16
LOOPBACK = ("localhost", "127.0.0.1")  # nginx and the run's own processes reach SuperLink there
PORT = {"rule": Bounds(1, 65535)}
HOST = Pattern(
    r"[A-Za-z0-9][A-Za-z0-9.-]{0,252}|[0-9A-Fa-f:]{2,39}", "a host name or an IP address"
)


@dataclass(frozen=True)
class Address:
    """Where institutions reach the coordinator."""

    host: str = field(default="", metadata={"rule": HOST})
    port: int = field(default=9443, metadata=PORT)

    @property
    def text(self) -> str:
        """`host:port`, an IPv6 host in brackets."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


@dataclass(frozen=True)
class SuperLinkPort:
    """Where SuperLink listens on this machine."""

    port: int = field(default=9300, metadata=PORT)


@dataclass(frozen=True)
class Settings:
    """coordinator.toml."""

    federation: str = field(
        default="",
        metadata={"rule": Pattern(FEDERATION.pattern, "lower-case letters, digits, '.', '-'")},
    )
    address: Address = field(default_factory=Address)
    superlink: SuperLinkPort = field(default_factory=SuperLinkPort)


@dataclass(frozen=True)
class Directory:
    """An open folder; `identity` speaks for the federation."""

    root: Path
    settings: Settings
    identity: Identity

    @classmethod
    def create(
        cls, path: Path, federation: str, host: str, port: int = 9443, superlink_port: int = 9300
    ) -> Directory:
        """A new folder at `path`, whole or not at all; BadInput for a bad name or place."""
        given, path = path, path.absolute()
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise BadInput(f"{path}: found something there, expected no folder or an empty one")
        if not re.fullmatch(r"[\w/.@+ -]+", str(path)):
            raise BadInput(
                f"{str(path)!r}: found a path that nginx.conf can't name, expected plain letters"
            )
        text = _filled(SETTINGS, {
            "FEDERATION": literal(federation),
            "HOST": literal(host),
            "PORT": str(port),
            "SUPERLINK_PORT": str(superlink_port),
        })  # fmt: skip
        settings = _settings(text)
        scratch = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            scratch.mkdir(parents=True)
            _fill(scratch, path, settings, {SETTINGS: text, TRAINING: _training(given / "public")})
            scratch.rename(path)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
        sync_folder(path.parent)
        return cls.open(path)

    @classmethod
    def open(cls, path: Path) -> Directory:
        """BadInput where it is no coordinator's folder, Refused where others can read its key."""
        path = path.absolute()
        try:
            with (path / SETTINGS).open("rb") as stream:
                data = stream.read(MAX_SETTINGS_BYTES + 1)
        except OSError as error:
            raise BadInput(
                f"{path}: found no {SETTINGS}, expected a folder of fedlora-server init"
            ) from error
        if len(data) > MAX_SETTINGS_BYTES:
            raise BadInput(f"{SETTINGS}: found more than {MAX_SETTINGS_BYTES} bytes")
        try:
            settings = _settings(data.decode())
        except UnicodeDecodeError as error:
            raise BadInput(f"{SETTINGS}: found bytes that are not UTF-8") from error
        return cls(path, settings, Identity.load(path / KEY))

    @property
    def registry(self) -> Registry:
        """The members, under the coordinator's signature."""
        return Registry(self.root / MEMBERS, self.identity, self.root / REVISION)

    @property
    def authority(self) -> Authority:
        """What signs certificates; BadInput where it is missing."""
        return Authority.load(self.root / "ca")

    @property
    def authority_fingerprint(self) -> str:
        """What `fedlora-node join` prints of the certificate authority, to be compared."""
        return certificate_fingerprint(self.authority.pem, "ca/ca.crt")

    def invitation(self) -> str:
        """What institutions join with: address, authority and coordinator's key, signed."""
        return _invitation(self.settings, self.identity, self.authority)

    def check_certificate(self) -> None:
        """BadInput where institutions would not accept the server's certificate."""
        authority = read_certificate(self.root / "ca" / "ca.crt")
        check_server(self.root / "tls", authority, self.settings.address.host)

    def renew(self, days: int = SERVER_DAYS, new_key: bool = False) -> None:
        """A new server certificate, invitation and proxy setup for the address in settings."""
        authority, host = self.authority, self.settings.address.host
        issue_server(authority, self.root / "tls", _hosts(host), days=days, new_key=new_key)
        write_atomically(self.root / INVITATION, self.invitation().encode())
        write_atomically(self.root / "nginx.conf", _proxy(self.root, self.settings).encode())

    @property
    def port(self) -> int:
        """SuperLink's, on loopback."""
        return self.settings.superlink.port

    def coordinator(self) -> Coordinator:
        """Who speaks in a run, and to whom: members are read anew each time they are asked for."""
        registry = self.registry
        speaks = (self.settings.federation, self.identity)
        return Coordinator(*speaks, registry.active, registry.former, self.heights)

    @property
    def heights(self) -> Heights:
        """How far the members' ledgers had come."""
        return Heights(self.root / HEIGHTS)

    def revoke(self, name: str) -> Member:
        """End a membership; BadInput where there is none. Whoever comes back by this name under a
        new key has another ledger, or says so.
        """
        ended = self.registry.revoke(name)
        self.heights.forget(name)
        return ended

    def superlink_files(self) -> Files:
        """What SuperLink is started with."""
        tls = self.root / "tls"
        return Files(
            self.root / "ca" / "ca.crt",
            tls / "server.crt",
            tls / "server.key",
            self.root / "superlink",
        )

    def flower_keys(self) -> Mapping[str, str]:
        """The OpenSSH keys of the active members' nodes, by name."""
        return self.registry.flower_keys()

    def nodes(self) -> dict[str, int]:
        """Flower's number of each active member's node."""
        active = self.registry.active()
        return {name: node for name, (node, _) in self.registered().items() if name in active}

    def registered(self) -> dict[str, tuple[int, str]]:
        """Node numbers and keys that SuperLink knows, by member."""
        path = self.root / "superlink" / "nodes.json"
        if not path.exists():
            return {}
        try:
            table = json.loads(path.read_bytes())
            return {name: (int(node), str(key)) for name, (node, key) in table.items()}
        except (ValueError, TypeError, AttributeError, RecursionError) as error:
            raise BadInput(
                f"{path}: found no table of node numbers and keys, expected what was written; where"
                f" it is lost, remove {path.parent / 'superlink.db'} too: all nodes are then"
                " registered anew"
            ) from error

    def write_registered(self, nodes: Mapping[str, tuple[int, str]]) -> None:
        """Which SuperNode is whose: by name, its node's number and key."""
        text = json.dumps(nodes, indent=1) + "\n"
        write_atomically(self.root / "superlink" / "nodes.json", text.encode())

    def runs(self) -> list[Path]:
        """Folders of the runs that were begun, oldest first."""
        found = [
            path
            for path in (self.root / "runs").glob("*")
            if path.name.isdecimal() and path.is_dir()
        ]
        return sorted(found, key=lambda path: int(path.name))

    def new_run(self) -> Path:
        """The folder of the next run, made."""
        runs = self.runs()
        folder = self.root / "runs" / str(int(runs[-1].name) + 1 if runs else 1)
        folder.mkdir(parents=True)
        return folder


def _training(public: Path) -> str:
    """The example, with paths of public files as said in the directory that init runs in."""
    places = {"TEST": public / "test.parquet", "VALIDATION": public / "validation.parquet"}
    return _filled(TRAINING, {name: literal(str(path)) for name, path in places.items()})


def _fill(scratch: Path, path: Path, settings: Settings, texts: Mapping[str, str]) -> None:
    """Everything that `path` will hold, written to `scratch`; `texts` are files by name."""
    for name in ("keys", "ca", "tls", "superlink"):
        (scratch / name).mkdir(mode=0o700)
    for name in ("runs", "nginx-temp", "public"):
        (scratch / name).mkdir()
    identity = Identity.create(scratch / KEY)
    authority = Authority.create(scratch / "ca", settings.federation)
    issue_server(authority, scratch / "tls", _hosts(settings.address.host))
    Registry.create(scratch / MEMBERS, identity, scratch / REVISION)
    for name, content in {
        **texts,
        PUBLIC_KEY: identity.public.text + "\n",
        INVITATION: _invitation(settings, identity, authority),
        "nginx.conf": _proxy(path, settings),
    }.items():
        write_atomically(scratch / name, content.encode())


def _settings(text: str) -> Settings:
    table = read_table(text, SETTINGS)
    settings, faults = read_fields(Settings, table)
    found = cast(Settings, settings)
    if not found.federation:
        faults.setdefault("federation", f"{SETTINGS} federation: missing, expected a short name")
    if not found.address.host:
        faults.setdefault(
            "address.host", f"{SETTINGS} [address] host: missing, expected a name or an address"
        )
    if faults:
        raise BadInput(list(faults.values()))
    return found


def _invitation(settings: Settings, identity: Identity, authority: Authority) -> str:
    address = settings.address.text
    return invitation_to_text(
        identity, Invitation(settings.federation, address, authority.pem, identity.public)
    )


def _proxy(root: Path, settings: Settings) -> str:
    host, port = settings.address.host, settings.address.port
    values: dict[str, Any] = {
        "ROOT": root,
        "LISTEN": f"[::]:{port}" if ":" in host else port,
        "SERVER_NAME": f'"{host}"' if ":" not in host else '""',
        "SUPERLINK_PORT": settings.superlink.port,
        "USER": _worker(),
    }
    return _filled("nginx.conf", values)


def _worker() -> str:
    """Where root starts nginx, its worker must be able to write a body here: it owns the folder."""
    try:
        owner = pwd.getpwuid(os.geteuid())
        group = grp.getgrgid(owner.pw_gid)
    except KeyError:  # a container's user without a name
        return "# user NAME;  # whose this folder is, where root starts nginx"
    return f'user "{owner.pw_name}" "{group.gr_name}";  # counts where root starts nginx'


def _filled(name: str, values: dict[str, Any]) -> str:
    text = (TEMPLATES / name).read_text(encoding="utf-8")
    for key, value in values.items():
        text = text.replace(f"@{key}@", str(value))
    return text


def _hosts(host: str) -> list[str]:
    return list(dict.fromkeys((host, *LOOPBACK)))
