"""One directory, several commands: none takes another's unfinished work away."""

import json
import os

import pytest

from pyllmlite.compress.hf_view import HFView
from pyllmlite.compress.place import (
    DISTILL_STATE,
    LOCK,
    QUANTIZE_STATE,
    SHARE_KV_STATE,
    check_place,
    locked,
    occupy,
    publish,
)
from pyllmlite.compress.writer import DirectoryWriter
from pyllmlite.core.errors import ConfigError, ModelError
from pyllmlite.model.source import open_model

STATES = {"quantize": QUANTIZE_STATE, "share-kv": SHARE_KV_STATE, "distill": DISTILL_STATE}


def put(path, text="x"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def files(folder):
    return {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("left", [*STATES, "qat"])
@pytest.mark.parametrize("now", STATES)
def test_unfinished_work_of_another_command(tmp_path, left, now):
    partial = tmp_path / "out.partial"
    state = STATES.get(left, QUANTIZE_STATE)
    put(partial / state, json.dumps({"settings": {"method": left}}))
    put(partial / "model-00001-of-00003.safetensors")
    before = files(partial)
    if state == STATES[now]:
        occupy(partial, STATES[now], restart=False).close()
    else:
        with pytest.raises(ConfigError, match=f"unfinished run of {left};.*--restart") as caught:
            occupy(partial, STATES[now], restart=False)
        assert "\n" not in str(caught.value)
    assert files(partial) == before | {LOCK}
    occupy(partial, STATES[now], restart=True).close()
    assert files(partial) == {LOCK} and {p.name for p in partial.iterdir()} == {".pyllmlite"}


@pytest.mark.parametrize("now", STATES)
def test_what_nobody_knows(tmp_path, now):
    put(tmp_path / "out.partial" / "notes" / "a.txt")
    with pytest.raises(ConfigError, match="holds notes, which no unfinished run.*--restart"):
        occupy(tmp_path / "out.partial", STATES[now], restart=False)
    assert (tmp_path / "out.partial" / "notes" / "a.txt").read_text() == "x"


@pytest.mark.parametrize("now", STATES)
def test_a_run_that_was_killed_before_it_began(tmp_path, now):
    """A lock, empty folders, a state that was being written: nothing is lost."""
    partial = tmp_path / "out.partial"
    put(partial / LOCK)
    put(partial / (STATES[now] + ".part"))
    occupy(partial, STATES[now], restart=False).close()


def test_one_lock_for_all(tmp_path):
    held = occupy(tmp_path / "out.partial", DISTILL_STATE, restart=False)
    for state in STATES.values():
        for restart in (False, True):
            with pytest.raises(ModelError, match="another run is writing"):
                occupy(tmp_path / "out.partial", state, restart)
    held.close()


def test_a_lock_that_went_away_holds_nothing(tmp_path, monkeypatch):
    """Between the opening of the file and the lock its directory was given its name."""
    import fcntl

    real = fcntl.flock

    def slow(file, how):
        (tmp_path / "lock").unlink()
        real(file, how)

    monkeypatch.setattr(fcntl, "flock", slow)
    with pytest.raises(ModelError, match="just ended there; try again"):
        locked(tmp_path / "lock")


def test_a_writer_leaves_other_work_alone(model, tmp_path):
    view, partial = HFView(open_model(model)), tmp_path / "out.partial"
    put(partial / "distill" / "data.jsonl")
    put(partial / DISTILL_STATE)
    with pytest.raises(ConfigError, match="unfinished run of distill"):
        DirectoryWriter(tmp_path / "out", view, None, "f32", {})
    assert files(partial) == {LOCK, "distill/data.jsonl", DISTILL_STATE}
    with DirectoryWriter(tmp_path / "out", view, None, "f32", {}, restart=True):
        assert files(partial) == {LOCK, QUANTIZE_STATE}
    assert list(tmp_path.iterdir()) == []


def test_the_scratch_stays_until_the_name_is_given(tmp_path, monkeypatch):
    """A rename that fails costs nothing: what the run needs to go on is still there."""
    partial, out = tmp_path / "out.partial", tmp_path / "out"
    for name in (QUANTIZE_STATE, "config.json"):
        put(partial / name)
    put(out / "old")

    def refused(old, new):
        if str(new) == str(out) and str(old) == str(partial):
            raise OSError(5, "I/O error")
        real(old, new)

    real = os.rename
    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", refused)
        with pytest.raises(ModelError, match="I/O error"):
            publish(partial, out)
    assert files(partial) == {QUANTIZE_STATE, "config.json"} and files(out) == {"old"}
    publish(partial, out)
    assert files(out) == {"config.json"} and [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("now", [QUANTIZE_STATE, DISTILL_STATE, SHARE_KV_STATE])
def test_restart_deletes_only_under_the_lock(tmp_path, now):
    for name in (now, LOCK):
        put(tmp_path / "out.partial" / name)
    held = locked(tmp_path / "out.partial" / LOCK)
    with pytest.raises(ModelError, match="another run"):
        occupy(tmp_path / "out.partial", now, restart=True)
    assert (tmp_path / "out.partial" / now).read_text() == "x"
    held.close()


@pytest.mark.parametrize("folder", ["out", "out/deep", "out.partial/distill"])
def test_never_over_what_is_read(tmp_path, folder):
    """Neither by --force nor by --restart; a link to it is it."""
    data, model = tmp_path / folder / "data.jsonl", tmp_path / "model"
    put(data)
    (tmp_path / "link").symlink_to(data.parent)
    for given in (data, str(data), data.parent, tmp_path / "link" / "data.jsonl"):
        with pytest.raises(ConfigError, match="which is read; choose another --out"):
            check_place(tmp_path / "out", model, True, ["self", given])
    with pytest.raises(ConfigError, match="holds the model that is read"):
        check_place(tmp_path / "out", data.parent, True)
    check_place(tmp_path / "other", model, True, [data, "self", "org/name:split"])
    check_place(tmp_path / "ou", model, True, [data])  # a name that begins so is no parent
