"""A short run of ``fuzz.py``."""

import pytest

pytest.importorskip("schemathesis")

from fuzz import fuzz


def test_requests_made_from_the_openapi_document(start):
    server = start("--max-model-len", "128")
    seen = fuzz(server.url, 150)
    assert sum(seen.values()) >= 150
    assert {status for _, path, _, status in seen if path == "/v1/completions"} >= {200, 400}
    server.until_idle()
    assert not [line for line in server.lines if "Traceback" in line], server.lines
