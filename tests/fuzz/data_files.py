"""Tiny files of data, and how they are read."""

import functools
import gzip
import io
import json
import pickle

import mutations as m
import numpy as np
from chats import make_tokenizer
from model_files import TEXTS

LINES = "".join(
    json.dumps(row, ensure_ascii=False) + "\n"
    for row in [{"text": text, "n": i} for i, text in enumerate(TEXTS * 3)]
).encode()


def write(name, data):
    def build(directory):
        (directory / name).write_bytes(data if isinstance(data, bytes) else data())

    return build


def read_windows(name):
    """Token windows of a file, as calibration reads them: in order, and spread."""

    def read(directory):
        from lordjax.data.token_windows import array_length, load_tokens

        file = directory / name
        how = {"tokenizer": _tokenizer(), "seq_len": 4, "vocab_size": 320}
        first = load_tokens(file, **how, samples=3, spread=True)
        return [array_length(file), first, load_tokens(file, **how)]

    return read


_tokenizer = functools.cache(make_tokenizer)


def npy():
    file = io.BytesIO()
    np.save(file, np.arange(40, dtype=np.int32).reshape(5, 8))
    return file.getvalue()


def other_array(rng, data):
    """Another kind of NumPy file under the same name."""
    file = io.BytesIO()
    rows = np.arange(40).reshape(5, 8)
    match rng.randrange(5):
        case 0:
            np.savez(file, a=rows)
        case 1:
            np.savez(file, a=np.array([[{}, None]], object))
        case 2:
            np.save(file, rows.astype(object), allow_pickle=True)
        case 3:
            pickle.dump(rows, file)
        case 4:
            kind = rng.choice("?bBhHiIlLfdFDSUmM")
            np.save(file, np.zeros((5, 8), kind) if kind in "mMSU" else rows.astype(kind))
    return file.getvalue()


def regzip(rng, data):
    """Changed lines in an intact gzip file, several members, or a bomb."""
    match rng.randrange(60):
        case 0 | 1 as kind:
            return bombs()[kind]
        case 2 | 3 | 4:
            return data + data
        case 5 | 6 | 7:
            return data + rng.randbytes(20)
    return gzip.compress(m.edit_lines(rng, gzip.decompress(data)))


@functools.cache
def bombs():
    """Small files that hold 1 GB: one line, and many records."""
    piece = gzip.compress(b" " * 2**24, 9)
    lines = LINES * (2**24 // len(LINES))
    return piece * 64, gzip.compress(lines, 9) * 64


def parquet(rows):
    """Records as a parquet file of several row groups."""

    def make():
        from pyarrow import Table
        from pyarrow.parquet import write_table

        file = io.BytesIO()
        write_table(Table.from_pylist(rows()), file, row_group_size=2)
        return file.getvalue()

    return make


def repack(rng, data):
    """Other records in an intact parquet file: of other types, without a field, or a bomb."""
    from pyarrow import Table
    from pyarrow.parquet import read_table, write_table

    if (kind := rng.randrange(40)) < 2:
        return parquet_bombs()[kind]
    rows, file = read_table(io.BytesIO(data)).to_pylist(), io.BytesIO()
    name = rng.choice(list(rows[0]))
    value = rng.choice((None, 3, 1.5, b"\xff", ["a"], [[]], {"a": 1}, {}, True, "x"))
    for row in rows[:: rng.choice((1, 1, 9))] if value is None else rows:
        row[rng.choice((name, name, f"{name}x"))] = value
    try:
        write_table(Table.from_pylist(rows), file)
    except Exception:  # parquet has no such type
        return data[: rng.randrange(len(data))]
    return file.getvalue()


@functools.cache
def parquet_bombs():
    """Small files of large values: packed, and one of 8 MB that a thousand records share."""
    import pyarrow
    from pyarrow.parquet import write_table

    large = pyarrow.array(["x" * 2**23])
    shared = pyarrow.DictionaryArray.from_arrays(pyarrow.array([0] * 1000), large)
    found = []
    for texts, how in ((pyarrow.concat_arrays([large] * 20), False), (shared, True)):
        table = pyarrow.table({"text": texts})
        write_table(table, file := io.BytesIO(), compression="zstd", use_dictionary=how)
        found.append(file.getvalue())
    return found


def records():
    return [json.loads(line) for line in LINES.splitlines()]


def chat_records():
    return [json.loads(line) for line in chats_lines().splitlines()[:1]] * 3


def chats_list():
    return json.dumps([json.loads(line) for line in chats_lines().splitlines()]).encode()


def chats_lines():
    rows = [
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
        {"instruction": "say a", "input": "x", "output": "a", "system": "s"},
        {"prompt": [{"role": "user", "content": [{"type": "text", "text": "a"}]}],
         "completion": [{"from": "gpt", "value": "b"}], "tools": "[]"},
    ]  # fmt: skip
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def read_chats(name):
    def read(directory):
        from lordjax.data.conversations import conversations

        return [repr(found) for found in conversations(directory / name)]

    return read


def questions():
    rows = [
        {"question": "what?", "choices": ["a", "b"], "answer": i % 2, "passage": "p"}
        for i in range(4)
    ]
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def read_tasks(directory):
    from lordjax.evaluate.choice_tasks import read_questions

    return repr(read_questions(directory / "boolq.jsonl", "boolq"))


def problems():
    row = {"task_id": "a", "prompt": "def f():\n    ", "canonical_solution": "return 1"}
    row |= {"entry_point": "f", "test": "def check(f):\n    assert f() == 1"}
    return (json.dumps(row) + "\n" + json.dumps(row | {"task_id": "b"}) + "\n").encode()


def read_programs(directory):
    from lordjax.evaluate.code_problems import read_problems

    return repr(read_problems(directory / "problems.jsonl"))


def labelled(directory):
    rows = "".join(f"text {i} here\t{i % 2}\n" for i in range(12))
    (directory / "labels.tsv").write_text("text\tlabel\n" + rows)


def read_labelled(directory):
    from lordjax.data.classification import classification

    found = classification(
        directory / "labels.tsv", tokenizer=_tokenizer(), seq_len=6, vocab_size=320
    )
    return repr(found)
