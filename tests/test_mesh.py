"""Several devices share the work of a compression, and come to what one comes to."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec
from test_cli import calibration, fails, run, text, tiny  # noqa: F401
from test_output import MODEL, TOKENS

from lordjax import mesh, trees
from lordjax.calibrate import activation_keys, block_statistics, checked, hidden_states, on_device
from lordjax.compression import compress
from lordjax.gradients import gradient_statistics
from lordjax.methods import METHODS
from lordjax.progress import Clock
from lordjax.quantization import quantize
from lordjax.sites import sites_for

MESHES = [{"data": 4}, {"data": 2, "model": 2}, {"model": 4}]


def statistics(axes):
    """Of the first block's activations, and of all blocks' gradients."""
    devices = None if axes is None else mesh.make_mesh(axes)
    calibrated = checked(MODEL.config, TOKENS, None, None, mesh=devices)
    row, config = METHODS["lord"], MODEL.config
    block = on_device(MODEL.block(0), devices)
    sites = sites_for(row.kinds, config)
    keys = activation_keys(block, sites, row)
    states = hidden_states(MODEL, calibrated)
    stats = block_statistics(block, 0, states, calibrated, sites, keys, config)
    gradients = gradient_statistics(MODEL, calibrated, row, Clock())
    return {"activations": stats, "gradients": dict(gradients), "states": np.concatenate(states)}


@pytest.fixture(scope="module")
def of_one():
    return statistics(None)


@pytest.mark.parametrize("axes", MESHES, ids=str)
def test_statistics_are_those_of_one_device(of_one, axes):
    def close(a, b):
        a, b = np.asarray(a, float), np.asarray(b, float)
        assert np.abs(a - b).max() <= 1e-5 * np.abs(b).max()

    jax.tree.map(close, statistics(axes), of_one)


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("lord", {}),
        ("modegpt", {}),
        pytest.param("rom", {}, marks=pytest.mark.slow),
        pytest.param("lord", {"prefix": "corrective"}, marks=pytest.mark.slow),
    ],
)
def test_the_plan_is_that_of_one_device(method, options):
    one = compress(MODEL, TOKENS, method=method, keep=0.6, **options)
    for axes in MESHES[:2]:
        many = compress(
            MODEL, TOKENS, method=method, keep=0.6, mesh=mesh.make_mesh(axes), **options
        )
        assert many.plan.ranks == one.plan.ranks
        assert many.report["bytes"] == one.report["bytes"]


def test_rows_that_do_not_divide_lie_everywhere():
    devices = mesh.make_mesh({"data": 4})
    assert mesh.share_rows(np.zeros((8, 3)), devices).sharding.spec == PartitionSpec("data")
    assert mesh.share_rows(np.zeros((6, 3)), devices).sharding.is_fully_replicated
    # 12 windows in steps of 8 and 4, then of 5: 5, 5 and 2.
    results = [
        compress(
            MODEL,
            TOKENS,
            method="lord",
            keep=0.6,
            batch_size=size,
            mesh=devices,
        ).plan.ranks
        for size in (8, 5)
    ]
    assert results[0] == results[1]


@pytest.mark.slow
def test_weight_gradients_of_windows_are_those_of_one_device():
    """Each device squares and adds those of its own windows."""
    one, four = (
        gradient_statistics(
            MODEL, checked(MODEL.config, TOKENS, None, 4, mesh=m), METHODS["fwsvd"], Clock()
        )
        for m in (None, mesh.make_mesh({"data": 4}))
    )
    for i, stats in one.items():
        for path, fisher in stats["row_fisher"].items():
            found = four[i]["row_fisher"][path]
            assert np.abs(found - fisher).max() <= 1e-5 * np.abs(fisher).max()


def test_each_device_loops_over_its_own_rows():
    devices, seen = mesh.make_mesh({"data": 4}), []

    def run(scale, x):
        seen.append(x.shape)
        return scale * x

    for rows, own in ((8, 2), (6, 6)):  # what does not divide is run as a whole
        x = np.arange(3 * rows, dtype=np.float32).reshape(rows, 3)
        np.testing.assert_array_equal(mesh.over_rows(run, rows, devices)(2.0, x), 2 * x)
        assert seen.pop() == (own, 3)


def test_a_block_is_shared_out_by_rules():
    devices = mesh.make_mesh({"data": 1, "model": 4})
    shared = trees.flatten(on_device(MODEL.block(0), devices))
    spec = {path: a.sharding.spec for path, a in shared.items()}
    assert spec["mlp/up/kernel"] == PartitionSpec(None, "model")
    assert spec["mlp/down/kernel"] == PartitionSpec("model", None)
    whole = trees.flatten(MODEL.block(0))
    for path, a in shared.items():
        np.testing.assert_array_equal(a, whole[path])
        cut = "model" in tuple(spec[path])
        assert a.addressable_shards[0].data.size == a.size // (4 if cut else 1)


def test_jobs_take_turns_on_the_devices():
    devices = mesh.make_mesh({"data": 4})
    double = jax.jit(lambda x: 2 * x)
    jobs = [np.full(3, float(i), np.float32) for i in range(6)]
    shares = mesh.share_jobs(dict.fromkeys(range(6), 1.0), 4)
    found = [(jobs[k], y) for k, y in mesh.map_kernels(lambda k: double(jobs[k]), shares, devices)]
    assert [float(job[0]) for job, _ in found] == list(range(6))
    for job, out in found:
        np.testing.assert_array_equal(out, 2 * job)
    ids = [next(iter(out.devices())).id for _, out in found]
    assert ids == [0, 1, 2, 3, 0, 1]


def test_codes_are_those_of_one_device():
    def result(devices):
        settings = {"method": "lq", "weighting": "fisher", "form": "nf4", "rank": 2, "steps": 1}
        return quantize(MODEL, TOKENS, mesh=devices, **settings)

    one, many = result(None), result(mesh.make_mesh({"data": 4}))
    assert many.report["bytes"] == one.report["bytes"]
    for a, b in zip(jax.tree.leaves(many.params), jax.tree.leaves(one.params), strict=True):
        if a.dtype == np.uint32:
            assert np.mean(np.asarray(a) == np.asarray(b)) > 0.9


@pytest.mark.parametrize(
    "wrong", ["data", "data=0", "rows=2", "data=2,data=2", "data=2;model=2", ""]
)
def test_a_mesh_is_named_by_its_axes(wrong):
    assert mesh.parse("data=2, model=3") == {"data": 2, "model": 3}
    with pytest.raises(ValueError, match="expected data=N"):
        mesh.parse(wrong)


def test_the_command_line(tiny, text, tmp_path):  # noqa: F811
    out = tmp_path / "out"
    command = ("compress", tiny, out, *calibration(text), "--keep", 0.6, "--method", "lord")
    fails("9 devices asked for; there are 4", *command, "--mesh", "data=9")
    fails("expected data=N", *command, "--mesh", "4")
    assert not list(tmp_path.iterdir())
    found = run(*command, "--mesh", "data=4", "--json")
    assert found.exit_code == 0, found.stderr
    assert json.loads(found.stdout)["settings"]["mesh"] == "data=4"


QUICK = ("factorize", "nbytes", "matmul", "eigenvalues", "stats.moments")


@pytest.mark.parametrize(
    "names", [pytest.param(QUICK, id="quick"), pytest.param((), id="all", marks=pytest.mark.slow)]
)
def test_functions_under_pmap_on_eight_devices(names):
    """What a user's own pipeline may call on its devices: `pmapped.CASES`."""
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, str(Path(__file__).with_name("pmapped.py")), *names]
    found = subprocess.run(
        command, env=os.environ | flags, capture_output=True, text=True, timeout=300, check=False
    )
    assert found.returncode == 0, found.stdout + found.stderr
    assert "functions on 8 devices" in found.stdout
