"""Several devices share a compression, and give the same result as one device."""

import dataclasses
import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from blocks import random_model
from commands import calibration, fails, run
from interrupted import TOKENS, Killed, small_model
from jax.sharding import PartitionSpec

from lordjax.calibration.backward_pass import gradient_statistics
from lordjax.calibration.forward_pass import (
    activation_keys,
    block_statistics,
    checked,
    hidden_states,
    on_device,
)
from lordjax.compression import single_pass
from lordjax.compression.low_rank import compress
from lordjax.compression.quantized import quantize
from lordjax.compression.resumable_output import TYPES
from lordjax.forecast import device_shares
from lordjax.forecast.job import CompressionSpec
from lordjax.forecast.low_rank_cost import site_factors, stages
from lordjax.kernels import trees
from lordjax.methods import METHODS
from lordjax.models.sites import sites_for
from lordjax.runtime import flops, mesh
from lordjax.runtime.progress import Clock
from lordjax.storage.disk_store import DiskStore

FOUR = functools.partial(mesh.make_mesh, {"data": 4})
MESHES = [{"data": 4}, {"data": 2, "model": 2}, {"model": 4}]


def statistics(axes):
    """Returns statistics of the first block's activations and of all blocks' gradients."""
    devices = None if axes is None else mesh.make_mesh(axes)
    calibrated = checked(small_model().config, TOKENS, None, None, mesh=devices)
    row, config = METHODS["lord"], small_model().config
    block = on_device(small_model().block(0), devices)
    sites = sites_for(row.kinds, config)
    keys = activation_keys(block, sites, row)
    states = hidden_states(small_model(), calibrated)
    stats = block_statistics(block, 0, states, calibrated, sites, keys, config)
    gradients = gradient_statistics(small_model(), calibrated, row, Clock())
    return {"activations": stats, "gradients": dict(gradients), "states": np.concatenate(states)}


@pytest.fixture(scope="module")
def of_one():
    return statistics(None)


@pytest.mark.full
@pytest.mark.parametrize("axes", MESHES, ids=str)
def test_statistics_are_those_of_one_device(of_one, axes):
    def close(a, b):
        a, b = np.asarray(a, float), np.asarray(b, float)
        assert np.abs(a - b).max() <= 1e-5 * np.abs(b).max()

    jax.tree.map(close, statistics(axes), of_one)


@pytest.mark.full
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
    one = compress(small_model(), TOKENS, method=method, keep=0.6, **options)
    for axes in MESHES[:2]:
        many = compress(
            small_model(), TOKENS, method=method, keep=0.6, mesh=mesh.make_mesh(axes), **options
        )
        assert many.plan.ranks == one.plan.ranks
        assert many.report["bytes"] == one.report["bytes"]


@pytest.mark.full
def test_rows_that_do_not_divide_lie_everywhere():
    devices = mesh.make_mesh({"data": 4})
    assert mesh.shard_batch(np.zeros((8, 3)), devices).sharding.spec == PartitionSpec("data")
    assert mesh.shard_batch(np.zeros((6, 3)), devices).sharding.is_fully_replicated
    # 12 windows in steps of 8 and 4, then of 5: 5, 5 and 2.
    results = [
        compress(
            small_model(),
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
    """Each device squares and adds the gradients of its own sequences."""
    one, four = (
        gradient_statistics(
            small_model(),
            checked(small_model().config, TOKENS, None, 4, mesh=m),
            METHODS["fwsvd"],
            Clock(),
        )
        for m in (None, mesh.make_mesh({"data": 4}))
    )
    for i, (stats,) in one.items():
        for path, fisher in stats["row_fisher"].items():
            found = four[i][0]["row_fisher"][path]
            assert np.abs(found - fisher).max() <= 1e-5 * np.abs(fisher).max()


def test_each_device_loops_over_its_own_rows():
    devices, seen = mesh.make_mesh({"data": 4}), []

    def run(scale, x):
        seen.append(x.shape)
        return scale * x

    for rows, own in ((8, 2), (6, 6)):  # what does not divide is run as a whole
        x = np.arange(3 * rows, dtype=np.float32).reshape(rows, 3)
        np.testing.assert_array_equal(mesh.shard_map_batch(run, rows, devices)(2.0, x), 2 * x)
        assert seen.pop() == (own, 3)


def test_a_block_is_shared_out_by_rules():
    devices = mesh.make_mesh({"data": 1, "model": 4})
    shared = trees.flatten(on_device(small_model().block(0), devices))
    spec = {path: a.sharding.spec for path, a in shared.items()}
    assert spec["mlp/up/kernel"] == PartitionSpec(None, "model")
    assert spec["mlp/down/kernel"] == PartitionSpec("model", None)
    whole = trees.flatten(small_model().block(0))
    for path, a in shared.items():
        np.testing.assert_array_equal(a, whole[path])
        cut = "model" in tuple(spec[path])
        assert a.addressable_shards[0].data.size == a.size // (4 if cut else 1)


def test_jobs_take_turns_on_the_devices():
    devices = mesh.make_mesh({"data": 4})
    double = jax.jit(lambda x: 2 * x)
    jobs = [np.full(3, float(i), np.float32) for i in range(6)]
    shares = mesh.assign_tasks(dict.fromkeys(range(6), 1.0), 4)
    found = [(jobs[k], y) for k, y in mesh.run_tasks(lambda k: double(jobs[k]), shares, devices)]
    assert [float(job[0]) for job, _ in found] == list(range(6))
    for job, out in found:
        np.testing.assert_array_equal(out, 2 * job)
    ids = [next(iter(out.devices())).id for _, out in found]
    assert ids == [0, 1, 2, 3, 0, 1]


def test_devices_that_share_cores_take_turns():
    """CPU devices take turns, since concurrent programs go wrong (`mesh.run_tasks`)."""
    slow, before, made = jax.jit(lambda x: jax.lax.fori_loop(0, 300, lambda i, y: x @ y, x)), [], []

    def run(k):
        before.append(not made or made[-1].is_ready())
        made.append(slow(np.eye(200, dtype=np.float32) * k))
        return made[-1]

    shares = mesh.assign_tasks(dict.fromkeys(range(8), 1.0), 4)
    assert len(list(mesh.run_tasks(run, shares, FOUR()))) == 8
    assert all(before)


@pytest.mark.parametrize(
    ("costs", "sums"),
    [
        ([5, 1, 1, 1, 5, 1, 1, 1], [5, 5, 3, 3]),
        ([7, 7, 6, 6, 5, 4, 4], [11, 11, 10, 7]),
        ([2, 3], [3, 2, 0, 0]),
    ],
)
def test_the_largest_job_goes_to_the_device_with_the_least(costs, sums):
    shares = mesh.assign_tasks(dict(enumerate(costs)), 4)
    assert sorted(job for share in shares for job in share) == list(range(len(costs)))
    for share in shares:
        assert [costs[k] for k in share] == sorted((costs[k] for k in share), reverse=True)
    found = [sum(costs[k] for k in share) for share in shares]
    assert max(found) <= 4 / 3 * max(max(costs), sum(costs) / 4) + 1e-9
    assert sorted(found) == sorted(sums)


@pytest.mark.full
def test_devices_factor_equally_much(monkeypatch):
    """The MLP is most of a block's work; the test adds up the tasks that each device gets."""
    given = []

    def seen(run, shares, devices):
        given.append(shares)
        return mesh.run_tasks(run, shares, devices)

    monkeypatch.setattr(single_pass, "run_tasks", seen)
    config = dataclasses.replace(small_model().config, num_layers=6)
    compress(random_model(config), TOKENS, method="modegpt", keep=0.6, mesh=FOUR())
    job = CompressionSpec(config, "modegpt", *TOKENS.shape, meshed=True)
    work = {site: flops.total(site_factors(job, site)) for site in job.sites}
    assert max(work.values()) > 0.5 * sum(work.values())
    done = [
        sum(work[site] for shares in given for _, site in shares[k]) / (6 * sum(work.values()))
        for k in range(4)
    ]
    assert [len({i for share in shares for i, _ in share}) for shares in given] == [4, 2]
    assert max(done) < 0.3 and sum(done) == pytest.approx(1)
    told = device_shares.report(device_shares.device_work(job, stages(job), 4), stages(job), {})
    assert told["factors"]["shares"] == pytest.approx(done)


@pytest.mark.full
@pytest.mark.parametrize("dying", range(2, 28, 4))
def test_a_group_that_is_killed_goes_on_to_the_same_bits(dying, tmp_path, monkeypatch):
    """A run is killed before a line of the journal; only unfinished factors are computed again."""
    config = dataclasses.replace(small_model().config, num_layers=6)
    model, left, made = random_model(config), [0], []
    record, collect = DiskStore._record, single_pass.collect_factors

    def killing(self, row):
        left[0] -= 1
        if left[0] == 0:
            raise Killed
        record(self, row)

    def counted(*arguments):
        made.append(arguments[1])
        return collect(*arguments)

    monkeypatch.setattr(DiskStore, "_record", killing)
    monkeypatch.setattr(single_pass, "collect_factors", counted)

    def factors(name):
        calibrated = checked(config, TOKENS, None, None, mesh=FOUR())
        options = {"keep_gradients": True, "influence": False}
        with DiskStore(tmp_path / name, {}, TYPES) as work:
            found = single_pass.factor_all(
                model, calibrated, "modegpt-published", {}, Clock(), work, **options
            )[0]
            assert not work.below("statistics/")
            return {path: jax.tree.map(np.array, found[path]) for path in found}

    whole, sites = factors("whole"), len(made)
    made.clear()
    left[0] = dying
    with pytest.raises(Killed):
        factors("killed")
    again = factors("killed")
    assert again.keys() == whole.keys()
    jax.tree.map(np.testing.assert_array_equal, again, whole)
    assert len(set(made)) == sites and len(made) <= sites + 1


@pytest.mark.full
def test_codes_are_those_of_one_device():
    def result(devices):
        settings = {"method": "lq", "weighting": "fisher", "form": "nf4", "rank": 2, "steps": 1}
        return quantize(small_model(), TOKENS, mesh=devices, **settings)

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


@pytest.mark.full
def test_the_command_line(tiny, text, tmp_path):
    out = tmp_path / "out"
    command = ("compress", tiny, out, *calibration(text), "--keep", 0.6, "--method", "lord")
    fails("9 devices asked for; there are 4", *command, "--mesh", "data=9")
    fails("expected data=N", *command, "--mesh", "4")
    assert not list(tmp_path.iterdir())
    found = run(*command, "--mesh", "data=4", "--json")
    assert found.exit_code == 0, found.stderr
    assert json.loads(found.stdout)["settings"]["mesh"] == "data=4"


QUICK = ("factorize", "nbytes", "matmul", "eigenvalues", "stats.moments")


@pytest.mark.full
@pytest.mark.parametrize(
    "names", [pytest.param(QUICK, id="quick"), pytest.param((), id="all", marks=pytest.mark.slow)]
)
def test_functions_under_pmap_on_eight_devices(names):
    """Functions that a user's pipeline may call under ``pmap``: `pmapped.CASES`."""
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, str(Path(__file__).parents[2] / "support" / "pmapped.py"), *names]
    found = subprocess.run(
        command, env=os.environ | flags, capture_output=True, text=True, timeout=300, check=False
    )
    assert found.returncode == 0, found.stdout + found.stderr
    assert "functions on 8 devices" in found.stdout
