"""The jitted fine-tuning step over the trainable part of a model, and the training loop.

The parameters are split in two trees (`trees.partition`). The trainable tree is float32 and has
optimizer state. The frozen tree has no gradient: its dense arrays are in the computing dtype, and
its quantized weights are dequantized one layer at a time, in the forward pass and again in the
backward pass. The loss is the mean over the targets of all micro-batches of a step, so gradient
accumulation changes only the memory::

    loss = Σ nll / targets
    loss = (1 - w) · Σ nll / targets + w · Σ KL(teacher ‖ student) / targets      with a teacher

The teacher is a model in memory, or a table of its predictions in the examples (`predictions`).
A run is a function of its arguments. The examples of a step follow from the seed and the step's
number, and no other random number is drawn after the start.
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
from lordjax.models import divergence, objective
from lordjax.models.blocks import Block
from lordjax.models.config import ModelConfig
from lordjax.models.output_heads import CARRIED
from lordjax.models.transformer import Transformer, default_positions
from lordjax.names import layer
from lordjax.runtime import target
from lordjax.runtime.mesh import Mesh, batch_shardings, fsdp_shardings, put
from lordjax.runtime.xla_scheduling import block_by_block


class DivergedError(ValueError):
    """A loss or gradient is not finite."""


class State(NamedTuple):
    """The training state, which a step updates.

    Attributes:
      step: number of steps done.
      params: the trainable arrays in float32; None elsewhere.
      optimizer: the state of the optax optimizer.
    """

    step: Int[Array, ""]
    params: Any
    optimizer: Any


@dataclasses.dataclass(frozen=True)
class Settings:
    """Settings of a run that do not belong to its recipe.

    Attributes:
      steps: number of optimizer steps.
      batch: examples per step.
      accumulate: micro-batches per step; must divide ``batch``. None: one per step; on CPU one per
        example, because its cache holds the activations of few tokens.
      remat: whether to recompute each block in the backward pass instead of storing its
        activations.
      seed: seed of the order of the examples and of new adapters.
      dtype: computing dtype; gradients, optimizer state and trained arrays are float32.
      distill: weight of the teacher's term in the loss, 0 to 1.
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
        """Micro-batches per step."""
        alone = self.batch if target.platform() == "cpu" else 1
        return alone if self.accumulate is None else self.accumulate

    def check(self) -> None:
        """Raises ValueError if a setting is out of range."""
        count = 1 if self.accumulate is None else self.accumulate
        if min(self.steps, self.batch, count) < 1 or self.batch % count:
            raise ValueError(
                f"steps {self.steps}, batch {self.batch}, accumulate {self.accumulate}: expected 1 "
                "or more, and a batch that accumulate divides"
            )
        if not 0 <= self.distill <= 1:
            raise ValueError(f"distill {self.distill}: expected a weight from 0 to 1")


def split_trainable(params: Any, paths: list[str], dtype: str) -> tuple[Any, Any]:
    """Splits parameters into a trainable tree in float32 and a frozen tree in ``dtype``."""
    trained, frozen = trees.partition(jax.tree.map(jnp.asarray, params), set(paths))
    # A copy, because a step donates the memory of its arguments.
    trained = jax.tree.map(lambda a: jnp.array(a, jnp.float32, copy=True), trained)
    return trained, astype(frozen, dtype)


class TrainingSetup(NamedTuple):
    """Everything that a run starts from.

    Attributes:
      params: parameters of the whole model, after quantization and with new adapters.
      paths: paths of the trained arrays.
      state: the state before the first step.
      frozen: the frozen parameters in the computing dtype.
      optimizer: the recipe's optimizer.
    """

    params: Any
    paths: list[str]
    state: State
    frozen: Any
    optimizer: optax.GradientTransformation


def prepare_training(
    config: ModelConfig, params: Any, recipe: Recipe, settings: Settings
) -> TrainingSetup:
    """Prepares a model for training by a recipe; raises as `recipes.initial_params` does."""
    optimizer = recipes.optimizer(recipe, settings.steps)
    key, classes = jax.random.key(settings.seed), config.head == "classes"
    params, paths = recipes.initial_params(recipe, params, key, classes=classes)
    paths = [path for path in paths if path.split("/")[0] not in CARRIED]  # have no gradient
    trained, frozen = split_trainable(params, paths, settings.dtype)
    return TrainingSetup(params, paths, init_state(trained, optimizer), frozen, optimizer)


def with_trained(trained: Any, params: Any, paths: list[str]) -> Any:
    """Returns a model's parameters with the trained arrays at ``paths``, in the old dtypes."""
    before, others = trees.partition(params, set(paths))
    new = jax.tree.map(lambda a, old: a.astype(old.dtype), trained, before)
    return trees.combine(new, others)


def init_state(params: Any, optimizer: optax.GradientTransformation) -> State:
    """Returns the state before the first step."""
    return State(jnp.zeros((), jnp.int32), params, optimizer.init(params))


def target_losses(
    config: ModelConfig,
    params: Any,
    batch: Examples,
    teacher: Any = None,
    *,
    distill: float = 0.0,
    remat: bool = True,
    trained: Collection[str] | None = None,
) -> tuple[Float[Array, "b t"], Float[Array, "b t"]]:
    """Returns the nats of every target, and the training loss of every target.

    The training loss mixes the nats with the divergence from a teacher; without a teacher both
    results are equal.

    Args:
      config: the model's architecture.
      params: the model's parameters.
      batch: examples ``[b, s]``.
      teacher: the teacher's parameters; needed if ``distill`` is not 0, unless the examples hold
        a teacher's predictions.
      distill: weight of the divergence from the teacher.
      remat: whether to recompute each block in the backward pass; needs ``trained``.
      trained: paths of the arrays that get a gradient, which is computed block by block. None: all
        arrays get one, and ``remat`` has no effect.
    """
    stream = functools.partial(_stream, config, batch, remat)
    x = stream(params, trained)
    if distill and batch.top_ids is not None:
        table = (batch.top_ids, batch.top_logs)
        nll, apart = divergence.losses_and_divergences(config, params, x, batch.targets, *table)
    else:
        nll = objective.losses(config, params, x, batch.targets, batch.mask)
        if not distill:
            return nll, nll
        y = stream(teacher)
        apart = divergence.divergences(config, params, teacher, x, y, batch.targets)
    return nll, apart if distill == 1 else (1 - distill) * nll + distill * apart


def _stream(
    config: ModelConfig,
    batch: Examples,
    remat: bool,
    params: Any,
    trained: Collection[str] | None = None,
) -> Float[Array, "b s m"]:
    """Returns the residual stream after the last block."""
    run: Any = functools.partial(Transformer(config).apply, {"params": params})
    inputs = (batch.tokens, batch.mask, batch.token_types)
    if trained is None:
        return run(*inputs, method=Transformer.hidden)
    x: Any = run(*inputs, method=Transformer.embed_tokens)
    positions = default_positions(batch.tokens, batch.mask)

    def block(sliding_window: int | None, trained: Any, others: Any, x: Array) -> Array:
        params, *where = others
        module: Any = Block(config, sliding_window)
        return module.apply({"params": trees.combine(trained, params)}, x, *where)

    for i in range(config.num_layers):
        prefix = f"{layer(i)}/"
        inside = {path.removeprefix(prefix) for path in trained if path.startswith(prefix)}
        first, second = trees.partition(params[layer(i)], inside)
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
    """Returns the jitted step ``(state, frozen, batch, teacher) -> (state, metrics)``.

    The step donates the state's memory to its result. Every array of ``batch`` (`Examples`) has a
    leading axis of micro-batches.

    Args:
      config: the model's architecture.
      optimizer: any optax optimizer.
      dtype: computing dtype.
      distill: weight of the divergence from ``teacher``, the parameters of a model of the same
        architecture.
      remat: whether to recompute each block in the backward pass.
      shardings: shardings of the state; None leaves them to JAX.

    Returns:
      The jitted function. Its metrics are ``loss`` (mean training loss), ``nll`` (nats per target),
      ``gradient`` (global norm before clipping) and ``targets`` (their number).
    """

    def loss(trained: Any, frozen: Any, batch: Examples, teacher: Any) -> tuple[Array, Array]:
        params = astype(trees.combine(trained, frozen), dtype)
        every = tuple(trees.arrays(trained))
        given = {"distill": distill, "remat": remat, "trained": every}
        nll, mixed = target_losses(config, params, batch, teacher, **given)
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


def microbatches(examples: Examples, settings: Settings, step: int) -> Examples:
    """Returns the examples of a step, with a leading axis of micro-batches."""
    rows = batch_indices(examples.size, settings.batch, step, settings.seed)
    count = settings.micro_batches
    return jax.tree.map(lambda a: a.reshape(count, -1, *a.shape[1:]), examples.rows(rows))


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
    """Trains from a state to the last step; yields the state and metrics after every step.

    The next step donates the memory of the yielded state, so use or copy it before.

    Args:
      config: the model's architecture.
      state: the state to start from; see `prepare_training`.
      frozen: the frozen parameters.
      examples: the training examples.
      optimizer: the optimizer whose state ``state`` holds.
      settings: settings of the run.
      teacher: parameters of a model of the same architecture, to distill from.
      mesh: devices that share the work; None uses one device.

    Raises:
      DivergedError: if a loss or gradient is not finite; names the step.
      ValueError: if a setting is out of range, or the teacher is missing or not possible.
    """
    settings.check()
    if settings.distill and teacher is None and examples.top_ids is None:
        raise ValueError(
            f"distill {settings.distill}: distillation needs a teacher; give one, or set distill "
            "to 0"
        )
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
            raise DivergedError(
                f"step {i}: loss {metrics['loss']}, norm of the gradient {metrics['gradient']}; "
                "lower the learning rate, or compute in float32"
            )
        yield state, metrics
