"""``AsyncEngine``: requests that come, stream, are left and fail."""

import asyncio
import threading

import pytest
from engine_fakes import fake_built, greedy

from pyllmlite.core.errors import RequestError, StepError
from pyllmlite.core.sampling import SamplingParams
from pyllmlite.engine.async_engine import AsyncEngine

LONG = SamplingParams(temperature=0, max_tokens=30, ignore_eos=True)
TIMEOUT = 20


def served(test, **options):
    """Run ``test(engine)`` on a loop of its own; nothing may be left behind."""
    built = fake_built(**options)

    async def body():
        async with AsyncEngine.from_built(built) as engine:
            await asyncio.wait_for(test(engine), TIMEOUT)
        assert not engine.is_running
        engine._engine.check_integrity()
        assert not engine._engine.has_unfinished and not engine._streams

    asyncio.run(body())
    assert built.cache.num_free_blocks == built.cache.num_blocks


async def last(outputs):
    final = None
    async for output in outputs:
        final = output
    return final


async def until(condition):
    while not condition():
        await asyncio.sleep(0.001)


def test_many_at_once():
    async def test(engine):
        prompts = [[i, i + 1, i + 2] for i in range(20)]
        outputs = await asyncio.gather(*[last(engine.generate(p, LONG)) for p in prompts])
        for prompt, output in zip(prompts, outputs, strict=True):
            assert output.finished
            assert output.outputs[0].token_ids == greedy(prompt, 30, None)

    served(test)


def test_stream_grows():
    async def test(engine):
        seen = []
        async for output in engine.stream([1, 2], LONG, request_id="me"):
            assert output.request_id == "me"
            seen.append(output.outputs[0].token_ids)
        assert seen[-1] == greedy([1, 2], 30, None)
        assert all(seen[-1][: len(s)] == s for s in seen)
        only = [o async for o in engine.add([1, 2], LONG, stream=False)]
        assert len(only) == 1 and only[0].outputs[0].token_ids == seen[-1]

    served(test)


def test_abort_ends_the_stream():
    async def test(engine):
        stream = engine.add([1, 2], LONG, "a")
        await stream.__anext__()
        await engine.abort("a")
        final = await last(stream)
        if final is not None:  # else it had ended before
            assert final.finished and final.outputs[0].finish_reason in ("abort", "length")
        await engine.abort("nobody")

    served(test)


def test_leaving_and_cancelling_abort():
    async def test(engine):
        engine.built.program.before = lambda batch: threading.Event().wait(0.002)
        generator = engine.generate([1, 2], LONG)
        await generator.__anext__()
        await generator.aclose()
        await until(lambda: not engine._engine.has_unfinished)
        task = asyncio.create_task(last(engine.generate([3, 4], LONG)))
        await until(lambda: engine._engine.has_unfinished)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await until(lambda: not engine._engine.has_unfinished)
        assert engine._engine.num_steps < 40

    served(test)


def test_leaving_does_not_end_another_request_of_that_name():
    async def test(engine):
        engine.built.program.before = lambda batch: threading.Event().wait(0.002)
        first = engine.add([1, 2], LONG, "same")
        await first.__anext__()
        second = engine.add([1, 2], LONG, "same")  # will be refused, but is left before
        await second.aclose()
        for _ in range(5):
            output = await first.__anext__()
        assert output.outputs[0].finish_reason is None
        engine.abort("same")
        output = [o async for o in first][-1]
        assert output.outputs[0].finish_reason == "abort"

    served(test)


def test_refusals_come_out_of_the_stream():
    async def test(engine):
        with pytest.raises(RequestError, match="a prompt is"):
            engine.add(5, LONG)
        with pytest.raises(RequestError, match="empty"):
            await last(engine.add([], LONG))
        with pytest.raises(RequestError, match="max_model_len"):
            await last(engine.generate([1] * 100, LONG))
        first = engine.add([1], LONG, "same")
        with pytest.raises(RequestError, match="'same'"):
            await last(engine.add([1], LONG, "same"))
        assert (await last(first)).outputs[0].finish_reason == "length"

    served(test)


def test_a_failed_step_is_an_output_not_a_hang():
    async def test(engine):
        def fail(batch):
            engine.built.program.before = lambda batch: None
            raise RuntimeError("once")

        engine.built.program.before = fail
        output = await last(engine.generate([1, 2], LONG))
        assert output.outputs[0].finish_reason == "error" and "once" in output.error
        output = await last(engine.generate([1, 2], LONG))
        assert output.outputs[0].finish_reason == "length"

    served(test)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_dead_thread_reaches_every_waiter():
    async def body():
        engine = AsyncEngine.from_built(fake_built())
        streams = [engine.add([i], LONG) for i in range(3)]
        await streams[0].__anext__()

        def die():
            raise MemoryError("gone")

        engine._engine.step = die
        for stream in streams:
            with pytest.raises(StepError, match="MemoryError: gone"):
                while True:
                    await asyncio.wait_for(stream.__anext__(), TIMEOUT)
        with pytest.raises(StepError, match="gone"):
            engine.add([1], LONG)
        engine.abort("x")
        engine.close()

    asyncio.run(body())


def test_close_ends_those_who_wait():
    async def body():
        engine = AsyncEngine.from_built(fake_built())
        engine.built.program.before = lambda batch: threading.Event().wait(0.005)
        stream = engine.add([1], LONG)
        await stream.__anext__()
        await asyncio.get_running_loop().run_in_executor(None, engine.close)
        final = await asyncio.wait_for(last(stream), TIMEOUT)
        assert final.outputs[0].finish_reason == "abort"
        with pytest.raises(StepError, match="closed"):
            engine.add([1], LONG)
        engine.close()

    asyncio.run(body())


def test_adding_and_aborting_from_many_threads():
    async def test(engine):
        async def client(k):
            for i in range(10):
                stream = engine.add([k, i], LONG, f"{k}-{i}")
                if (k + i) % 3 == 0:
                    await stream.__anext__()
                    threading.Thread(target=engine.abort, args=(f"{k}-{i}",)).start()
                final = await last(stream)
                if final is not None and final.outputs[0].finish_reason == "length":
                    assert final.outputs[0].token_ids == greedy([k, i], 30, None)

        await asyncio.gather(*[client(k) for k in range(6)])

    served(test)


def test_two_loops():
    engine = AsyncEngine.from_built(fake_built())
    results = {}

    def work(k):
        results[k] = asyncio.run(last(engine.generate([k], LONG)))

    threads = [threading.Thread(target=work, args=(k,)) for k in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(TIMEOUT)
    engine.close()
    for k in range(3):
        assert results[k].outputs[0].token_ids == greedy([k], 30, None)


def test_a_loop_that_is_gone_leaves_nothing():
    engine = AsyncEngine.from_built(fake_built())

    async def leave():
        engine.built.program.before = lambda batch: threading.Event().wait(0.002)
        await engine.add([1], LONG).__anext__()

    asyncio.run(leave())
    output = asyncio.run(last(engine.generate([2], LONG)))
    assert output.finished
    engine.close()
    assert engine.built.cache.num_free_blocks == engine.built.cache.num_blocks
