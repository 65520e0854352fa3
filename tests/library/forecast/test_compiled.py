"""Jobs as they are compiled for a GPU: what is recorded, how bytes and time follow from it."""

import dataclasses
import math
import os

import jax
import jax.numpy as jnp
import pytest
from blocks import SMALL

from lordjax.finetune.recipes import changed, named
from lordjax.finetune.step import Settings
from lordjax.forecast.compiled import roofline
from lordjax.forecast.compiled.programs import Compiled, extrapolated
from lordjax.forecast.compiled.stages import _Total, program_name
from lordjax.forecast.compiled.whole_models import begun_shapes, shallow
from lordjax.forecast.compiled.worker import Task
from lordjax.forecast.job import CompressionSpec
from lordjax.forecast.job_settings import plan_or_estimate
from lordjax.forecast.low_rank_cost import stages
from lordjax.forecast.shapes import dense_shapes, outline
from lordjax.runtime import flops, gpu_compiler
from lordjax.runtime.cards import CARDS
from lordjax.runtime.hlo import ProgramFacts

WORKER = "lordjax.forecast.compiled.worker"
CARD = CARDS["h200"]


def job(method):
    return CompressionSpec(SMALL, method, 8, 16)


def test_every_operation_of_a_job_belongs_to_a_recorded_program():
    spec = job("lord")
    plain = stages(spec)
    with flops.recorded() as programs:
        found = stages(spec)
    assert flops.mode() == (jax.default_backend(), False)
    for stage in ("statistics", "factors"):
        runs = {kind: n for kind, n in found[stage].items() if kind.startswith(flops.RUNS)}
        assert runs
        total = sum(n * flops.total(programs[kind].ops) for kind, n in runs.items())
        assert total == pytest.approx(flops.total(found[stage]), rel=1e-6)
        assert flops.total(found[stage]) == flops.total(plain[stage])
    names = {program_name(programs[kind]) for kind in found["factors"] if kind in programs}
    assert "factor_program" in names
    assert all(
        programs[k].x64
        for k in found["factors"]
        if k in programs and "factor_" in program_name(programs[k])
    )


def test_time_is_bound_by_operations_bytes_or_what_is_sent():
    ops = flops.OpCounts({"product bfloat16": 989 * 10**12})
    assert roofline.least_seconds(CARD, ops, 0, {}) == pytest.approx(1)
    assert roofline.least_seconds(CARD, ops, 2 * CARD.bandwidth, {}) == pytest.approx(2)
    sent = {"all-reduce": int(3 * CARD.link)}
    assert roofline.least_seconds(CARD, ops, 2 * CARD.bandwidth, sent) == pytest.approx(3)


def test_precision_decides_the_rate_of_float32():
    fast, exact = (roofline.rate(CARD, f"product float32{how}") for how in ("", " highest"))
    assert (fast, exact) == (CARD.rates["tf32"], CARD.rates["float32"])
    assert roofline.rate(CARD, "cholesky float32") == CARD.rates["float32"]
    assert roofline.rate(CARD, "exp") is None


def test_an_eigendecomposition_takes_what_its_tridiagonalization_takes():
    """4/3 n³ operations at 3 % of the peak are nine tenths of the time."""
    n = 4096
    seconds = 4 / 3 * n**3 / (0.03 * CARD.rates["float64"]) / 0.9
    counted = flops.OpCounts({f"eigh float64 {n}": 9 * n**3})
    assert roofline.computing_seconds(CARD, counted) == pytest.approx(seconds)


def test_numbers_of_all_blocks_lie_on_a_line():
    assert extrapolated(10, 13, (2, 3), 32) == 100
    assert extrapolated(7, 7, (2, 3), 80) == 7


def test_a_shallow_model_has_the_first_blocks():
    config = dataclasses.replace(SMALL, num_layers=5)
    few, params = shallow(config, dense_shapes(config).params, 2)
    assert few.num_layers == 2
    assert {name for name in params if name.startswith("layer_")} == {"layer_0", "layer_1"}
    state, _ = begun_shapes(few, params, 3, 16)
    assert state.token.shape == (3,) and set(state.cache) == {"layer_0", "layer_1"}
    assert {leaf.shape[2] for leaf in jax.tree.leaves(state.cache)} == {16}


def task(method, count):
    spec = job(method)
    plan, _ = plan_or_estimate(spec.config, method, 0.7, None, "uniform")
    params = dense_shapes(spec.config).params
    tuned = changed(named("lora"), rank=4), Settings(1, 2, 1)
    return Task(spec, CARD, count, params, outline(spec.config, plan), 2, tuned)


@pytest.mark.gpu_compile
@pytest.mark.parametrize("count", [1, 2])
def test_a_job_is_compiled_in_a_process_of_its_own(count):
    stages = gpu_compiler.run_apart(WORKER, task("lord", count))
    assert {"statistics", "factors", "decoding", "fine-tuning"} <= stages.keys()
    for row in stages.values():
        assert row["fits"] and row["seconds"] > 0 and row["launches"] > 0
        parts = sum(row[name] for name in ("arguments", "outputs", "temporaries"))
        assert row["bytes"] == parts + row.get("resident", 0)
    assert any("syevd" in name for name in stages["factors"]["calls"])
    # Devices that split a batch send sums of statistics, and nothing else.
    sent = stages["statistics"]["collectives"]
    assert set(sent) == (set() if count == 1 else {"all-reduce"})
    assert stages["factors"]["collectives"] == {}
    assert jnp.ones(1).devices().pop().platform == "cpu"


DECODING = """
from lordjax.forecast.compiled.programs import Compiler
from lordjax.forecast.compiled.whole_models import decoding
from lordjax.runtime import target
from lordjax.runtime.gpu_compiler import absent_mesh, answer

def run(task):
    spec, params, card, batch, length = task
    with target.absent_gpus():
        compiler = Compiler(absent_mesh(card, 1), spec)
        return decoding(spec.config, params, compiler, card, batch, length)

answer(run)
"""


@pytest.mark.gpu_compile
@pytest.mark.parametrize("method", [None, "lord"])
@pytest.mark.parametrize("batch", [1, 8])
def test_decoding_moves_little_more_than_weights_and_cache(monkeypatch, tmp_path, method, batch):
    (tmp_path / "decoding_apart.py").write_text(DECODING)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    sizes = {"hidden_size": 2048, "mlp_size": 5632, "num_heads": 16, "num_kv_heads": 16}
    config = dataclasses.replace(
        SMALL, **sizes, head_size=128, num_layers=4, vocab_size=1000, tie_embeddings=False
    )
    params = dense_shapes(config).params
    if method is not None:
        plan, _ = plan_or_estimate(config, method, 0.8, None, "uniform")
        params = outline(config, plan)

    def shape(a):  # multiples of 64: where no product is timed, the compiler pads others
        return jax.ShapeDtypeStruct(tuple(n // 64 * 64 or n for n in a.shape), jnp.bfloat16)

    params = jax.tree.map(shape, params)
    given = CompressionSpec(config, "lord", 8, 1024), params, CARD, batch, 1024
    found = gpu_compiler.run_apart("decoding_apart", given)
    cache = 2 * 4 * batch * 1024 * 16 * 128
    weights = sum(math.prod(a.shape) for a in jax.tree.leaves(params)) - 960 * 2048
    assert found["moved"] < 1.1 * 2 * (cache + weights)


def test_what_is_held_counts_where_a_program_takes_less_of_it():
    """One fold's statistics are arguments of a program; those of the others stay beside it."""
    program = flops.Program(len, (), False, None, flops.OpCounts())
    facts = ProgramFacts()
    total = _Total(CARD, held=100.0)
    total.add(program, Compiled(90, 0, 5, facts), 1.0)
    total.add(program, Compiled(20, 0, 30, facts), 1.0)  # 100 held and 30
    assert total.report()["temporaries"] == 30
    total.add(program, Compiled(150, 0, 1, facts), 1.0)
    assert total.report()["arguments"] == 150
