"""``pyllmlite info`` and ``pyllmlite plugins``: what this installation is made of."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from pyllmlite.cli.output import print_json, print_table, size


def version(distribution: str = "pyllmlite") -> str | None:
    """The installed version, without importing the distribution; None: not installed."""
    from importlib import metadata  # takes longer than all of --help

    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _package_dir() -> Path:
    import pyllmlite

    return Path(pyllmlite.__file__).resolve().parent


def cmake_dir() -> Path:
    """Where ``pyllmliteConfig.cmake`` is."""
    return _installed("lib/cmake/pyllmlite", "pyllmliteConfig.cmake")


def include_dir() -> Path:
    """What goes on a compiler's include path: ``#include "pyllmlite/ops.h"`` is found below."""
    return _installed("include", "pyllmlite/op.h")


def _installed(relative: str, witness: str) -> Path:
    from pyllmlite.core.errors import PyllmliteError

    package = _package_dir()
    candidates = [package / relative, package.parent / "csrc" / relative]
    for path in candidates:
        if (path / witness).is_file():
            return path
    raise PyllmliteError(
        f"{witness} is not under {candidates[0]}: this installation has no C++ part"
    )


def memory_bytes() -> int | None:
    """The machine's memory, or what the control group leaves of it; None: not known."""
    try:
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):
        return None
    for limit in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            total = min(total, int(Path(limit).read_text()))
        except (OSError, ValueError):
            continue
    return total


def usable_cpus() -> int:
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:
        return os.cpu_count() or 1


def _cuda() -> str:
    """One line about the CUDA part: was it built, which devices there are."""
    from pyllmlite import _native

    told = _native.cuda_info()
    names = ", ".join(f"{d['name']} ({size(d['total_bytes'])})" for d in told["devices"])
    return names or str(told["reason"])


def gather() -> dict[str, Any]:
    """All that ``info`` says, as plain data."""
    import platform

    facts: dict[str, Any] = {
        "pyllmlite": version(),
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
    }
    try:
        from pyllmlite import _native

        native = _native.info()
        facts["native"] = native
        facts["instruction_set"] = native["isa"]
        facts["instruction_sets_available"] = list(native["available"])
        facts["cuda"] = _cuda()
    except ImportError as error:
        facts["native"] = None
        facts["problem"] = f"the compiled extension cannot be imported: {error}"
    facts["cpus"] = usable_cpus()
    facts["memory_bytes"] = memory_bytes()
    for name in ("numpy", "torch", "transformers"):
        facts[name] = version(name)
    facts.update(_default_model())
    return facts


def _default_model() -> dict[str, Any]:
    from pyllmlite.model import hub

    path = hub.cached(hub.DEFAULT_MODEL)
    return {
        "cache_dir": str(hub.cache_dir()),
        "default_model": hub.DEFAULT_MODEL,
        "default_model_path": str(path) if path else None,
    }


def info(
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Say what runs here: versions, CPU, memory, default model."""
    facts = gather()
    if json:
        print_json(facts)
        return
    native = facts["native"]
    lines = [("pyllmlite", f"{facts['pyllmlite'] or 'not installed'} in {_package_dir()}")]
    lines.append(("python", f"{facts['python']} ({sys.executable}), {facts['platform']}"))
    if native is None:
        lines.append(("native", facts["problem"]))
    else:
        available = ", ".join(facts["instruction_sets_available"])
        lines.append(
            ("cpu", f"{facts['instruction_set']} taken of {available} (PYLLMLITE_ISA forces one)")
        )
        lines.append(("cuda", facts["cuda"]))
    lines.append(("threads", f"{facts['cpus']} CPUs this process may use"))
    memory = facts["memory_bytes"]
    lines.append(("memory", size(memory) if memory else "not known"))
    for name in ("numpy", "torch", "transformers"):
        lines.append((name, facts[name] or "not installed"))
    path = facts["default_model_path"]
    lines.append(
        (
            "model",
            f"{facts['default_model']}: "
            + (path or f"not here yet; pyllmlite pull {facts['default_model']}"),
        )
    )
    width = max(len(name) for name, _ in lines)
    for name, text in lines:
        print(f"{name:<{width}}  {text}")


def plugins(
    pairs: Annotated[bool, typer.Option("--pairs", help="What works with what.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """List installed strategies, their origin, and problems."""
    from pyllmlite.hooks.registry import CONTRACTS, Registry

    registry = Registry.load()
    if pairs:
        from pyllmlite.model.pairs import refusals, table

        if json:
            refused = refusals(registry).items()
            print_json([{"pair": list(pair), "reason": reason} for pair, reason in refused])
        else:
            print(table(registry), end="")
        return
    rows = [
        {
            "contract": entry.contract,
            "role": entry.role,
            "name": entry.name,
            "priority": entry.cls.priority,
            "contract_version": entry.cls.contract_version,
            "distribution": entry.distribution,
            "version": entry.version,
            "class": f"{entry.cls.__module__}.{entry.cls.__qualname__}",
        }
        for contract in CONTRACTS
        for entry in registry.entries(contract)
    ]
    problems = [problem.line for problem in registry.problems]
    disabled = [str(origin) for origin in registry.disabled]
    if json:
        print_json({"plugins": rows, "problems": problems, "disabled": disabled})
        return
    print_table(
        ("contract", "name", "distribution", "version", "priority", "class"),
        [
            (
                row["contract"] if row["role"] is None else f"{row['contract']} ({row['role']})",
                row["name"],
                row["distribution"],
                row["version"],
                row["priority"],
                row["class"],
            )
            for row in rows
        ],
    )
    for origin in disabled:
        print(f"disabled: {origin} (PYLLMLITE_DISABLE_PLUGINS)")
    for problem in problems:
        print(f"problem: {problem}")
