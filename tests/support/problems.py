"""Problems for methods, with every statistic that one may ask for, and sizes of plans."""

import jax
import jax.numpy as jnp
import numpy as np

from lordjax.calibration.statistics import AbsMean, HeadMoments, Moments, SecondMoment
from lordjax.methods import METHODS, linalg
from lordjax.models.rope import rotate

METHOD_NAMES = sorted(name for name, method in METHODS.items() if method.factor is not None)


def inputs(shape, seed=0):
    """A kernel and every statistic that a method may ask for."""
    rng = np.random.default_rng(seed)
    kernel = jnp.asarray(rng.normal(size=shape), jnp.float32)
    x = jnp.asarray(rng.normal(size=(300, shape[0])) + 0.5, jnp.float32)
    g = jnp.asarray(rng.normal(size=(300, min(shape))), jnp.float32)
    stats = {
        "input": Moments.zeros(shape[0]).update(x),
        "abs_mean": AbsMean.zeros(shape[0]).update(x),
        "row_fisher": jnp.asarray(rng.uniform(0.5, 2, shape[0]), jnp.float32),
        "gradients": Moments.zeros(min(shape)).update(g),
    }
    return kernel, stats


def degenerate(shape=(24, 16)):
    """What is wrong -> a kernel and every statistic of `inputs`, without NaN in a valid model."""
    rng = np.random.default_rng(5)
    kernel = rng.normal(size=shape)
    x, g = rng.normal(size=(300, shape[0])) + 0.5, rng.normal(size=(300, min(shape)))
    dead = np.arange(shape[0]) % 3 == 0

    def stats(x, g, fisher=None):
        x, g = jnp.asarray(x, jnp.float32), jnp.asarray(g, jnp.float32)
        fisher = jnp.ones(shape[0]) if fisher is None else jnp.asarray(fisher, jnp.float32)
        return {
            "input": Moments.zeros(shape[0]).update(x),
            "abs_mean": AbsMean.zeros(shape[0]).update(x),
            "row_fisher": fisher,
            "gradients": Moments.zeros(min(shape)).update(g),
        }

    none = np.zeros(shape[0])
    cases = {
        "a kernel of zeros": (np.zeros(shape), stats(x, g)),
        "equal rows": (np.repeat(kernel[:1], shape[0], axis=0), stats(x, g)),
        "equal columns": (np.repeat(kernel[:, :1], shape[1], axis=1), stats(x, g)),
        "inputs of zeros": (kernel, stats(0 * x, g)),
        "dead inputs": (kernel, stats(np.where(dead, 0, x), g, np.where(dead, 0, 1))),
        "a constant input": (kernel, stats(np.where(dead, 7.0, x), g)),
        "one token": (kernel, stats(np.repeat(x[:1], 300, axis=0), g)),
        "no gradients": (kernel, stats(x, 0 * g, none)),
        "nothing": (np.zeros(shape), stats(0 * x, 0 * g, none)),
    }
    return {name: (jnp.asarray(k, jnp.float32), own) for name, (k, own) in cases.items()}


def moments(x):
    return Moments.zeros(x.shape[1], jnp.float64).update(jnp.asarray(x))


def heads(x):
    """Moments of ``[tokens, heads, d]``."""
    return HeadMoments.zeros(x.shape[1:], jnp.float64).update(jnp.asarray(x.reshape(len(x), -1)))


def gradients(width, seed=9):
    g = np.random.default_rng(seed).normal(size=(50, width)) @ np.diag(np.arange(1.0, width + 1))
    return SecondMoment.zeros(width, jnp.float64).update(jnp.asarray(g))


def metric(stat):
    """The damped metric that the methods use."""
    m = np.asarray(stat.second_moment())
    return m + linalg.GRADIENT_DAMPING * np.trace(m) / len(m) * np.eye(len(m))


def mlp_problem(tokens=500, inside=24, out=10, seed=0, mean=0.5):
    rng = np.random.default_rng(seed)
    mix = np.eye(inside) + rng.normal(size=(inside, inside)) / 6  # correlated, well conditioned
    z = rng.normal(size=(tokens, inside)) @ mix + mean
    kernels = {
        "gate": rng.normal(size=(out, inside)),
        "up": rng.normal(size=(out, inside)),
        "down": rng.normal(size=(inside, out)),
    }
    return z, kernels


def qk_problem(groups=2, per_group=2, width=8, tokens=60, seed=0, model=12, rotary=True, bias=True):
    rng = np.random.default_rng(seed)
    h = groups * per_group
    scales = np.exp(rng.normal(size=width))
    kernels = {
        "q": rng.normal(size=(model, h, width)) * scales,
        "k": rng.normal(size=(model, groups, width)) * scales,
    }
    if bias:
        kernels["q_bias"] = rng.normal(size=(h, width))
        kernels["k_bias"] = rng.normal(size=(groups, width))
    if rotary:
        kernels["rope_index"] = np.tile(np.arange(width // 2, dtype=np.int32), (groups, 1))
    x = rng.normal(size=(tokens, model))
    return x, kernels


FREQUENCIES = (10_000.0 ** -(np.arange(4) / 4)).astype(np.float32)


def project(x, kernels, name, positions=None, turns=FREQUENCIES):
    """``[tokens, heads, d]`` with bias, rotated if positions are given."""
    y = np.einsum("tm,mhd->thd", x, kernels[name]) + kernels.get(f"{name}_bias", 0)
    if positions is None:
        return y
    index = kernels["rope_index"]
    freq = np.repeat(turns[index], y.shape[1] // len(index), axis=0)
    return np.asarray(rotate(jnp.asarray(y)[None], positions[None], jnp.asarray(freq), 1.0)[0])


def vo_problem(groups=2, per_group=2, width=6, model=16, length=40, seed=0, bias=True):
    """Kernels, inputs ``[s, m]`` and causal attention probabilities ``[h, s, s]``."""
    rng = np.random.default_rng(seed)
    h = groups * per_group
    scores = rng.normal(size=(h, length, length)) + np.where(np.tri(length), 0, -np.inf)
    probabilities = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
    kernels = {
        "v": rng.normal(size=(model, groups, width)) * np.exp(rng.normal(size=width)),
        "o": rng.normal(size=(h, width, model)),
    }
    if bias:
        kernels["v_bias"] = rng.normal(size=(groups, width))
    return kernels, rng.normal(size=(length, model)), probabilities


def mixed(kernels, x, probabilities):
    """``[s, h, d]``: attention times values."""
    v = np.einsum("tm,mkd->tkd", x, kernels["v"]) + kernels.get("v_bias", 0)
    return np.einsum(
        "hst,thd->shd", probabilities, np.repeat(v, len(probabilities) // v.shape[1], 1)
    )


def problems():
    """Kind of module -> its kernels, and every statistic that a method may ask for."""
    z, mlp_kernels = mlp_problem()
    x, qk_kernels = qk_problem()
    vo_kernels, vx, probabilities = vo_problem()
    values = mixed(vo_kernels, vx, probabilities)
    mixing = {"moments": moments(values.reshape(len(values), -1)), "gradients": gradients(16)}
    heads_kernels = {n: vo_kernels[n] for n in ("v", "o", "v_bias")} | {
        "q": np.zeros((16, 4, 6)),
        "k": np.ones((16, 2, 6)),
    }
    return {
        "heads": (heads_kernels, mixing),
        "mlp": (mlp_kernels, {"moments": moments(z), "gradients": gradients(10)}),
        "qk": (
            qk_kernels,
            {
                "queries": heads(project(x, qk_kernels, "q")),
                "keys": heads(project(x, qk_kernels, "k")),
                "gates": heads(np.ones((5, 2, 4))),
            },
        ),
        "vo": (
            vo_kernels,
            mixing | {"values": heads(np.einsum("tm,mkd->tkd", vx, vo_kernels["v"]))},
        ),
    }


def degenerate_modules(kind):
    """What is wrong -> the kernels of a module, and its statistics."""
    kernels, stats = problems()[kind]
    zeros = {name: np.zeros_like(a) if name != "rope_index" else a for name, a in kernels.items()}
    outward = {"mlp": "down", "vo": "o", "heads": "o", "qk": "k"}[kind]

    def nothing(given, *names):
        """Statistics that saw zeros, or of ``names`` alone."""
        return {
            name: jax.tree.map(lambda a: a * 0 if a.ndim else a, own)
            if not names or name in names
            else own
            for name, own in given.items()
        }

    return {
        "kernels of zeros": (zeros, nothing(stats)),
        "an outward kernel of zeros": (kernels | {outward: zeros[outward]}, stats),
        "inputs of zeros": (kernels, nothing(stats)),
        "no gradients": (kernels, nothing(stats, "gradients", "gates")),
    }


def spent(curves, ranks):
    """Weights, counted independently of `Curve.cost`."""
    total = 0
    for path, rank in ranks.items():
        size = curves[path].size
        total += size.dense if rank is None else size.unit * rank + curves[path].extra
    return total
