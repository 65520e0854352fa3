"""One process works in a directory, also where a file system has no locks."""

import errno
import os
import subprocess
import sys

import pytest

from lordjax.storage.lock import LOCK, lock_directory, locked, remove_locked

fcntl = pytest.importorskip("fcntl")
WITHOUT = [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP]
# A process that locks a directory on such a file system and is killed.
KILLED = """
import fcntl, os, sys
from pathlib import Path
def none(*_):
    raise OSError(int(sys.argv[2]), "no locks")
fcntl.flock = none
from lordjax.storage.lock import lock_directory
held = lock_directory(Path(sys.argv[1]))
os.kill(os.getpid(), 9)
"""


@pytest.fixture(params=[None, *WITHOUT], ids=str)
def flock(request, monkeypatch):
    """``flock`` as it is, and with the errors of file systems that have none."""

    def none(*_):
        raise OSError(request.param, "no locks")

    if request.param is not None:
        monkeypatch.setattr(fcntl, "flock", none)
    return request.param


def test_one_process_at_a_time(tmp_path, flock):
    lock = lock_directory(tmp_path / "a")
    with pytest.raises(BlockingIOError, match="another process works here") as found:
        lock_directory(tmp_path / "a")
    assert (f"process {os.getpid()} of" in str(found.value)) == (flock is not None)
    lock.release()
    remove_locked(tmp_path / "a", lock_directory(tmp_path / "a"))
    assert not (tmp_path / "a").exists()


def test_a_lock_leaves_what_was_there(tmp_path, flock):
    (tmp_path / "mine").mkdir()
    with locked(tmp_path / "mine", "kept"), locked(tmp_path / "new", "kept"):
        for name in ("mine", "new"):
            with pytest.raises(BlockingIOError, match="another process works here"):
                lock_directory(tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
    with pytest.raises(KeyboardInterrupt) as found, locked(tmp_path / "new", "kept"):
        (tmp_path / "new" / "file").touch()
        raise KeyboardInterrupt
    assert found.value.__notes__ == ["kept"]
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["file"]


@pytest.mark.full
@pytest.mark.parametrize("flock", WITHOUT[:1], indirect=True)
def test_the_lock_of_a_process_that_has_ended(tmp_path, flock):
    """Of this host it is taken over; of another one it cannot be known, so the file is named."""
    subprocess.run([sys.executable, "-c", KILLED, tmp_path / "a", str(flock)], check=False)
    assert (tmp_path / "a" / LOCK).exists()
    lock_directory(tmp_path / "a").release()
    (tmp_path / "a" / LOCK).write_text("123\nelsewhere\n")
    with pytest.raises(
        BlockingIOError, match=rf"123 of elsewhere.*if it has ended, remove .*{LOCK}"
    ):
        lock_directory(tmp_path / "a")
