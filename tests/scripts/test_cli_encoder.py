"""The command line on encoders: the mask token, the ends of sequences, heads without perplexity."""

import json
import shutil

import numpy as np
import pytest
from click.testing import CliRunner

from lordjax.scripts.cli import cli

pytest.importorskip("torch")
WINDOW = 32
SPECIAL = ["<s>", "<pad>", "</s>", "<mask>"]


def save_tokenizer(directory, special):
    """A byte-level tokenizer with these tokens first."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {name: i for i, name in enumerate([*special, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(directory)
    return len(vocab)


def save_model(directory, head, special=SPECIAL, **options):
    """A random RoBERTa as a Hugging Face directory. Only names say what its tokens are."""
    import torch
    import transformers

    torch.manual_seed(0)
    config = transformers.RobertaConfig(
        vocab_size=save_tokenizer(directory, special),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=66,
        type_vocab_size=1,
        **options,
    )
    getattr(transformers, f"Roberta{head}")(config).save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def masked(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("masked"), "ForMaskedLM")


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("".join(f"def f{i}(x):\n    return x + {i * i}\n" for i in range(200)))
    return path


def run(*arguments):
    return CliRunner().invoke(cli, [str(a) for a in arguments], catch_exceptions=False)


def good(*arguments):
    result = run(*arguments, "--json")
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


def fails(message, *arguments):
    result = run(*arguments)
    assert result.exit_code == 2, result.output
    assert message in result.stderr.strip().splitlines()[-1]


def calibration(path):
    return "--calibration", path, "--samples", 6, "--seq-len", WINDOW


def evaluation(path):
    return "--tokens", path, "--windows", 3, "--seq-len", WINDOW


def test_perplexity_of_a_masked_model(masked, text):
    result = good("evaluate", masked, *evaluation(text))
    protocol = result["protocol"]
    assert protocol["mask_token"] == SPECIAL.index("<mask>")
    assert protocol["window"] == WINDOW
    assert protocol["bos"]
    assert result["tokens"] == 3 * round(protocol["masked_share"] * WINDOW)
    assert run("evaluate", masked, *evaluation(text)).stdout.startswith("pseudo-perplexity ")


def test_windows_begin_and_end_like_sequences(masked, text):
    from lordjax.scripts.opened_model import open_model
    from lordjax.scripts.token_inputs import read_tokens

    tokens, facts = read_tokens(open_model(str(masked)), str(text), seq_len=9, samples=2, seed=0)
    assert tokens.shape == (2, 9)
    assert (tokens[:, 0] == 0).all()
    assert (tokens[:, -1] == 2).all()
    assert facts["sequence_ends"] == [0, 2]


@pytest.mark.quick("method0")
@pytest.mark.parametrize(
    "method",
    [
        ("modegpt", "--keep", 0.6),
        ("lord", "--keep", 0.6),
        pytest.param(("auto", "--bits", 6), marks=pytest.mark.slow),
    ],
)
def test_compress_inspect_evaluate(masked, text, tmp_path, method):
    name, *budget = method
    out = tmp_path / "model"
    summary = good("compress", masked, out, *calibration(text), "--method", name, *budget)
    assert summary["calibration"]["masked_share"] == 0.15
    assert summary["calibration"]["mask_token"] == SPECIAL.index("<mask>")
    small, dense = good("inspect", out), good("inspect", masked)
    assert small["bytes"] < dense["bytes"]
    assert small["config"] == dense["config"]
    before, after = (good("evaluate", model, *evaluation(text)) for model in (masked, out))
    assert np.isfinite(after["perplexity"])
    assert after["perplexity"] != before["perplexity"]
    unlike = {"tokenizer", "dtype"}
    assert {k: v for k, v in after["protocol"].items() if k not in unlike} == {
        k: v for k, v in before["protocol"].items() if k not in unlike
    }


def test_no_mask_token(masked, text, tmp_path):
    other = save_model(tmp_path / "model", "ForMaskedLM", ["<s>", "<pad>", "</s>", "<end>"])
    fails("has no mask_token", "evaluate", other, *evaluation(text))
    fails("has no mask_token", "compress", other, tmp_path / "out", *calibration(text))
    bare = tmp_path / "no tokenizer"
    shutil.copytree(masked, bare, ignore=shutil.ignore_patterns("*token*", "special*"))
    np.save(tmp_path / "ids.npy", np.full((5, 20), 7))
    fails("no tokenizer", "evaluate", bare, "--tokens", tmp_path / "ids.npy")
    assert not (tmp_path / "out").exists()


@pytest.mark.full
def test_a_classifier_is_compressed_but_has_no_perplexity(text, tmp_path):
    model = save_model(tmp_path / "in", "ForSequenceClassification", num_labels=3)
    out = tmp_path / "out"
    summary = good("compress", model, out, *calibration(text), "--keep", 0.6)
    assert summary["kept"] <= 0.6
    assert good("inspect", out)["config"]["num_classes"] == 3
    fails("head 'classes' predicts no tokens", "evaluate", out, *evaluation(text))
