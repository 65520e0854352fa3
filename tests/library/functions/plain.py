"""Small plain-JAX models in the layouts that people use, as ``apply(params, tokens)``."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

VOCAB, WIDTH, HEADS, HEAD, HIDDEN, LAYERS = 29, 16, 2, 8, 24, 3


class Model(NamedTuple):
    """A function, its parameters, and two batches of tokens."""

    apply: Any
    params: Any
    batches: Any


def normal(seed, *shape, scale=None):
    scale = shape[-2] ** -0.5 if scale is None else scale
    return scale * jax.random.normal(jax.random.key(seed), shape)


def tokens(seed, batch=2, length=6):
    return jax.random.randint(jax.random.key(seed), (batch, length), 0, VOCAB)


def loss(logits, ids):
    """The loss of every next token; 0 for the last one."""
    logits = logits.astype(jnp.float32)
    targets = jnp.roll(ids, -1, axis=1)
    chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], axis=-1)[..., 0]
    return jnp.where((jnp.arange(ids.shape[1]) < ids.shape[1] - 1)[None], -chosen, 0)


def norm(x, scale):
    return scale[None, None] * x * lax.rsqrt(jnp.mean(x**2, axis=-1, keepdims=True) + 1e-6)


def attend(q, k, v):
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) / q.shape[-1] ** 0.5
    causal = jnp.tril(jnp.ones(scores.shape[-2:], bool))
    return jnp.einsum(
        "bhqk,bkhd->bqhd", jax.nn.softmax(jnp.where(causal[None, None], scores, -1e9)), v
    )


def block(p, x):
    """A block with DenseGeneral shapes and a gated MLP."""
    h = norm(x, p["norm"])
    q, k, v = (jnp.einsum("bsm,mhd->bshd", h, p[name]) for name in ("q", "k", "v"))
    x = x + jnp.einsum("bshd,hdm->bsm", attend(q, k, v), p["o"])
    h = norm(x, p["norm"])
    return x + (jax.nn.silu(h @ p["gate"]) * (h @ p["up"])) @ p["down"]


def block_params(seed):
    heads = {name: normal(seed + i, WIDTH, HEADS, HEAD, scale=0.3) for i, name in enumerate("qkv")}
    return heads | {
        "o": normal(seed + 4, HEADS, HEAD, WIDTH, scale=0.3),
        "gate": normal(seed + 5, WIDTH, HIDDEN),
        "up": normal(seed + 6, WIDTH, HIDDEN),
        "down": normal(seed + 7, HIDDEN, WIDTH),
        "norm": 1 + normal(seed + 8, 1, WIDTH, scale=0.1)[0],
    }


def _outer():
    return {"embed": normal(1, VOCAB, WIDTH, scale=1.0), "head": normal(2, WIDTH, VOCAB)}


def unrolled():
    """A list of blocks, each with leaves of its own."""

    def apply(params, ids):
        x = params["embed"][ids]
        for p in params["blocks"]:
            x = block(p, x)
        return x @ params["head"]

    params = _outer() | {"blocks": [block_params(10 * i + 10) for i in range(LAYERS)]}
    return Model(apply, params, [tokens(0), tokens(1)])


def scanned(remat=False):
    """The same blocks, stacked and scanned over."""

    def apply(params, ids):
        body = jax.checkpoint(block) if remat else block
        x, _ = lax.scan(lambda x, p: (body(p, x), None), params["embed"][ids], params["blocks"])
        return x @ params["head"]

    blocks = unrolled().params["blocks"]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *blocks)
    return Model(apply, _outer() | {"blocks": stacked}, [tokens(0), tokens(1)])


def rematerialized():
    return scanned(remat=True)


def transposed():
    """GPT-2's layout in Flax: kernels ``[out, in]`` that are transposed, biases, a tied head."""

    def linear(p, x):
        y = lax.dot_general(x, p["kernel"].T, (((x.ndim - 1,), (0,)), ((), ())))
        return y + p["bias"].reshape((1,) * (y.ndim - 1) + (-1,))

    def apply(params, ids):
        x = params["embed"][ids]
        for p in params["blocks"]:
            h = norm(x, p["norm"])
            q, k, v = jnp.split(linear(p["qkv"], h), 3, axis=-1)
            heads = [a.reshape(*a.shape[:2], HEADS, HEAD) for a in (q, k, v)]
            x = x + linear(p["o"], attend(*heads).reshape(x.shape))
            x = x + linear(p["fc2"], jax.nn.gelu(linear(p["fc1"], norm(x, p["norm"]))))
        return x @ params["embed"].T

    def made(seed, fan_in, fan_out):
        kernel = normal(seed, fan_in, fan_out).T
        return {"kernel": kernel, "bias": normal(seed + 1, 1, fan_out, scale=0.1)[0]}

    def one(seed):
        sizes = {"qkv": (WIDTH, 3 * WIDTH), "o": (WIDTH, WIDTH)}
        sizes |= {"fc1": (WIDTH, HIDDEN), "fc2": (HIDDEN, WIDTH)}
        rows = {name: made(seed + 2 * i, *size) for i, (name, size) in enumerate(sizes.items())}
        return rows | {"norm": jnp.ones(WIDTH)}

    params = {"embed": normal(1, VOCAB, WIDTH, scale=1.0), "blocks": [one(10), one(30)]}
    return Model(apply, params, [tokens(0), tokens(1)])


def experts():
    """Experts ``[E, m, f]``: every token goes through all of them, weighted by a router."""

    def apply(params, ids):
        x = params["embed"][ids]
        gates = jax.nn.softmax(x @ params["router"])
        h = jax.nn.relu(jnp.einsum("bsm,emf->ebsf", x, params["up"]))
        y = jnp.einsum("ebsf,efm->ebsm", h, params["down"])
        return jnp.einsum("ebsm,bse->bsm", y, gates) @ params["head"]

    params = _outer() | {
        "router": normal(3, WIDTH, 4),
        "up": normal(4, 4, WIDTH, HIDDEN),
        "down": normal(5, 4, HIDDEN, WIDTH),
    }
    return Model(apply, params, [tokens(0), tokens(1)])


def dispatched():
    """Experts to which tokens are dispatched: the stack is a batch axis of the product."""

    def apply(params, ids):
        x = params["embed"][ids].reshape(-1, 2, WIDTH).swapaxes(0, 1)
        h = jax.nn.relu(jnp.einsum("ecm,emf->ecf", x, params["up"]))
        y = jnp.einsum("efm,ecf->ecm", params["down"], h)  # the leaf comes first
        return (y.swapaxes(0, 1).reshape(*ids.shape, WIDTH)) @ params["head"]

    params = _outer() | {"up": normal(4, 2, WIDTH, HIDDEN), "down": normal(5, 2, HIDDEN, WIDTH)}
    return Model(apply, params, [tokens(0), tokens(1)])


def indexed():
    """The same stacked blocks, one after the other by their indices."""
    stack = scanned()

    def apply(params, ids):
        x = params["embed"][ids]
        for i in range(LAYERS):
            x = block(jax.tree.map(lambda a, i=i: a[i], params["blocks"]), x)
        return x @ params["head"]

    return Model(apply, stack.params, stack.batches)


def crossed():
    """Experts of scanned layers, whose parameters begin with the axis of experts."""

    def apply(params, ids):
        x = params["embed"][ids].reshape(-1, 2, WIDTH).swapaxes(0, 1)

        def body(x, w):
            return jnp.tanh(jnp.einsum("ecm,emn->ecn", x, w)), None

        x, _ = lax.scan(body, x, jnp.moveaxis(params["mix"], 1, 0))
        return x.swapaxes(0, 1).reshape(*ids.shape, WIDTH) @ params["head"]

    params = _outer() | {"mix": normal(4, 2, LAYERS, WIDTH, WIDTH)}
    return Model(apply, params, [tokens(0), tokens(1)])


def recurrent():
    """One matrix that every step of a loop uses, and one behind a condition."""

    def apply(params, ids):
        x = params["embed"][ids].swapaxes(0, 1)

        def step(h, row):
            h = jnp.tanh(row + h @ params["cell"])
            return h, h

        _, out = lax.scan(step, jnp.zeros(x.shape[1:]), x)
        out = lax.cond(ids[0, 0] >= 0, lambda o: o @ params["extra"], lambda o: o, out)
        return out.swapaxes(0, 1) @ params["head"]

    params = _outer() | {"cell": normal(3, WIDTH, WIDTH), "extra": normal(4, WIDTH, WIDTH)}
    return Model(apply, params, [tokens(0), tokens(1)])


def mixed():
    """Float32 parameters in bfloat16 products, whose results are float32."""

    def apply(params, ids):
        x = params["embed"][ids].astype(jnp.bfloat16)
        up = params["up"].astype(jnp.bfloat16)
        h = lax.dot_general(x, up, (((2,), (0,)), ((), ())), preferred_element_type=jnp.float32)
        return jax.nn.relu(h).astype(jnp.bfloat16) @ params["head"].astype(jnp.bfloat16)

    params = {
        "embed": normal(1, VOCAB, WIDTH, scale=1.0),
        "up": normal(4, WIDTH, HIDDEN),
        "head": normal(2, HIDDEN, VOCAB),
    }
    return Model(apply, params, [tokens(0), tokens(1)])


_MAKERS = [unrolled, scanned, rematerialized, transposed, experts, dispatched, indexed]
MODELS = {fn.__name__: fn for fn in (*_MAKERS, crossed, recurrent, mixed)}
