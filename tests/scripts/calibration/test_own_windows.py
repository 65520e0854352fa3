"""Windows of the model's own text in the cache: kept, resumed, written again if damaged."""

import shutil

import numpy as np
import pytest

from lordjax.generation import own_text
from lordjax.runtime import multihost
from lordjax.scripts import own_windows as module
from lordjax.scripts.opened_model import open_model
from lordjax.scripts.own_windows import cache_folder, own_windows

WINDOWS, LENGTH = 5, 24


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A cache of its own, and batches of two windows."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(module, "BATCH", 2)
    return tmp_path / "lordjax" / "own_text"


@pytest.fixture
def written(monkeypatch):
    """The numbers of the windows that were written, batch by batch."""
    found, original = [], own_text.write_windows

    def write(config, params, how, numbers, **given):
        found.append(list(numbers))
        return original(config, params, how, numbers, **given)

    monkeypatch.setattr(own_text, "write_windows", write)
    return found


def own(tiny, seed=0, windows=WINDOWS, length=LENGTH, progress=None):
    model = open_model(str(tiny))
    return own_windows(model, windows=windows, length=length, seed=seed, progress=progress)


def test_windows_are_written_once(tiny, cache, written):
    done = []
    first = own(tiny, progress=lambda *state: done.append(state))
    assert first.shape == (WINDOWS, LENGTH) and first.dtype == np.int32
    assert sorted(i for batch in written for i in batch) == list(range(WINDOWS))
    assert max(map(len, written)) == 2
    assert done[-1] == (module.STAGE, WINDOWS, WINDOWS)
    assert [n for _, n, _ in done] == sorted(n for _, n, _ in done)
    batches = len(written)
    np.testing.assert_array_equal(first, own(tiny))
    assert len(written) == batches
    assert len(list(cache.iterdir())) == 1


def test_a_run_that_was_killed_goes_on(tiny, cache, written, monkeypatch):
    class Killed(BaseException):
        pass

    def killed(stage, done, total):
        if done == 3:
            raise Killed

    with pytest.raises(Killed):
        own(tiny, progress=killed)
    kept = sorted(path.name for path in next(cache.iterdir()).iterdir())
    assert kept == ["00000.safetensors"]
    resumed = own(tiny)
    assert written.count(written[0]) == 1  # the finished batch is not written again
    shutil.rmtree(cache)
    np.testing.assert_array_equal(resumed, own(tiny))


def flip_a_byte(path):
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    "damage",
    [
        flip_a_byte,
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(path.read_bytes()[:-8]),
        lambda path: path.write_bytes(b"\x00" * 100),
    ],
)
def test_a_damaged_file_is_written_again(tiny, cache, written, capsys, damage):
    first = own(tiny)
    file = sorted(next(cache.iterdir()).iterdir())[1]
    content = file.read_bytes()
    damage(file)
    written.clear()
    np.testing.assert_array_equal(first, own(tiny))
    assert len(written) == 1 and file.read_bytes() == content
    assert f"{file} is damaged" in capsys.readouterr().err


def test_the_name_holds_what_the_ids_depend_on(tiny, tmp_path, monkeypatch):
    model = open_model(str(tiny))
    names = {
        cache_folder(model, *numbers)
        for numbers in ((4, 16, 0), (5, 16, 0), (4, 17, 0), (4, 16, 1))
    }
    assert len(names) == 4
    monkeypatch.setattr(own_text, "VERSION", own_text.VERSION + 1)
    names.add(cache_folder(model, 4, 16, 0))
    other = tmp_path / "other"
    shutil.copytree(tiny, other)
    with (other / "tokenizer.json").open("r+") as file:
        text = file.read().replace("<end>", "<eos>")
        file.seek(0)
        file.write(text)
    names.add(cache_folder(open_model(str(other)), 4, 16, 0))
    assert len(names) == 6


def test_seeds_differ_and_nothing_is_kept_where_nothing_can_be_written(
    tiny, cache, tmp_path, monkeypatch
):
    first = own(tiny)
    assert not np.array_equal(first, own(tiny, seed=1))
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    np.testing.assert_array_equal(first, own(tiny))


def test_no_special_token_is_first(tiny):
    tokenizer = open_model(str(tiny)).tokenizer()
    assert tokenizer.all_special_ids
    assert not set(own(tiny)[:, 0].tolist()) & set(tokenizer.all_special_ids)


def test_too_long_windows(tiny):
    with pytest.raises(
        ValueError, match=r"self: windows of 65 tokens; expected 2 to 64.*--seq-len"
    ):
        own(tiny, length=65)


def test_the_first_process_writes_for_all(tiny, written, monkeypatch):
    expected = own(tiny)
    sent = []

    def gathered(data):
        sent.append(data)
        return [expected.tobytes(), b""]

    monkeypatch.setattr(multihost, "process_count", lambda: 2)
    monkeypatch.setattr(multihost, "all_gather_bytes", gathered)
    np.testing.assert_array_equal(expected, own(tiny))
    written.clear()
    monkeypatch.setattr(multihost, "is_primary", lambda: False)
    np.testing.assert_array_equal(expected, own(tiny, seed=1))
    assert sent == [expected.tobytes(), b""] and not written
