"""Messages between the HTTP process and the engine's: JSON behind a length.

JSON and not pickle: whatever bytes come in, nothing but numbers, strings, lists and dicts comes
out of them.
"""

from __future__ import annotations

import json
import struct
from typing import Any

_LENGTH = struct.Struct("<I")
# Prompts of a few million tokens; a longer message is a damaged stream.
MAX_MESSAGE = 256 << 20
_encode = json.JSONEncoder(separators=(",", ":"), check_circular=False).encode


class WireError(ValueError):
    """The stream is damaged: nothing behind this point can be read."""


def pack(message: Any) -> bytes:
    """A message as bytes: uint32 length (little endian), then JSON in ASCII."""
    body = _encode(message).encode("ascii")
    if len(body) > MAX_MESSAGE:
        raise WireError(f"a message of {len(body)} bytes; at most {MAX_MESSAGE} can be sent")
    return _LENGTH.pack(len(body)) + body


class Unpacker:
    """Messages out of a stream of bytes that is cut anywhere."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> list[Any]:
        """The messages that are complete with ``data``.  ``WireError``: not from :func:`pack`."""
        buffer = self._buffer
        buffer += data
        messages = []
        start = 0
        while len(buffer) - start >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(buffer, start)
            if length > MAX_MESSAGE:
                raise WireError(f"a message says that it has {length} bytes")
            end = start + _LENGTH.size + length
            if len(buffer) < end:
                break
            try:
                messages.append(json.loads(buffer[start + _LENGTH.size : end]))
            except (ValueError, RecursionError) as error:
                raise WireError(f"a message is no JSON: {error}") from None
            start = end
        del buffer[:start]
        return messages
