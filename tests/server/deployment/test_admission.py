"""Members' nodes at SuperLink, over kills and ill will; and whether Flower still carries a run."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from flwr.server.superlink.linkstate.sql_linkstate import SqlLinkState
from flwr.supercore.error import ApiErrorCode
from flwr.supercore.error.catalog import API_ERROR_MAP

from fedlora.common.errors import BadInput, FedloraError
from fedlora.common.trust.identity import Identity
from fedlora.server.coordinator.folder import Directory
from fedlora.server.deployment import supervise
from fedlora.server.deployment.superlink import SuperLink
from fedlora.server.deployment.supervise import admit
from tests.server.enrolments import flower_key, request

OURS = "us"


class Stand(SuperLink):
    """`flwr` answered by Flower's own table of nodes.

    `cut` is a kill once Flower has done its part.
    """

    nodes: SqlLinkState
    cut = False

    def _flwr(self, *arguments: str, seconds: float = 0) -> dict[str, Any]:
        found: dict[str, Any] = {}
        try:
            if arguments[1] == "register":
                key = Path(arguments[2]).read_bytes()
                found = {"node-id": self.nodes.create_node(OURS, OURS, key, 30.0)}
            elif arguments[1] == "unregister":
                self.nodes.delete_node(OURS, int(arguments[2]))
            else:
                known = self.nodes.get_node_info(owner_aids=[OURS])
                return {
                    "nodes": [
                        {"node-id": str(each.node_id), "status": each.status} for each in known
                    ]
                }
        except ValueError as error:
            taken = "in use" in str(error)
            code = ApiErrorCode.PUBLIC_KEY_ALREADY_IN_USE if taken else ApiErrorCode.NODE_NOT_FOUND
            raise FedloraError(f"flwr supernode: {API_ERROR_MAP[code].public_message}") from error
        if self.cut:
            raise KeyboardInterrupt
        return found


@pytest.fixture
def made(tmp_path: Path) -> Directory:
    directory = Directory.create(tmp_path / "c", "demo", "127.0.0.1")
    for name in ("north", "south"):
        directory.registry.enrol(request(Identity.generate(), name), name)
    return directory


@pytest.fixture
def link(made: Directory) -> Iterator[Stand]:
    link = Stand(made.superlink_files(), 1)
    link.nodes = SqlLinkState(":memory:", SimpleNamespace(), None)  # type: ignore[arg-type]
    link.nodes.initialize()
    yield link


def test_a_kill_between_flower_and_the_note_of_it_is_made_good(
    made: Directory, link: Stand
) -> None:
    for _ in made.flower_keys():
        link.cut = True
        with pytest.raises(KeyboardInterrupt):
            admit(made, link)
    link.cut = False
    assert admit(made, link) == [] and set(made.registered()) == {"north", "south"}
    known = {each.node_id for each in link.nodes.get_node_info(owner_aids=[OURS])}
    assert {node for node, _ in made.registered().values()} == known
    made.registry.revoke("south")
    link.cut = True
    with pytest.raises(KeyboardInterrupt):
        admit(made, link)
    link.cut = False
    assert admit(made, link) == [] and set(made.registered()) == {"north"}


def test_a_node_that_is_not_taken_stops_nobody_else(made: Directory, link: Stand) -> None:
    link.nodes.create_node(OURS, OURS, made.flower_keys()["north"].encode() + b"\n", 30.0)
    link.nodes.create_node(OURS, OURS, b"another that nobody knows", 30.0)
    (fault,) = admit(made, link)
    assert fault.startswith("north: ") and "found 2 nodes" in fault and "superlink.db" in fault
    assert set(made.registered()) == {"south"}


def test_another_spelling_of_a_key_is_refused(made: Directory) -> None:
    """Base64 of a P-384 key has spare bits.

    A member could take another's key from SuperLink's point of view.
    """
    key = made.flower_keys()["north"]
    body = key.rstrip("=")
    twin = body[:-1] + chr(ord(body[-1]) + 1) + "=" * (len(key) - len(body))
    with pytest.raises(BadInput, match="another spelling"):
        made.registry.enrol(request(Identity.generate(), "mallory", key=twin), "mallory")
    made.registry.enrol(request(Identity.generate(), "west", key=flower_key()), "west")


class Flower:
    """What `_followed` asks: statuses in turn, then none."""

    def __init__(self, *statuses: str, listening: bool = True, log: str = "") -> None:
        self.statuses, self.listening, self.log = list(statuses), listening, log

    def run_status(self, run: str) -> tuple[str, str]:
        if self.statuses and (status := self.statuses.pop(0)):
            return status, "details"
        raise FedloraError("flwr ls: found no answer")

    def listens(self) -> bool:
        return self.listening

    def lost(self) -> str:
        return self.log


def test_a_question_without_an_answer_ends_no_run_that_lives() -> None:
    vigil = supervise._Vigil(Flower("", "", "running", "", "", ""), "1")  # type: ignore[arg-type]
    assert [vigil.ended() for _ in range(5)] == [""] * 5
    with pytest.raises(FedloraError, match="no answer"):
        vigil.ended()
    with pytest.raises(FedloraError, match="no answer"):
        supervise._Vigil(Flower(listening=False), "1").ended()  # type: ignore[arg-type]


def test_a_run_that_no_executor_takes_says_so() -> None:
    started = supervise._Vigil(Flower("pending", log="superexec.log"), "1")  # type: ignore[arg-type]
    assert "superexec.log says why" in started.ended()
    waiting = supervise._Vigil(Flower("pending", "pending", "running"), "1")  # type: ignore[arg-type]
    assert waiting.ended() == ""
    waiting.began = time.monotonic() - 61
    assert "no executor has taken it" in waiting.ended() and waiting.ended() == ""
    assert "finished:failed" in supervise._Vigil(Flower("finished:failed"), "1").ended()  # type: ignore[arg-type]
