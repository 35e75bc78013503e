"""Secure aggregation on Ray: any actor may train any institution, and one keeps all their secrets.

A node's state machine has to outlive its messages, and Flower's simulation promises no node the
same actor twice. So the state machines live in an actor of their own, by name; the actor that
trains asks it before and after. What reaches the coordinator through Flower's grid are masked
vectors, as between machines.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ray

from fedlora.client.secagg.masked_run import Train
from fedlora.common.errors import BadInput, FedloraError, Refused
from fedlora.common.manifest.manifest import RunManifest
from fedlora.common.manifest.plan import Delta
from fedlora.common.model.state import AdapterSpec
from fedlora.common.protocol.stages import Request, Stage
from fedlora.simulations.engines.masked import Roster
from fedlora.simulations.engines.shared import Shared
from fedlora.simulations.federation.population import client_name
from fedlora.simulations.federation.run_folder import SimulatedRun


class _Keeper:
    """One run's nodes. A refusal comes back as text: an exception would arrive as Ray's."""

    def __init__(self, shared: Shared, names: list[str], manifest: bytes) -> None:
        identities = {name: shared.identity(name) for name in names}
        self._roster = Roster(identities, RunManifest.from_bytes(manifest))

    def prepare(self, request: bytes, spec: AdapterSpec) -> _Said:
        """The answer to a stage; None: an update is to be trained and handed to `mask` first."""
        asked = Request.from_bytes(request)
        run = self._roster.masked_run(asked.institution)

        def step() -> bytes | None:
            if asked.stage != Stage.INPUT:
                return run.answer(asked.stage, asked.message, asked.plan)
            sent = run.node.sent(asked.plan.round, asked.plan.attempt)
            if sent is None:
                run.check(asked.message, asked.plan, spec)
            return sent

        return _said(step)

    def mask(self, request: bytes, spec: AdapterSpec, update: Delta) -> _Said:
        asked = Request.from_bytes(request)
        return _said(
            lambda: self._roster.masked_run(asked.institution).mask(asked.plan, spec, update)
        )


# the answer; or why there is none, and whether it is a refusal
_Said = tuple[bytes | None, str, bool]


class Keeper:
    """The handle of a run's keeper; the coordinator starts it, training actors find it by name."""

    def __init__(self, actor: Any) -> None:
        self._actor = actor

    @classmethod
    def start(cls, run: SimulatedRun, shared: Shared) -> Keeper:
        """It lives as long as this handle."""
        actor = ray.remote(_Keeper).options(name=_name(run.manifest), num_cpus=0)
        names = [client_name(client) for client in run.federation.clients]
        return cls(actor.remote(shared, names, run.manifest.to_bytes()))

    @classmethod
    def find(cls, manifest: RunManifest) -> Keeper:
        """The run's actor, from any process of its cluster; ValueError where there is none."""
        return cls(ray.get_actor(_name(manifest)))

    def answer(self, request: bytes, spec: AdapterSpec, train: Train) -> bytes:
        """The node's answer to a stage; BadInput or Refused with its reason."""
        answer = _heard(ray.get(self._actor.prepare.remote(request, spec)))
        if answer is None:
            answer = _heard(ray.get(self._actor.mask.remote(request, spec, train())))
        if answer is None:
            raise FedloraError("secure aggregation: found no answer to a stage")
        return answer


def _name(manifest: RunManifest) -> str:
    return f"fedlora-{manifest.digest}"


def _said(step: Callable[[], bytes | None]) -> _Said:
    try:
        return step(), "", False
    except FedloraError as error:
        return None, str(error), isinstance(error, Refused)


def _heard(said: _Said) -> bytes | None:
    answer, reason, refused = said
    if reason:
        raise Refused(reason) if refused else BadInput(reason)
    return answer
