"""How the relay asks the trainer: one gRPC method, bytes to bytes, by Unix socket or mutual TLS."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import grpc

from fedlora.common.errors import FedloraError
from fedlora.common.trust.identity import read_private

SERVICE = "fedlora.Trainer"
METHOD = f"/{SERVICE}/Ask"
MAX_MESSAGE_BYTES = 256 << 20


class TrainerAway(FedloraError):
    """Nobody answers where the trainer should be, or it takes no more now."""


@dataclass(frozen=True)
class Door:
    """Where the trainer listens: `unix:PATH`, or host:port with the relay's certificate."""

    address: str
    authority: str = ""  # PEM files, for host:port
    certificate: str = ""
    key: str = ""

    def channel(self) -> grpc.Channel:
        """A channel to the trainer: in clear over a local socket, else under mutual TLS.

        OSError or BadInput where one of its PEM files can't be read.
        """
        options = [
            ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
            ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
            ("grpc.enable_retries", 0),
            ("grpc.enable_http_proxy", 0),
        ]
        if self.address.startswith("unix:"):
            return grpc.insecure_channel(self.address, options)
        credentials = grpc.ssl_channel_credentials(
            Path(self.authority).read_bytes(),
            read_private(Path(self.key)),
            Path(self.certificate).read_bytes(),
        )
        return grpc.secure_channel(self.address, credentials, options)

    def ask(self, data: bytes, seconds: float | None = None) -> bytes:
        """The trainer's reply; TrainerAway says on one line why there is none."""
        with self.channel() as channel:
            call = channel.unary_unary(METHOD, request_serializer=None, response_deserializer=None)
            try:
                reply: bytes = call(data, timeout=seconds)
            except grpc.RpcError as error:
                code, details = error.code(), " ".join(str(error.details()).split())[:300]
                raise TrainerAway(
                    f"trainer {self.address}: {code.name.lower()} ({details})"
                ) from error
        return reply
