"""Imports run downward only, the core knows no plugin, and what is light stays light."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import pyllmlite

ROOT = Path(__file__).resolve().parent.parent

# What each part may import besides itself.
BELOW = {
    "core": set(),
    "hooks": {"core"},
    "runtime": {"core", "hooks"},
    "model": {"runtime", "hooks", "core"},
    "sizing": {"model", "runtime", "hooks", "core"},
    "engine": {"model", "runtime", "hooks", "core"},
    "compress": {"engine", "sizing", "model", "runtime", "hooks", "core"},
    "serve": {"engine", "sizing", "model", "runtime", "hooks", "core"},
    "testing": {"runtime", "hooks", "core"},
    "cli": {"serve", "compress", "engine", "sizing", "model", "runtime", "hooks", "core"},
    "plugins": {"hooks", "runtime", "core"},
}
# The package itself and the compiled extension: no part of the order.
TOP = {"_native", "_version", "__version__", ""}


def imported_parts(file: Path, package: str) -> set[tuple[int, str]]:
    """(line, part) of every import of pyllmlite or its plugins, inside functions too."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"), str(file))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, base] if base else above)
            names = [f"{base}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            parts = name.split(".")
            if parts[0] == "pyllmlite":
                if len(parts) > 1 and parts[1] in pyllmlite._EXPORTS:  # from pyllmlite import LLM
                    parts = pyllmlite._EXPORTS[parts[1]].split(".")
                found.add((node.lineno, parts[1] if len(parts) > 1 else ""))
            elif parts[0] == "pyllmlite_plugins":
                found.add((node.lineno, "plugins"))
    return found


def sources() -> list[tuple[str, Path, str]]:
    """(part, file, its package) for the whole tree."""
    files = []
    for part in BELOW:
        top = ROOT / "plugins" if part == "plugins" else ROOT / "pyllmlite" / part
        for file in sorted(top.rglob("*.py")):
            inside = file.relative_to(top).parent.parts
            start = ["pyllmlite_plugins"] if part == "plugins" else ["pyllmlite", part]
            files.append((part, file, ".".join([*start, *inside])))
    return files


def test_every_folder_has_its_place():
    folders = {
        p.name for p in (ROOT / "pyllmlite").iterdir() if p.is_dir() and list(p.rglob("*.py"))
    }
    assert folders <= set(BELOW), "add the new folder to BELOW, with what it may import"


def test_imports_run_downward_only():
    wrong = []
    for part, file, package in sources():
        for line, imported in sorted(imported_parts(file, package)):
            if imported in TOP or imported == part or imported in BELOW[part]:
                continue
            wrong.append(f"{file.relative_to(ROOT)}:{line}: {part} imports {imported}")
    assert not wrong, "\n".join(wrong)


def test_core_imports_no_plugin():
    wrong = [
        f"{file.relative_to(ROOT)}:{line}"
        for part, file, package in sources()
        if part != "plugins"
        for line, imported in imported_parts(file, package)
        if imported == "plugins"
    ]
    assert not wrong


def test_the_check_sees_relative_and_inner_imports(tmp_path):
    file = tmp_path / "x.py"
    file.write_text(
        "from ..engine import llm\n"
        "from . import y\n"
        "def f():\n    import pyllmlite_plugins.cache\n    from pyllmlite import cli, LLM\n"
        "import numpy\n"
    )
    assert {part for _, part in imported_parts(file, "pyllmlite.core")} == {
        "engine",
        "core",
        "plugins",
        "cli",
    }


def loaded_by(*arguments: str) -> set[str]:
    """Top-level modules imported by ``python ARGUMENTS``."""
    done = subprocess.run(
        [sys.executable, "-X", "importtime", *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    lines = [line for line in done.stderr.splitlines() if line.startswith("import time:")]
    return {line.rsplit("|", 1)[1].strip().split(".")[0] for line in lines}


@pytest.mark.parametrize(
    "arguments",
    [("-c", "import pyllmlite"), ("-m", "pyllmlite.cli.main", "--help")],
    ids=["import", "help"],
)
def test_light(arguments):
    loaded = loaded_by(*arguments)
    assert "pyllmlite" in loaded
    assert not loaded & {"torch", "transformers", "huggingface_hub", "safetensors", "gguf"}
    if "--help" in arguments:
        assert "numpy" not in loaded
