"""Checkpoints on disk: damage is named, and what a killed process left is no damage."""

import re
import resource
import shutil

import jax.numpy as jnp
import numpy as np
import pytest

from lordjax.finetune.checkpoints import CheckpointStore
from lordjax.finetune.step import State
from lordjax.storage.checksums import MANIFEST
from lordjax.storage.room import is_full

NLL = {2: 3.0, 4: 2.0, 6: 2.5}


def state(count):
    return State(jnp.int32(count), {"a": jnp.full((40, 40), count, jnp.float32)}, [jnp.ones(3)])


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    directory = tmp_path_factory.mktemp("run") / "checkpoints"
    store = CheckpointStore(directory, 1)
    for count, nll in NLL.items():
        store.save(state(count), nll)
    store.close()
    return directory


@pytest.fixture
def directory(written, tmp_path):
    return shutil.copytree(written, tmp_path / "checkpoints")


def test_the_best_and_the_last_are_kept_and_nothing_else(directory):
    store = CheckpointStore(directory, 1)
    assert store.steps() == {4: 2.0, 6: 2.5} and store.best() == 4
    np.testing.assert_array_equal(store.restore(state(0), 6).params["a"], state(6).params["a"])
    store.close()
    assert {path.name for path in directory.iterdir()} == {"4", "6"}


def test_a_changed_array_is_named(directory):
    """Orbax has no checksum of arrays."""
    file = max((directory / "6").rglob("d/*"), key=lambda path: path.stat().st_size)
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    message = f"^{re.escape(str(file))}: was changed .*; remove {directory / '6'} to go on from an"
    with pytest.raises(ValueError, match=message):
        CheckpointStore(directory, 1)
    shutil.rmtree(directory / "6")
    assert CheckpointStore(directory, 1).steps() == {4: 2.0}


def test_a_full_disk_is_one_error_without_a_traceback(directory, capfd):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    store = CheckpointStore(directory, 1)
    params = {"a": jnp.asarray(np.random.default_rng(0).random((200, 200)))}
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, before[1]))
    try:
        with pytest.raises(Exception, match="too large") as found:
            store.save(State(jnp.int32(8), params, []), 1.0)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert is_full(found.value)
    assert "Traceback" not in capfd.readouterr().err


def test_a_missing_best_checkpoint_is_an_error(directory):
    shutil.rmtree(directory / "4")
    with pytest.raises(ValueError, match=r"the best one, of 2\.0 nats per target, is missing"):
        CheckpointStore(directory, 1)


def test_a_checkpoint_under_another_number_is_an_error(directory):
    shutil.rmtree(directory / "6")
    shutil.copytree(directory / "4", directory / "6")
    store = CheckpointStore(directory, 1)
    with pytest.raises(ValueError, match=r"6: damaged checkpoint .*after 4 steps"):
        store.restore(state(0), 6)


def test_what_a_killed_process_left_is_no_damage(directory):
    """It had not written the checksums of the last one, and was removing another."""
    (directory / "6" / MANIFEST).unlink()
    (directory / "removed" / "2").mkdir(parents=True)
    assert CheckpointStore(directory, 1).steps() == {4: 2.0, 6: 2.5}
    assert (directory / "6" / MANIFEST).exists()
    assert not (directory / "removed").exists()
