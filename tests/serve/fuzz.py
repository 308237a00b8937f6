"""Requests made from the server's own OpenAPI document (Schemathesis), and what came of them.

    python tests/serve/fuzz.py [--cases 3000] [--model MODEL]

Starts a server of its own with a short model length, so that no answer takes long whatever is
asked.  Half of the cases fit the document, half break it.  A status of 500 or more, or no answer
within 20 seconds (twice), ends it with exit code 1; as does a server that is not well afterwards.
"""

import argparse
import collections
import sys
import tempfile
import time
from pathlib import Path

TIMEOUT = 20.0
# Fields of which most values are refused before anything else is looked at: every other case that
# fits the document goes without them, so that more get as far as an engine.
PICKY = ("model", "suffix", "best_of", "structured_outputs", "guided_json", "guided_regex",
         "guided_choice", "guided_grammar", "response_format", "tools", "tool_choice",
         "chat_template", "chat_template_kwargs", "logit_bias")  # fmt: skip


def fuzz(url, cases, note=None):
    """At least ``cases`` requests, the same in every run.

    Returns:
        A Counter of answers by ``(method, path, fits, status)``.

    Raises:
        AssertionError: A status from 500 on, or no answer; says which request it was.
    """
    import requests
    import schemathesis
    from hypothesis import HealthCheck, Phase, given, seed, settings
    from hypothesis.errors import Unsatisfiable
    from schemathesis import GenerationMode

    seen = collections.Counter()
    session = requests.Session()
    found = schemathesis.openapi.from_url(url + "/openapi.json").get_all_operations()
    operations = [one.ok() for one in found]
    takers = [one for one in operations if one.method.upper() == "POST" or one.path_parameters]

    def sender(operation, mode):
        def send(case):
            if mode.is_positive and sum(seen.values()) % 2 and isinstance(case.body, dict):
                case.body = {k: v for k, v in case.body.items() if k not in PICKY}
            for _ in range(2):  # once more: the whole machine may have slept
                try:
                    answer = case.call(base_url=url, session=session, timeout=TIMEOUT)
                    break
                except requests.Timeout:
                    pass
            else:
                raise AssertionError(f"no answer, twice: {case.as_curl_command()[:2000]}")
            status = answer.status_code
            assert status < 500, f"{status} {answer.text}: {case.as_curl_command()[:2000]}"
            seen[operation.method.upper(), operation.path, mode.is_positive, status] += 1

        return send

    def run(operation, mode, count, number):
        runs = settings(
            max_examples=count, database=None, deadline=None, phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )  # fmt: skip
        strategy = operation.as_strategy(generation_mode=mode)
        try:
            seed(number)(runs(given(case=strategy)(sender(operation, mode))))()
        except Unsatisfiable:  # nothing can be wrong with a request that takes nothing
            pass
        if note is not None:
            note(operation, mode, sum(seen.values()))

    modes = (GenerationMode.POSITIVE, GenerationMode.NEGATIVE)
    for operation in operations:
        if operation not in takers:
            for mode in modes:
                run(operation, mode, 3, 0)
    number = 0
    while (left := cases - sum(seen.values())) > 0:  # some have few cases that differ
        for operation in takers:
            for mode in modes:
                run(operation, mode, -(-left // (2 * len(takers))), number)
        number += 1
    return seen


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--cases", type=int, default=3000)
    parser.add_argument("--model", help="without: a tiny one with random weights")
    given = parser.parse_args()
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from conftest import Server
    from text_model import write_text_model

    with tempfile.TemporaryDirectory() as folder:
        model = given.model or str(write_text_model(Path(folder) / "tiny"))
        server = Server(model, "--max-model-len", "128", "--kv-cache-memory", "16MB")
        begun = time.monotonic()
        try:
            server.wait_ready()
            seen = fuzz(
                server.url, given.cases,
                lambda op, mode, count: print(f"{count:6d} {op.method.upper()} {op.path} "
                                              f"{mode.value}", flush=True),
            )  # fmt: skip
            server.until_idle()
            assert not [line for line in server.lines if "Traceback" in line], server.lines
        finally:
            code = server.stop()
    for (method, path, fits, status), count in sorted(seen.items()):
        print(f"{count:6d} {status} {method} {path} {'' if fits else '(broken)'}")
    print(f"{sum(seen.values())} cases in {time.monotonic() - begun:.0f} s, exit code {code}")


if __name__ == "__main__":
    main()
