"""The relay (F): a Flower ClientApp that hands opaque bytes to the trainer and its answer back.

It holds no data and no key but Flower's, parses no body, and imports neither torch nor anything
that does. Where the trainer listens comes from the SuperNode's own configuration, never from a
message.
"""

from __future__ import annotations

from pathlib import Path

from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp

from fedlora.client.network.channel import MAX_MESSAGE_BYTES, Door
from fedlora.common.errors import BadInput, FedloraError
from fedlora.common.protocol.flower import envelope_record, read_envelope

SECONDS = 24 * 3600.0  # the coordinator's deadline ends a round, not the relay
NO_ANSWER = "error"  # kind of an envelope that carries one line of text instead of a reply

app = ClientApp()


@app.train()
def train(message: Message, context: Context) -> Message:
    """One request to the trainer."""
    return Message(_relayed(message, context), reply_to=message)


@app.query()
def query(message: Message, context: Context) -> Message:
    """Likewise: an offer may come as a query."""
    return Message(_relayed(message, context), reply_to=message)


def door_of(node_config: object) -> Door:
    """Where the trainer is, as the node's operator configured it."""
    if not isinstance(node_config, dict) or not isinstance(node_config.get("trainer"), str):
        raise BadInput('node configuration trainer: missing, expected "unix:PATH" or "host:port"')
    files = {
        name: str(node_config.get(f"trainer-{name}", ""))
        for name in ("authority", "certificate", "key")
    }
    missing = [path for path in files.values() if path and not Path(path).is_file()]
    if missing:
        raise BadInput(f"node configuration: {missing[0]} is not there")
    return Door(str(node_config["trainer"]), **files)


def _relayed(message: Message, context: Context) -> RecordDict:
    try:
        kind, data = read_envelope(message.content, MAX_MESSAGE_BYTES)
        return envelope_record(kind, door_of(dict(context.node_config)).ask(data, SECONDS))
    except FedloraError as error:
        line = " ".join(str(error).split())[:500]
        return envelope_record(NO_ANSWER, line.encode())
