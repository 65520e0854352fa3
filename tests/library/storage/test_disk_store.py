"""The store on disk: named entries are complete, damage is named, one process works at a time."""

import errno
import json
import os
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lordjax.calibration.hidden_states import open_states
from lordjax.calibration.statistics import Moments
from lordjax.compression.resumable_output import TYPES
from lordjax.methods import Factors, ModuleFactors
from lordjax.storage.disk_store import JOURNAL, DiskStore
from lordjax.storage.store import Entries, MemoryStore, get_or_compute
from lordjax.storage.tensor_files import TensorFile, TensorWriter, write_json, write_tensors

IDENTITY = {"method": "lord", "settings": {"keep": 0.8}, "tokens": "ab"}


def tree():
    """Returns a tree with every type that an entry may hold."""
    a = np.arange(6, dtype=np.float32).reshape(2, 3)
    return {
        "factors": Factors(a, a.T, np.arange(2.0), None, jnp.asarray(a, jnp.bfloat16)),
        "module": ModuleFactors(a[0], {"kept": np.array([3, 1], np.int32)}),
        "list": [Moments(np.float32(2), a[0], a), (1, None), "x", 0.1, True],
        "empty": np.zeros((0, 3)),
        "scalar": np.array(1.5),
    }


def opened(path, **changes):
    return DiskStore(path / "out.partial", {**IDENTITY, **changes}, TYPES)


def same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(x, y)
        assert np.asarray(x).dtype == np.asarray(y).dtype


def test_entries_are_read_as_they_were_written(tmp_path):
    with opened(tmp_path) as store:
        store["a/b"], store["plain"] = tree(), {"x": [1, 0.1, None]}
        read = store["a/b"]
        assert isinstance(read["factors"], Factors) and isinstance(read["list"][1], tuple)
    with opened(tmp_path) as store:
        assert store.below("") == ["a/b", "plain"]
        expected = tree()
        read = store["a/b"]
        same(read["factors"], expected["factors"])
        same(read["module"], expected["module"])
        assert read["empty"].shape == (0, 3) and read["scalar"] == 1.5
        assert store["plain"] == {"x": [1, 0.1, None]}


def test_an_entry_is_overwritten_and_its_old_file_goes(tmp_path):
    with opened(tmp_path) as store:
        for value in range(3):
            store["key"] = np.full(4, value)
        assert len(list((store.directory / "entries").iterdir())) == 1
        store.discard("key")
        assert "key" not in store and not list((store.directory / "entries").iterdir())
    with opened(tmp_path) as store:
        assert store.below("") == []


def test_linked_files_are_named_alike_after_an_interruption(tmp_path):
    def linked(name, *, interrupted):
        with opened(tmp_path / name) as store:
            if interrupted:
                store.stream("lost", [np.zeros(3)])
                store["overwritten"] = np.zeros(3)
            store["overwritten"], store["b"], store["plain"] = np.ones(3), np.arange(4), 7
            (tmp_path / name / "there").mkdir()
            return store.link(["b", "plain", "overwritten"], tmp_path / name / "there")

    whole = linked("whole", interrupted=False)
    assert linked("resumed", interrupted=True) == whole
    file = whole["overwritten"]["file"]
    read = [(tmp_path / name / "there" / file).read_bytes() for name in ("whole", "resumed")]
    assert read[0] == read[1]


def test_once_computes_once(tmp_path):
    calls = []
    for store in (MemoryStore(), opened(tmp_path)):
        for _ in range(2):
            assert get_or_compute(store, "x/1", lambda: calls.append(0) or {"n": 3}) == {"n": 3}
        assert dict(Entries(store, "x", int)) == {1: {"n": 3}}
    assert len(calls) == 2


def test_a_second_run_is_refused(tmp_path):
    with opened(tmp_path), pytest.raises(BlockingIOError, match=r"out\.partial: another process"):
        opened(tmp_path)
    opened(tmp_path).close()


def test_another_run_is_refused_and_the_difference_named(tmp_path):
    opened(tmp_path).close()
    with pytest.raises(ValueError, match=r'method: "lord" -> "svd"; tokens: "ab" -> "cd"'):
        opened(tmp_path, method="svd", tokens="cd")
    with pytest.raises(ValueError, match=r"settings\.keep: 0\.8 -> 0\.7.*remove the directory"):
        opened(tmp_path, settings={"keep": 0.7})
    opened(tmp_path).close()


def test_a_directory_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "thesis.txt").write_text("x")
    with pytest.raises(FileExistsError, match=r"thesis\.txt"):
        opened(tmp_path)


def begun(path):
    with opened(path) as store:
        for value in range(3):
            store[str(value)] = np.full(4, value)
    return path / "out.partial"


@pytest.mark.parametrize("cut", [1, 5, 40])
def test_the_last_line_of_the_journal_may_be_cut(tmp_path, cut):
    journal = begun(tmp_path) / JOURNAL
    os.truncate(journal, journal.stat().st_size - cut)
    with opened(tmp_path) as store:
        assert store.below("") == ["0", "1"]
        assert len(list((store.directory / "entries").iterdir())) == 2
        store["2"] = np.full(4, 2)
    with opened(tmp_path) as store:
        assert store["2"][0] == 2


def test_damage_inside_the_journal_is_named(tmp_path):
    journal = begun(tmp_path) / JOURNAL
    text = bytearray(journal.read_bytes())
    text[20] ^= 1
    journal.write_bytes(text)
    with pytest.raises(ValueError, match=r"journal\.jsonl: line 1 of 3 is damaged; remove"):
        opened(tmp_path)


def entry(directory):
    return sorted((directory / "entries").iterdir())[1]


def test_a_flipped_bit_is_named(tmp_path):
    file = entry(begun(tmp_path))
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with opened(tmp_path) as store, pytest.raises(ValueError, match=f"{file.name} is not what"):
        store["1"]


def test_a_cut_or_missing_file_is_named(tmp_path):
    file = entry(begun(tmp_path))
    size = file.stat().st_size
    os.truncate(file, size - 1)
    with pytest.raises(ValueError, match=rf"{file.name} has {size - 1} bytes.*says {size}"):
        opened(tmp_path)
    file.unlink()
    with pytest.raises(ValueError, match=rf"{file.name} is missing.*remove"):
        opened(tmp_path)


class Full:
    """A file on a full disk: writes of more than ``room`` bytes fail."""

    def __init__(self, file, room):
        self._file, self._room = file, room

    def __getattr__(self, name):
        return getattr(self._file, name)

    def write(self, data):
        if len(data) > self._room:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return self._file.write(data)


def test_a_full_disk_is_named_and_work_goes_on(tmp_path, monkeypatch):
    begun(tmp_path)
    whole = TensorWriter.__init__

    def full(self, *arguments):
        whole(self, *arguments)
        self._file = Full(self._file, 100)

    with opened(tmp_path) as store:
        monkeypatch.setattr(TensorWriter, "__init__", full)
        with pytest.raises(OSError, match=r"entries/.*is the disk full\?"):
            store["1"] = np.zeros(1000)
        assert len(list((store.directory / "entries").iterdir())) == 3
        np.testing.assert_array_equal(store["1"], np.full(4, 1))
        monkeypatch.undo()
        store["1"] = np.zeros(1000)
    with opened(tmp_path) as store:
        assert len(store["1"]) == 1000


def test_safetensors_reads_what_is_written(tmp_path):
    import safetensors.numpy

    arrays = {"b": np.arange(3, dtype=np.uint8), "a": np.ones((2, 2)), "c": np.array(2.0)}
    write_tensors(tmp_path / "x", arrays, {"format": "x"})
    read = safetensors.numpy.load_file(tmp_path / "x")
    assert read.keys() == arrays.keys()
    for name, array in arrays.items():
        np.testing.assert_array_equal(read[name], array)
    safetensors.numpy.save_file(arrays, tmp_path / "y", {"format": "x"})
    assert (tmp_path / "x").read_bytes() == (tmp_path / "y").read_bytes()
    (tmp_path / "x").write_bytes(b"nothing of the sort")
    with pytest.raises(ValueError, match="not a safetensors file"):
        TensorFile(tmp_path / "x")


SHAPES = [(2, 3), (1, 3)]


def fill(states, value):
    for j, shape in enumerate(SHAPES):
        states[j] = jnp.full(shape, value, jnp.float32)


def test_states_go_on_where_they_were_left(tmp_path):
    with opened(tmp_path) as store:
        states = open_states(store, "pass", SHAPES)
        assert states.at is None
        for at in range(3):
            fill(states, at)
            states.commit(at)
        (store.directory / "entries" / "000009-pass.safetensors.new").touch()  # killed in a block
    with opened(tmp_path) as store:
        states = open_states(store, "pass", SHAPES)
        assert states.at == 2
        assert [float(states[j][0, 0]) for j in range(2)] == [2, 2]
        assert len(list((store.directory / "entries").iterdir())) == 1
        states.close()
        assert open_states(store, "pass", SHAPES).at is None


def test_states_are_kept_for_the_way_back(tmp_path):
    for store in (MemoryStore(), opened(tmp_path)):
        states = open_states(store, "pass", SHAPES)
        for at in range(3):
            fill(states, at)
            states.commit(at, keep=True)
        for at in (1, 0):
            states.back(at)
            assert states.at == at and float(states[1][0, 2]) == at
        states.close()


def forge(directory, change):
    """Changes the rows of a journal, with right checksums."""
    file = directory / "journal.jsonl"
    rows = [json.loads(line.split(b" ", 1)[1]) for line in file.read_bytes().splitlines()]
    texts = [json.dumps(row).encode() for row in change(rows)]
    file.write_bytes(b"".join(b"%08x %s\n" % (zlib.crc32(text), text) for text in texts))


@pytest.mark.parametrize("name", ["../../victim", "{}/victim", "entries/../../victim", "lock", 3])
def test_a_forged_journal_touches_nothing_outside(tmp_path, name):
    (victim := tmp_path / "victim").write_text("precious")
    with opened(tmp_path) as store:
        store["a"] = np.ones(3)
    file = name.format(tmp_path) if isinstance(name, str) else name
    size = victim.stat().st_size
    forge(
        store.directory,
        lambda rows: [{"key": "b", "file": file, "bytes": size, "sha256": ""}, {"removed": ["b"]}],
    )
    with pytest.raises(ValueError, match=r"journal\.jsonl: not a journal .*remove .* start over"):
        opened(tmp_path)
    assert victim.read_text() == "precious"


ROWS = {
    "no object": [3],
    "no key": [{"value": 1}],
    "a number as key": [{"key": 3, "value": 1}],
    "no value": [{"key": "a"}],
    "a list as file": [{"key": "a", "file": []}],
    "no size": [{"key": "a", "file": "entries/000001-a.safetensors"}],
    "removed is a number": [{"removed": 3}],
    "removed is no text": [{"removed": [[]]}],
}


@pytest.mark.parametrize("name", ROWS)
def test_lines_that_are_no_entries(tmp_path, name):
    with opened(tmp_path) as store:
        store["a"] = 1
    forge(store.directory, lambda rows: ROWS[name])
    with pytest.raises(ValueError, match=r"journal\.jsonl: not a journal"):
        opened(tmp_path)


@pytest.mark.parametrize("name", ["journal.jsonl", "run.json", "lock", "entries", "entries/x"])
def test_links_are_refused_before_anything_is_written(tmp_path, name):
    (outside := tmp_path / "outside").mkdir()
    (victim := outside / "victim").write_text("precious")
    with opened(tmp_path) as store:
        store["a"] = 1
    place = store.directory / name
    if place.is_dir():
        place.rmdir()
    place.unlink(missing_ok=True)
    place.symlink_to(outside if name == "entries" else victim)
    with pytest.raises(ValueError, match=r"a symbolic link.*remove .* to start over"):
        opened(tmp_path)
    assert [file.read_text() for file in outside.iterdir()] == ["precious"]


def test_what_is_written_goes_through_no_link(tmp_path):
    (victim := tmp_path / "victim").write_text("precious")
    for name in ("a.json.new", "b.safetensors.new"):
        (tmp_path / name).symlink_to(victim)
    write_json(tmp_path / "a.json", {})
    write_tensors(tmp_path / "b.safetensors", {"x": np.ones(2)})
    assert victim.read_text() == "precious"
    assert not (tmp_path / "a.json").is_symlink()


HEADERS = {
    "longer than the file": (2**40, b"{}"),
    "beyond the data": (None, b'{"x": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}'),
    "other size": (None, b'{"x": {"dtype": "F32", "shape": [1], "data_offsets": [0, 8]}}'),
    "negative": (None, b'{"x": {"dtype": "F32", "shape": [-1, -2], "data_offsets": [0, 8]}}'),
    "text": (None, b'{"x": {"dtype": "F32", "shape": ["2"], "data_offsets": [0, 8]}}'),
    "no dtype": (None, b'{"x": {"dtype": "F33", "shape": [2], "data_offsets": [0, 8]}}'),
    "a list": (None, b"[]"),
    "deep": (None, b"[" * 10_000),
}


@pytest.mark.parametrize("name", HEADERS)
def test_headers_of_tensor_files_are_checked(tmp_path, name):
    length, text = HEADERS[name]
    data = (len(text) if length is None else length).to_bytes(8, "little") + text + b"\0" * 8
    (tmp_path / "x").write_bytes(data)
    with pytest.raises(ValueError, match=r"x: (not (a safetensors file|JSON)|the arrays end)"):
        TensorFile(tmp_path / "x")
