"""What the command line and the resident process say to each other: objects of JSON, each with its length before it.

To the process: {"do": "run" | "status" | "stop", ...}, then {"signal": NUMBER} as often as one arrives. With "run" come
descriptors: standard input, output and error, and the folder that the command was given in.
From it: {"waits": true}, {"began": true}, {"directory": PATH}, and last one of {"exit": CODE}, {"leaves": WHY} (ask the
next process), {"dropped": true} (a signal came while it waited), {"status": ...}.
"""

from __future__ import annotations

import array
import json
import os
import socket

TYPE_CHECKING = False
if TYPE_CHECKING:  # every command that hands its run over imports this
    from typing import Any

LARGEST = 16 << 20
"""Bytes of a message. A command line with its environment is at most two million, and JSON's escapes take six each."""
LENGTH_BYTES = 4
DESCRIPTORS = 4


class Closed(Exception):
    """The other side is gone, or what it says is no message."""


def send(connection: socket.socket, message: dict[str, Any], descriptors: tuple[int, ...] = ()) -> None:
    """Send a message, and descriptors with it. Raises Closed, ValueError for one that is too large."""
    body = json.dumps(message).encode()  # ASCII: names of files may hold bytes that are no letters
    if len(body) > LARGEST:
        raise ValueError(f"a message of {len(body)} bytes is larger than {LARGEST}")
    data = memoryview(len(body).to_bytes(LENGTH_BYTES, "little") + body)
    try:
        if descriptors:
            data = data[socket.send_fds(connection, [data], list(descriptors)) :]
        connection.sendall(data)
    except OSError as error:
        raise Closed(str(error)) from None


def receive(connection: socket.socket) -> dict[str, Any]:
    """The next message. Raises Closed, TimeoutError."""
    return _parsed(_exactly(connection, _length(_exactly(connection, LENGTH_BYTES))))


def receive_with_descriptors(connection: socket.socket) -> tuple[dict[str, Any], list[int]]:
    """The first message and the descriptors that came with it, which are the receiver's to close. Raises as above."""
    item = array.array("i").itemsize
    try:
        start, ancillary, _, _ = connection.recvmsg(
            LENGTH_BYTES, socket.CMSG_SPACE(DESCRIPTORS * item), socket.MSG_CMSG_CLOEXEC
        )
    except TimeoutError:
        raise
    except OSError as error:
        raise Closed(str(error)) from None
    found = array.array("i")
    for level, kind, data in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            found.frombytes(data[: len(data) - len(data) % item])
    try:
        if not start:
            raise Closed("nothing was said")
        start += _exactly(connection, LENGTH_BYTES - len(start))
        return _parsed(_exactly(connection, _length(start))), list(found)
    except BaseException:
        close_all(list(found))
        raise


def close_all(descriptors: list[int]) -> None:
    """Close descriptors that were received."""
    for descriptor in descriptors:
        os.close(descriptor)


def _length(data: bytes) -> int:
    length = int.from_bytes(data, "little")
    if length > LARGEST:
        raise Closed(f"a message of {length} bytes")
    return length


def _parsed(body: bytes) -> dict[str, Any]:
    try:
        message = json.loads(body)
    except (ValueError, RecursionError):
        raise Closed("what came is no JSON") from None
    if not isinstance(message, dict):
        raise Closed("what came is no object of JSON")
    return message


def _exactly(connection: socket.socket, size: int) -> bytes:
    parts = []
    while size:
        try:
            part = connection.recv(min(size, 1 << 20))
        except TimeoutError:
            raise
        except OSError as error:
            raise Closed(str(error)) from None
        if not part:
            raise Closed("the connection has ended")
        parts.append(part)
        size -= len(part)
    return b"".join(parts)
