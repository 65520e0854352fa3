"""JAX as strict as it gets, on several CPU devices, before any test imports it."""

import os
import time
from fnmatch import fnmatch
from pathlib import Path

from flags import faster

os.environ["XLA_FLAGS"] = " ".join(
    [
        os.environ.get("XLA_FLAGS", ""),
        "--xla_force_host_platform_device_count=4",
        *faster(),
    ]
)
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Also in commands that run in processes of their own; what is measured runs elsewhere.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "true")
# What commands compile in processes of their own is not left behind.
os.environ.setdefault("JAX_ENABLE_COMPILATION_CACHE", "false")
# Small matrices in as many processes as cores: threads of BLAS and torch would wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import jax
import pytest

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_default_matmul_precision", "highest")

MAPPINGS = Path("/proc/self/maps")
counted = time.monotonic()


def pytest_configure(config):
    """Coverage is that of the whole quick tier: unasked, nothing else counts it."""
    given = [str(argument) for argument in config.invocation_params.args]
    chosen = config.option.collectonly or config.args_source is pytest.Config.ArgsSource.ARGS
    chosen |= any(argument.startswith(("-k", "-m", "--lf", "--ff")) for argument in given)
    asked = any(argument.startswith("--cov") for argument in given)
    coverage = config.pluginmanager.getplugin("_cov")
    if coverage and chosen and not asked:
        config.option.no_cov = coverage.options.no_cov = True


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Marks those parameters of a ``quick`` test as ``full`` that its mark does not name."""
    for item in items:
        for mark in item.iter_markers("quick"):
            if not any(fnmatch(item.callspec.id, pattern) for pattern in mark.args):
                item.add_marker("full")


@pytest.fixture(autouse=True)
def forget_programs():
    """Every compiled program holds memory mappings, and Linux allows a process 65530 of them.

    Ten thousand take 10 ms to count, so they are counted every two seconds.
    """
    global counted
    yield
    if time.monotonic() - counted > 2 and MAPPINGS.exists():
        counted = time.monotonic()
        if MAPPINGS.read_bytes().count(b"\n") > 30_000:
            jax.clear_caches()


@pytest.fixture(autouse=True, scope="module")
def forget_programs_of_other_files():
    """What one file compiles no other uses; clearing keeps memory low."""
    yield
    jax.clear_caches()


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """A random Llama with a byte-level tokenizer, as a Hugging Face directory."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    directory = tmp_path_factory.mktemp("tiny")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {"<end>": 0} | {c: i for i, c in enumerate(alphabet, 1)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>")
    fast.save_pretrained(directory)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(vocab),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("".join(f"def f{i}(x):\n    return x + {i * i}\n" for i in range(200)))
    return path


@pytest.fixture(scope="session")
def compressed(tiny, text, tmp_path_factory):
    """The tiny model at keep 0.5, and what the command printed."""
    out = tmp_path_factory.mktemp("compressed") / "model"
    from commands import calibration, run

    result = run("compress", tiny, out, *calibration(text), "--keep", "0.5", "--json")
    assert result.exit_code == 0, result.stderr
    return out, result
