"""A disk that is full at any write: nothing half-written stays, and the error says the need."""

import errno
import os
import shutil

import numpy as np
import pytest

from lordjax.runtime import unfinished
from lordjax.runtime.input_files import reading
from lordjax.storage.atomic_directory import staged
from lordjax.storage.disk_store import DiskStore
from lordjax.storage.lock import LOCK
from lordjax.storage.room import RESERVE, NoRoomError, check_room, no_room
from lordjax.storage.tensor_files import write_tensors, write_text


@pytest.fixture
def full(monkeypatch):
    """Lets the next syncs of files succeed, and fails the one after them."""

    def after(count):
        left, sync = [count], os.fsync

        def fails(handle):
            left[0] -= 1
            if left[0] < 0:
                raise OSError(errno.ENOSPC, "No space left on device")
            sync(handle)

        monkeypatch.setattr(os, "fsync", fails)

    yield after
    monkeypatch.undo()


def names(directory):
    return sorted(path.name for path in directory.iterdir())


def test_the_room_asked_for_is_the_room_that_is_named(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=RESERVE + 10**6)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    check_room(tmp_path / "new", 10**6)
    with pytest.raises(OSError, match=r"new: needs about 18.8 MB of disk, but 17.8 MB are free"):
        check_room(tmp_path / "new", 2 * 10**6)


@pytest.mark.parametrize("count", range(6))
def test_a_model_directory(tmp_path, full, count):
    (tmp_path / "old").write_text("old")
    full(count)
    try:
        with staged(tmp_path / "out", 7 * 10**6) as stage:
            write_tensors(stage / "a.safetensors", {"a": np.zeros(1000)})
            write_text(stage / "b.json", "{}")
            (stage / "c").write_text("c")
        assert names(tmp_path / "out") == ["a.safetensors", "b.json", "c"]
    except OSError as error:
        assert "are needed" in str(error) or "No space" in str(error)
        assert not (tmp_path / "out").exists() or count >= 6
    assert set(names(tmp_path)) <= {"old", "out"}


@pytest.mark.parametrize("count", range(7))
def test_a_store_keeps_what_it_has(tmp_path, full, count):
    with DiskStore(tmp_path / "s", {"a": 1}) as store:
        store["first"] = np.arange(3)
    full(count)
    with DiskStore(tmp_path / "s", {"a": 1}) as store:
        for k in range(3):
            try:
                store[str(k)] = np.full(4, k)
            except NoRoomError as error:
                assert "are needed" in str(error)
    with DiskStore(tmp_path / "s", {"a": 1}) as store:
        np.testing.assert_array_equal(store["first"], np.arange(3))
        for k in store.below(""):
            assert k == "first" or int(store[k][0]) == int(k)


def test_a_store_that_cannot_begin_leaves_nothing(tmp_path, full):
    full(0)
    with pytest.raises(NoRoomError, match=r"run\.json: cannot be written"):
        DiskStore(tmp_path / "s", {"a": 1})
    assert not names(tmp_path)


@pytest.mark.parametrize(
    "text", ["No space left on device (os error 28)", "I/O: Disk quota exceeded", "other"]
)
def test_errors_of_other_libraries(tmp_path, text):
    wanted = NoRoomError if text != "other" else RuntimeError
    message = "7 MB are needed" if text != "other" else "other"
    with pytest.raises(wanted, match=message), staged(tmp_path / "out", 7 * 10**6):
        raise RuntimeError(text)
    assert not names(tmp_path)


def test_what_a_killed_process_has_left_goes(tmp_path):
    place = tmp_path / ".out.writing"
    (place / "stage").mkdir(parents=True)
    (place / "stage" / "half").write_text("x")
    (place / LOCK).touch()
    with staged(tmp_path / "out") as stage:
        assert not names(stage)
        with pytest.raises(BlockingIOError, match="another process"), staged(tmp_path / "out"):
            pass
    assert names(tmp_path) == ["out"] and not names(tmp_path / "out")


def test_what_is_unfinished_is_left_when_the_process_must_end(tmp_path):
    context = staged(tmp_path / "out")
    context.__enter__()
    unfinished.begin(tmp_path / "kept", lambda: "it is kept")
    assert unfinished.leave_all() == ["it is kept"]
    assert not names(tmp_path)
    assert not context.__exit__(RuntimeError, RuntimeError("end"), None)


def test_a_full_disk_is_no_damage_of_what_is_read(tmp_path):
    """As a model is read, another one may be written."""
    full = no_room(tmp_path / "out", OSError(errno.ENOSPC, "No space left on device"), 5)
    expected = pytest.raises(NoRoomError, match=r"out: cannot be written .* 5 bytes are needed")
    with expected, reading(tmp_path / "model", "damaged"):
        raise full
    assert str(full).startswith(f"{tmp_path / 'out'}: cannot be written")
