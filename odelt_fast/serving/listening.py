"""A socket that listens, and how many connections the process may hold."""

from __future__ import annotations

import socket


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens on an address.

    Args:
        host: name or address, IPv4 or IPv6.
        port: 0 takes a free one.

    Raises:
        ValueError: it cannot listen there.
    """
    if not 0 <= port < 2**16:
        raise ValueError(f"--port must be from 0 to 65535, not {port}")
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        listener = socket.create_server((host, port), family=family, backlog=2048)
    except (OSError, UnicodeError) as error:
        raise ValueError(
            f"cannot listen on {host}, port {port}: {getattr(error, 'strerror', None) or error};"
            " --port 0 takes a free one"
        ) from None
    # asyncio sets TCP_NODELAY on connections whose socket names its protocol, as those do that
    # this one accepts. Without it an answer's last packet waits 40 ms for an acknowledgement.
    return socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP, listener.detach())


def url_of(listener: socket.socket) -> str:
    """Where a browser finds what listens there."""
    host, port = listener.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


def allow_files(count: int) -> None:
    """Lets the process have so many files and connections open, as far as the system does."""
    try:
        import resource
    except ImportError:  # not a Unix
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = count if hard == resource.RLIM_INFINITY else min(count, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
