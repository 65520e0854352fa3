"""Fine-tuning recipes by name: which arrays are trained, on which base, with which optimizer.

Every recipe also trains the classification head of a classifier.
"""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import jax
import optax
from jaxtyping import Array

from lordjax.finetune import adapters
from lordjax.kernels import trained_scales, trees
from lordjax.kernels.base import is_kernel
from lordjax.names import did_you_mean, is_block_linear

ADAPTERS = r"kernel/low_rank/(left|right)$"
FACTORS = r"layer_\d+/.*/kernel/(left|right)$"
HEAD = r"^(transform/|head/)"  # a classifier's head
SHIFTS = r"/shifts$"  # of block scales, see `kernels.trained_scales`
NORMS = r"(^|_)norm/(scale|bias)$|^layer_\d+/.*/bias$"  # and biases of linear layers


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How a model is fine-tuned.

    Attributes:
      train: regular expressions of the paths of trained arrays (`trees.arrays`).
      codes: format to which the blocks' matrices are quantized first; None leaves them as they are.
      scales: whether block scales and quantized low-rank factors can be trained.
      rank: rank of new adapters; None adds none.
      alpha: LoRA's alpha. The adapters' learning rate is multiplied by ``sqrt(alpha / rank)``; see
        `adapters`.
      learning_rate: peak learning rate.
      schedule: a key of `SCHEDULES`; the schedule after the warm-up.
      warmup: fraction of the steps in which the learning rate rises linearly from 0.
      weight_decay: AdamW's weight decay.
      b2: AdamW's second-moment decay rate.
      clip: largest global norm of a gradient; None does not clip.
      summary: one line for help texts.
    """

    train: tuple[str, ...]
    codes: str | None = None
    scales: bool = False
    rank: int | None = None
    alpha: float | None = None
    learning_rate: float = 2e-4
    schedule: str = "cosine"
    warmup: float = 0.03
    weight_decay: float = 0.0
    b2: float = 0.999
    clip: float | None = 1.0
    summary: str = ""


# Usual rates of LoRA; LQ-LoRA's scripts have 2e-5 for batches of 128 and 512, 2e-4 for 16.
RECIPES: dict[str, Recipe] = {
    "lq-lora": Recipe(
        (ADAPTERS,),
        summary="the low-rank terms of a model that method lq wrote (arXiv 2311.12023)",
    ),
    "qlora": Recipe(
        (ADAPTERS,),
        codes="nf4",
        rank=32,
        summary="new adapters on an NF4 base; both factors of a low-rank base are quantized (LoRD)",
    ),
    "lora": Recipe(
        (ADAPTERS,), rank=32, summary="new adapters on the weights as they are, merged afterwards"
    ),
    "recovery": Recipe(
        (ADAPTERS, FACTORS),
        rank=32,
        summary="low-rank factors, and new adapters on the other block matrices, merged afterwards",
    ),
    "distill": Recipe(
        (ADAPTERS, FACTORS, SHIFTS, NORMS),
        scales=True,
        rank=32,
        learning_rate=3e-4,
        summary="all of a compressed model but codes and embeddings, as compress --distill does",
    ),
    "factors": Recipe((FACTORS,), summary="low-rank factors only"),
    "full": Recipe(
        (".",), learning_rate=5e-5, summary="all parameters (as LoRD with all parameters trainable)"
    ),
}


def named(name: str) -> Recipe:
    """Returns the recipe with a name.

    Raises:
      KeyError: if there is no such recipe; suggests names.
    """
    if name not in RECIPES:
        raise KeyError(f"no recipe {name!r}; {did_you_mean(name, RECIPES)}")
    return RECIPES[name]


def changed(recipe: Recipe, **asked: Any) -> Recipe:
    """Returns a recipe with some fields replaced.

    Args:
      recipe: the recipe.
      **asked: new values by field; None, and names that are no field, are ignored.

    Raises:
      ValueError: if a rank is given and the recipe adds no adapters.
    """
    names = {field.name for field in dataclasses.fields(recipe)}
    new = {key: value for key, value in asked.items() if key in names and value is not None}
    if "rank" in new and recipe.rank is None:
        raise ValueError(
            f"rank {new['rank']}: this recipe adds no adapters; leave the rank out, or choose a "
            "recipe with adapters such as lora"
        )
    return dataclasses.replace(recipe, **new)


SCHEDULES = {
    "constant": lambda peak, steps: optax.constant_schedule(peak),
    "linear": lambda peak, steps: optax.linear_schedule(peak, 0.0, steps),
    "cosine": lambda peak, steps: optax.cosine_decay_schedule(peak, steps),
}


def initial_params(
    recipe: Recipe, params: Any, key: Array, *, classes: bool = False
) -> tuple[Any, list[str]]:
    """Returns the parameters that training starts from, and the paths of the trained arrays.

    Args:
      recipe: what is trained, and how.
      params: nested dict of a model; leaves may be kernels of any kind.
      key: random key for new adapters.
      classes: whether the model is a classifier, whose head is trained too.

    Raises:
      KeyError: if the model has no array that the recipe trains.
      ValueError: if the recipe's format is unknown or its rank does not fit a matrix.
    """
    if recipe.codes is not None:
        params = adapters.quantize_bases(params, recipe.codes)
    if recipe.scales:
        params = trained_scales.unpacked(params)
    if recipe.rank is not None:
        where = [
            path for path, leaf in trees.flatten(params).items() if _adapted(recipe, path, leaf)
        ]
        if where:
            scale = 1.0 if recipe.alpha is None else recipe.alpha / recipe.rank
            pattern = f"^({'|'.join(map(re.escape, where))})$"
            params = adapters.add_adapters(
                params, rank=recipe.rank, key=key, scale=scale, where=pattern
            )
    able = trees.arrays(params)
    patterns = [p for p in recipe.train if p == "." or any(re.search(p, path) for path in able)]
    if not patterns:
        raise KeyError(
            f"this recipe trains {' and '.join(recipe.train)}, but no parameter of the model "
            f"matches; {did_you_mean(recipe.train[0], able)}"
        )
    return params, adapters.trainable(params, (*patterns, *([HEAD] if classes else [])))


def _adapted(recipe: Recipe, path: str, leaf: Any) -> bool:
    """Whether a block matrix gets an adapter; low-rank factors that are trained need none."""
    if not is_block_linear(path):
        return False
    return not (FACTORS in recipe.train and is_kernel(leaf))


def optimizer(recipe: Recipe, steps: int) -> optax.GradientTransformation:
    """Returns AdamW with a recipe's schedule, clipping and adapter learning rates.

    Args:
      recipe: the recipe.
      steps: number of steps of the whole run.

    Raises:
      ValueError: if the schedule is unknown.
    """
    if recipe.schedule not in SCHEDULES:
        raise ValueError(f"schedule {recipe.schedule!r}; expected one of {', '.join(SCHEDULES)}")
    warm = min(round(recipe.warmup * steps), steps - 1)
    peak = recipe.learning_rate
    schedule = SCHEDULES[recipe.schedule](peak, steps - warm)
    if warm:
        rise = optax.linear_schedule(peak / warm, peak, warm)
        schedule = optax.join_schedules([rise, schedule], [warm])
    adam = optax.adamw(schedule, b2=recipe.b2, weight_decay=recipe.weight_decay)
    scaled = [] if recipe.alpha is None else [_scale_adapter_updates(recipe.alpha)]
    clip = [] if recipe.clip is None else [optax.clip_by_global_norm(recipe.clip)]
    return optax.chain(*clip, adam, *scaled)


def _scale_adapter_updates(alpha: float) -> optax.GradientTransformation:
    """Multiplies the updates of adapters by ``sqrt(alpha / rank)``, each with its own rank."""

    def scaled(updates: Any, params: Any) -> Any:
        del params
        leaves, structure = jax.tree.flatten(updates)
        rates = (_adapter_rate(alpha, path, a) for path, a in trees.arrays(updates).items())
        return structure.unflatten([a * rate for a, rate in zip(leaves, rates, strict=True)])

    return optax.stateless(scaled)


def _adapter_rate(alpha: float, path: str, array: Array) -> float:
    if not re.search(ADAPTERS, path):
        return 1.0
    return (alpha / array.shape[-1 if path.endswith("left") else -2]) ** 0.5
