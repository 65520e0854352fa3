"""Synthetic checkpoints: the shapes of released models, opened by transformers and by us."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from click.testing import CliRunner

from lordjax.conversions.families.registry import model_config
from lordjax.conversions.readers.checkpoint import open_checkpoint
from lordjax.forecast.shapes import dense_shapes
from lordjax.models import transformer
from lordjax.scripts.make_checkpoint import config_like, main, make, matrix

# Released numbers of parameters, in billions.
PARAMETERS = {"llama-2-7b": 6.738, "llama-2-13b": 13.016, "llama-2-70b": 68.977}
SMALL = {"layers": 2, "shrink": 32, "vocabulary": 96}


@pytest.mark.parametrize(("like", "billions"), PARAMETERS.items())
def test_the_whole_model_has_the_released_number_of_parameters(like, billions):
    source = dense_shapes(model_config(config_like(like)))
    trees = [source.non_block_params(), *(source.block(i) for i in range(source.config.num_layers))]
    count = sum(leaf.size for leaf in jax.tree.leaves(trees))
    assert round(count / 1e9, 3) == billions


# Their numbers of key/value heads allow no more.
@pytest.mark.quick("llama-2-7b-32")
@pytest.mark.parametrize(
    ("like", "shrink"), [("llama-2-7b", 32), ("llama-2-70b", 8), ("starcoder-16b", 24)]
)
def test_transformers_and_we_open_the_same_model(like, shrink, tmp_path):
    out = tmp_path / "model"
    total = make(out, like, **{**SMALL, "shrink": shrink}, dtype="float32")
    stored = sum(file.stat().st_size for file in out.glob("*.safetensors"))
    assert total <= stored < total + 10_000
    opened = open_checkpoint(out)
    assert opened.config.num_layers == 2
    ids = np.random.default_rng(0).integers(0, 96, (1, 12))
    ours = transformer.Transformer(opened.config).apply(
        {"params": opened.params(np.float32)}, jnp.asarray(ids)
    )
    theirs = transformers.AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    with torch.inference_mode():
        expected = theirs(torch.from_numpy(ids)).logits.numpy()
    assert expected.std() > 0.01
    np.testing.assert_allclose(np.asarray(ours), expected, atol=1e-4 * np.abs(expected).max())


def test_spectra_have_a_head_and_a_tail():
    found = matrix(np.random.default_rng(0), (512, 384), 1)
    noise = np.random.default_rng(0).standard_normal((512, 384))
    for a, lowest, highest in ((found, 0.3, 0.95), (noise, 0.0, 0.3)):
        energy = np.linalg.svd(a, compute_uv=False) ** 2
        assert lowest < energy[:38].sum() / energy.sum() < highest


def test_a_seed_says_everything(tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        make(tmp_path / name, "llama-2-7b", **SMALL, seed=seed)
    files = [(tmp_path / name / "model-layer_1.safetensors").read_bytes() for name in "abc"]
    assert files[0] == files[1] != files[2]


def test_blocks_differ(tmp_path):
    make(tmp_path / "a", "llama-2-7b", **SMALL)
    opened = open_checkpoint(tmp_path / "a")
    first, second = (opened.block(i)["mlp"]["up"]["kernel"] for i in range(2))
    assert not np.array_equal(first, second)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--like", "llama-2-7b", "--shrink", "3"], "hidden_size 4096 cannot be divided"),
        (["--like", "gpt-5"], "is not one of"),
        (["--like", "llama-2-7b", "--layers", "0"], "not in the range"),
    ],
)
def test_wrong_arguments(arguments, message, tmp_path):
    result = CliRunner().invoke(main, [str(tmp_path / "x"), *arguments])
    assert result.exit_code != 0 and message in result.output
    assert not (tmp_path / "x").exists()


def test_nothing_is_written_over(tmp_path):
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "file").touch()
    result = CliRunner().invoke(main, [str(tmp_path / "x"), "--like", "llama-2-7b"])
    assert result.exit_code != 0 and "exists" in result.output
