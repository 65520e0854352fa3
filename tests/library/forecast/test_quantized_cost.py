"""Predictions for quantization, elastic models and several devices: what is counted runs."""

import dataclasses
import functools
import math
import re
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from blocks import BLOCKS, source
from rates import RATES

from lordjax.allocation import candidates
from lordjax.calibration import backward_pass, forward_pass, table_statistics
from lordjax.calibration.observers import observe
from lordjax.compression import quantized_matrix
from lordjax.compression.elastic import check_settings
from lordjax.compression.measured import scale_search, variants
from lordjax.compression.quantized import quantize
from lordjax.forecast import device_shares, job_settings, peak_memory, predict, shapes
from lordjax.forecast.job import CompressionSpec
from lordjax.forecast.low_rank_cost import stages
from lordjax.forecast.quantized_cost import quantized_stages
from lordjax.forecast.seconds import seconds
from lordjax.forecast.whole_file import table_stages
from lordjax.kernels import normal_float, trees
from lordjax.kernels.base import nbytes
from lordjax.methods.quantized import lq, weightings
from lordjax.models.config import ModelConfig
from lordjax.runtime import flops
from lordjax.runtime.mesh import make_mesh, shard_batch

WINDOWS, LENGTH = 8, 24
FLAGS = dict.fromkeys(job_settings.QUANTIZATION_SETTINGS)


def tokens(config):
    return np.random.default_rng(0).integers(0, config.vocab_size, (WINDOWS, LENGTH), np.int32)


def coded(config, method, **flags):
    return job_settings.quantized_spec(config, method, WINDOWS, LENGTH, FLAGS | flags)[0]


def result(model, method, **flags):
    used = {name: value for name, value in flags.items() if value is not None}
    return quantize(model, tokens(model.config), method=method, mask_token=1, **used)


@pytest.mark.quick("nf-flags0")
@pytest.mark.parametrize(
    ("method", "flags"),
    [
        ("nf", {"form": "nf4"}),
        ("nf", {"form": "nf3-4-bfloat16-16-64", "dtype": "float32"}),
        ("lq", {"form": "nf2", "rank": 3}),
        ("lq", {"form": "nf2", "rank": 3, "factors": "nf8", "dtype": "bfloat16"}),
    ],
)
def test_bytes_are_those_that_come_out(method, flags):
    model = source("gemma2")
    settings = {"method": method, **FLAGS, **flags}
    before = shapes.stored(model.config, trees.flatten(model.params))
    job, after, sure, _ = job_settings.parse_settings(model.config, before, (0, 0), settings)
    found = result(model, method, **flags)
    assert sure == job_settings.EXACT
    assert nbytes(after) == found.report["bytes"] == nbytes(found.params)
    cost = predict.cost(job, before, after, RATES)  # without calibration
    assert cost["seconds"]["decomposition"] > 0
    assert cost["memory"]["with a work directory"]["host"] > 0
    expected = jax.tree.map(lambda a: (a.shape, np.dtype(a.dtype)), dict(found.params))
    assert jax.tree.map(lambda a: (a.shape, np.dtype(a.dtype)), after) == expected


@pytest.mark.parametrize(("method", "bits"), [("nf", 3.0), ("lq", 3.4), ("auto", 5.0)])
def test_an_estimate_uses_its_budget_and_no_more(method, bits):
    config = BLOCKS["qwen3"]
    job = coded(config, method, bits=bits, rank=3 if method == "lq" else None)
    assert len(job.options) == 14
    block = trees.flatten(shapes.dense_shapes(config).block(0))
    matrices = {path: block[path.split("/", 1)[1]].shape for path in job.options}
    counted = candidates.QUANTIZERS[method].counts_low_rank
    used = sum(
        candidates.candidate_bytes(option, matrices[path], 2, job.factors, low_rank=counted)
        for path, option in job.options.items()
    )
    budget = bits * sum(map(math.prod, matrices.values())) / 8
    assert 0.85 * budget < used <= budget


def test_a_budget_that_cannot_be_met_is_named():
    with pytest.raises(ValueError, match=r"1 bits per weight cannot be met.*at least 2"):
        coded(BLOCKS["qwen3"], "nf", bits=1.0)


def counting(work, fn):
    """A function that counts what it is called with, and does it."""

    @functools.wraps(fn)
    def run(*args, **kwargs):
        configs = [a for a in args if isinstance(a, ModelConfig)]  # the first argument, if any
        given = jax.tree.map(
            lambda a: jax.ShapeDtypeStruct(np.shape(a), jnp.result_type(a)), args[len(configs) :]
        )
        work.update(flops.count_ops(functools.partial(fn, *configs, **kwargs), *given))
        return fn(*args, **kwargs)

    return run


def counting_programs(monkeypatch):
    """The operations of all programs that a quantization runs from here on."""
    done = Counter()
    for module, names in {
        forward_pass: ("observe", "embed"),
        backward_pass: ("observe", "observe_gradients", "loss_gradient", "embed"),
        quantized_matrix: (
            *("jitted_cost", "jitted_feedback", "predict"),
            *("encode_kernel", "best_pair", "pack", "measures", "materialize"),
        ),
        lq: ("decompose",),
        scale_search: ("materialize",),
        table_statistics: ("_add_head", "_add_embeddings"),
        variants: ("observe", "divergences"),
    }.items():
        for name in names:
            monkeypatch.setattr(module, name, counting(done, getattr(module, name)))
    return done


@pytest.mark.full
@pytest.mark.parametrize(
    ("method", "flags"),
    [
        ("nf", {"form": "nf4", "weighting": "both"}),
        ("lq", {"form": "nf3", "rank": 3}),
        pytest.param("lq", {"bits": 3.4, "rank": 3, "weighting": "input"}, marks=pytest.mark.slow),
    ],
)
def test_a_quantisation_runs_what_was_counted(method, flags, monkeypatch):
    model = source("gpt2")
    expected = quantized_stages(coded(model.config, method, **flags))
    done = counting_programs(monkeypatch)
    result(model, method, **flags)
    counted = flops.merged(list(expected.values()))
    assert flops.total(counted) == pytest.approx(flops.total(done), rel=1e-6)
    assert counted["select"] == pytest.approx(done["select"], rel=1e-5)


@pytest.mark.full
@pytest.mark.parametrize("weighting", weightings.WEIGHTINGS)
def test_every_weighting_has_stages_seconds_and_memory(weighting):
    config = BLOCKS["qwen3"]
    job = coded(config, "lq", bits=3.4, rank=3, weighting=weighting)
    work = quantized_stages(job)
    assert ("gradients" in work) == (weighting in ("fisher", "both"))
    assert {"predictions", "decomposition"} <= set(work)
    found = seconds(work, RATES)
    assert all(math.isfinite(n) and n > 0 for n in found.values())
    before = shapes.dense_shapes(config).params
    found = peak_memory.memory(job, work, before, before)
    for name, parts in found["in memory"]["parts"].items():
        streamed = found["with a work directory"]["parts"][name]
        assert sum(streamed.values()) <= sum(parts.values())


def test_memory_of_codes_with_a_work_directory_does_not_grow_with_depth():
    def memory(layers):
        config = dataclasses.replace(BLOCKS["qwen3"], num_layers=layers)
        job = coded(config, "nf", form="nf4", weighting="both")
        before = shapes.dense_shapes(config).params
        return peak_memory.memory(job, quantized_stages(job), before, before)

    few, many = memory(8), memory(32)
    weights = nbytes(
        shapes.dense_shapes(dataclasses.replace(BLOCKS["qwen3"], num_layers=32)).params
    )
    grown = {name: many[name]["host"] - few[name]["host"] for name in few}
    assert grown["in memory"] > weights / 2
    assert grown["with a work directory"] < weights / 32


def test_an_elastic_model_is_the_dense_one_with_factors():
    config = BLOCKS["gpt2"]
    check_settings("lord", None)
    settings = {"method": "lord", "keep": None, "ranks": None, "allocation": "global"}
    settings |= {"temperature": None, "prefix": "dense", "factors": None, "dtype": None}
    before = shapes.dense_shapes(config)
    shape = (WINDOWS, LENGTH)
    job, after, sure, _ = job_settings.parse_settings(
        config, before, shape, settings | {"elastic": True}
    )
    assert sure == job_settings.EXACT
    assert nbytes(after) == nbytes(before.params)
    direct, *_ = job_settings.parse_settings(config, before, shape, settings | {"keep": 0.7})
    elastic, one = stages(job), stages(direct)
    for name in ("gradients", "statistics", "factors"):
        assert flops.total(elastic[name]) == flops.total(one[name])
    memory = peak_memory.memory(job, elastic, before.params, after)["with a work directory"]
    assert memory["disk"] > 1.5 * nbytes(after)


# --- several devices ------------------------------------------------------------------------------


def shares(job, count):
    work = stages(job)
    return device_shares.report(device_shares.device_work(job, work, count), work, {})


def job(name="qwen3", windows=16 + 1, **options):
    return CompressionSpec(BLOCKS[name], "lord", windows, 40, gradient_windows=None, **options)


@pytest.mark.quick("qwen3")
@pytest.mark.parametrize("name", ["qwen3", "starcoder2"])
def test_devices_share_all_but_loops(name):
    four = shares(job(name), 4)
    for stage in ("gradients", "statistics"):
        assert len(set(four[stage]["shares"])) == 1
        assert 0.25 < four[stage]["shares"][0] < 0.6  # attention is everybody's
    assert sum(four["factors"]["shares"]) == pytest.approx(1)
    assert min(four["factors"]["shares"]) > 0


def test_one_device_does_it_all():
    for row in shares(job(), 1).values():
        assert row["shares"] == [pytest.approx(1)]


def test_windows_that_do_not_divide_are_everybodys():
    def share(windows, devices):
        return shares(job(windows=windows + 1), devices)["statistics"]["shares"][0]

    assert share(20, 4) > share(16, 4)  # 8, 2 and 8, 2 instead of 8 and 8
    assert share(20, 2) == pytest.approx(share(16, 2))


def test_codes_are_the_first_devices():
    one = coded(BLOCKS["qwen3"], "nf", form="nf4", weighting="input")
    work = quantized_stages(one)
    found = device_shares.report(
        device_shares.device_work(one, work, 4), work, {"decomposition": 2.0}
    )
    row = found["decomposition"]
    assert row["seconds"] == 2.0
    assert row["shares"][0] > row["shares"][1] == row["shares"][3] > 0
    nothing = coded(BLOCKS["qwen3"], "nf", form="nf4")
    parts = device_shares.device_work(nothing, quantized_stages(nothing), 4)["decomposition"]
    assert not any(parts[1:])


def test_the_compiler_leaves_loops_to_every_device():
    """Each device runs all eight loops over sequences and heads, as `device_shares` counts."""
    config, mesh = BLOCKS["qwen3"], make_mesh({"data": 4})
    block = source("qwen3").block(0)
    x = shard_batch(jnp.ones((4, LENGTH, config.hidden_size)), mesh)
    program = observe.lower(block, x, None, {}, config=config, sliding_window=None).compile()
    counts = re.findall(r'known_trip_count":\{"n":"(\d+)"', program.as_text())
    assert set(counts) == {str(4 * config.num_kv_heads)}


def test_memory_of_devices():
    """Hidden states are shared; of what each has there are as many as devices."""
    one = job()
    work, before = stages(one), shapes.dense_shapes(one.config).params
    found = {n: peak_memory.memory(one, work, before, before, n)["in memory"] for n in (1, 2, 4)}
    assert found[1]["device"] == 0  # it is the host's
    assert found[2]["device"] >= found[4]["device"] > 0
    assert found[1]["host"] < found[2]["host"] < found[4]["host"]


def test_a_mesh_that_cuts_blocks_is_not_forecast():
    with pytest.raises(ValueError, match="the cost of an axis other than data cannot be predicted"):
        predict.device_count("data=2,model=2")
    assert predict.device_count("data=4") == 4
    assert predict.device_count(None) == 1


def test_formats_of_estimates_are_those_that_a_budget_mixes():
    used = {o.form for o in coded(BLOCKS["qwen3"], "nf", bits=3.5).options.values()}
    assert used <= set(candidates.FORMATS)
    assert {normal_float.Format.parse("nf4")} == {
        o.form for o in coded(BLOCKS["qwen3"], "nf", form="nf4").options.values()
    }


# --- tables ---------------------------------------------------------------------------------------


def planned(config, method, **flags):
    """The job of some settings, shapes of the original model, and those of the result."""
    before = shapes.stored(config, trees.flatten(shapes.dense_shapes(config).params))
    rest = dict.fromkeys(("keep", "ranks", "allocation", "temperature", "prefix"))
    given = {"method": method, **FLAGS, **rest, **flags}
    spec, after, *_ = job_settings.parse_settings(config, before, (WINDOWS, LENGTH), given)
    return spec, before, after


@pytest.mark.full
@pytest.mark.parametrize("family", ["gpt2", "gpt_neox"])  # a tied head and positions; a head
@pytest.mark.parametrize(
    "flags",
    [
        {"form": "nf4", "embeddings": "nf4"},
        {"form": "nf4", "embeddings": "nf3", "weighting": "none"},
        {"form": "nf4", "embeddings": "bfloat16"},
    ],
)
def test_what_tables_cost_was_counted(family, flags, monkeypatch):
    model = source(family)
    spec, _, after = planned(model.config, "nf", **{"weighting": "both"} | flags)
    ops = quantized_stages(spec)
    for name, work in table_stages(spec).items():
        ops[name] = flops.merged([ops.get(name, Counter()), work])
    done = counting_programs(monkeypatch)
    found = result(model, "nf", **{"weighting": "both"} | flags)
    assert flops.total(flops.merged(list(ops.values()))) == pytest.approx(
        flops.total(done), rel=1e-6
    )
    assert nbytes(after) == found.report["bytes"]
    # A pass over the model has seconds of its own; a dtype needs none.
    passes = flags["embeddings"] == "nf4"
    assert ("tables" in found.report["seconds"]) == passes
    assert ("tables" in table_stages(spec)) == passes


def test_tables_have_seconds_and_memory():
    config = BLOCKS["gpt2"]
    some = {"weighting": "both", "embeddings": "nf4", "dtype": "float32"}
    for method, flags in (
        ("nf", {"form": "nf4", **some}),
        ("auto", {"file_bytes": 40_000, "weighting": "both"}),
        ("lord", {"keep": 0.8, "allocation": "global", "embeddings": "nf8"}),
    ):
        spec, before, after = planned(config, method, **flags)
        found = predict.cost(spec, before, after, RATES)
        assert found["seconds"]["tables"] > 0
        parts = found["memory"]["in memory"]["parts"]["tables"]
        streamed = found["memory"]["with a work directory"]["parts"]["tables"]
        assert parts["device: hidden states"] == streamed["device: hidden states"] > 0
        assert sum(streamed.values()) <= sum(parts.values())


def test_tables_that_stay_cost_nothing():
    spec, *_ = planned(BLOCKS["gpt2"], "nf", form="nf4", weighting="both")
    assert not table_stages(spec)
