import os
import subprocess
import sys

import pytest
from text_model import write_text_model


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    """Path of a tiny model with a chat template."""
    return str(write_text_model(tmp_path_factory.mktemp("models") / "tiny"))


@pytest.fixture(scope="session")
def base_model(tmp_path_factory):
    """The same without a chat template."""
    return str(write_text_model(tmp_path_factory.mktemp("models") / "base", chat=False))


@pytest.fixture
def pyllmlite(tmp_path):
    """Runs the real command in a process of its own, with an empty cache folder."""
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path / "cache"), "PYLLMLITE_DEBUG": ""}

    def run(*arguments, stdin="", check=None, **more):
        done = subprocess.run(
            [sys.executable, "-m", "pyllmlite.cli.main", *arguments],
            input=stdin,
            capture_output=True,
            text=True,
            timeout=120,
            env={**environment, **more.pop("env", {})},
            cwd=tmp_path,
            **more,
        )
        if check is not None:
            assert done.returncode == check, done.stderr
        return done

    return run
