"""The built-in strategies pass the suites that third parties run."""

from pyllmlite.testing import (
    AttentionConformance,
    CacheConformance,
    DecoderConformance,
    QuantizerConformance,
    SchedulerConformance,
)
from pyllmlite_plugins.attention.flash import Flash
from pyllmlite_plugins.attention.reference import Reference
from pyllmlite_plugins.cache.contiguous import Contiguous
from pyllmlite_plugins.cache.paged import Paged
from pyllmlite_plugins.cache.paged_int8 import PagedInt8
from pyllmlite_plugins.decoder.sample import Sample
from pyllmlite_plugins.quantizer.int8 import LLMInt8
from pyllmlite_plugins.quantizer.nf4 import NormalFloat4
from pyllmlite_plugins.quantizer.none import Unquantized
from pyllmlite_plugins.quantizer.rtn import RoundToNearest
from pyllmlite_plugins.scheduler.continuous import Continuous
from pyllmlite_plugins.scheduler.dynamic import Dynamic
from pyllmlite_plugins.scheduler.static import Static


class TestFlash(AttentionConformance):
    strategy = Flash


class TestFlashContiguous(AttentionConformance):
    strategy = Flash
    cache = Contiguous


class TestFlashInt8(AttentionConformance):
    strategy = Flash
    cache = PagedInt8


class TestReference(AttentionConformance):
    strategy = Reference


class TestReferenceInt8(AttentionConformance):
    strategy = Reference
    cache = PagedInt8


class TestPaged(CacheConformance):
    strategy = Paged


class TestPagedInt8(CacheConformance):
    strategy = PagedInt8
    operations = 2_000


class TestContiguous(CacheConformance):
    strategy = Contiguous
    operations = 2_000


class TestUnquantized(QuantizerConformance):
    strategy = Unquantized


class TestRoundToNearest(QuantizerConformance):
    strategy = RoundToNearest


class TestLLMInt8(QuantizerConformance):
    strategy = LLMInt8
    settings = (*QuantizerConformance.settings, {"extra": {"outlier_threshold": 2.5}})


class TestNormalFloat4(QuantizerConformance):
    strategy = NormalFloat4
    settings = (
        *QuantizerConformance.settings,
        {"extra": {"kind": "fp4"}},
        {"extra": {"kind": "fp4", "double_quant": True}, "group_size": 32},
        {"extra": {"double_quant": True}},
    )


class TestContinuous(SchedulerConformance):
    strategy = Continuous


class TestStatic(SchedulerConformance):
    strategy = Static


class TestSample(DecoderConformance):
    strategy = Sample


class TestContinuousChunked(SchedulerConformance):
    strategy = Continuous
    options = {"max_prefill_tokens_per_step": 5}


class TestContinuousPaced(SchedulerConformance):
    strategy = Continuous
    options = {"max_decode_slowdown": 1.5}


class TestContinuousUnfair(SchedulerConformance):
    strategy = Continuous
    options = {"fair_clients": False}


class TestDynamic(SchedulerConformance):
    strategy = Dynamic


class TestDynamicSmallBatches(SchedulerConformance):
    strategy = Dynamic
    options = {"batch_size": 2, "batch_window": 1.5}
