"""Distillation of a compressed model: it is trained to predict as the original model does.

It is a run of `training_run` with another loss and other data: the loss is the divergence from the
original model's predictions, which are kept on disk (`predictions`). What is trained are all
low-rank factors, the scales of quantized matrices, norms and biases, and adapters of the dense
matrices of the blocks, merged afterwards; so the size stays as it is. Codes and embeddings are not
trained. If the divergence on held-out sequences does not fall, or a loss is not finite, the model
is left as it was.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lordjax.data import examples, token_windows
from lordjax.data.examples import Data, Examples
from lordjax.finetune import adapters, recipes
from lordjax.finetune.predictions import TOP, taught
from lordjax.finetune.recipes import Recipe
from lordjax.finetune.step import DivergedError, Settings, State
from lordjax.finetune.training_run import CheckpointPolicy, mean_losses, train
from lordjax.kernels import trained_scales, trees
from lordjax.models.config import ModelConfig
from lordjax.models.source import Source
from lordjax.names import is_block_linear
from lordjax.runtime.progress import Progress
from lordjax.storage.store import Store

RECIPE = "distill"
STEPS, BATCH = 40, 8  # about so many steps, of at most so many sequences
CHECKPOINTS = 5  # so often the state is judged and kept
MOST_HELD_OUT = 8  # sequences


@dataclasses.dataclass(frozen=True)
class Distillation:
    """How a model is distilled.

    Attributes:
      tokens: number of tokens to train on.
      learning_rate: peak learning rate; None: the recipe's.
      dtype: computing dtype; what is trained is float32.
      seed: seed of new adapters and of the order of the sequences.
    """

    tokens: int
    learning_rate: float | None = None
    dtype: str = "float32"
    seed: int = 0

    def sequences(self, length: int) -> tuple[int, int]:
        """Returns how many sequences of a length are trained on, and how many are held out.

        Raises:
          ValueError: if there are fewer tokens than in one sequence.
        """
        count = self.tokens // length
        if not count:
            raise ValueError(
                f"--distill {self.tokens}: fewer tokens than one calibration sequence has, "
                f"{length}; give more, or shorter sequences (--seq-len)"
            )
        return count, min(MOST_HELD_OUT, max(2, count // 10))

    def identity(self, text: Text) -> dict[str, Any]:
        """Returns everything that the bits of a distilled model depend on, besides the models."""
        tokens = token_windows.fingerprint(np.concatenate(text[:2]))
        return {**dataclasses.asdict(self), "tokens_sha256": tokens}

    def recipe(self, params: Any) -> Recipe:
        """Returns what of a model is trained, and how.

        Args:
          params: the model's parameters; no adapter's rank exceeds a side of its matrix.
        """
        recipe = recipes.named(RECIPE)
        flat = trees.flatten(params).items()
        sides = [min(leaf.shape) for path, leaf in flat if is_block_linear(path)]
        rank = min(recipe.rank or 1, *sides)
        return recipes.changed(recipe, learning_rate=self.learning_rate, rank=rank)

    def settings(self, count: int) -> Settings:
        """Returns the settings of a run over so many sequences, each of which is read once."""
        batch = max(1, min(BATCH, count // STEPS))
        own = {"dtype": self.dtype, "seed": self.seed, "distill": 1.0}
        return Settings(-(-count // batch), batch, **own)


class Text(NamedTuple):
    """What a model is distilled on.

    Attributes:
      train: token ids ``[n, L]`` to train on.
      held_out: token ids ``[m, L]`` that judge the result.
      source: where they come from, for the report.
    """

    train: np.ndarray
    held_out: np.ndarray
    source: str = ""


def check(config: ModelConfig) -> None:
    """Raises ValueError if a model does not predict the next token."""
    if config.head != "causal" or not config.causal:
        raise ValueError(
            f"a model with head {config.head!r} is not distilled: only causal language models are; "
            "leave --distill out"
        )


def distill(
    teacher: Source,
    config: ModelConfig,
    params: Any,
    text: Text,
    how: Distillation,
    *,
    store: Store,
    directory: Path,
    progress: Progress | None = None,
) -> tuple[Any, dict[str, Any]]:
    """Distills a model; a run that was killed and is started again gives the same bits.

    Args:
      teacher: the original model.
      config: architecture of the compressed model, with the same vocabulary.
      params: its parameters; leaves may be kernels of any kind.
      text: what it is trained and judged on.
      how: learning rate, dtype and seed.
      store: keeps the teacher's predictions.
      directory: of the run's checkpoints and metrics; new, or holds the same run.
      progress: called with a stage, the work done, and all of it.

    Returns:
      The parameters, with the kinds, shapes and dtypes of ``params``; and facts for a report:
      settings, nats and divergence per held-out target before and after, and whether the training
      was kept.

    Raises:
      ValueError: if a model does not predict the next token, or the vocabularies differ.
    """
    start = time.perf_counter()
    check_pair(teacher.config, config)
    data, recipe = _data(teacher, text, store, progress), how.recipe(params)
    settings = how.settings(len(text.train))
    before = _judged(config, params, data.validation, how.dtype)
    run = (config, params, data, recipe, settings, directory)
    new, outcome = _trained(run, before, how.dtype, progress)
    facts = {
        "source": text.source,
        "tokens": text.train.size,
        "held_out_tokens": text.held_out.size,
        "recipe": dataclasses.asdict(recipe),
        "settings": dataclasses.asdict(settings),
        "teacher_tokens": data.train.top_ids.shape[-1],
        "before": before,
        **outcome,
        "seconds": time.perf_counter() - start,
    }
    return new, facts


def _trained(
    run: tuple[Any, ...], before: dict[str, float], dtype: str, progress: Progress | None
) -> tuple[Any, dict[str, Any]]:
    """Trains a model; returns its parameters, or the old ones if they are better, and facts."""
    config, params, data, _, settings, _ = run
    keeping = CheckpointPolicy(-(-settings.steps // CHECKPOINTS), 1)

    def report(line: Mapping[str, Any]) -> None:
        if progress is not None:
            progress("distill", line["step"], settings.steps)

    own: dict[str, Any] = {"about": {"data": data.facts}, "keeping": keeping, "resume": True}
    try:
        trained = train(*run, **own, report=report)
    except DivergedError as error:
        return params, {"best_step": None, "after": before, "kept": False, "error": str(error)}
    new = adapters.merge(trained_scales.packed(trained.params, params))
    after = _judged(config, new, data.validation, dtype)
    better = after["divergence"] < before["divergence"]
    facts = {"best_step": trained.best, "after": after, "kept": better, "error": None}
    return new if better else params, facts


def check_pair(teacher: ModelConfig, student: ModelConfig) -> None:
    """Raises ValueError if one model cannot be distilled from the other."""
    check(teacher)
    check(student)
    if teacher.vocab_size != student.vocab_size:
        raise ValueError(
            f"the teacher has a vocabulary of {teacher.vocab_size} tokens, the model one of "
            f"{student.vocab_size}; expected the same: give the model that it was compressed from"
        )


def _data(teacher: Source, text: Text, store: Store, progress: Progress | None) -> Data:
    """Returns examples with the teacher's predictions; the held-out ones come last."""
    rows = taught(teacher, np.concatenate(text[:2]), store, top=TOP, progress=progress)
    held = np.arange(len(text.train), rows.size)
    validation = rows.rows(held)
    plain = Examples(text.train, rows.targets[: len(text.train)])
    facts = examples.described(plain, Examples(text.held_out, validation.targets), {}).facts
    return Data(_first(rows, len(text.train)), validation, facts)


def _first(rows: Examples, count: int) -> Examples:
    """Returns the first examples; the teacher's predictions of all stay where they are."""
    return rows._replace(tokens=rows.tokens[:count], targets=rows.targets[:count])


def _judged(config: ModelConfig, params: Any, held_out: Examples, dtype: str) -> dict[str, float]:
    """Returns nats and divergence per target of the held-out examples."""
    state = State(jnp.zeros((), jnp.int32), params, None)
    nothing = jax.tree.map(lambda _: None, params)
    given = (config, state, nothing, held_out)
    nll, divergence = mean_losses(*given, batch=1, dtype=dtype, distill=1.0)
    return {"nats": nll, "divergence": divergence}
