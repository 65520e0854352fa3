"""The estimated memory of a training step, compared with the compiler's numbers."""

import dataclasses
import functools

import jax
import pytest
from tuning import CONFIG

from lordjax.finetune import memory, recipes
from lordjax.finetune.recipes import RECIPES
from lordjax.finetune.step import Settings
from lordjax.kernels import trees
from lordjax.models import init


@pytest.mark.full
@pytest.mark.parametrize("recipe", ["full", "qlora"])
def test_memory_is_about_what_the_compiler_lays_out(recipe):
    """The model's hidden states are larger than anything that the estimate leaves out."""
    config = dataclasses.replace(
        CONFIG, hidden_size=256, mlp_size=768, num_heads=8, num_kv_heads=4, head_size=32
    )
    row = recipes.changed(RECIPES[recipe], rank=8 if RECIPES[recipe].rank else None)

    def sizes(layers):
        own = dataclasses.replace(config, num_layers=layers)
        shapes = jax.eval_shape(lambda: init(own, jax.random.key(0)))
        given = (own, shapes, row, Settings(1, 4, 4), 256)
        return memory.predict(*given), memory.compiled_bytes(*given)

    said, found = sizes(3)
    state = 3 / memory.COPIES * said["trained"]  # parameters and moments
    assert said["base"] + state == pytest.approx(found["arguments"], rel=0.01)
    if recipe == "full":
        assert 0.7 < said["total"] / found["total"] < 1.3


@pytest.mark.slow
def test_dequantized_matrices_do_not_pile_up():
    """Each quantized block adds no more memory to a step than a dense one does."""
    config = dataclasses.replace(CONFIG, hidden_size=256, mlp_size=768, head_size=64)
    quantized = recipes.changed(RECIPES["qlora"], rank=2)
    added = {}
    for name, row in (
        ("codes", quantized),
        ("matrices", dataclasses.replace(quantized, codes=None)),
    ):
        sizes = []
        for layers in (2, 5):
            own = dataclasses.replace(config, num_layers=layers)
            shapes = jax.eval_shape(functools.partial(init, own), jax.random.key(0))
            sizes.append(
                memory.compiled_bytes(own, shapes, row, Settings(1, 4, 4), 16)["temporaries"]
            )
        added[name] = sizes[1] - sizes[0]
    arrays = trees.arrays(shapes)
    block = sum(4 * a.size for path, a in arrays.items() if path.startswith("layer_0/"))
    assert added["codes"] - added["matrices"] < 0.5 * 3 * block


@pytest.mark.full
def test_remat_holds_the_inside_of_one_block():
    """Compiles with optimization, which would merge two copies of one computation."""
    config = dataclasses.replace(CONFIG, hidden_size=64, mlp_size=1024)
    row, sizes = recipes.changed(RECIPES["lora"], rank=2), []
    jax.config.update("jax_disable_most_optimizations", False)
    try:
        for layers in (2, 5):
            own = dataclasses.replace(config, num_layers=layers)
            shapes = jax.eval_shape(functools.partial(init, own), jax.random.key(0))
            sizes.append(
                memory.compiled_bytes(own, shapes, row, Settings(1, 4, 1), 256)["temporaries"]
            )
    finally:
        jax.config.update("jax_disable_most_optimizations", True)
    hidden = 4 * 256 * config.mlp_size * 4
    assert (sizes[1] - sizes[0]) / 3 < hidden  # of which a block has three
