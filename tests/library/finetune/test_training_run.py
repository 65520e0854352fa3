"""Runs on disk: killed, resumed, and the checkpoints that are kept."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tuning import CONFIG, examples

from lordjax.data.examples import Data
from lordjax.finetune import run_directory, step, training_run
from lordjax.finetune.recipes import RECIPES
from lordjax.finetune.step import Settings
from lordjax.finetune.training_run import CheckpointPolicy, train

RUN = """
import dataclasses, sys
from pathlib import Path
sys.path.insert(0, {tests!r})
import jax
from tuning import CONFIG, examples
from lordjax.data.examples import Data
from lordjax.finetune.recipes import RECIPES
from lordjax.finetune.step import Settings
from lordjax.finetune.training_run import CheckpointPolicy, train
from lordjax.models import init
data = Data(examples(), examples(4, seed=1), {{}})
recipe = dataclasses.replace(RECIPES["lora"], rank=4, learning_rate=1e-2)
train(CONFIG, init(CONFIG, jax.random.key(0)), data, recipe, Settings(40, 4, 2),
      Path(sys.argv[1]), about={{"data": 1}}, keeping=CheckpointPolicy(8), resume=True,
      report=lambda line: print(line["step"], flush=True))
"""


def process(directory):
    code = RUN.format(tests=os.path.dirname(__file__))
    return subprocess.Popen([sys.executable, "-c", code, str(directory)], stdout=subprocess.PIPE)


def finished(directory):
    with process(directory) as run:
        run.stdout.read()
        assert run.wait() == 0


def metrics_of(directory):
    lines = map(json.loads, (directory / training_run.METRICS).read_text().splitlines())
    return [untimed(line) for line in lines]


def untimed(line):
    return {key: value for key, value in line.items() if key != "seconds"}


@pytest.mark.full
def test_killed_and_resumed_is_the_same_to_the_bit(tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    finished(whole)
    for stop in (11, 27):
        run = process(broken)
        for line in run.stdout:
            if int(line) >= stop:
                break
        time.sleep(0.02)
        run.send_signal(signal.SIGKILL)
        run.wait()
        run.stdout.close()
    finished(broken)
    assert metrics_of(broken) == metrics_of(whole)
    assert len(metrics_of(whole)) == 40 + 1 + 5


def short_run(params, directory, count=12, recipe=RECIPES["lora"], **options):
    data = Data(examples(), examples(4, seed=1), {})
    recipe = dataclasses.replace(recipe, rank=4, learning_rate=1e-2)
    given = {"about": {"data": "a"}, "keeping": CheckpointPolicy(3, 2), **options}
    return train(CONFIG, params, data, recipe, Settings(count, 4), directory, **given)


def test_the_best_and_the_last_are_kept(params, tmp_path):
    trained = short_run(params, tmp_path / "run")
    held = {line["step"]: line["validation"] for line in trained.history if "validation" in line}
    del held[0]
    assert trained.best == min(held, key=held.get)
    there = {int(p.name) for p in (tmp_path / "run" / "checkpoints").iterdir() if p.name.isdigit()}
    assert there == {9, 12, trained.best}
    own = training_run.evaluate(
        CONFIG,
        step.State(jnp.zeros((), jnp.int32), trained.params, None),
        jax.tree.map(lambda a: None, trained.params),
        examples(4, seed=1),
        batch=3,
        dtype="float32",
    )
    np.testing.assert_allclose(own, held[trained.best], rtol=1e-5)


def test_another_run_is_not_resumed(params, tmp_path):
    short_run(params, tmp_path / "run", 3)
    with pytest.raises(FileExistsError, match="a run is there; go on with --resume"):
        short_run(params, tmp_path / "run", 3)
    with pytest.raises(ValueError, match=r'other settings .*: data: "a" -> "b"'):
        short_run(params, tmp_path / "run", 3, resume=True, about={"data": "b"})
    with pytest.raises(ValueError, match=r"settings\.steps: 3 -> 6"):
        short_run(params, tmp_path / "run", 6, resume=True)
    reworded = dataclasses.replace(RECIPES["lora"], summary="another text")
    assert short_run(params, tmp_path / "run", 3, resume=True, recipe=reworded).best
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").touch()
    with pytest.raises(FileExistsError, match="not empty, and not a run"):
        short_run(params, tmp_path / "other", 3)


@pytest.mark.full
def test_a_finished_run_is_resumed_to_the_same(params, tmp_path):
    first = short_run(params, tmp_path / "run", 6)
    again = short_run(params, tmp_path / "run", 6, resume=True)
    jax.tree.map(np.testing.assert_array_equal, first.params, again.params)
    assert first.history == again.history


@pytest.mark.full
@pytest.mark.parametrize("after", ["a step", "a checkpoint"])
def test_every_line_of_metrics_is_written_once(params, tmp_path, monkeypatch, after):
    whole = short_run(params, tmp_path / "whole", 6)
    store = training_run.CheckpointStore
    saved = store.save

    def save(self, state, nll):
        saved(self, state, nll)
        raise KeyboardInterrupt

    def stop(line):
        if line["step"]:
            raise KeyboardInterrupt

    options = {"report": stop} if after == "a step" else {}
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(store, "save", save)
        # A process that is killed leaves what is there.
        patch.setattr(run_directory, "remove_locked", run_directory.unlock_directory)
        short_run(params, tmp_path / "broken", 6, **options)
    again = short_run(params, tmp_path / "broken", 6, resume=True)
    assert [untimed(line) for line in again.history] == [untimed(line) for line in whole.history]
