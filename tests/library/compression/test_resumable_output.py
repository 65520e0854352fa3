"""A run that is killed anywhere is resumed and ends with the same bits."""

import contextlib
import random

import jax
import numpy as np
import pytest
from interrupted import CONFIG, TOKENS, Killed, small_model

from lordjax.compression import elastic
from lordjax.compression.low_rank import compress
from lordjax.compression.measured import held_out
from lordjax.compression.quantized import prepare_quantized
from lordjax.compression.resumable_output import Output, partial
from lordjax.kernels.normal_float import Format
from lordjax.runtime.mesh import make_mesh
from lordjax.scripts.benchmarks.resume import contents
from lordjax.storage import atomic_directory, checkpoint
from lordjax.storage.disk_store import DiskStore
from lordjax.storage.tensor_files import TensorWriter

IDENTITY = {"made of": "test"}
FORMATS = tuple(Format(bits, 4, "bfloat16", 32, 256) for bits in (2, 4))


def low_rank(**options):
    def run(**given):
        return compress(small_model(), TOKENS, batch_size=5, **options, **given)

    return run


def on_two_devices(**given):
    return low_rank(method="svd-llm", keep=0.6, mesh=make_mesh({"data": 2}))(**given)


def quantized(method, **options):
    def run(*, work=None, into=None):
        prepared = prepare_quantized(
            small_model(), TOKENS, method=method, formats=FORMATS, steps=1, work=work, **options
        )
        return prepared.compress(bits=4.5, into=into)

    return run


# Together these keep every kind of intermediate result: statistics, gradients, held-out losses,
# passes over the compressed model, tables of candidates.
RUNS = {
    "lord": low_rank(method="lord", keep=0.7, allocation="global"),
    "modegpt": low_rank(method="modegpt", keep=0.6),
    "modegpt-published": low_rank(method="modegpt-published", keep=0.6),
    "rom": low_rank(method="rom", keep=0.6),
    "corrective": low_rank(method="lord", keep=0.6, prefix="corrective"),
    "ranks": low_rank(method="svd", ranks={"mlp/down": 5}),
    "mesh": on_two_devices,  # factors two blocks at a time, then the third
    "codes of pairs": low_rank(method="svd", keep=0.6, factors="nf4"),
    "lq": quantized("lq", weighting="fisher", rank=2),
    "auto": quantized("auto"),
}


def make(run, directory):
    with Output(directory, IDENTITY) as output:
        if output.finished is not None:
            output.publish()
            return
        result = run(work=output.store, into=output.shards)
        output.finish(result, hf_config={"model_type": "llama"})


# The other runs keep nothing that these do not keep, or take long (auto: tables of candidates).
QUICK = ("lord", "modegpt-published", "rom", "ranks", "mesh")
KILLED = [pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow) for name in RUNS]


@pytest.mark.quick("ranks")
@pytest.mark.parametrize("name", KILLED)
def test_killed_at_random_writes_it_goes_on_to_the_same_bits(name, tmp_path, monkeypatch):
    """The result is that of a run that was not killed, and of a run in memory."""
    make(RUNS[name], tmp_path / "whole")
    in_memory = RUNS[name]()
    assert ("held_out_check" in in_memory.report) == (name in ("lord", "modegpt"))
    checkpoint.save(
        tmp_path / "memory",
        in_memory.config,
        in_memory.params,
        hf_config={"model_type": "llama"},
        plan=in_memory.plan,
        report=in_memory.report,
    )
    expected = contents(tmp_path / "whole")
    of_memory = elastic.load(tmp_path / "memory")[1]
    same(elastic.load(tmp_path / "whole")[1], of_memory)

    left = [0]

    def killing(function):
        def call(*arguments):
            left[0] -= 1
            if left[0] == 0:
                raise Killed
            return function(*arguments)

        return call

    monkeypatch.setattr(DiskStore, "_record", killing(DiskStore._record))
    monkeypatch.setattr(TensorWriter, "add", killing(TensorWriter.add))
    monkeypatch.setattr(DiskStore, "remove", killing(DiskStore.remove))
    lives, chance = 0, random.Random(name)
    while not (tmp_path / "out").exists() or partial(tmp_path / "out").exists():
        lives += 1
        left[0] = chance.randrange(
            1, 2 ** (lives + 2)
        )  # every life is longer, so that the run ends
        assert lives < 20
        with contextlib.suppress(Killed):
            make(RUNS[name], tmp_path / "out")
    assert lives > 1
    assert contents(tmp_path / "out") == expected


def same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(x, y)


def test_work_is_not_done_again(tmp_path, monkeypatch):
    """Results that a killed process finished are read, not computed again."""
    from lordjax.compression import single_pass

    count = []
    original = single_pass.collect_factors

    def counted(*arguments):
        count.append(arguments[1])
        if len(count) == 10:
            raise Killed
        return original(*arguments)

    monkeypatch.setattr(single_pass, "collect_factors", counted)
    with pytest.raises(Killed):
        make(RUNS["lord"], tmp_path / "out")
    make(RUNS["lord"], tmp_path / "out")
    sites = 7 * CONFIG.num_layers
    assert len(count) == sites + 1 and len(set(count)) == sites


@pytest.mark.full
def test_held_out_losses_are_not_measured_again(tmp_path, monkeypatch):
    """A run that is killed when it writes the model has the check of the killed one."""
    count, measure = [], held_out.compare

    def counted(*arguments, **options):
        count.append(options["stage"])
        return measure(*arguments, **options)

    monkeypatch.setattr(held_out, "compare", counted)
    make(RUNS["lord"], tmp_path / "whole")
    with monkeypatch.context() as killed, pytest.raises(Killed):
        killed.setattr(TensorWriter, "add", lambda *_: (_ for _ in ()).throw(Killed))
        make(RUNS["lord"], tmp_path / "out")
    make(RUNS["lord"], tmp_path / "out")
    assert count == ["held-out check"] * 4  # of sites and of a plan, in two runs
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_a_finished_output_only_takes_its_name(tmp_path, monkeypatch):
    with monkeypatch.context() as killed:
        killed.setattr(atomic_directory, "publish", lambda *_: (_ for _ in ()).throw(Killed))
        with pytest.raises(Killed):
            make(RUNS["ranks"], tmp_path / "out")
    assert not (tmp_path / "out").exists()
    make(None, tmp_path / "out")
    assert (tmp_path / "out" / "config.json").exists()
    assert not partial(tmp_path / "out").exists()


def test_another_run_is_refused_with_the_difference(tmp_path):
    with pytest.raises(Killed), Output(tmp_path / "out", {"keep": 0.7, "x": [1]}) as output:
        output.store["done"] = 1
        raise Killed
    with pytest.raises(ValueError, match=r"started with other settings .*: keep: 0\.7 -> 0\.6"):
        Output(tmp_path / "out", {"keep": 0.6, "x": [1]})


def test_one_output_has_parts_of_one_plan(tmp_path):
    with Output(tmp_path / "out", IDENTITY) as output:
        given = {"work": output.store, "into": output.shards, "method": "svd"}
        compress(small_model(), TOKENS, ranks={"mlp/down": 5}, **given)
        with pytest.raises(ValueError, match="another plan"):
            compress(small_model(), TOKENS, ranks={"mlp/down": 6}, **given)


def test_a_damaged_part_is_named(tmp_path):
    with pytest.raises(Killed), Output(tmp_path / "out", IDENTITY) as output:
        RUNS["ranks"](work=output.store, into=output.shards)
        raise Killed
    file = next(iter((partial(tmp_path / "out") / "model").glob("layer_1-*")))
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(bytes(data))
    with pytest.raises(ValueError, match=r"layer_1-0\.safetensors.*checksum.*start over"):
        make(RUNS["ranks"], tmp_path / "out")


def test_nothing_stays_of_a_run_that_cannot_go_on(tmp_path):
    """A run that finished nothing, or would fail again in the same way, leaves no directory."""
    with pytest.raises(Killed), Output(tmp_path / "out", IDENTITY):
        raise Killed
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError), Output(tmp_path / "out", IDENTITY) as output:
        output.store["done"] = 1
        raise ValueError
    assert not list(tmp_path.iterdir())
    with pytest.raises(OSError), Output(tmp_path / "out", IDENTITY) as output:
        output.store["done"] = 1
        raise OSError
    with pytest.raises(ValueError), Output(tmp_path / "out", IDENTITY) as output:
        assert output.resumed
        raise ValueError
    assert partial(tmp_path / "out").exists()


def test_an_output_that_is_taken_is_refused(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "file").write_text("precious")
    with pytest.raises(FileExistsError):
        Output(tmp_path / "out", IDENTITY)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
