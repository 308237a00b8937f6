"""What all suites share: the registry's own checks, and a way to run a suite without pytest."""

from __future__ import annotations

import types
from typing import Any, ClassVar

from pyllmlite.hooks.registry import HOOKS, Registry
from pyllmlite.hooks.specs import hookimpl

_SUITES: dict[tuple[str, str | None], type[Conformance]] = {}


class Conformance:
    """Base of the suites.  Methods named ``test_...`` are run by pytest; a subclass sets
    ``strategy`` and may narrow what is tried by overriding the suite's other attributes."""

    contract: ClassVar[str]
    role: ClassVar[str | None] = None
    strategy: Any = None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "contract" in vars(cls):
            _SUITES[cls.contract, cls.role] = cls

    def test_registers(self) -> None:
        """The registry takes it: base class, name, contract version, abstract methods."""
        hook = next(name for name, contract in HOOKS.items() if contract == self.contract)
        plugin = types.ModuleType("conformance_plugin")

        def bring() -> list[Any]:
            return [self.strategy]

        bring.__name__ = hook
        setattr(plugin, hook, hookimpl(bring))
        registry = Registry()
        registry.register(plugin, distribution="(conformance)")
        assert not registry.problems, registry.problems[0].line
        name = self.strategy.name
        assert registry.get(self.contract, name, self.role) is self.strategy
        assert self.strategy.__doc__, f"{name!r} has no docstring that says what it does"


def check_strategy(strategy: type[Any]) -> None:
    """Run the suite of the strategy's contract.  ``AssertionError`` names the test that fails."""
    found = _SUITES.get((strategy.contract, getattr(strategy, "role", None)))
    if found is None:
        raise ValueError(f"there is no suite for contract {strategy.contract!r}")
    suite_class = type(f"Test{strategy.__name__}", (found,), {"strategy": strategy})
    for name in [n for n in dir(suite_class) if n.startswith("test_")]:
        try:
            getattr(suite_class(), name)()
        except Exception as error:
            text = str(error) or type(error).__name__
            raise AssertionError(f"{strategy.name}: {name}: {text}") from error
