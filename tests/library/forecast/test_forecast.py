"""Forecasts: of headers alone, exact where they can be, and as large as what they add up."""

import dataclasses
import json
import math
import resource
import struct

import jax.numpy as jnp
import numpy as np
import pytest
from blocks import BLOCKS, source
from rates import RATES

from lordjax.compression.low_rank import compress
from lordjax.conversions.families.registry import tensor_table
from lordjax.forecast import job_settings, machine_rates, peak_memory, predict, shapes
from lordjax.forecast.job import CompressionSpec
from lordjax.forecast.low_rank_cost import stages
from lordjax.forecast.seconds import seconds
from lordjax.kernels import trees
from lordjax.kernels.base import nbytes
from lordjax.models.source import InMemory
from lordjax.runtime import flops
from lordjax.scripts.make_checkpoint import config_like
from lordjax.scripts.verbs.plan import plan_model

OPTIONS = {
    "ranks": None,
    "allocation": None,
    "seq_len": None,
    "dtype": None,
    "recipe": None,
    "batch": 8,
    "accumulate": None,
    "rank": None,
    "measure": False,
}


def write_checkpoint(directory, config, fill=None):
    """A checkpoint of bfloat16 whose headers are in order; its data is a hole, or ``fill``."""
    shards, index = {}, {}
    for path, tensor in tensor_table(config).items():
        shards.setdefault(path.split("/")[0], {})[tensor.name] = tensor.shape
    for top, rows in shards.items():
        header, end = {}, 0
        for name, shape in rows.items():
            size = 2 * math.prod(shape)
            header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [end, end + size]}
            end += size
        text = json.dumps(header).encode()
        with (directory / f"{top}.safetensors").open("wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            if fill is None:
                file.truncate(8 + len(text) + end)
            else:
                file.write(fill(end))
        index |= dict.fromkeys(rows, f"{top}.safetensors")
    listing = {"metadata": {}, "weight_map": index}
    (directory / "model.safetensors.index.json").write_text(json.dumps(listing))
    (directory / "config.json").write_text(json.dumps({**config, "dtype": "bfloat16"}))


def test_a_model_larger_than_memory_and_disk(tmp_path):
    """Llama-2-70B: 138 GB that are a hole in a file."""
    write_checkpoint(tmp_path, config_like("llama-2-70b"))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found = plan_model(str(tmp_path), method="lord-linear", keep=0.7, **OPTIONS)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown * 1024 < 1e9
    assert sum(file.stat().st_blocks for file in tmp_path.iterdir()) * 512 < 2**22
    assert found["before"]["bytes"] == 2 * found["before"]["parameters"] > 137e9
    assert 0.65 < found["after"]["bytes"] / found["before"]["bytes"] < 0.75
    assert found["ranks_are"] == job_settings.EXACT
    memory = found["cost"]["memory"]
    assert memory["in memory"]["host"] > 137e9 > 2 * memory["with a work directory"]["host"]
    assert memory["with a work directory"]["disk"] > found["after"]["bytes"]


def test_data_is_never_read(tmp_path):
    """Bytes that are no numbers at all give the same plan."""
    config = config_like("llama-2-70b", layers=2, shrink=8, vocabulary=96)
    random = np.random.default_rng(0)
    plans = []
    for name, fill in (("hole", None), ("noise", random.bytes), ("nan", lambda n: b"\xff" * n)):
        (tmp_path / name).mkdir()
        write_checkpoint(tmp_path / name, config, fill)
        found = plan_model(str(tmp_path / name), method="modegpt", keep=0.6, **OPTIONS)
        plans.append({key: value for key, value in found.items() if key != "model"})
    assert plans[0] == plans[1] == plans[2]


def test_damaged_headers_are_named(tmp_path):
    write_checkpoint(tmp_path, config_like("llama-2-70b", layers=1, shrink=8, vocabulary=96))
    file = tmp_path / "layer_0.safetensors"
    with file.open("r+b") as handle:
        handle.truncate(file.stat().st_size - 1)
    with pytest.raises(ValueError, match=r"layer_0\.safetensors"):
        plan_model(str(tmp_path), method="svd", keep=0.7, **OPTIONS)


@pytest.mark.quick("svd-*-None", "modegpt-published-*-float16")
@pytest.mark.parametrize("dtype", [None, "float16"])
@pytest.mark.parametrize(
    "name", ["gpt2", *(pytest.param(n, marks=pytest.mark.slow) for n in ("gemma2", "roberta"))]
)
@pytest.mark.parametrize(
    ("method", "policy"),
    [
        ("svd", "uniform"),
        ("lord-affine", "uniform"),
        ("modegpt-published", "uniform"),
        ("rom", "last-k"),
    ],
)
def test_bytes_are_those_that_come_out(method, policy, name, dtype):
    """Forecasts of models that are stored in two dtypes."""
    model = source(name)
    table = {
        path: a.astype(jnp.bfloat16) if path.endswith("kernel") else a
        for path, a in trees.flatten(model.params).items()
    }
    model = InMemory(model.config, trees.unflatten(table))
    tokens = np.random.default_rng(0).integers(0, 61, (6, 24))
    settings = {"method": method, "allocation": policy, "keep": 0.7, "dtype": dtype}
    result = compress(model, tokens, mask_token=1, **settings)
    plan, exact = job_settings.plan_or_estimate(model.config, method, 0.7, None, policy)
    assert exact
    assert plan.ranks == result.plan.ranks
    stored = shapes.stored(model.config, table, dtype)
    outline = shapes.outline(model.config, plan, stored)
    assert nbytes(outline) == result.report["bytes"] == nbytes(result.params)


def job(layers=2, **options):
    config = dataclasses.replace(BLOCKS["qwen3"], num_layers=layers)
    return CompressionSpec(config, "lord", **({"sequences": 16, "length": 40} | options))


def memory(of):
    plan = job_settings.plan_or_estimate(of.config, of.method, 0.7, None, "uniform")[0]
    before = shapes.dense_shapes(of.config).params
    return peak_memory.memory(of, stages(of), before, shapes.outline(of.config, plan))


def test_memory_with_a_work_directory_does_not_grow_with_depth():
    few, many = memory(job(2)), memory(job(32))
    grown = {name: many[name]["host"] - few[name]["host"] for name in few}
    weights = nbytes(shapes.dense_shapes(job(32).config).params)
    assert grown["in memory"] > weights / 2
    assert grown["with a work directory"] < weights / 32
    assert many["with a work directory"]["disk"] > few["with a work directory"]["disk"]
    for name in few["in memory"]["parts"]:
        whole, small = (sum(few[kind]["parts"][name].values()) for kind in few)
        assert small <= whole


def test_memory_grows_with_windows_only_where_states_stay():
    few, many = memory(job(sequences=16)), memory(job(sequences=4096))
    assert few["in memory"]["host"] < many["in memory"]["host"]
    kind = "with a work directory"
    states = {n: memory(job(sequences=n))[kind]["parts"]["statistics"] for n in (64, 4096)}
    assert states[64] == states[4096]


def test_variants_of_a_check_are_in_memory_at_once():
    """Three widths of the MLPs and one of the attention at the last four blocks, else one each."""
    checking = job(6)
    assert len(checking.trials) == 4 * (3 + 1) + 2 * (1 + 1)
    states = checking.held_out * checking.length * checking.config.hidden_size * 4
    for found in memory(checking).values():
        parts = found["parts"]["held-out check"]
        assert parts["device: hidden states"] == (1 + 20) * states
    for other in (job(sequences=7), job(allocation="uniform"), job(prefix="compressed")):
        assert not other.trials
        assert "held-out check" not in stages(other)


def test_a_check_runs_the_blocks_from_the_changed_one_on():
    """A variant runs from its own block on. Three models are whole: a plan, the original twice."""
    one, two = (stages(job(layers))["held-out check"] for layers in (1, 2))
    trials = [len(job(layers).trials) for layers in (1, 2)]
    assert trials == [4, 8]
    # Runs of a block: 3 + 4, and 3 · 2 + 4 · (2 + 1); runs of the head: 3 + 4 and 3 + 8.
    block, head = np.linalg.solve([[7, 7], [18, 11]], [flops.total(one), flops.total(two)])
    assert block > 0 and head > 0
    assert flops.total(stages(job(3))["held-out check"]) == pytest.approx(33 * block + 15 * head)


def test_seconds_are_work_over_rate():
    work = {
        "one": flops.OpCounts({"product float32": 4e9, "equations": 50}),
        "two": flops.OpCounts({"exp": 3e8}),
    }
    found = seconds(work, RATES)
    assert found == {"one": 2.5, "two": 3.0, "total": 5.5, "compiling": 0.5}
    fast = seconds(work, {kind: 2 * rate for kind, rate in RATES.items()})
    assert fast["total"] == found["total"] / 2


@pytest.mark.quick("lord", "modegpt-published")
@pytest.mark.parametrize("method", ["lord", "modegpt-cr", "modegpt-published", "fwsvd", "rom"])
def test_every_kind_of_work_has_a_rate(method):
    found = seconds(stages(CompressionSpec(BLOCKS["gpt2"], method, 16, 40)), RATES)
    assert all(seconds > 0 for seconds in found.values())
    assert all(map(math.isfinite, found.values()))


def test_rates_of_eigendecompositions_lie_on_a_line():
    at = {n: machine_rates.rate(RATES, f"eigh float64 {n}") for n in (20, 160, 268, 448, 10**6)}
    assert at[20] == at[160] == RATES["eigh float64 160"]
    assert at[448] == pytest.approx(RATES["eigh float64 448"])
    assert at[268] == pytest.approx(2e8, rel=0.01)  # the middle, in logarithms
    assert at[10**6] <= RATES["product float64"]


def test_no_rate_of_unknown_work():
    with pytest.raises(KeyError, match="no measured rate for 'prayer'; expected one of"):
        machine_rates.rate(RATES, "prayer")


def test_measured_rates_are_those_that_are_needed(monkeypatch, tmp_path):
    monkeypatch.setattr(machine_rates, "SIZE", {"cpu": 128})
    monkeypatch.setattr(machine_rates, "PATIENCE", 0.0)
    rates = machine_rates.measure_rates(tmp_path)
    assert set(rates) == set(RATES)
    assert min(rates.values()) > 0
    assert not list(tmp_path.iterdir())


def test_small_jobs_are_not_measured(monkeypatch):
    asked = []
    monkeypatch.setattr(machine_rates, "matmul_rate", lambda: asked.append(1) or 1e11)
    assert not predict.worth_measuring(predict.SMALL_JOB / 2)
    assert not asked
    assert not predict.worth_measuring(1e12)
    assert predict.worth_measuring(1e14)


def test_ranks_that_need_data_are_labelled():
    config = BLOCKS["gpt2"]
    plan, exact = job_settings.plan_or_estimate(config, "lord", 0.7, None, "global")
    assert not exact
    assert (
        plan.ranks == job_settings.plan_or_estimate(config, "lord", 0.7, None, "uniform")[0].ranks
    )
    assert job_settings.plan_or_estimate(config, "lord", 1, None, "global")[1]


def test_what_happened_is_told_in_the_forecasts_terms():
    report = {
        "seconds": {
            "gradients": 4.0,
            "factors": 3.0,
            "statistics and factors": 8.0,
            "apply": 1.0,
        },
        "peak_rss_bytes": 5,
        "bytes": 6,
    }
    found = predict.measured(report, {"flops": {"gradients": 8e9, "factors": 3e9}})
    assert found["seconds"] == {
        "gradients": 4.0,
        "statistics": 5.0,
        "factors": 3.0,
        "apply": 1.0,
        "total": 13.0,
    }
    assert found["flops_per_second"] == {"gradients": 2e9, "factors": 1e9}
