"""The legal order of messages from a client, as a table, for both dialects (Gadgetron's client and FIRE).

QUERY may come first and at any time; CLOSE ends every state; FIRE sends one TEXT with JSON between HEADER and data. Sources:
reference client and server of gadgetron 4.7.2 (CONFIG, HEADER, STREAM; VOID when CLOSE comes before the header) and
python-ismrmrd-server.
"""

from __future__ import annotations

import json

from gadgets.errors import IllegalOrder, MalformedText
from gadgets.wire import events

MAX_PARAMETERS = 256
MAX_PARAMETERS_CHARACTERS = 64 << 10

IDLE, CONFIGURED, DESCRIBED, STREAMING, CLOSED = "idle", "configured", "described", "streaming", "closed"

NEXT: dict[tuple[str, type[events.Event]], str] = {
    (IDLE, events.Query): IDLE,
    (IDLE, events.ConfigFile): CONFIGURED,
    (IDLE, events.ConfigScript): CONFIGURED,
    (IDLE, events.Close): CLOSED,
    (CONFIGURED, events.Query): CONFIGURED,
    (CONFIGURED, events.HeaderText): DESCRIBED,
    (CONFIGURED, events.Close): CLOSED,
    (DESCRIBED, events.Query): DESCRIBED,
    (DESCRIBED, events.Text): DESCRIBED,
    (DESCRIBED, events.ErrorText): DESCRIBED,
    (DESCRIBED, events.Readouts): STREAMING,
    (DESCRIBED, events.Waveform): STREAMING,
    (DESCRIBED, events.Image): STREAMING,
    (DESCRIBED, events.Composite): STREAMING,
    (DESCRIBED, events.Close): CLOSED,
    (STREAMING, events.Query): STREAMING,
    (STREAMING, events.Text): STREAMING,
    (STREAMING, events.ErrorText): STREAMING,
    (STREAMING, events.Readouts): STREAMING,
    (STREAMING, events.Waveform): STREAMING,
    (STREAMING, events.Image): STREAMING,
    (STREAMING, events.Composite): STREAMING,
    (STREAMING, events.Close): CLOSED,
}

_MEANING = {
    IDLE: "before any configuration",
    CONFIGURED: "after the configuration, before the MRD header",
    DESCRIBED: "after the MRD header",
    STREAMING: "among the data",
    CLOSED: "after CLOSE",
}


class Session:
    """Where one connection stands.

    Attributes
    ----------
    state
        ``"idle"``, ``"configured"``, ``"described"`` (header seen), ``"streaming"`` (data seen) or ``"closed"``.
    """

    def __init__(self) -> None:
        self.state = IDLE

    def accept(self, event: events.Event) -> None:
        """Take the next event of the parser; nothing changes when it raises, so a connection can be drained behind it.

        Raises
        ------
        WireError
            The error of an ``events.Problem``.
        IllegalOrder
            This message may not come now.
        """
        if isinstance(event, events.Problem):
            raise event.error
        following = NEXT.get((self.state, type(event)))
        if following is None:
            allowed = sorted({kind.__name__ for state, kind in NEXT if state == self.state})
            raise IllegalOrder(
                f"{type(event).__name__} {_MEANING[self.state]}",
                where=f"byte {event.offset} of the stream",
                got=type(event).__name__,
                expected=", ".join(allowed) or "nothing more",
            )
        self.state = following


def fire_parameters(text: str) -> dict[str, str] | None:
    """The console's parameters from FIRE's JSON text.

    Parameters
    ----------
    text
        ``{"version": "1.1.0", "parameters": {"config": "cg_sense", "iterations": 8, ...}}``.

    Returns
    -------
    Names and values, values as text (``True`` becomes ``"True"``, as consoles write it), or ``None`` when this is not such a
    document but an ordinary text.

    Raises
    ------
    MalformedText
        It is one, but too long, with too many parameters, or with a value that is not a text, a number or a truth value.
    """
    if not text.lstrip().startswith("{"):
        return None
    if len(text) > MAX_PARAMETERS_CHARACTERS:
        raise _malformed("the parameters are too long", f"{len(text)} characters", f"at most {MAX_PARAMETERS_CHARACTERS}")
    try:
        document = json.loads(text)
    except (ValueError, RecursionError):
        return None
    parameters = document.get("parameters")
    if parameters is None:
        return None
    if not isinstance(parameters, dict):
        raise _malformed("the parameters are no table", type(parameters).__name__, "names with values")
    if len(parameters) > MAX_PARAMETERS:
        raise _malformed("too many parameters", len(parameters), f"at most {MAX_PARAMETERS}")
    for name, value in parameters.items():
        if not isinstance(value, str | bool | int | float):
            raise _malformed(
                f"parameter {name[:64]!r} has no simple value", type(value).__name__, "text, number or truth value"
            )
    return {name: value if isinstance(value, str) else str(value) for name, value in parameters.items()}


def _malformed(what: str, got: object, expected: object) -> MalformedText:
    return MalformedText(what, where="TEXT with parameters", got=got, expected=expected)
