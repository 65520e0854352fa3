"""Distillation: the teacher's tables, what is recovered, killed runs, and what is refused."""

import dataclasses
import os
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tuning import BLOCKS, CONFIG

from lordjax.finetune import distillation, predictions
from lordjax.finetune.distillation import Distillation, Text, check, check_pair, distill
from lordjax.finetune.predictions import Rows, taught
from lordjax.finetune.step import DivergedError
from lordjax.kernels import trees
from lordjax.kernels.base import nbytes
from lordjax.kernels.convert import encode, factorize
from lordjax.models import Transformer
from lordjax.models.source import InMemory
from lordjax.storage.disk_store import DiskStore
from lordjax.storage.store import MemoryStore

LENGTH = 16


@pytest.fixture(scope="module")
def teacher(params):
    """A model whose predictions are not all alike."""
    sharp = {"embed/embedding": 4 * params["embed"]["embedding"]}
    return InMemory(CONFIG, trees.update(params, sharp))


@pytest.fixture(scope="module")
def text(teacher):
    """What the teacher writes, so that its loss is the least that any model can have."""
    apply = jax.jit(lambda ids: Transformer(CONFIG).apply({"params": teacher.params}, ids))
    ids = np.random.default_rng(0).integers(0, CONFIG.vocab_size, (128, LENGTH), np.int32)
    for t in range(LENGTH - 1):
        ids[:, t + 1] = jax.random.categorical(jax.random.key(t), apply(ids)[:, t])
    return Text(ids[:120], ids[120:])


def small(teacher, kind):
    """A compressed model: pairs in float16, or codes of 2 bits beside dense matrices."""
    if kind == "pairs":
        pairs = factorize(teacher.params, keep=0.5, where=BLOCKS)
        return jax.tree.map(lambda a: a.astype(jnp.float16), pairs)
    return encode(teacher.params, "nf2", where=r"mlp/.*/kernel$")


def distilled(teacher, params, text, directory, rate=1e-2, store=None):
    how = Distillation(text.train.size, rate)
    store = MemoryStore() if store is None else store
    return distill(teacher, CONFIG, params, text, how, store=store, directory=directory)


def test_rows_of_parts_are_those_of_the_whole():
    parts = [
        np.arange(6).reshape(3, 2),
        np.arange(6, 8).reshape(1, 2),
        np.arange(8, 12).reshape(2, 2),
    ]
    rows, whole = Rows(parts), np.concatenate(parts)
    assert rows.shape == whole.shape
    for indices in ([5, 0, 3, 3], np.array([2]), whole[:, 0] > 3, slice(1, 5)):
        np.testing.assert_array_equal(rows[indices], whole[indices])


@pytest.mark.full
def test_the_tables_are_those_of_the_whole_model(teacher, text, tmp_path, monkeypatch):
    monkeypatch.setattr(predictions, "STREAM_BYTES", 3 * 4 * LENGTH * CONFIG.hidden_size)
    with DiskStore(tmp_path / "store", {}) as store:
        found = taught(teacher, text.held_out, store, top=5)
        assert len(store.below("teacher/")) == 3
    logits = Transformer(CONFIG).apply({"params": teacher.params}, text.held_out)
    logs = np.asarray(jax.nn.log_softmax(logits))
    every = np.arange(len(text.held_out))
    np.testing.assert_array_equal(found.top_ids[every], np.argsort(-logs)[..., :5])
    top = np.take_along_axis(logs, found.top_ids[every], -1)
    np.testing.assert_allclose(found.top_logs[every][..., :5], top, rtol=1e-4, atol=1e-5)
    total = np.exp(found.top_logs[every]).sum(-1)
    np.testing.assert_allclose(total, 1, rtol=1e-4)
    with DiskStore(tmp_path / "store", {}) as store:  # nothing is computed again
        monkeypatch.setattr(predictions, "_predictions", print)
        again = taught(teacher, text.held_out, store, top=5)
        np.testing.assert_array_equal(again.top_logs[every], found.top_logs[every])


@pytest.mark.full
@pytest.mark.parametrize("kind", ["pairs", "codes"])
def test_loss_is_recovered_on_unseen_windows_at_the_same_size(teacher, text, tmp_path, kind):
    params = small(teacher, kind)
    new, facts = distilled(teacher, params, text, tmp_path / "run")
    before, after = facts["before"], facts["after"]
    assert facts["kept"]
    assert after["divergence"] < 0.85 * before["divergence"]
    assert after["nats"] < before["nats"]
    assert jax.tree.structure(new) == jax.tree.structure(params)
    assert nbytes(new) == nbytes(params)
    for path, a in trees.arrays(params).items():
        b = trees.arrays(new)[path]
        assert (a.shape, a.dtype) == (b.shape, b.dtype), path
        frozen = path.endswith("/codes") or path.startswith("embed")
        assert np.array_equal(a, b) or not frozen, path


@pytest.mark.full
def test_a_model_that_gets_worse_is_left_as_it_was(teacher, text, tmp_path, monkeypatch):
    params = small(teacher, "pairs")
    new, facts = distilled(teacher, params, text, tmp_path / "run", rate=3.0)
    assert not facts["kept"]
    assert facts["after"]["divergence"] >= facts["before"]["divergence"]
    assert new is params

    def fails(*_, **__):
        raise DivergedError("step 3: loss nan")

    monkeypatch.setattr(distillation, "train", fails)
    new, facts = distilled(teacher, params, text, tmp_path / "other")
    assert (facts["kept"], facts["error"]) == (False, "step 3: loss nan")
    assert new is params


RUN = """
import sys
from pathlib import Path
sys.path.insert(0, {tests!r})
import jax, numpy as np
from test_distillation import LENGTH, distilled, small
from tuning import CONFIG
from lordjax.finetune.distillation import Text
from lordjax.models import init
from lordjax.models.source import InMemory
from lordjax.storage.disk_store import DiskStore
folder = Path(sys.argv[1])
teacher = InMemory(CONFIG, init(CONFIG, jax.random.key(0)))
ids = np.random.default_rng(0).integers(0, CONFIG.vocab_size, (44, LENGTH), np.int32)
with DiskStore(folder, {{}}) as store:
    new, facts = distilled(teacher, small(teacher, "codes"), Text(ids[:40], ids[40:]),
                           folder / "run", store=store)
np.savez(folder.with_suffix(".npz"), *map(np.asarray, jax.tree.leaves(new)))
"""


def process(directory):
    code = RUN.format(tests=os.path.dirname(__file__))
    return subprocess.Popen([sys.executable, "-c", code, str(directory)], stdout=subprocess.DEVNULL)


@pytest.mark.full
def test_killed_and_resumed_is_the_same_to_the_bit(tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert process(whole).wait() == 0
    metrics = broken / "run" / "metrics.jsonl"
    for lines in (1, 20):
        run = process(broken)
        while not metrics.exists() or metrics.read_bytes().count(b"\n") < lines:
            assert run.poll() is None
            time.sleep(0.01)
        run.send_signal(signal.SIGKILL)
        run.wait()
    assert process(broken).wait() == 0
    first, second = (np.load(path.with_suffix(".npz")) for path in (whole, broken))
    assert first.files == second.files
    for name in first.files:
        np.testing.assert_array_equal(first[name], second[name])


def test_what_cannot_be_distilled():
    with pytest.raises(ValueError, match="vocabulary of 61 tokens, the model one of 62"):
        check_pair(CONFIG, dataclasses.replace(CONFIG, vocab_size=62))
    for head in ({"head": "classes", "num_classes": 2}, {"head": "none"}):
        with pytest.raises(ValueError, match="only causal language models"):
            check(dataclasses.replace(CONFIG, **head))
    with pytest.raises(ValueError, match="--distill 15: fewer tokens than one calibration"):
        Distillation(15).sequences(16)


def test_settings_follow_the_text():
    assert Distillation(40_000).sequences(1024) == (39, 3)
    assert Distillation(400_000).sequences(1024) == (390, 8)
    assert Distillation(1024).sequences(1024) == (1, 2)
    for count, batch, steps in ((1, 1, 1), (39, 1, 39), (390, 8, 49), (120, 3, 40)):
        settings = Distillation(1).settings(count)
        assert (settings.batch, settings.steps) == (batch, steps)
        settings.check()
