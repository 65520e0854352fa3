"""Settings of fine-tuning by name: what is trained, over what, and how fast.

A classification head is trained by all of them.
"""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import jax
import optax
from jaxtyping import Array

from lordjax.finetune import adapters
from lordjax.kernels import trees
from lordjax.kernels.base import is_kernel
from lordjax.names import did_you_mean, is_block_linear

PRODUCTS = r"kernel/low_rank/(left|right)$"
FACTORS = r"layer_\d+/.*/kernel/(left|right)$"
HEAD = r"^(transform/|head/)"  # of a classifier


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How a model is fine-tuned.

    Attributes:
      train: regular expressions of the arrays that are trained (`trees.arrays`).
      codes: format that the blocks' matrices are encoded in before; None: as they are.
      rank: of new adapters; None: there are none.
      alpha: LoRA's; the products' learning rate is times ``sqrt(alpha / rank)``, see `adapters`.
      learning_rate: highest of the schedule.
      schedule: a key of `SCHEDULES`, behind the warm-up.
      warmup: share of the steps in which the learning rate rises from 0.
      weight_decay: of AdamW.
      b2: of AdamW.
      clip: largest norm of a gradient; None: any.
      summary: one line for people.
    """

    train: tuple[str, ...]
    codes: str | None = None
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
        (PRODUCTS,), summary="the products beside codes, as lq left them (arXiv 2311.12023)"
    ),
    "qlora": Recipe(
        (PRODUCTS,),
        codes="nf4",
        rank=32,
        summary="new adapters over NF4 codes; over factor pairs, codes of both factors (LoRD's)",
    ),
    "lora": Recipe(
        (PRODUCTS,), rank=32, summary="new adapters over what is there, folded in afterwards"
    ),
    "recovery": Recipe(
        (PRODUCTS, FACTORS),
        rank=32,
        summary="factor pairs; of the blocks' matrices adapters, folded in afterwards",
    ),
    "factors": Recipe((FACTORS,), summary="factor pairs only"),
    "full": Recipe(
        (".",), learning_rate=5e-5, summary="everything (LoRD's all parameters trainable)"
    ),
}


def named(name: str) -> Recipe:
    """The recipe of a name.

    Raises:
      KeyError: if there is none.
    """
    if name not in RECIPES:
        raise KeyError(f"no recipe {name!r}; {did_you_mean(name, RECIPES)}")
    return RECIPES[name]


def changed(recipe: Recipe, **asked: Any) -> Recipe:
    """A recipe with what was asked for instead; None and what is no field of it changes nothing.

    Raises:
      ValueError: if a rank is asked for and the recipe adds no adapters.
    """
    names = {field.name for field in dataclasses.fields(recipe)}
    new = {key: value for key, value in asked.items() if key in names and value is not None}
    if "rank" in new and recipe.rank is None:
        raise ValueError("this recipe adds no adapters, so it has no use for a rank")
    return dataclasses.replace(recipe, **new)


SCHEDULES = {
    "constant": lambda peak, steps: optax.constant_schedule(peak),
    "linear": lambda peak, steps: optax.linear_schedule(peak, 0.0, steps),
    "cosine": lambda peak, steps: optax.cosine_decay_schedule(peak, steps),
}


def initial_params(
    recipe: Recipe, params: Any, key: Array, *, classes: bool = False
) -> tuple[Any, list[str]]:
    """The model that training starts from, and the paths of the arrays that are trained.

    Args:
      recipe: what to do.
      params: nested dict of a model; its kernels may be of any kind.
      key: draws new adapters.
      classes: the model classifies.

    Raises:
      KeyError: if nothing matches what the recipe trains.
      ValueError: if a format or rank is wrong.
    """
    if recipe.codes is not None:
        params = adapters.encode_bases(params, recipe.codes)
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
            f"this recipe trains {' and '.join(recipe.train)}, of which the model has nothing; "
            f"{did_you_mean(recipe.train[0], able)}"
        )
    return params, adapters.trainable(params, (*patterns, *([HEAD] if classes else [])))


def _adapted(recipe: Recipe, path: str, leaf: Any) -> bool:
    """Whether a matrix gets an adapter: factor pairs do not where they are trained themselves."""
    if not is_block_linear(path):
        return False
    return not (FACTORS in recipe.train and is_kernel(leaf))


def optimizer(recipe: Recipe, steps: int) -> optax.GradientTransformation:
    """AdamW as a recipe says, for so many steps.

    Raises:
      ValueError: if there is no such schedule.
    """
    if recipe.schedule not in SCHEDULES:
        raise ValueError(f"schedule {recipe.schedule!r}; known: {', '.join(SCHEDULES)}")
    warm = min(round(recipe.warmup * steps), steps - 1)
    peak = recipe.learning_rate
    schedule = SCHEDULES[recipe.schedule](peak, steps - warm)
    if warm:
        rise = optax.linear_schedule(peak / warm, peak, warm)
        schedule = optax.join_schedules([rise, schedule], [warm])
    adam = optax.adamw(schedule, b2=recipe.b2, weight_decay=recipe.weight_decay)
    scaled = [] if recipe.alpha is None else [_product_rates(recipe.alpha)]
    clip = [] if recipe.clip is None else [optax.clip_by_global_norm(recipe.clip)]
    return optax.chain(*clip, adam, *scaled)


def _product_rates(alpha: float) -> optax.GradientTransformation:
    """Steps of products times ``sqrt(alpha / rank)``, whatever their ranks are."""

    def scaled(updates: Any, params: Any) -> Any:
        del params
        leaves, structure = jax.tree.flatten(updates)
        rates = (_product_rate(alpha, path, a) for path, a in trees.arrays(updates).items())
        return structure.unflatten([a * rate for a, rate in zip(leaves, rates, strict=True)])

    return optax.stateless(scaled)


def _product_rate(alpha: float, path: str, array: Array) -> float:
    if not re.search(PRODUCTS, path):
        return 1.0
    return (alpha / array.shape[-1 if path.endswith("left") else -2]) ** 0.5
