"""The trainer's endpoint: one method, the standard health service, and limits on all that costs.

Training runs on a thread of its own, so that health answers meanwhile. Who connects is not asked: a
Unix socket of mode 0600 or 0660 or mutual TLS decides who may, and only what the coordinator signed
trains.
"""

from __future__ import annotations

import logging
import os
import stat
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, ThreadPoolExecutor
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import NoReturn

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from fedlora.client.network.channel import SERVICE
from fedlora.client.node.policy import TrainerPolicy
from fedlora.client.service.signals import stop_event
from fedlora.common.errors import BadInput, Refused
from fedlora.common.terminal import places
from fedlora.common.trust.enrolment import certificate_in
from fedlora.common.trust.identity import private_key_in, read_private

log = logging.getLogger(__name__)

WAITING = 4  # requests, the one at hand included; more are told to come back, unread
CALLS = 16  # at once, of one connection and of all
READ_SECONDS = 20.0  # that a body may take to come in
LOOK = 0.5  # seconds between two looks whether to stop
GRACE = 30.0  # seconds that a stop leaves to the round that is being trained

Ask = Callable[[bytes], bytes]


class Service:
    """A running endpoint; `address` is what a relay connects to."""

    def __init__(self, ask: Ask, settings: TrainerPolicy, root: Path) -> None:
        self._ask = ask
        self._worker = ThreadPoolExecutor(1, "trainer")
        self._room = threading.BoundedSemaphore(WAITING)
        self._health = health.HealthServicer()
        self._server = grpc.server(
            ThreadPoolExecutor(WAITING + 4, "grpc"),
            maximum_concurrent_rpcs=CALLS,
            options=_options(settings),
        )
        self._server.add_generic_rpc_handlers((self._handlers(),))
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        self.address = _bind(self._server, settings, root)

    def start(self) -> None:
        """Serve, and say so to a health check."""
        self._server.start()
        self._health.set(SERVICE, health_pb2.HealthCheckResponse.SERVING)

    def stop(self, grace: float) -> bool:
        """Take nothing new, and end the round at hand within `grace` seconds; whether it did."""
        end = time.monotonic() + grace
        self._health.enter_graceful_shutdown()
        answered = self._server.stop(grace)
        self._worker.shutdown(wait=False, cancel_futures=True)
        answered.wait(grace + 1)
        if self.address.startswith("unix:"):
            Path(self.address.removeprefix("unix:")).unlink(missing_ok=True)
        # Who asked may have hung up meanwhile: a place is free again once its work has ended.
        return all(
            self._room.acquire(timeout=max(0.0, end - time.monotonic())) for _ in range(WAITING)
        )

    def _handlers(self) -> grpc.GenericRpcHandler:
        # Unary to who asks. As a stream, a body is read when its turn comes: one is in memory.
        method = grpc.stream_unary_rpc_method_handler(self._handle)
        return grpc.method_handlers_generic_handler(SERVICE, {"Ask": method})

    def _handle(self, bodies: Iterator[bytes], context: grpc.ServicerContext) -> bytes:
        if not self._room.acquire(blocking=False):
            context.abort(
                grpc.StatusCode.RESOURCE_EXHAUSTED, "the trainer is busy; ask again later"
            )
        try:
            return self._worker.submit(lambda: self._ask(_body(bodies, context))).result()
        except CancelledError:
            context.abort(grpc.StatusCode.UNAVAILABLE, "the trainer stops; ask again later")
        except grpc.RpcError:
            raise
        except Exception as error:  # an answer that could not even be signed: say nothing of why
            log.error("a request could not be answered: %s", places(error))
            context.abort(grpc.StatusCode.INTERNAL, "the trainer failed; its own log says why")
        finally:
            self._room.release()
        raise AssertionError("abort raises")


def serve(
    ask: Ask, settings: TrainerPolicy, root: Path, listening: Callable[[str], object]
) -> None:
    """Until SIGTERM or SIGINT; `listening` is told the address. BadInput as of a `Service`.

    Ends this process where the round at hand does not end in time, or at a second signal. A thread
    can't be stopped, and an interpreter that returned from here would give up the lock of the only
    trainer and wait for it. All that a round leaves is whole or absent, so any moment will do.
    """
    # Before the socket exists: who sees it, and asks for the end at once, is heard.
    asked = stop_event(lambda: _end_now("a second signal came"))
    service = Service(ask, settings, root)
    listening(service.address)
    service.start()
    while not asked.wait(LOOK):
        pass
    log.info("stops: takes nothing new, and the round at hand has %g s", GRACE)
    if not service.stop(GRACE):
        _end_now(f"the round at hand did not end within {GRACE:g} s")


def _end_now(why: str) -> NoReturn:
    log.warning("%s: the trainer ends now; what was not committed is a lost attempt", why)
    os._exit(0)  # it was asked to end


def _body(bodies: Iterator[bytes], context: grpc.ServicerContext) -> bytes:
    """The one body of a request; who sends none, or too slowly, is hung up on."""
    hang_up = threading.Timer(READ_SECONDS, context.cancel)
    hang_up.start()
    try:
        return next(bodies)
    finally:
        hang_up.cancel()


def _options(settings: TrainerPolicy) -> list[tuple[str, int]]:
    return [
        ("grpc.max_receive_message_length", settings.max_message_bytes),
        ("grpc.max_send_message_length", settings.max_message_bytes),
        ("grpc.max_concurrent_streams", CALLS),
        ("grpc.max_connection_idle_ms", 60_000),
        ("grpc.so_reuseport", 0),
        ("grpc.max_metadata_size", 16 << 10),
        ("grpc.http2.bdp_probe", 0),  # windows stay small: what is not read stays with who sends it
    ]


def _bind(server: grpc.Server, settings: TrainerPolicy, root: Path) -> str:
    """Listen where the policy says; BadInput where that is not possible."""
    if not settings.listen.startswith("unix:"):
        return _bind_tls(server, settings, root)
    path = (root / settings.listen.removeprefix("unix:")).resolve()
    if len(str(path).encode()) > 100:
        raise BadInput(
            f"node.toml [trainer] listen: {path} is too long for a socket, expected 100 bytes"
        )
    _remove_socket(path)
    with _umask(0o117 if settings.group_may_ask else 0o177):
        try:
            server.add_insecure_port(f"unix:{path}")
        except RuntimeError as error:
            raise BadInput(f"node.toml [trainer] listen: {path} can't be listened on") from error
    return f"unix:{path}"


def _remove_socket(path: Path) -> None:
    """Remove a killed trainer's socket: the lock says none lives; BadInput for all else there."""
    try:
        held = path.lstat()
    except FileNotFoundError:
        return
    except OSError as error:
        raise BadInput(
            f"node.toml [trainer] listen: {path} can't be read ({error.strerror})"
        ) from error
    if not stat.S_ISSOCK(held.st_mode):
        raise BadInput(
            f"node.toml [trainer] listen: found a file or folder at {path}, expected a socket or"
            " nothing"
        )
    path.unlink()


def _bind_tls(server: grpc.Server, settings: TrainerPolicy, root: Path) -> str:
    try:
        certificate = (root / settings.tls_certificate).read_bytes()
        clients = (root / settings.tls_clients).read_bytes()
    except OSError as error:
        raise BadInput(
            f"node.toml [trainer] tls: {error.filename} can't be read ({error.strerror})"
        ) from error
    key = read_private(root / settings.tls_key)
    check_pair(certificate, key, settings.tls_certificate)
    credentials = grpc.ssl_server_credentials(
        [(key, certificate)], clients, require_client_auth=True
    )
    host = settings.listen.rpartition(":")[0]
    try:
        port = server.add_secure_port(settings.listen, credentials)
    except RuntimeError as error:
        raise BadInput(
            f"node.toml [trainer] listen: {settings.listen} can't be listened on"
        ) from error
    return f"{host}:{port}"


def check_pair(certificate: bytes, key: bytes, where: str) -> None:
    """BadInput unless the key is the certificate's; Refused where that is not valid now."""
    found = certificate_in(certificate, where)
    try:
        pair = (private_key_in(key).public_key(), found.public_key())
    except ValueError as error:
        raise BadInput(f"{where}: found no certificate and key in PEM") from error
    if pair[0] != pair[1]:
        raise BadInput(f"{where}: found a key that does not match its certificate")
    if not found.not_valid_before_utc <= datetime.now(UTC) <= found.not_valid_after_utc:
        raise Refused(
            f"{where}: found a certificate that is not valid now (until"
            f" {found.not_valid_after_utc})"
        )


@contextmanager
def _umask(mask: int) -> Iterator[None]:
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)
