from pyllmlite_example_plugin.fair import Fair
from pyllmlite_example_plugin.last_words import LastWords

from pyllmlite import Registry
from pyllmlite.testing import ProposerConformance, SchedulerConformance, SimulatedEngine


class TestFair(SchedulerConformance):
    strategy = Fair


class TestLastWords(ProposerConformance):
    strategy = LastWords

    def test_repetition_is_foretold(self):
        engine = self.engine()
        # The table's cycle has 20 tokens or fewer: from the second round on all is known.
        engine.add([4], max_tokens=100, ignore_eos=True)
        engine.run()
        assert engine.accepted >= 50 and engine.accepted >= 0.9 * engine.proposed

    def test_nothing_known_nothing_proposed(self):
        engine = self.engine()
        seq = engine.add([1, 2, 3, 4, 5], max_tokens=5).sequences[0]
        assert engine.proposer.propose(seq, 5) == []

    def test_the_latest_place_counts(self):
        engine = self.engine()
        seq = engine.add([1, 2, 8, 1, 2, 9, 7, 1, 2], max_tokens=5).sequences[0]
        engine.proposer.propose(seq, 3)
        seq.token_ids += [6, 1, 2]
        assert engine.proposer.propose(seq, 3) == [6, 1, 2]


def test_a_flood_does_not_push_others_aside():
    def first_done(scheduler):
        engine = SimulatedEngine(scheduler, max_num_seqs=4, num_blocks=200)
        for _ in range(40):
            engine.add(20, 20, client="flood")
        quiet = [engine.add(20, 20, client="quiet") for _ in range(4)]
        engine.run_until_idle()
        return max(engine.finish_times[s.request.id] for s in quiet), engine.now

    done, end = first_done(Fair())
    assert done < end / 3


def test_found_through_its_entry_point():
    entry = Registry.load().entry("scheduler", "fair")
    assert entry.cls is Fair and entry.distribution == "pyllmlite-example-plugin"
    assert Registry.load().get("decoder", "last-words", "proposer") is LastWords
