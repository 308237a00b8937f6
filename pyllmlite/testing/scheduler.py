"""The suite for schedulers: whatever the policy, everybody ends and the rules are kept."""

from __future__ import annotations

import random
from typing import Any

from pyllmlite.core.request import Sequence, Status
from pyllmlite.testing.base import Conformance
from pyllmlite.testing.simulated import SimulatedEngine


class SchedulerConformance(Conformance):
    """``strategy``: the scheduler's class; ``options``: the ``extra`` it is set up with."""

    contract = "scheduler"
    options: dict[str, Any] = {}

    def make(self) -> Any:
        return self.strategy()

    def engine(self, **sizes: Any) -> SimulatedEngine:
        return SimulatedEngine(self.make(), options=self.options, **sizes)

    def test_empty_step(self) -> None:
        engine = self.engine()
        for _ in range(3):
            assert not engine.step().ran, "a step without sequences ran something"
        engine.add(5, 1)
        engine.run_until_idle(100)
        assert not engine.step().ran

    def test_one_request(self) -> None:
        for prompt, output in [(1, 1), (7, 3), (16, 16), (64, 2)]:
            engine = self.engine()
            seq = engine.add(prompt, output)
            engine.run_until_idle(200)
            assert seq.num_output_tokens == output
            assert engine.tokens_run == prompt + output - 1, "tokens were computed twice"

    def test_prompt_longer_than_a_step(self) -> None:
        engine = self.engine(max_num_batched_tokens=16)
        seq = engine.add(100, 3)
        engine.run_until_idle(200)
        assert seq.num_output_tokens == 3

    def test_everything_ends(self) -> None:
        rng = random.Random(1)
        for trial in range(6):
            engine = self.engine(max_num_batched_tokens=rng.choice([8, 32, 128]))
            added = []
            for _ in range(40):
                prompt, output = rng.randint(1, 120), rng.randint(1, 40)
                client, priority = rng.choice("abc"), rng.choice([0, 0, 1, -1])
                added.append(engine.add(prompt, output, priority, client))
                for _ in range(rng.choice([0, 0, 1, 5])):
                    engine.step()
            engine.run_until_idle()
            self._all_ended(engine, added, f"trial {trial}")

    def test_budget_and_rows(self) -> None:
        rng = random.Random(2)
        engine = self.engine(max_num_seqs=4, max_num_batched_tokens=32)
        for _ in range(30):
            engine.add(rng.randint(1, 90), rng.randint(1, 12))
        while engine.running or engine.waiting:
            report = engine.step()
            assert report.num_tokens <= 32, f"a step ran {report.num_tokens} of 32 tokens"
            assert len(engine.running) <= 4, f"{len(engine.running)} of 4 rows are in use"
            assert engine.free_blocks >= 0

    def test_small_cache(self) -> None:
        """Sequences outgrow the cache: some give way, all end, and the work stays bounded."""
        rng = random.Random(3)
        engine = self.engine(num_blocks=10, block_size=4, max_num_batched_tokens=64)
        added = [engine.add(rng.randint(1, 12), rng.randint(10, 28)) for _ in range(24)]
        engine.run_until_idle()
        self._all_ended(engine, added, "small cache")
        useful = sum(len(s.token_ids) for s in added)
        assert engine.tokens_run <= 20 * useful, (
            f"{engine.tokens_run} tokens were computed for {useful} that were needed"
        )

    def test_sequence_that_fills_the_cache(self) -> None:
        engine = self.engine(num_blocks=4, block_size=4)
        added = [engine.add(1, 15), engine.add(8, 8), engine.add(4, 2)]
        engine.run_until_idle()
        self._all_ended(engine, added, "cache of one sequence")

    def test_abort(self) -> None:
        rng = random.Random(4)
        engine = self.engine(num_blocks=24, block_size=4)
        added: list[Sequence] = []
        for _ in range(150):
            if rng.random() < 0.5:
                added.append(engine.add(rng.randint(1, 30), rng.randint(1, 40)))
            if rng.random() < 0.3:
                engine.abort(rng.choice(added or [engine.add(1, 1)]))
            engine.step()
        engine.run_until_idle()
        assert all(s.status is Status.FINISHED for s in added)
        assert engine.free_blocks == engine.num_blocks

    def test_prefix_in_flight(self) -> None:
        """A sequence that must wait for another's prefix neither stops the others nor is lost."""
        engine = self.engine(max_num_seqs=4)
        waits = [engine.add(20, 4, prefix_waits=n) for n in (1, 0, 7, 30)]
        engine.run_until_idle(500)
        self._all_ended(engine, waits, "prefix in flight")

    def test_no_starvation(self) -> None:
        """A big request, whose prompt needs most of the cache at once, gets through a stream of
        small ones."""
        engine = self.engine(max_num_batched_tokens=256, num_blocks=20, block_size=8)
        rng = random.Random(5)
        big = None
        for i in range(1500):
            if i == 50:
                big = engine.add(136, 8, client="big")
            if i % 3 == 0:
                engine.add(rng.randint(4, 20), 12, client="small")
            engine.step()
            if big is not None and big.status is Status.FINISHED:
                break
        assert big is not None and big.status is Status.FINISHED, (
            "a request of 136 tokens did not end in 1450 steps among small ones"
        )

    def _all_ended(self, engine: SimulatedEngine, added: list[Sequence], where: str) -> None:
        lost = [s for s in added if s.status is not Status.FINISHED]
        assert not lost, f"{where}: {lost[0]} never ended"
        assert len(engine.finished) == len(added)
        assert engine.free_blocks == engine.num_blocks, f"{where}: blocks are still held"
