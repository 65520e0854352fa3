"""Fine-tuning: a jitted step of optax over the trainable part of a model, and the loop around it.

Parameters are two trees (`trees.split`): what is trained, in float32, with its optimiser state; and
the rest, which has no gradient: matrices in the dtype that is computed in, codes as they are,
decoded a layer at a time forwards and once more backwards. The loss is the mean over the targets of
all micro-batches of a step, so that accumulation changes nothing but memory::

    loss = Σ nll / targets
    loss = (1 - w) · Σ nll / targets + w · Σ KL(teacher ‖ student) / targets      with a teacher

A run is a function of its arguments: the rows of a step follow from the seed and its number, so the
position in the data is the number of steps done, and nothing else is drawn after the start.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Collection, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

from lordjax.data.examples import Examples, batch_indices
from lordjax.finetune import recipes
from lordjax.finetune.recipes import Recipe
from lordjax.kernels import trees
from lordjax.kernels.kinds import astype
from lordjax.models import objective
from lordjax.models.blocks import BLOCKS
from lordjax.models.config import ModelConfig
from lordjax.models.transformer import Transformer, default_positions
from lordjax.runtime.mesh import Mesh, batch_shardings, fsdp_shardings, put
from lordjax.runtime.xla_scheduling import block_by_block


class State(NamedTuple):
    """What a step changes.

    Attributes:
      step: how many are done.
      params: the trainable part, float32; None elsewhere.
      optimizer: optax' state.
    """

    step: Int[Array, ""]
    params: Any
    optimizer: Any


@dataclasses.dataclass(frozen=True)
class Settings:
    """Of a run, apart from its recipe.

    Attributes:
      steps: how many times the parameters change.
      batch: examples per step.
      accumulate: micro-batches that a step's examples are computed in; divides ``batch``. None:
        one, or on CPU, whose cache holds the activations of few tokens, one for every example.
      remat: compute every block once more backwards, instead of keeping what is inside it.
      seed: of the order of the examples and of new adapters.
      dtype: that is computed in; gradients, optimiser and what is trained are float32.
      distill: the teacher's weight in the loss, 0 to 1.
    """

    steps: int
    batch: int = 8
    accumulate: int | None = None
    remat: bool = True
    seed: int = 0
    dtype: str = "float32"
    distill: float = 0.0

    @property
    def micro_batches(self) -> int:
        """Micro-batches of a step."""
        alone = self.batch if jax.default_backend() == "cpu" else 1
        return alone if self.accumulate is None else self.accumulate

    def check(self) -> None:
        """Raises ValueError if something is out of range."""
        parts = 1 if self.accumulate is None else self.accumulate
        if min(self.steps, self.batch, parts) < 1 or self.batch % parts:
            raise ValueError(
                f"steps {self.steps}, batch {self.batch}, accumulate {self.accumulate}: expected 1 "
                "or more, and a batch that accumulate divides"
            )
        if not 0 <= self.distill <= 1:
            raise ValueError(f"distill {self.distill}: expected a weight in [0, 1]")


def split(params: Any, paths: list[str], dtype: str) -> tuple[Any, Any]:
    """The trainable part in float32, copied, and the rest in the dtype that is computed in."""
    first, second = trees.partition(jax.tree.map(jnp.asarray, params), set(paths))
    # Copied: a step gives the memory of its arguments to its results.
    return jax.tree.map(lambda a: jnp.array(a, jnp.float32, copy=True), first), astype(
        second, dtype
    )


class Begun(NamedTuple):
    """What a run begins with.

    Attributes:
      params: the whole model, with new codes and adapters.
      paths: of the arrays that are trained.
      state: before the first step.
      frozen: what is not trained, in the dtype that is computed in.
      optimizer: of the recipe.
    """

    params: Any
    paths: list[str]
    state: State
    frozen: Any
    optimizer: optax.GradientTransformation


def begin(config: ModelConfig, params: Any, recipe: Recipe, settings: Settings) -> Begun:
    """Makes a model ready for a recipe; the errors are those of `recipes.start`."""
    optimizer = recipes.optimizer(recipe, settings.steps)
    key, classes = jax.random.key(settings.seed), config.head == "classes"
    params, paths = recipes.initial_params(recipe, params, key, classes=classes)
    trained, frozen = split(params, paths, settings.dtype)
    return Begun(params, paths, init_state(trained, optimizer), frozen, optimizer)


def joined(trained: Any, params: Any, paths: list[str]) -> Any:
    """The model with what was trained at ``paths``, in the dtype that it had before."""
    before, others = trees.partition(params, set(paths))
    new = jax.tree.map(lambda a, old: a.astype(old.dtype), trained, before)
    return trees.combine(new, others)


def init_state(params: Any, optimizer: optax.GradientTransformation) -> State:
    """The state before the first step, of the trainable part."""
    return State(jnp.zeros((), jnp.int32), params, optimizer.init(params))


def rows_of(
    config: ModelConfig,
    params: Any,
    batch: Examples,
    teacher: Any = None,
    *,
    distill: float = 0.0,
    remat: bool = True,
    trained: Collection[str] | None = None,
) -> tuple[Float[Array, "b t"], Float[Array, "b t"]]:
    """Nats of every target, and what is trained on: those, mixed with the distance to a teacher.

    ``trained`` are the paths of the only arrays with a gradient, which is computed block by block;
    None: all have one, and ``remat`` means nothing.
    """
    stream = functools.partial(_stream, config, batch, remat)
    x = stream(params, trained)
    nll = objective.losses(config, params, x, batch.targets)
    if not distill:
        return nll, nll
    y = stream(teacher)
    far = objective.divergences(config, params, teacher, x, y, batch.targets)
    return nll, (1 - distill) * nll + distill * far


def _stream(
    config: ModelConfig,
    batch: Examples,
    remat: bool,
    params: Any,
    trained: Collection[str] | None = None,
) -> Float[Array, "b s m"]:
    """The residual stream behind the last block."""
    run: Any = functools.partial(Transformer(config).apply, {"params": params})
    inputs = (batch.tokens, batch.mask, batch.token_types)
    if trained is None:
        return run(*inputs, method=Transformer.hidden)
    x: Any = run(*inputs, method=Transformer.embed_tokens)
    positions = default_positions(batch.tokens, batch.mask)

    def block(window: int | None, trained: Any, others: Any, x: Array) -> Array:
        module, (params, *where) = BLOCKS[config.block](config, window), others
        return module.apply({"params": trees.combine(trained, params)}, x, *where)

    for i in range(config.num_layers):
        name = f"layer_{i}/"
        inside = {path.removeprefix(name) for path in trained if path.startswith(name)}
        first, second = trees.partition(params[f"layer_{i}"], inside)
        fn = functools.partial(block, config.window(i))
        x = block_by_block(fn, remat, first, (second, positions, batch.mask), x)
    return x


def make_step(
    config: ModelConfig,
    optimizer: optax.GradientTransformation,
    *,
    dtype: str = "float32",
    distill: float = 0.0,
    remat: bool = True,
    shardings: Any = None,
) -> Callable[..., tuple[State, dict[str, Array]]]:
    """The jitted step ``(state, frozen, batch, teacher) -> (state, metrics)``.

    The state's memory is given to the result. Every array of ``batch`` (`Examples`) has a leading
    axis of micro-batches. Metrics: ``loss`` (mean of what is trained on), ``nll`` (nats per
    target), ``gradient`` (norm before clipping), ``targets``.

    Args:
      config: the model.
      optimizer: any of optax'.
      dtype: that is computed in.
      distill: weight of the teacher, parameters of a model of the same architecture.
      remat: as of `Settings`.
      shardings: of the state; it stays where it is.
    """

    def loss(trained: Any, frozen: Any, batch: Examples, teacher: Any) -> tuple[Array, Array]:
        params = astype(trees.combine(trained, frozen), dtype)
        every = tuple(trees.arrays(trained))
        given = {"distill": distill, "remat": remat, "trained": every}
        nll, mixed = rows_of(config, params, batch, teacher, **given)
        return jnp.sum(mixed), jnp.sum(nll)

    where = {} if shardings is None else {"out_shardings": (shardings, None)}

    @functools.partial(jax.jit, donate_argnums=0, **where)
    def step(state: State, frozen: Any, batch: Examples, teacher: Any = None) -> Any:
        def add(total: Any, part: Examples) -> tuple[Any, None]:
            grad = jax.value_and_grad(loss, has_aux=True)
            return jax.tree.map(jnp.add, total, grad(state.params, frozen, part, teacher)), None

        zero = jnp.zeros(())
        nothing = ((zero, zero), jax.tree.map(jnp.zeros_like, state.params))
        ((mixed, nll), gradient), _ = jax.lax.scan(add, nothing, batch)
        targets = jnp.sum(batch.targets >= 0)
        count = jnp.maximum(targets, 1).astype(jnp.float32)
        gradient = jax.tree.map(lambda g: g / count, gradient)
        with jax.numpy_dtype_promotion("standard"):  # optax counts steps in int32
            updates, inner = optimizer.update(gradient, state.optimizer, state.params)
        new = State(state.step + 1, optax.apply_updates(state.params, updates), inner)
        norm = optax.tree.norm(gradient)
        metrics = {"loss": mixed / count, "nll": nll / count, "gradient": norm, "targets": targets}
        return new, metrics

    return step


@functools.partial(jax.jit, static_argnames=("config", "dtype"))
def _evaluate(
    trained: Any, frozen: Any, batch: Examples, *, config: ModelConfig, dtype: str
) -> Any:
    params = astype(trees.combine(trained, frozen), dtype)
    return rows_of(config, params, batch)[0]


def evaluate(
    config: ModelConfig, state: State, frozen: Any, examples: Examples, *, batch: int, dtype: str
) -> float:
    """Nats per target of all examples, in the dtype of training."""
    total, targets, count = 0.0, 0, examples.size
    for first in range(0, count, batch):
        # The last batch is filled up: another shape would be compiled again.
        rows = np.arange(first, first + batch)
        part = examples.rows(np.minimum(rows, count - 1))
        nll = _evaluate(state.params, frozen, part, config=config, dtype=dtype)
        total += float(np.asarray(nll, np.float64)[rows < count].sum())
        targets += int((part.targets[rows < count] >= 0).sum())
    return total / max(targets, 1)


def microbatches(examples: Examples, settings: Settings, step: int) -> Examples:
    """The examples of a step, with a leading axis of micro-batches."""
    rows = batch_indices(examples.size, settings.batch, step, settings.seed)
    part, parts = examples.rows(rows), settings.micro_batches
    return jax.tree.map(lambda a: a.reshape(parts, -1, *a.shape[1:]), part)


def run(
    config: ModelConfig,
    state: State,
    frozen: Any,
    examples: Examples,
    optimizer: optax.GradientTransformation,
    settings: Settings,
    *,
    teacher: Any = None,
    mesh: Mesh | None = None,
) -> Iterator[tuple[State, dict[str, float]]]:
    """Trains from a state to the last step; yields after every one.

    A state that was yielded is used up by the next step.

    Raises:
      ValueError: if a setting is out of range, or a loss or gradient is not finite; names the step.
    """
    settings.check()
    if settings.distill and teacher is None:
        raise ValueError("distillation needs a teacher")
    if settings.distill and config.head == "classes":
        raise ValueError("only models that predict tokens are distilled; leave the teacher out")
    teacher = (
        None if teacher is None else astype(jax.tree.map(jnp.asarray, teacher), settings.dtype)
    )
    where = None if mesh is None else fsdp_shardings(state, mesh)
    if mesh is not None:
        settings = dataclasses.replace(settings, accumulate=settings.accumulate or 1)
        frozen, teacher = (put(tree, fsdp_shardings(tree, mesh)) for tree in (frozen, teacher))
        state = put(state, where)
    own = {name: getattr(settings, name) for name in ("dtype", "distill", "remat")}
    step = make_step(config, optimizer, **own, shardings=where)
    for i in range(int(state.step), settings.steps):
        batch = microbatches(examples, settings, i)
        batch = batch if mesh is None else put(batch, batch_shardings(batch, mesh, axis=1))
        state, found = step(state, frozen, batch, teacher)
        metrics = {name: float(value) for name, value in found.items()}
        if not np.isfinite([metrics["loss"], metrics["gradient"]]).all():
            raise ValueError(
                f"step {i}: loss {metrics['loss']}, norm of the gradient {metrics['gradient']}; "
                "lower the learning rate, or compute in float32"
            )
        yield state, metrics
