"""Several processes work on one job: same result as one process, also after a kill."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest
from commands import fails
from interrupted import TOKENS, Killed, small_model

from lordjax.compression import elastic
from lordjax.compression.low_rank import compress
from lordjax.compression.resumable_output import Output, partial
from lordjax.kernels.base import materialize
from lordjax.runtime import multihost
from lordjax.scripts.benchmarks.resume import contents
from lordjax.storage import checkpoint

SECONDS = 60  # a job must never hang
# Dies before it writes some line of its journal.
DYING = """
import os, signal
from lordjax.storage.disk_store import DiskStore
left, record = [LINES], DiskStore._record
def dying(self, row):
    left[0] -= 1
    if left[0] == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    record(self, row)
DiskStore._record = dying
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    directory = tmp_path_factory.mktemp("model")
    config = small_model().config
    facts = {"model_type": "llama", "vocab_size": config.vocab_size}
    checkpoint.save(directory / "model", config, small_model().params, hf_config=facts)
    np.save(directory / "tokens.npy", TOKENS)
    return directory


def free_port():
    with socket.socket() as there:
        there.bind(("127.0.0.1", 0))
        return there.getsockname()[1]


def environment(model, devices=2):
    flags = {
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        # What the first process compiled the next job need not.
        "JAX_ENABLE_COMPILATION_CACHE": "true",
        "JAX_COMPILATION_CACHE_DIR": str(model / "programs"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    return os.environ | flags


def job(model, out, *options, dying=None, launcher=False):
    """Runs two processes; returns (exit code, stdout, last line of stderr) of each.

    Args:
      model: directory of the model and its tokens.
      out: where the result goes.
      options: of the command.
      dying: which process dies, before which line of its journal.
      launcher: processes find each other by what Slurm tells them.
    """
    port, processes = free_port(), []
    for k in range(2):
        code = "from lordjax.scripts.cli import main; main()"
        if dying is not None and dying[0] == k:
            code = DYING.replace("LINES", str(dying[1])) + code
        command = [sys.executable, "-c", code, "compress", model / "model", out, "--json"]
        command += ["--calibration", model / "tokens.npy", "--samples", 12, "--seq-len", 16]
        variables = environment(model)
        if launcher:
            command += ["--coordinator", "auto"]
            variables |= {"SLURM_JOB_ID": "1", "SLURM_STEP_NODELIST": "127.0.0.1"}
            variables |= {"SLURM_NTASKS": "2", "SLURM_PROCID": str(k), "SLURM_LOCALID": "0"}
            variables["JAX_COORDINATOR_PORT"] = str(port)
        else:
            command += ["--coordinator", f"127.0.0.1:{port}"]
            command += ["--process-id", k, "--num-processes", 2]
        pipe = subprocess.PIPE
        arguments = [str(a) for a in [*command, *options]]
        processes.append(
            subprocess.Popen(arguments, env=variables, stdout=pipe, stderr=pipe, text=True)
        )
    found = []
    try:
        for process in processes:
            out, err = process.communicate(timeout=SECONDS)
            lines = [line for line in err.splitlines() if "Gloo] Rank" not in line]
            found.append((process.returncode, out, "\n".join(lines)))
    finally:
        for process in processes:
            process.kill()
    return found


LORD = ("--method", "lord", "--keep", 0.6)


@pytest.fixture(scope="module")
def whole(model):
    """Returns the result of an undisturbed run of two processes, and what they print."""
    found = job(model, model / "whole", *LORD)
    assert [code for code, _, _ in found] == [0, 0], found
    return model / "whole", found


@pytest.mark.full
def test_two_processes_are_one(model, whole):
    """Same plan, and same model up to the order of sums; only process 0 writes and prints."""
    out, found = whole
    one = compress(small_model(), TOKENS, method="lord", keep=0.6)
    assert json.loads((out / "plan.json").read_text())["ranks"] == one.plan.ranks
    params = jax.tree.map(np.asarray, materialize(elastic.load(out)[1]))
    for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(materialize(one.params)), strict=True):
        assert np.abs(a - b).max() <= 1e-4 * np.abs(b).max()
    assert json.loads(found[0][1])["settings"]["mesh"] == "data=4"
    assert found[1][1:] == ("", "")
    assert not list(out.parent.glob("whole.partial*"))


@pytest.mark.full
@pytest.mark.parametrize("line", [14, pytest.param(40, marks=pytest.mark.slow)])
def test_a_death_ends_the_job_and_the_next_goes_on_to_the_same_bits(model, whole, line):
    out = model / f"died-{line}"
    (code, stdout, errors), (died, _, _) = job(model, out, *LORD, dying=(1, line))
    assert died == -signal.SIGKILL
    assert code == 2 and stdout == ""
    assert errors.splitlines()[-1].startswith("error: another process of this job ended")
    assert not out.exists() and partial(out).exists() and partial(out, 1).exists()
    # The one that died has written less; nothing may be made of more than both have.
    found = job(model, out, *LORD, launcher=True)
    assert [code for code, _, _ in found] == [0, 0], found
    assert "resuming from the finished work" in found[0][2]
    assert contents(out) == contents(whole[0])
    assert not list(model.glob(f"{out.name}.partial*"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("modegpt", ("--mesh", "data=2,model=2")),
        ("rom", ()),
        ("lord", ("--prefix", "corrective", "--mesh", "data=2,model=2")),
    ],
)
def test_other_methods_and_meshes(model, tmp_path, method, options):
    found = job(model, tmp_path / "out", "--method", method, "--keep", 0.6, *options)
    assert [code for code, _, _ in found] == [0, 0], found
    prefix = "corrective" if "corrective" in options else None
    one = compress(small_model(), TOKENS, method=method, keep=0.6, prefix=prefix)
    plan = json.loads((tmp_path / "out" / "plan.json").read_text())
    assert plan["ranks"] == one.plan.ranks


@pytest.mark.slow
def test_the_death_of_the_first(model, whole):
    """JAX itself ends the other processes in this case."""
    first, second = job(model, model / "first", *LORD, dying=(0, 10))
    assert first[0] == -signal.SIGKILL and second[0] != 0
    assert "another" in second[2] or "coordination service" in second[2]
    assert [code for code, _, _ in job(model, model / "first", *LORD)] == [0, 0]
    assert contents(model / "first") == contents(whole[0])


@pytest.mark.slow
def test_elastic_models(model, whole):
    options = ("--method", "lord", "--elastic")
    assert job(model, model / "elastic", *options, dying=(1, 40))[0][0] == 2
    assert [code for code, _, _ in job(model, model / "elastic", *options)] == [0, 0]
    ours, theirs = elastic.load(model / "elastic", keep=0.6)[1], elastic.load(whole[0])[1]
    for a, b in zip(*map(jax.tree.leaves, (ours, theirs)), strict=True):
        np.testing.assert_array_equal(a, b)


def test_wrong_arguments_are_one_line(model, tmp_path):
    command = ("compress", model / "model", tmp_path / "out")
    numbers = ("--process-id", 2, "--num-processes", 2)
    fails("expected HOST:PORT or auto", *command, "--coordinator", "here", *numbers)
    fails("needs --process-id and --num-proc", *command, "--coordinator", "here:1")
    fails("expected a number from 0 to 1", *command, "--coordinator", "here:1", *numbers)
    fails("go with --coordinator HOST:PORT", *command, *numbers)


def test_nobody_and_somebody_at_the_address(monkeypatch):
    monkeypatch.setattr(multihost, "CONNECT_TIMEOUT", 0.0)
    port = free_port()
    with pytest.raises(ConnectionError, match="process 0 cannot be reached"):
        multihost._check_address(f"127.0.0.1:{port}", own=False)
    multihost._check_address(f"127.0.0.1:{port}", own=True)
    with socket.socket() as there:
        there.bind(("", 0))
        there.listen()
        port = there.getsockname()[1]
        with pytest.raises(ConnectionError, match=f"port {port} of this machine cannot be used"):
            multihost._check_address(f"127.0.0.1:{port}", own=True)
        multihost._check_address(f"127.0.0.1:{port}", own=False)


def told(monkeypatch, number, others):
    """Simulates one of two processes; ``others`` is the JSON of the other one."""
    monkeypatch.setattr(multihost, "process_index", lambda: number)
    monkeypatch.setattr(
        multihost, "all_gather_json", lambda own: [own, others] if number == 0 else [others, own]
    )


def test_what_one_lacks_none_has(tmp_path, monkeypatch):
    facts = {"made of": "test"}
    with contextlib.suppress(Killed), Output(tmp_path / "out", facts) as made:
        made.store["a"], made.store["b"] = 1, 2
        raise Killed
    told(monkeypatch, 0, [facts, ["b"], None])
    with contextlib.suppress(Killed), Output(tmp_path / "out", facts) as made:
        assert made.store.below("") == ["b"] and made.resumed
        raise Killed
    told(monkeypatch, 0, [{"made of": "else"}, ["b"], None])
    with pytest.raises(ValueError, match="process 1 was given something else: made of"):
        Output(tmp_path / "out", facts)


def test_all_see_that_the_first_has_finished(tmp_path, monkeypatch):
    facts = {"made of": "test"}
    told(monkeypatch, 1, [facts, [], None])
    with contextlib.suppress(Killed), Output(tmp_path / "out", facts) as made:
        made.shards["rest"] = {}
        raise Killed
    assert "rest" not in {file.stem for file in partial(tmp_path / "out", 1).rglob("*")}
    told(monkeypatch, 1, [facts, [], "done"])
    with Output(tmp_path / "out", facts) as made:
        assert made.finished == "done"
        made.publish()
    assert not list(tmp_path.iterdir())
