"""The public functions on arrays under ``jax.pmap``, on as many devices as there are.

Run by `test_mesh` in a process of its own, which has 8 emulated ones, with names of `CASES` as
arguments, or for all. Prints what differs.
"""

import dataclasses
import sys
import warnings

import jax
import jax.numpy as jnp
import numpy as np
from blocks import GPT2, random_model
from problems import METHOD_NAMES, inputs, problems

from lordjax import encode, factorize, nbytes
from lordjax.calibration.observers import embed, observe, observe_gradients
from lordjax.calibration.statistics import STATISTICS
from lordjax.finetune import adapters
from lordjax.kernels import base, kinds, normal_float
from lordjax.methods import METHODS, column_selection, linalg
from lordjax.methods.quantized import lq, weightings
from lordjax.models import Transformer, objective
from lordjax.models.sites import LINEAR_SITES

CONFIG = dataclasses.replace(GPT2, num_layers=1)
MODEL = random_model(CONFIG).params
FORM = normal_float.Format.parse("nf4")
SIDE = 16
TAP = next(site.input_tap for site in LINEAR_SITES)


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def tree(seed):
    return {"up": {"kernel": normal(seed, 24, SIDE), "bias": normal(seed + 1, SIDE)}}


def gram(seed):
    return linalg.gram(normal(seed, 40, SIDE))


def model(seed):
    tokens = jax.random.randint(jax.random.key(seed), (2, 12), 0, CONFIG.vocab_size)
    return jax.tree.map(lambda a: a * (1 + seed / 100), MODEL), tokens


def compressed_logits(params, tokens):
    new = encode(factorize(params, keep=0.5, where="mlp/.*kernel$"), where="attention/./kernel$")
    return Transformer(CONFIG).apply({"params": new}, tokens)


def statistics(params, tokens):
    """Statistics of the activations and gradients of a block."""
    x = embed(params, tokens, config=CONFIG)
    given = {"config": CONFIG, "sliding_window": None}
    width = CONFIG.hidden_size
    stats = {f"{TAP}:moments": STATISTICS["moments"].zeros(width)}
    y, stats = observe(params["layer_0"], x, None, stats, **given)
    back = objective.loss_gradient(params, y, jnp.roll(tokens, -1, axis=1), config=CONFIG)
    fisher = {"fisher": {"attention/q/kernel": jnp.zeros((width, width))}}
    return stats, observe_gradients(params["layer_0"], x, None, back, {}, fisher, **given)


def merged(params):
    tuned = adapters.add_adapters(params, rank=2, key=jax.random.key(0), where="kernel$")
    return adapters.merge(tuned)


def decomposed(kernel):
    found = lq.decompose(kernel, jnp.asarray(2), weightings.Weights(), form=FORM, width=2, steps=2)
    return found.error, found.left @ found.right


def taken(kind):
    """A statistic of batches with weights."""
    width = (2, SIDE // 2) if kind == "heads" else SIDE

    def run(x, weights):
        x = (x, x + 1) if kind == "influence" else x
        return STATISTICS[kind].zeros(width).update(x, weights)

    return run, lambda s: (normal(s, 3, 7, SIDE), jax.random.uniform(jax.random.key(s), (3, 7)))


ON_GRAMS = {
    "root_pair": lambda a: linalg.root_pair(a, 0.01),
    "eigenvalues": lambda a: linalg.eigh_descending(a)[0],
    "jittered": lambda a: linalg.jittered(a, 1e-6, 1.0),
    "lower_inverse": lambda a: linalg.lower_inverse(jnp.linalg.cholesky(a)),
    "inverse_psd": column_selection.inverse_psd,
    "leverage_complement": lambda a: column_selection.leverage_complement(a, 0.1),
}
ON_GRAMS_AND_KERNELS = {
    "solve_psd": lambda a, b: linalg.solve_psd(a, b, 0.01),
    "nested_refit": column_selection.nested_refit,
    "elimination_order": column_selection.elimination_order,
    "metric_pca": lambda a, b: linalg.metric_pca(b.T, a)[2],
}
# Name -> what runs on a device, and its arguments on device number k.
CASES = {
    "factorize": (lambda t: base.materialize(factorize(t, rank=4)), lambda s: (tree(s),)),
    "encode": (lambda t: base.materialize(encode(t)), lambda s: (tree(s),)),
    "nbytes": (lambda t: jnp.asarray(nbytes(factorize(t, rank=4))), lambda s: (tree(s),)),
    "matmul": (
        lambda x, t: base.matmul(x, encode(factorize(t, rank=4), "nf8")["up"]["kernel"]),
        lambda s: (normal(s, 5, 24), tree(s)),
    ),
    "astype": (lambda t: kinds.astype(factorize(t, rank=4), jnp.bfloat16), lambda s: (tree(s),)),
    "merge": (merged, lambda s: (tree(s),)),
    "nf": (
        lambda x: normal_float.dequantize_packed(normal_float.quantize_packed(x, FORM), FORM, 100),
        lambda s: (normal(s, 100),),
    ),
    "decompose": (decomposed, lambda s: (normal(s, 24, 64),)),
    "row_space": (linalg.row_space, lambda s: (normal(s, 8, SIDE),)),
    "orthonormal_rows": (linalg.orthonormal_rows, lambda s: (normal(s, 8, SIDE),)),
    "Transformer": (compressed_logits, model),
    "observe": (statistics, model),
}
CASES |= {name: (fn, lambda s: (gram(s),)) for name, fn in ON_GRAMS.items()}
CASES |= {
    name: (fn, lambda s: (gram(s), normal(s, SIDE, 8))) for name, fn in ON_GRAMS_AND_KERNELS.items()
}
CASES |= {f"stats.{kind}": taken(kind) for kind in STATISTICS}
CASES |= {
    f"METHODS.{name}": (
        lambda *given, factor=METHODS[name].factor: factor(*given).spectrum,
        lambda s: inputs((24, SIDE), s),
    )
    for name in METHOD_NAMES
}


def modules():
    """Those of every method, as `CASES`."""
    given = problems()
    for name, method in METHODS.items():
        for kind, module in method.modules.items():
            arrays, stats = given[kind]
            stats = {need: stats[need] for need in module.needs}
            arguments = jax.tree.map(jnp.asarray, (dict(arrays), stats))
            yield f"METHODS.{name}.{kind}", (module.factor, lambda s, a=arguments: a)


def differs(run, arguments):
    """How results on devices differ from those alone, relative to the largest; all of them."""
    count = jax.device_count()
    given = [arguments(seed) for seed in range(count)]
    many = jax.pmap(run)(*jax.tree.map(lambda *a: jnp.stack(a), *given))
    single = jax.jit(run)
    worst = 0.0
    for k in (0, count - 1):
        alone = single(*given[k])
        for a, b in zip(*map(jax.tree.leaves, (many, alone)), strict=True):
            assert len(a.sharding.device_set) == count
            a, b = np.asarray(a[k], float), np.asarray(b, float)
            worst = max(worst, np.abs(a - b).max() / max(np.abs(b).max(), 1e-30))
    return worst


def in_float64():
    with jax.enable_x64(True):
        return {name: differs(*case) for name, case in modules()}


def main():
    # It wraps shard_map, and says that it will go; users have such pipelines.
    warnings.filterwarnings("ignore", ".*pmap.*", DeprecationWarning)
    jax.config.update("jax_disable_most_optimizations", True)
    jax.config.update("jax_default_matmul_precision", "highest")
    chosen = sys.argv[1:]
    found = {name: differs(*CASES[name]) for name in chosen or CASES}
    if not chosen:
        found |= in_float64()
    wrong = {name: worst for name, worst in found.items() if not worst < 1e-3}
    print(f"{len(found)} functions on {jax.device_count()} devices", wrong or "")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
