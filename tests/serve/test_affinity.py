"""Prompts go where their beginning is; a request that starts again goes on where its reader was."""

import asyncio
import random

import pytest

pytest.importorskip("starlette")

from pyllmlite.serve.ray.affinity import BLOCK, Affinity, block_names
from pyllmlite.serve.ray.replay import Diverged, Replay
from pyllmlite.serve.tickets import Inbox


def tokens(seed, count):
    rng = random.Random(seed)
    return [rng.randrange(50000) for _ in range(count)]


@pytest.mark.parametrize("count", [0, 1, 15, 16, 17, 32, 33, 100])
def test_a_block_is_named_by_all_that_is_before_it(count):
    ids = tokens(0, count)
    names = block_names(ids)
    assert len(names) == max(count - 1, 0) // BLOCK  # one token at least is computed
    assert len(set(names)) == len(names)
    assert block_names(ids + [1] * BLOCK)[: len(names)] == names
    if names:
        other = [ids[0] + 1, *ids[1:]]
        assert not set(names) & set(block_names(other))


def test_known_prefixes_are_found_again():
    """Against a plain comparison of the prompts that were sent."""
    rng = random.Random(1)
    affinity, sent = Affinity(imbalance=1000, min_share=0.25), {"a": [], "b": [], "c": []}
    loads = dict.fromkeys(sent, 0)
    starts = [tokens(seed, rng.randrange(200)) for seed in range(8)]
    for number in range(300):
        ids = starts[rng.randrange(8)] + tokens(1000 + number, rng.randrange(100))
        names = block_names(ids)

        def known(replica, ids=ids, names=names):
            best = 0
            for other in sent[replica]:
                pairs = zip(ids, other, strict=False)
                same = next((i for i, (x, y) in enumerate(pairs) if x != y),
                            min(len(ids), len(other)))  # fmt: skip
                best = max(best, min(same // BLOCK, max(len(other) - 1, 0) // BLOCK))
            return min(best, len(names))

        for replica in sent:
            assert affinity.matched(names, replica) == known(replica)
        chosen = affinity.rank(names, loads)[0]
        best = max(map(known, sent))
        if best >= max(1, 0.25 * len(names)):
            assert known(chosen) == best
        affinity.note(names, chosen)
        sent[chosen].append(ids)
        loads[chosen] += 1


def test_the_idlest_gets_what_nobody_knows():
    affinity = Affinity()
    names = block_names(tokens(0, 100))
    assert affinity.rank(names, {"a": 3, "b": 1, "c": 2}) == ["b", "c", "a"]
    assert affinity.rank([], {"a": 0, "b": 1}) == ["a", "b"]
    assert affinity.rank(names, {}) == []


def test_a_replica_far_ahead_keeps_nothing():
    affinity = Affinity(imbalance=4)
    names = block_names(tokens(0, 100))
    affinity.note(names, "a")
    assert affinity.rank(names, {"a": 4, "b": 0})[0] == "a"
    assert affinity.rank(names, {"a": 5, "b": 0})[0] == "b"


def test_what_all_prompts_begin_with_draws_nobody():
    affinity = Affinity(min_share=0.25)
    template = tokens(0, BLOCK)
    affinity.note(block_names(template + tokens(1, 100)), "a")
    long, short = template + tokens(2, 200), template + tokens(3, 20)
    assert affinity.rank(block_names(long), {"a": 1, "b": 0})[0] == "b"
    assert affinity.rank(block_names(short), {"a": 1, "b": 0})[0] == "a"  # half of it


def test_routers_agree_on_what_is_new():
    loads = {f"replica-{n}": 0 for n in range(4)}
    chosen = set()
    for seed in range(40):
        names = block_names(tokens(seed, 50))
        first = Affinity().rank(names, loads)
        assert first == Affinity().rank(names, dict(reversed(loads.items())))
        chosen.add(first[0])
    assert chosen == set(loads)


def test_the_oldest_are_forgotten_and_the_dead():
    affinity = Affinity(capacity=10 * BLOCK)
    names = [block_names(tokens(seed, 6 * BLOCK + 1)) for seed in range(3)]
    for one in names:
        affinity.note(one, "a")
    assert [affinity.matched(one, "a") for one in names] == [0, 4, 6]
    affinity.keep_only({"b"})
    assert affinity.matched(names[2], "a") == 0


# -- replay -------------------------------------------------------------------------------------
def deltas_of(rng, texts, with_logprobs):
    """A run that says ``texts``, in pieces: token ``i`` of a text is its character ``i``."""
    at = [0] * len(texts)
    while any(a < len(t) for a, t in zip(at, texts, strict=True)):
        index = rng.choice([i for i, t in enumerate(texts) if at[i] < len(t)])
        count = min(rng.randint(1, 4), len(texts[index]) - at[index])
        piece = texts[index][at[index] : at[index] + count]
        at[index] += count
        last = at[index] == len(texts[index])
        logprobs = [[[ord(c), -1.0, c]] for c in piece] if with_logprobs else None
        yield [index, piece, count, logprobs, "length" if last else None, None]


@pytest.mark.parametrize("with_logprobs", [False, True])
def test_runs_that_break_off_say_everything_once(with_logprobs):
    for seed in range(200):
        rng = random.Random(seed)
        texts = ["".join(rng.choices("abäß\U0001f600", k=rng.randint(1, 20))) for _ in range(3)]
        replay, found = Replay(), []
        for run in range(3):
            replay.restart()
            all_of_it = list(deltas_of(rng, texts, with_logprobs))
            for delta in all_of_it if run == 2 else all_of_it[: rng.randrange(len(all_of_it))]:
                found += replay.fresh([delta])
        for index, text in enumerate(texts):
            mine = [delta for delta in found if delta[0] == index]
            assert "".join(delta[1] for delta in mine) == text
            assert sum(delta[2] for delta in mine) == len(text)
            assert [delta[4] for delta in mine if delta[4]] == ["length"]
            if with_logprobs:
                assert [entry[0][2] for delta in mine for entry in delta[3]] == list(text)


@pytest.mark.parametrize("second", [
    [[0, "abX", 3, None, None, None]],
    [[0, "ab", 2, None, "stop", None]],
    [[0, "aX", 2, None, "stop", None]],
])  # fmt: skip
def test_a_run_that_says_something_else_is_noticed(second):
    replay = Replay()
    replay.fresh([[0, "abc", 3, None, None, None]])
    replay.restart()
    with pytest.raises(Diverged):
        replay.fresh(second)


def test_text_held_back_does_not_count_twice():
    """Tokens whose text comes later (half a character)."""
    replay = Replay()
    assert replay.fresh([[0, "a", 3, None, None, None]]) == [[0, "a", 3, None, None, None]]
    replay.restart()
    assert replay.fresh([[0, "a", 1, None, None, None]]) == []
    assert replay.fresh([[0, "ä", 3, None, "stop", 7]]) == [[0, "ä", 1, None, "stop", 7]]


# -- resting --------------------------------------------------------------------------------------
def test_a_rest_ends_with_the_request():
    async def main():
        loop = asyncio.get_running_loop()
        for end in ("put", "fail", "before", "failed"):
            inbox = Inbox()
            inbox.put((0, [], None))
            if end == "before":
                inbox.put((0, [], {}))
            elif end == "failed":
                inbox.fail(RuntimeError())
            elif end == "put":
                loop.call_soon(inbox.put, (0, [], {}))
            else:
                loop.call_soon(inbox.fail, RuntimeError())
            await asyncio.wait_for(inbox.rest(1000), 10)
        inbox = Inbox()
        loop.call_soon(inbox.put, (0, [], None))
        await asyncio.wait_for(inbox.rest(0.01), 10)
        assert len(await inbox.take()) == 1

    asyncio.run(main())
