"""Messages survive being cut anywhere; a damaged stream is refused."""

import math
import struct

import pytest

from pyllmlite.serve.wire import MAX_MESSAGE, Unpacker, WireError, pack

MESSAGES = [{"t": "step", "out": [["1", [[0, "ä\ud800\n", 1, None, None, None]], None]]}, [], "x",
            {"stats": {"n": 2**60}}]  # fmt: skip


@pytest.mark.parametrize("size", [1, 3, 7, 10_000])
def test_cut_anywhere(size):
    data = b"".join(map(pack, MESSAGES))
    unpacker = Unpacker()
    found = []
    for at in range(0, len(data), size):
        found += unpacker.feed(data[at : at + size])
    assert found == MESSAGES


def test_nan_and_infinity_arrive():
    (found,) = Unpacker().feed(pack([math.nan, -math.inf]))
    assert math.isnan(found[0]) and found[1] == -math.inf


@pytest.mark.parametrize(
    "data",
    [struct.pack("<I", MAX_MESSAGE + 1), struct.pack("<I", 2) + b"{x",
     struct.pack("<I", 200_000) + b"[" * 200_000, struct.pack("<I", 1) + b"\xff"],
    ids=["length", "no JSON", "deep", "no text"],
)  # fmt: skip
def test_damaged(data):
    with pytest.raises(WireError):
        Unpacker().feed(data)
