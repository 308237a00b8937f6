"""The Python examples of the README and of every page run, in the order they stand in."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from text_model import write_text_model

ROOT = Path(__file__).resolve().parent.parent.parent
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])
FENCE = re.compile(r"^```python\n(.*?)^```$", re.M | re.S)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(write_text_model(tmp_path_factory.mktemp("models") / "tiny"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_examples(page, model, monkeypatch, tmp_path):
    from pyllmlite.hooks import registry
    from pyllmlite.model import hub

    blocks = list(FENCE.finditer(page.read_text(encoding="utf-8")))
    if not blocks:
        pytest.skip("no Python on this page")
    # An example names no model: here the default one is a tiny one.
    monkeypatch.setattr(hub, "DEFAULT_MODEL", model)
    monkeypatch.chdir(tmp_path)
    registry._load.cache_clear()  # what an example registers ends with it
    names: dict[str, object] = {"__name__": "__example__"}
    try:
        for block in blocks:
            line = page.read_text(encoding="utf-8")[: block.start(1)].count("\n")
            exec(compile("\n" * line + block[1], str(page), "exec"), names)
        for suite in [v for n, v in names.items() if n.startswith("Test")]:
            for name in [n for n in dir(suite) if n.startswith("test_")]:
                getattr(suite(), name)()
    finally:
        registry._load.cache_clear()


def test_links_lead_somewhere():
    broken = []
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
            if "://" not in target and not (page.parent / target).exists():
                broken.append(f"{page.name}: {target}")
    assert not broken


def test_files_that_pages_name_exist():
    missing = []
    for page in PAGES:
        for name in re.findall(
            r"`((?:pyllmlite|plugins|csrc|examples|tests|benchmarks)/[^`\s*]+)`",
            page.read_text(encoding="utf-8"),
        ):
            if not (ROOT / name).exists():
                missing.append(f"{page.name}: {name}")
    assert not missing


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
def test_cpp_examples(tmp_path):
    from pyllmlite.cli.info import cmake_dir, include_dir

    library = cmake_dir().parent.parent
    blocks = re.findall(r"^```cpp\n(.*?)^```$", (ROOT / "docs/native.md").read_text(), re.M | re.S)
    assert blocks
    for index, block in enumerate(blocks):
        source, program = tmp_path / f"example{index}.cpp", tmp_path / f"example{index}"
        source.write_text(block)
        subprocess.run(
            ["g++", "-std=c++17", "-Wall", "-Werror", f"-I{include_dir()}", str(source)]
            + [f"-L{library}", "-lpyllmlite", f"-Wl,-rpath,{library}", "-o", str(program)],
            check=True,
            timeout=120,
        )
        done = subprocess.run([program], capture_output=True, text=True, timeout=60)
        assert done.returncode == 0 and done.stdout == "ok\n"
