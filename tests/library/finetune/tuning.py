"""A tiny model, its examples, and every kind of kernel with trainable arrays."""

import jax
import jax.numpy as jnp
import numpy as np

from lordjax.data.examples import Examples, next_tokens
from lordjax.finetune import adapters, recipes, step
from lordjax.kernels import trees
from lordjax.kernels.convert import encode, factorize
from lordjax.models import ModelConfig

CONFIG = ModelConfig(
    vocab_size=61,
    hidden_size=32,
    mlp_size=48,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_size=8,
    max_positions=32,
    tie_embeddings=True,
)

BLOCKS = r"layer_\d+/.*/kernel$"


def examples(count=8, length=16, seed=0):
    tokens = np.random.default_rng(seed).integers(0, CONFIG.vocab_size, (count, length), np.int32)
    return Examples(tokens, next_tokens(tokens, np.ones(tokens.shape, bool)))


def quantized(params):
    return encode(params, "nf4", where=BLOCKS)


# Every kind of kernel that something is trained in: how it is made, and what is trained.
KINDS = {
    "matrices": (lambda p: p, r"/kernel$"),
    "pairs": (lambda p: factorize(p, keep=0.6, where=BLOCKS), recipes.FACTORS),
    "over matrices": (lambda p: p, recipes.ADAPTERS),
    "over pairs": (lambda p: factorize(p, keep=0.6, where=BLOCKS), recipes.ADAPTERS),
    "over codes": (quantized, recipes.ADAPTERS),
    "over pairs of codes": (
        lambda p: adapters.quantize_bases(factorize(p, keep=0.6, where=BLOCKS), "nf4"),
        recipes.ADAPTERS,
    ),
    "norms": (quantized, r"norm/scale$"),
}


def made(params, kind):
    """Returns a model and the paths of the trained arrays; its adapters are not 0."""
    make, pattern = KINDS[kind]
    new = make(params)
    if pattern == recipes.ADAPTERS:
        new = adapters.add_adapters(new, rank=3, key=jax.random.key(1))
        rng = np.random.default_rng(2)
        noise = {p: rng.normal(size=a.shape) for p, a in trees.arrays(new).items()}
        leaves, structure = jax.tree.flatten(new)
        pairs = zip(trees.arrays(new), leaves, strict=True)
        moved = [
            jnp.asarray(0.1 * noise[p], a.dtype) if p.endswith("low_rank/right") else a
            for p, a in pairs
        ]
        new = jax.tree.unflatten(structure, moved)
    return new, adapters.trainable(new, (pattern,))


def steps(params, recipe, settings, data=None, **options):
    """Returns the trained arrays and metrics of every step."""
    data = examples() if data is None else data
    setup = step.prepare_training(CONFIG, params, recipe, settings)
    given = (setup.state, setup.frozen, data, setup.optimizer, settings)
    run = step.run(CONFIG, *given, **options)
    return [(jax.tree.map(np.array, state.params), metrics) for state, metrics in run]


def losses(found):
    return np.array([metrics["loss"] for _, metrics in found])
