"""Every pair of strategies and options does what the table of pairs says: it works, and what leaves
tokens as they are leaves them so beside the other, or it is refused before the first token."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path

import pytest
from text_model import write_text_model

from pyllmlite import LLM, SamplingParams
from pyllmlite.core.errors import ConfigError, PluginError, RequestError
from pyllmlite.hooks.registry import Registry
from pyllmlite.model.pairs import parts, refusals, table

pytest.importorskip("llguidance")

REGISTRY = Registry.load()
BUILT_IN = "pyllmlite"  # the distribution: others may be installed beside it
PARTS = parts(REGISTRY, BUILT_IN)
REFUSED = refusals(REGISTRY, BUILT_IN)
PAGE = Path(__file__).parents[2] / "docs" / "pairs.md"
# Two sequences start, and one of them gives way (with one layout or another).
CROWDED = {"kv_cache_memory": "29kb"}
CROWDING = {"swap space", "sample", "prompt-lookup", "paged", "flash", "reference", "continuous"}
# How each is asked for: of the engine, of a request.
ASKED = {
    "sample": ({}, {}),
    "beam": ({}, {"decoder": "beam", "n": 2, "extra_args": {"beam_width": 2}}),
    "prompt-lookup": ({"proposer": "prompt-lookup", "extra": {"draft_token_cost": 0.01}}, {}),
    "draft-model": ({"proposer": "draft-model"}, {}),
    "guidance": ({}, {"structured_outputs": {"regex": "([a-f] ?){6,30}"}}),
    "int8 KV": ({"kv_cache_dtype": "int8"}, {}),
    "window": ({"sliding_window": 24}, {}),
    "sinks": ({"sliding_window": 24, "attention_sinks": 4}, {}),
    "swap space": ({"swap_space": "1MB", "preemption_mode": "swap"} | CROWDED, {}),
    "prefix sharing": ({"enable_prefix_caching": True}, {}),
}
# What these change is time and memory, never a token.
LOSSLESS = {
    "prompt-lookup", "draft-model", "contiguous", "paged", "flash", "continuous", "dynamic",
    "static", "swap space", "prefix sharing",
}  # fmt: skip


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return str(write_text_model(tmp_path_factory.mktemp("pairs")))


@pytest.fixture(scope="module")
def alone(path):
    """Tokens of each part by itself."""
    return {part.title: run(path, part) for part in PARTS}


def run(path, *some):
    engine = {"enable_prefix_caching": False, "max_model_len": 64, "max_num_seqs": 6}
    request = {"max_tokens": 14, "seed": 3}
    for part in some:
        more, asked = ASKED.get(part.title, ({part.contract: part.title}, {}))
        engine |= more
        request |= asked
    if engine.get("proposer") == "draft-model":
        engine["extra"] = {"draft_model": path, "draft_options": {"num_layers": 1}}
    llm = LLM(path, threads=1, dtype="bf16", **engine)
    prompts = ["a b c a b c a b c " * 2 + letter for letter in "abcd"]
    outputs = llm.generate(prompts, SamplingParams(**request), use_tqdm=False)
    llm.engine.check_integrity()
    assert not any(output.error for output in outputs), outputs[0].error
    stats = llm.built.cache.stats()
    titles = {part.title for part in some}
    if "swap space" in titles and titles <= CROWDING:
        assert stats["swapped_blocks"] > 0
    if "prefix sharing" in titles:
        assert (stats["hit_tokens"] > 0) == ("contiguous" not in titles)
    return [[completion.token_ids for completion in output.outputs] for output in outputs]


@pytest.mark.parametrize(
    ("a", "b"),
    [pair for pair in combinations(PARTS, 2)
     if REFUSED.get((pair[0].title, pair[1].title)) != "one of them"],
    ids=lambda part: part.title.replace(" ", "-"),
)  # fmt: skip
def test_a_pair(path, alone, a, b):
    reason = REFUSED.get((a.title, b.title))
    if reason is not None and reason != "shares nothing":
        with pytest.raises((ConfigError, PluginError, RequestError)):
            run(path, a, b)
        return
    got = run(path, a, b)
    if a.title in LOSSLESS:
        assert got == alone[b.title]
    if b.title in LOSSLESS:
        assert got == alone[a.title]


def test_the_page_has_the_table():
    assert table(REGISTRY, BUILT_IN) in PAGE.read_text(encoding="utf-8"), (
        "docs/pairs.md is not what the declarations say: pyllmlite plugins --pairs"
    )


def test_what_is_not_declared_is_refused():
    """A third party's classes enter the table by what they declare."""
    from pyllmlite_plugins.cache.paged import Paged
    from pyllmlite_plugins.decoder.sample import Sample

    class Old(Paged):
        name = "old"
        keeps_sinks = swaps = False

    class Plain(Sample):
        name = "plain"
        takes_drafts = takes_constraints = False

    class Plugin:
        @staticmethod
        def pyllmlite_caches():
            return [Old]

        @staticmethod
        def pyllmlite_decoders():
            return [Plain]

    from pyllmlite import hookimpl

    Plugin.pyllmlite_caches = staticmethod(hookimpl(Plugin.pyllmlite_caches))
    Plugin.pyllmlite_decoders = staticmethod(hookimpl(Plugin.pyllmlite_decoders))
    registry = Registry()
    registry.discover(())
    registry.register(Plugin)
    refused = refusals(registry)
    assert "keeps_sinks" in refused["old", "sinks"]
    assert "swaps" in refused["old", "swap space"]
    assert ("old", "window") not in refused
    assert refused["plain", "prompt-lookup"] == "takes no drafts"
    assert refused["plain", "guidance"] == "takes no constraints"
