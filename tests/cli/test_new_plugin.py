"""What ``new-plugin`` writes works as it stands."""

import ast
import os
import subprocess
import sys

import pytest

from pyllmlite.cli.new_plugin import words
from pyllmlite.core.errors import PluginError


def test_names():
    assert words("Shortest_First") == {
        "name": "shortest-first",
        "distribution": "pyllmlite-shortest-first",
        "module": "pyllmlite_shortest_first",
        "cls": "ShortestFirstScheduler",
    }
    assert words("pyllmlite-x")["distribution"] == "pyllmlite-x"


@pytest.mark.parametrize("name", ["", "3x", "a b", "a--b", "class", "../x", "ä", "-x"])
def test_bad_names(name):
    with pytest.raises(PluginError, match="cannot name a plugin"):
        words(name)


def test_the_package_passes_its_own_tests(pyllmlite, tmp_path):
    pyllmlite("new-plugin", "shortest-first", check=0)
    package = tmp_path / "pyllmlite-shortest-first"
    for file in package.rglob("*.py"):
        ast.parse(file.read_text())
        assert "$" not in file.read_text()
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-c", os.devnull, "tests"],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=package,
        env={**os.environ, "PYTHONPATH": str(package)},
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    assert " passed" in done.stdout


def test_installed_it_runs(pyllmlite, tmp_path, model):
    pyllmlite("new-plugin", "shortest-first", check=0)
    package = tmp_path / "pyllmlite-shortest-first"
    # As `pip install -e` would make it known, without an installation: its metadata on the path.
    info = package / "pyllmlite_shortest_first-0.1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: pyllmlite-shortest-first\nVersion: 0.1.0\n"
    )
    (info / "entry_points.txt").write_text(
        "[pyllmlite]\nshortest-first = pyllmlite_shortest_first\n"
    )
    on_path = {"PYTHONPATH": str(package)}
    listed = pyllmlite("plugins", env=on_path, check=0).stdout
    line = next(line for line in listed.splitlines() if "ShortestFirstScheduler" in line)
    assert "pyllmlite-shortest-first" in line and "0.1.0" in line
    asked = ("run", "Hi", "-m", model, "--max-tokens", "5")
    mine = pyllmlite(*asked, "--scheduler", "shortest-first", env=on_path, check=0).stdout
    assert mine == pyllmlite(*asked, check=0).stdout


def test_nothing_is_overwritten(pyllmlite, tmp_path):
    target = tmp_path / "here"
    target.mkdir()
    (target / "mine.txt").write_text("mine")
    done = pyllmlite("new-plugin", "x", "--directory", str(target))
    assert done.returncode == 1 and "nothing was written" in done.stderr
    assert [p.name for p in target.iterdir()] == ["mine.txt"]
