"""The address that a server of ours listens at, and what has to be installed for one."""

from __future__ import annotations

import importlib.util
import ipaddress
import socket
from collections.abc import Sequence

from zimage_runner.errors import UserError


def check_installed(*modules: str) -> None:
    """Raise UserError that names those of these modules, all of the extra ``web``, that are not there."""
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"not installed: {', '.join(missing)}: pip install 'zimage-runner[web]'")


def is_loopback(host: str) -> bool:
    """True if only this machine can reach it."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def listen(host: str, ports: Sequence[int], prefix: str = "") -> socket.socket:
    """A socket that listens at the first of these ports that is free. Raises UserError.

    ``prefix``: of the fields' names in messages.
    """
    reason: str | None = None
    for port in ports:
        try:
            family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        except (OSError, UnicodeError):
            raise UserError(f"{prefix}host={host}: there is no such address") from None
        listener = socket.socket(family[0], socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(family[4])
            listener.listen(128)  # whoever reads the address may come before the server is ready
            return listener
        except OSError as error:
            listener.close()
            reason = error.strerror
    fields = f"{prefix}host={host} {prefix}port={ports[-1]}"
    raise UserError(f"{fields}: {reason}: choose another port, or {prefix}port=0 for a free one")


def shown(host: str) -> str:
    """The host as it stands in an address that is printed."""
    if host in ("0.0.0.0", "::", ""):
        host = socket.gethostname()
    return f"[{host}]" if ":" in host else host
