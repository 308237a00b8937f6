"""Finds plugins, checks what they bring, and selects a strategy: by name, or by priority.

Plugins are modules in the entry-point group ``pyllmlite`` whose ``@hookimpl`` functions return
strategy classes.  A plugin that is broken takes no other down: each of its faults is one line
in :attr:`Registry.problems` and in the log, and it becomes an error when someone asks for what
the plugin would have brought.
"""

from __future__ import annotations

import difflib
import logging
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from typing import Any

import pluggy

from pyllmlite.core.errors import PluginError
from pyllmlite.hooks import specs
from pyllmlite.hooks.attention import Attention
from pyllmlite.hooks.cache import KVCache
from pyllmlite.hooks.decoder import Constraint, Decoder, Proposer
from pyllmlite.hooks.quantizer import Quantizer
from pyllmlite.hooks.scheduler import Scheduler
from pyllmlite.hooks.strategy import CONTRACT_VERSIONS, Strategy

DISABLE = "PYLLMLITE_DISABLE_PLUGINS"
BUILT_IN = "pyllmlite"  # the distribution whose strategies keep their names

CONTRACTS: dict[str, tuple[type[Strategy], ...]] = {
    "attention": (Attention,),
    "cache": (KVCache,),
    "quantizer": (Quantizer,),
    "scheduler": (Scheduler,),
    "decoder": (Decoder, Proposer, Constraint),
}
HOOKS = {
    "pyllmlite_attentions": "attention",
    "pyllmlite_caches": "cache",
    "pyllmlite_quantizers": "quantizer",
    "pyllmlite_schedulers": "scheduler",
    "pyllmlite_decoders": "decoder",
}
_NAME = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*")
_log = logging.getLogger("pyllmlite")


@dataclass(frozen=True)
class Origin:
    """Where a plugin comes from."""

    distribution: str
    version: str
    entry_point: str
    target: str  # the module, as the entry point names it

    def __str__(self) -> str:
        return f"{self.distribution} {self.version}".rstrip()


@dataclass(frozen=True)
class Entry:
    """A strategy that can be used, and where it comes from."""

    contract: str
    cls: type[Any]
    origin: Origin

    @property
    def name(self) -> str:
        return self.cls.name

    @property
    def role(self) -> str | None:
        """Decoders only: selector, proposer or constraint."""
        return getattr(self.cls, "role", None)

    @property
    def distribution(self) -> str:
        return self.origin.distribution

    @property
    def version(self) -> str:
        return self.origin.version


@dataclass(frozen=True)
class Problem:
    """A fault of a plugin.  ``contract`` and ``name`` of the strategy, where it has got one."""

    line: str
    origin: Origin
    contract: str | None = None
    name: str | None = None


@dataclass(frozen=True)
class Selection:
    """What was chosen, why, and why the others were not: ``rejected`` is (name, reason)."""

    contract: str
    cls: type[Any]
    distribution: str
    version: str
    why: str
    rejected: tuple[tuple[str, str], ...] = ()

    @property
    def name(self) -> str:
        return self.cls.name


class Registry:
    """The strategies at hand.  Empty when made; :meth:`load` gives the installed ones.

    Attributes:
        problems: One for each fault found, in the order of discovery.
        disabled: Plugins switched off by ``PYLLMLITE_DISABLE_PLUGINS``.
    """

    def __init__(self) -> None:
        self.problems: list[Problem] = []
        self.disabled: list[Origin] = []
        self.origins: list[Origin] = []
        self._entries: dict[str, dict[str, Entry]] = {contract: {} for contract in CONTRACTS}
        self._manager = pluggy.PluginManager(specs.PROJECT)
        self._manager.add_hookspecs(specs)

    # -- discovery -------------------------------------------------------------------------
    @staticmethod
    def load() -> Registry:
        """The installed plugins; found once a process and value of the environment variable."""
        return _load(os.environ.get(DISABLE, ""))

    def discover(self, disable: Iterable[str] = ()) -> None:
        """Register every entry point of the group, the built-in distribution first.

        Args:
            disable: Distributions (as on PyPI) or entry points to leave out.
        """
        off = {_canonical(word) for word in disable if word.strip()}
        found = []
        for point in metadata.entry_points(group=specs.ENTRY_POINT_GROUP):
            dist = point.dist
            name = dist.metadata["Name"] if dist is not None else "(unknown)"
            version = dist.version if dist is not None else ""
            found.append((point, Origin(name, version, point.name, point.value)))
        found.sort(key=lambda f: (_canonical(f[1].distribution) != BUILT_IN, _order(f[1])))
        for point, origin in found:
            if {_canonical(origin.distribution), _canonical(origin.entry_point)} & off:
                self.disabled.append(origin)
                continue
            try:
                plugin = point.load()
            except (Exception, SystemExit) as error:
                self._problem(origin, f"cannot be imported: {_one_line(error)}")
                continue
            self._register(plugin, origin)

    def register(
        self, plugin: Any, name: str = "", distribution: str = "(given)", version: str = ""
    ) -> None:
        """Register a module or object with ``@hookimpl`` functions, as if it were installed."""
        target = getattr(plugin, "__name__", type(plugin).__name__)
        self._register(plugin, Origin(distribution, version, name or target, target))

    def _register(self, plugin: Any, origin: Origin) -> None:
        # One manager finds and checks the hook functions, but they are called one by one here:
        # pluggy's own multi-call would end at the first plugin that raises.
        if self._manager.is_registered(plugin):
            self._problem(origin, "is registered twice")
            return
        try:
            self._manager.register(plugin, name=f"{origin.distribution}:{origin.entry_point}")
        except Exception as error:
            self._problem(origin, f"is no plugin: {_one_line(error)}")
            return
        self.origins.append(origin)
        callers = self._manager.get_hookcallers(plugin) or []
        if not callers:
            self._problem(
                origin, f"has no @hookimpl function; the hooks are {', '.join(sorted(HOOKS))}"
            )
        for caller in callers:
            if caller.name not in HOOKS:
                self._problem(
                    origin,
                    f"implements {caller.name!r}, which is no hook; "
                    f"the hooks are {', '.join(sorted(HOOKS))}",
                )
                continue
            contract = HOOKS[caller.name]
            for impl in caller.get_hookimpls():
                if impl.plugin is plugin:
                    self._collect(contract, caller.name, impl.function, origin)

    def _collect(self, contract: str, hook: str, function: Any, origin: Origin) -> None:
        try:
            classes = list(function())
        except (Exception, SystemExit) as error:
            self._problem(origin, f"{hook}() failed: {_one_line(error)}", contract)
            return
        for cls in classes:
            fault = _fault(contract, cls)
            name = getattr(cls, "name", None)
            if fault is None:
                taken = self._entries[contract].get(cls.name)
                if taken is None:
                    self._entries[contract][cls.name] = Entry(contract, cls, origin)
                    continue
                fault = (
                    f"brings {contract} {name!r}, a name that {taken.origin} already has; "
                    "rename it or uninstall one of the two"
                )
            self._problem(origin, fault, contract, name if isinstance(name, str) else None)

    def _problem(
        self, origin: Origin, fault: str, contract: str | None = None, name: str | None = None
    ) -> None:
        line = f"plugin {origin} ({origin.entry_point} = {origin.target}) {fault}"
        self.problems.append(Problem(line, origin, contract, name))
        _log.warning("%s", line)

    # -- look-up ---------------------------------------------------------------------------
    def names(self, contract: str, role: str | None = None) -> list[str]:
        """Names of the strategies that can be used, in alphabetical order."""
        return [entry.name for entry in self.entries(contract, role)]

    def entries(self, contract: str, role: str | None = None) -> list[Entry]:
        """The same with class, distribution and version."""
        known = self._contract(contract)
        return [known[n] for n in sorted(known) if role is None or known[n].role == role]

    def classes(self, contract: str, role: str | None = None) -> list[type[Any]]:
        """Their classes."""
        return [entry.cls for entry in self.entries(contract, role)]

    def get(self, contract: str, name: str, role: str | None = None) -> type[Any]:
        """The class of that name.  ``PluginError`` says what is known, and what came close."""
        return self.entry(contract, name, role).cls

    def entry(self, contract: str, name: str, role: str | None = None) -> Entry:
        """As :meth:`get`, with distribution and version."""
        found = self._contract(contract).get(name)
        if found is not None and role is not None and found.role != role:
            raise PluginError(
                f"{contract} {name!r} ({found.origin}) is a {found.role}, not a {role}; "
                f"known: {_listed(self.names(contract, role))}"
            )
        if found is not None:
            return found
        for problem in self.problems:
            if problem.contract == contract and problem.name == name:
                raise PluginError(problem.line)
        known = self.names(contract, role)
        near = difflib.get_close_matches(str(name), known, n=1, cutoff=0.5)
        line = f"no {role or contract} is called {name!r}"
        line += f"; did you mean {near[0]!r}?" if near else ";"
        line += f" known: {_listed(known)}"
        # A plugin that could not be asked may be the one that was meant.
        silent = [p.line for p in self.problems if p.name is None]
        raise PluginError("; ".join([line, *silent]))

    def select(
        self, contract: str, name: str | type[Any] | None, need: Any, role: str | None = None
    ) -> Selection:
        """Choose a strategy for ``need`` (the contract's ``...Needs``).

        Args:
            name: A name; ``"auto"`` or None: the highest priority that supports ``need``; or a
                class of the contract, used as it is.
            role: For decoders; without, a name may be any part's, and auto chooses a selector.
        Raises:
            PluginError: The name is unknown, or the reason why it cannot do what is needed;
                for ``auto`` the reasons of all.
        """
        if isinstance(name, type):
            fault = _fault(contract, name)
            if fault is not None:
                raise PluginError(f"{name.__module__}.{name.__qualname__} {fault}")
            origin = Origin("(given)", "", name.__qualname__, name.__module__)
            return self._named(Entry(contract, name, origin), need, "given as a class")
        if name is not None and name != "auto":
            return self._named(self.entry(contract, name, role), need, "asked for by name")
        if contract == "decoder" and role is None:
            role = "selector"
        rejected: list[tuple[str, str]] = []
        chosen: Entry | None = None
        for entry in sorted(self.entries(contract, role), key=lambda e: (-e.cls.priority, e.name)):
            if entry.cls.priority < 0:
                rejected.append((entry.name, "only by name"))
                continue
            reason = _reason(entry.cls, need)
            if reason is not None:
                rejected.append((entry.name, reason))
            elif chosen is None:
                chosen = entry
            else:
                rejected.append(
                    (entry.name, f"priority {entry.cls.priority} < {chosen.cls.priority}")
                    if entry.cls.priority < chosen.cls.priority
                    else (entry.name, f"same priority as {chosen.name!r}, later in the alphabet")
                )
        if chosen is None:
            reasons = "; ".join(f"{n}: {reason}" for n, reason in rejected) or "none is installed"
            silent = [p.line for p in self.problems if p.contract in (contract, None)]
            raise PluginError(
                "; ".join([f"no {role or contract} supports what is asked ({reasons})", *silent])
            )
        why = f"auto: highest priority ({chosen.cls.priority}) that supports what is asked"
        return Selection(
            contract, chosen.cls, chosen.distribution, chosen.version, why, tuple(rejected)
        )

    def _named(self, entry: Entry, need: Any, why: str) -> Selection:
        reason = _reason(entry.cls, need)
        if reason is not None:
            raise PluginError(f"{entry.contract} {entry.name!r} ({entry.origin}): {reason}")
        others = tuple(
            (other.name, "another was asked for")
            for other in self.entries(entry.contract)
            if other.cls is not entry.cls
        )
        return Selection(entry.contract, entry.cls, entry.distribution, entry.version, why, others)

    def _contract(self, contract: str) -> dict[str, Entry]:
        try:
            return self._entries[contract]
        except KeyError:
            raise PluginError(
                f"no contract is called {contract!r}; there are {', '.join(CONTRACTS)}"
            ) from None


def _fault(contract: str, cls: Any) -> str | None:
    """Why the class cannot be a strategy of the contract, in one line."""
    bases = CONTRACTS[contract]
    wanted = " or ".join(base.__name__ for base in bases)
    if not isinstance(cls, type) or not issubclass(cls, bases):
        what = cls.__qualname__ if isinstance(cls, type) else repr(cls)
        return f"brings {what} as {contract}, which is no subclass of {wanted}"
    name = getattr(cls, "name", None)
    if not isinstance(name, str) or not _NAME.fullmatch(name) or name == "auto":
        return (
            f"brings {contract} {cls.__qualname__} with name {name!r}; "
            "a name is lower-case letters, digits and single '-', and not 'auto'"
        )
    version, current = cls.contract_version, CONTRACT_VERSIONS[contract]
    accepted = _accepted_versions(current)
    if version not in accepted:
        fix = "upgrade the plugin" if version < current else "upgrade pyllmlite"
        return (
            f"brings {contract} {name!r} made for version {version} of the contract; this "
            f"pyllmlite takes {' and '.join(map(str, accepted))}: {fix}"
        )
    missing = sorted(getattr(cls, "__abstractmethods__", ()))
    if missing:
        return f"brings {contract} {name!r} without {', '.join(missing)}"
    if not isinstance(cls.priority, int):
        return f"brings {contract} {name!r} with priority {cls.priority!r}, which is no integer"
    return None


def _accepted_versions(current: int) -> tuple[int, ...]:
    """Version 0 promises nothing; from 2 on, plugins made for the one before still run."""
    return (current,) if current <= 1 else (current - 1, current)


def _reason(cls: type[Any], need: Any) -> str | None:
    try:
        return cls.undeclared(need) or cls.supports(need)
    except Exception as error:
        return f"supports() failed: {_one_line(error)}"


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name.strip()).lower()


def _order(origin: Origin) -> tuple[str, str]:
    return (_canonical(origin.distribution), origin.entry_point)


def _listed(names: list[str]) -> str:
    return ", ".join(names) or "none"


@cache
def _load(disable: str) -> Registry:
    registry = Registry()
    registry.discover(disable.split(","))
    return registry
