"""The sockets of a server, taken before anything slow begins: a port that is in use should say so at once."""

import errno
import socket

from mlx_step35.errors import RequestError

# What a name may stand for on a system that does without IPv6.
_ABSENT = frozenset({errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT})


def bind(host: str, port: int) -> list[socket.socket]:
    """Sockets at every address of a host, which nobody can connect to yet; port 0 is any free one.

    Raises RequestError for a host that is not of this machine, and a port that cannot be had.
    """
    sockets: list[socket.socket] = []
    failures: list[OSError] = []
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        for family, _, _, _, address in dict.fromkeys(found):
            try:
                sockets.append(_bound(family, (address[0], port, *address[2:])))
            except OSError as error:
                if error.errno not in _ABSENT:
                    raise
                failures.append(error)
            else:
                port = sockets[0].getsockname()[1]
        if not sockets:
            raise failures[0]
    # A name that cannot be encoded for a look-up is a ValueError.
    except (OSError, ValueError) as error:
        for bound in sockets:
            bound.close()
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise RequestError(f"cannot listen at {host} port {port}: {reason}", "port") from None
    return sockets


def address_of(listener: socket.socket) -> str:
    """Host and port as in a URL."""
    host, port = listener.getsockname()[:2]
    return f"[{host}]:{port}" if listener.family == socket.AF_INET6 else f"{host}:{port}"


def _bound(family: int, address: tuple[object, ...]) -> socket.socket:
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        # Without it a restart would have to wait until old connections are forgotten.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        listener.bind(address)
    except OSError:
        listener.close()
        raise
    return listener
