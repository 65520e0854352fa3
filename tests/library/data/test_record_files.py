"""Files of records: jsonl, compressed or not, and parquet; marks of Windows are no text."""

import contextlib
import gzip
import json
import sys
import types

import numpy as np
import pytest
from chats import make_tokenizer

from lordjax.data.documents import Corpus, documents
from lordjax.data.examples import packed
from lordjax.data.record_files import read_records, read_text, records, suffix_of
from lordjax.data.token_windows import load_windows

TEXTS = ["one word", "two words\nhere", "drei W\u00f6rter"]
RECORDS = [{"text": text, "body": text.upper(), "n": i} for i, text in enumerate(TEXTS)]
LINES = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in RECORDS)
# Name of a file -> its bytes; all hold the same records.
FILES = {
    "a.jsonl": LINES.encode(),
    "a.JSONL": LINES.encode(),
    "bom.jsonl": b"\xef\xbb\xbf" + LINES.encode(),
    "crlf.jsonl": LINES.replace("\n", "\r\n").encode(),
    "gaps.jsonl": LINES.replace("\n", "\n\n \n").encode(),
    "a.jsonl.gz": gzip.compress(LINES.encode()),
    "A.JSONL.GZ": gzip.compress(b"\xef\xbb\xbf" + LINES.replace("\n", "\r\n").encode()),
}


@pytest.fixture(params=FILES)
def file(request, tmp_path):
    path = tmp_path / request.param
    path.write_bytes(FILES[request.param])
    return path


def test_all_kinds_hold_the_same_records(file):
    assert [record for _, record in read_records(file)] == RECORDS
    assert [record for _, record in records(file, "records")[0]] == RECORDS
    assert list(documents(file)) == TEXTS
    assert list(documents(file.parent)) == TEXTS  # found in a directory, too
    corpus = Corpus.of(file)
    assert [corpus.text(i) for i in range(len(corpus))] == TEXTS
    assert sorted(documents(file, seed=1)) == sorted(TEXTS)


def test_the_field_of_the_text_is_chosen(file):
    upper = [text.upper() for text in TEXTS]
    assert list(documents(file, field="body")) == upper
    how = {"tokenizer": make_tokenizer(), "seq_len": 4, "vocab_size": 300}
    expected = load_windows(file, **how, field="body").tokens
    assert not np.array_equal(expected, load_windows(file, **how).tokens)
    tokens = packed(file, **how, share=0, field="body").train.tokens
    np.testing.assert_array_equal(tokens, expected)
    message = r"no \"nothing\" with a text; it has 'text', 'body'; name the field.*--field"
    for read in (documents, lambda path, field: [Corpus.of(path, field).text(0)]):
        with pytest.raises(ValueError, match=message):
            list(read(file, field="nothing"))


def test_text_files_of_windows(tmp_path):
    (tmp_path / "a.TXT").write_bytes(b"\xef\xbb\xbfone\r\ntwo\r\n")
    assert read_text(tmp_path / "a.TXT") == "one\ntwo\n"
    assert list(documents(tmp_path)) == ["one\ntwo\n"]


def test_damaged_compressed_file(tmp_path):
    (tmp_path / "a.jsonl.gz").write_bytes(FILES["a.jsonl.gz"][:-9])
    with pytest.raises(ValueError, match=r"a\.jsonl\.gz: cannot be read as \.jsonl\.gz"):
        read_records(tmp_path / "a.jsonl.gz")


def test_parquet_needs_pyarrow(tmp_path, monkeypatch):
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ImportError, match=r"a\.parquet: reading parquet needs pyarrow"):
        list(documents(tmp_path))


def test_rows_of_parquet_are_records(tmp_path, monkeypatch):
    """By a stand-in for pyarrow, which is an extra."""
    batch = types.SimpleNamespace(nbytes=2**24, to_pylist=lambda: RECORDS)

    @contextlib.contextmanager
    def parquet_file(path):
        if path.read_bytes()[:4] != b"PAR1":
            raise ValueError("no magic bytes")
        content = path.read_bytes()
        batches = [batch] * (1 + content.endswith(b"twice"))
        group = types.SimpleNamespace(total_byte_size=2**24 + content.endswith(b"says"))
        about = types.SimpleNamespace(num_row_groups=1, row_group=lambda i: group)
        yield types.SimpleNamespace(metadata=about, iter_batches=lambda batch_size: batches)

    parquet = types.SimpleNamespace(ParquetFile=parquet_file)
    monkeypatch.setitem(sys.modules, "pyarrow", types.SimpleNamespace(parquet=parquet))
    path = tmp_path / "a.Parquet"
    path.write_bytes(b"PAR1")
    assert suffix_of(path) == ".parquet"
    assert list(documents(path)) == TEXTS
    with pytest.raises(ValueError, match=r"a\.Parquet, row 1: no \"n\" with a text"):
        list(documents(path, field="n"))
    for content in (b"PAR1says", b"PAR1twice"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"a\.Parquet: holds more than 50 times its \d bytes"):
            list(documents(path))
    path.write_bytes(b"x")
    with pytest.raises(ValueError, match=r"a\.Parquet: cannot be read as parquet \(no magic"):
        list(documents(path))


def test_packed_files_are_bounded(tmp_path):
    """One line, and many records, of which a small file holds 100 times its bytes and more."""
    for content in (b" " * 2**20, b'{"text": "a"}\n' * 2**16):
        (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(content, 9) * 64)
        with pytest.raises(ValueError, match=r"a\.jsonl\.gz: holds more than 50 times its"):
            read_records(tmp_path / "a.jsonl.gz")
