"""Conformance suites for plugin authors: one line each.

    class TestFair(SchedulerConformance):
        strategy = Fair

or, without pytest, ``check_strategy(Fair)``.  The built-in strategies pass the same suites.
"""

from pyllmlite.testing.attention import AttentionConformance
from pyllmlite.testing.base import Conformance, check_strategy
from pyllmlite.testing.cache import CacheConformance
from pyllmlite.testing.decoder import (
    ConstraintConformance,
    DecoderConformance,
    ProposerConformance,
)
from pyllmlite.testing.quantizer import QuantizerConformance
from pyllmlite.testing.scheduler import SchedulerConformance
from pyllmlite.testing.simulated import SimulatedEngine

__all__ = [
    "AttentionConformance",
    "CacheConformance",
    "Conformance",
    "ConstraintConformance",
    "DecoderConformance",
    "ProposerConformance",
    "QuantizerConformance",
    "SchedulerConformance",
    "SimulatedEngine",
    "check_strategy",
]
