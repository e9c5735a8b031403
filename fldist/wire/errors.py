"""What can go wrong on the wire. All are TransportError."""


class TransportError(RuntimeError):
    """Base of the errors of links."""


class PeerLost(TransportError):
    """The other end died, fell silent or broke the protocol."""


class DeadlineExceeded(TransportError):
    """Something that had a deadline did not happen in time."""


class BadMessage(TransportError):
    """Bytes that are not a message this run allows; nothing of them was used."""
