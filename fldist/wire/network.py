"""Which of this machine's addresses a rank listens on: its interfaces, what GLOO_SOCKET_IFNAME chooses among them, and
host names that lead nowhere. It opens no connection and knows nothing of runs.
"""

from __future__ import annotations

import ctypes
import ipaddress
import os
import socket
import sys
from collections.abc import Iterator

VARIABLE = "GLOO_SOCKET_IFNAME"
"""The environment variable that torch's gloo reads too: names of interfaces, separated by commas."""


class _Address(ctypes.Structure):
    """`struct ifaddrs` as far as it is read here."""


_Address._fields_ = [
    ("next", ctypes.POINTER(_Address)),
    ("name", ctypes.c_char_p),
    ("flags", ctypes.c_uint),
    ("address", ctypes.c_void_p),
]


def interfaces() -> dict[str, list[str]]:
    """The addresses of every network interface of this machine, IPv4 before IPv6, in the system's order.

    Link-local IPv6 addresses are left out: they mean nothing without the interface's name. An interface that is down
    or has no address stands there with an empty list.
    """
    library = ctypes.CDLL(None, use_errno=True)
    first = ctypes.POINTER(_Address)()
    if library.getifaddrs(ctypes.byref(first)):
        raise OSError(ctypes.get_errno(), "the network interfaces cannot be listed")
    found: dict[str, list[str]] = {}
    try:
        at = first
        while at:
            entry = at.contents
            listed = found.setdefault(entry.name.decode(), [])
            listed += _addresses(entry.address)
            at = entry.next
    finally:
        library.freeifaddrs(first)
    return {name: sorted(listed, key=_is_ipv6) for name, listed in found.items()}


def _addresses(at: int | None) -> Iterator[str]:
    """The address in a `struct sockaddr`, where it is one of IPv4 or IPv6 that others may use."""
    if not at:
        return
    head = ctypes.string_at(at, 2)
    # BSD's structure begins with its length, one byte, and has one byte for the family
    family = head[1] if sys.platform == "darwin" else int.from_bytes(head, sys.byteorder)
    if family == socket.AF_INET:
        yield socket.inet_ntop(socket.AF_INET, ctypes.string_at(at + 4, 4))
    elif family == socket.AF_INET6:
        text = socket.inet_ntop(socket.AF_INET6, ctypes.string_at(at + 8, 16))
        if not ipaddress.IPv6Address(text).is_link_local:
            yield text


def _is_ipv6(address: str) -> bool:
    return ":" in address


def family_of(address: str) -> socket.AddressFamily:
    """The family of an address in figures."""
    return socket.AF_INET6 if _is_ipv6(address) else socket.AF_INET


def is_loopback(address: str) -> bool:
    """Whether an address in figures never leaves its machine."""
    return ipaddress.ip_address(address.partition("%")[0]).is_loopback


def chosen_address(preferred: socket.AddressFamily = socket.AF_INET, *, only: bool = False) -> str | None:
    """An address of the first interface in GLOO_SOCKET_IFNAME that is there and has one; None: it is not set.

    preferred: the family to take where there are both; only: no other will do. ValueError when no interface fits.
    """
    wanted = os.environ.get(VARIABLE, "")
    names = [name.strip() for name in wanted.split(",") if name.strip()]
    if not names:
        return None
    there = interfaces()
    for name in names:
        fitting = [a for a in there.get(name, []) if family_of(a) == preferred]
        if fitting or (there.get(name) and not only):
            return (fitting or there[name])[0]
    known = "; ".join(f"{name} {', '.join(listed)}" for name, listed in there.items() if listed)
    if not any(name in there for name in names):
        what = "there is no such interface here"
    elif only and any(there.get(name) for name in names):
        kind = "IPv6" if preferred == socket.AF_INET6 else "IPv4"
        what = f"it has no {kind} address, and the server is at one"
    else:
        what = "it has no address"
    raise ValueError(f"{VARIABLE}: {wanted}: {what}; name one of these, or unset it: {known}")


def address_of(name: str, variable: str) -> str:
    """The address of a host name, IPv4 where it has both; ValueError naming the variable it stands in."""
    try:
        found = [str(entry[4][0]) for entry in socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)]
    except OSError as error:
        raise ValueError(
            f"{variable}: {name} is no address and no name that this machine knows ({error.strerror}); give the "
            "address of the server's machine"
        ) from None
    return sorted(found, key=_is_ipv6)[0]


def reachable(name: str, variable: str) -> str:
    """The address of a host name that other machines are to reach; ValueError when it never leaves this machine.

    A name that means this machine by itself (localhost, 127.0.0.1, ::1) is taken as it is: all ranks are here.
    """
    address = address_of(name, variable)
    if is_loopback(address) and not means_loopback(name):
        others = ", ".join(a for listed in interfaces().values() for a in listed if not is_loopback(a)) or "none"
        raise ValueError(
            f"{variable}: {name} is {address} on this machine (see /etc/hosts), where no other machine reaches it; "
            f"give an address of this machine's network ({others}) as {variable} (torchrun: --master-addr; with "
            f"--rdzv-endpoint: --local-addr), or take the name out of the line with {address} in /etc/hosts; if all "
            "ranks are on this machine, give 127.0.0.1"
        )
    return address


def means_loopback(name: str) -> bool:
    """Whether a name says by itself that it is this machine."""
    if name == "localhost" or name.startswith("localhost."):
        return True
    try:
        return is_loopback(name)
    except ValueError:
        return False


def listening_address(master: str, *, one_machine: bool) -> str:
    """Where a server listens for hosts: at the interface that GLOO_SOCKET_IFNAME chooses; else at loopback when all
    ranks are on one machine; else at what MASTER_ADDR (`master`) stands for."""
    if os.environ.get(VARIABLE, "").strip(", "):
        preferred = socket.AF_INET if one_machine else family_of(address_of(master, "MASTER_ADDR"))
        chosen = chosen_address(preferred)
        assert chosen is not None
        return chosen
    return "127.0.0.1" if one_machine else reachable(master, "MASTER_ADDR")


def pair_address(connection: socket.socket) -> str:
    """The address for gloo's pairs beside a connection: of the interface that GLOO_SOCKET_IFNAME chooses, in the
    connection's family; else the connection's own. What runs over loopback stays there."""
    own = str(connection.getsockname()[0])
    if is_loopback(own):
        return own
    return chosen_address(family_of(own), only=True) or own
