"""What works with what: every pair of strategies and options, by what their classes declare.

Nothing here is a list of exceptions.  A selector says whether it takes drafts and constraints, a
cache and an attention say in ``supports`` and by their declarations what they do; what a contract
keeps apart (policy never learns of the device, a cache never of the decoder) works together.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any

from pyllmlite.core.errors import PluginError
from pyllmlite.hooks.attention import AttentionNeeds
from pyllmlite.hooks.cache import CacheNeeds, KVGroup
from pyllmlite.hooks.registry import Registry

# What an ordinary model asks.
CACHE = CacheNeeds(
    device="cpu", dtype="bf16", groups=(KVGroup((0,), None),), num_layers=1, num_kv_heads=2,
    head_dim=64, max_model_len=1024, max_rows=4, max_num_batched_tokens=64, max_bytes=1 << 26,
)  # fmt: skip
ATTENTION = AttentionNeeds("cpu", "bf16", 64, 4, 2, kv_layout="", kv_dtype="", block_size=16)


@dataclass(frozen=True)
class Part:
    """A strategy, or an option (``contract`` "option").

    Attributes:
        title: As the table shows it.
        cls: The strategy's class; None for an option.
        needs: What an option changes in :class:`CacheNeeds`.
    """

    contract: str
    title: str
    cls: Any = None
    needs: tuple[tuple[str, Any], ...] = ()


OPTIONS = (
    Part("option", "int8 KV", needs=(("kv_dtype", "int8"),)),
    Part("option", "window", needs=(("groups", (KVGroup((0,), 32),)),)),
    Part("option", "sinks", needs=(("groups", (KVGroup((0,), 32, 4),)),)),
    Part("option", "swap space", needs=(("swap_bytes", 1 << 24),)),
    Part("option", "prefix sharing", needs=(("prefix_caching", True),)),
)


def parts(registry: Registry, distribution: str | None = None) -> list[Part]:
    """Everything that can be paired: what is installed (by ``distribution``; None: by any), and
    the options."""
    kinds: list[tuple[str, str | None]] = [
        ("decoder", role) for role in ("selector", "proposer", "constraint")
    ]
    kinds += [(contract, None) for contract in ("cache", "attention", "scheduler")]
    found = [
        Part(role or contract, entry.name, entry.cls)
        for contract, role in kinds
        for entry in registry.entries(contract, role)
        if distribution is None or entry.distribution == distribution
    ]
    return found + list(OPTIONS)


def refusal(registry: Registry, a: Part, b: Part) -> str | None:
    """Why the two do not work together, None if they do.  ``"one of them"``: they answer the same
    question, so that a request or an engine chooses one."""
    by = {a.contract: a, b.contract: b}
    if a.contract == b.contract and a.contract not in ("constraint", "option"):
        return "one of them"
    if a.contract == b.contract == "option":
        return _storage(registry, None, None, a, b)
    if {"selector", "proposer"} == set(by) and not by["selector"].cls.takes_drafts:
        return "takes no drafts"
    if {"selector", "constraint"} == set(by) and not by["selector"].cls.takes_constraints:
        return "takes no constraints"
    if set(by) <= {"cache", "attention", "option"}:
        options = [part for part in (a, b) if part.contract == "option"]
        return _storage(registry, by.get("cache"), by.get("attention"), *options)
    return None


def _storage(
    registry: Registry, cache: Part | None, attention: Part | None, *options: Part
) -> str | None:
    """Is there a cache (this one) and an attention (this one) that do what the options ask?"""
    needs = CACHE
    for option in options:
        changes = dict(option.needs)
        if needs.groups != CACHE.groups:  # a window and sinks: the sinks' has one already
            changes["groups"] = max(needs.groups, changes.get("groups", ()), key=_sinks)
        needs = replace(needs, **changes)
    caches = [cache.cls] if cache else registry.classes("cache")
    attentions = [attention.cls] if attention else registry.classes("attention")
    reasons = []
    for kept in caches:
        reason = kept.undeclared(needs) or kept.supports(needs)
        if reason is None and any(o.title == "prefix sharing" for o in options):
            reason = None if kept.share_prefixes else "shares nothing"
        if reason is not None:
            reasons.append(reason)
            continue
        made = kept(needs)
        asked = replace(
            ATTENTION, kv_layout=made.layout, kv_dtype=made.kv_dtype, block_size=made.block_size,
            window=needs.groups[0].window is not None, sinks=needs.groups[0].sinks,
        )  # fmt: skip
        for reads in attentions:
            reason = reads.undeclared(asked) or reads.supports(asked)
            if reason is None:
                return None
            reasons.append(reason)
    return reasons[0] if reasons else "nothing is installed for it"


def _sinks(groups: tuple[KVGroup, ...]) -> int:
    return groups[0].sinks if groups else -1


def refusals(
    registry: Registry, distribution: str | None = None
) -> dict[tuple[str, str], str]:
    """By the titles of a pair why it does not work; pairs that do are not in it."""
    found = {}
    for a, b in combinations(parts(registry, distribution), 2):
        try:
            reason = refusal(registry, a, b)
        except PluginError as error:
            reason = str(error)
        if reason is not None:
            found[a.title, b.title] = reason
    return found


def table(registry: Registry, distribution: str | None = None) -> str:
    """The pairs as a Markdown table: rows by columns, and below it the reasons by number."""
    everything = parts(registry, distribution)
    reasons: list[str] = []
    refused = refusals(registry, distribution)
    lines = ["| | " + " | ".join(part.title for part in everything[:-1]) + " |"]
    lines.append("| --- |" + " --- |" * (len(everything) - 1))
    for i, row in enumerate(everything[1:], start=1):
        cells = []
        for column in everything[:i]:
            reason = refused.get((column.title, row.title))
            if reason == "one of them":
                cells.append("or")
            elif reason is None:
                cells.append("yes")
            else:
                if reason not in reasons:
                    reasons.append(reason)
                cells.append(f"no ({reasons.index(reason) + 1})")
        cells += [""] * (len(everything) - 1 - i)
        lines.append(f"| {row.title} | " + " | ".join(cells) + " |")
    lines.append("")
    lines += [f"{i}. {reason}" for i, reason in enumerate(reasons, start=1)]
    return "\n".join(lines) + "\n"
