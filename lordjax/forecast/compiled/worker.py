"""The process that compiles a job for a GPU; `gpu_compiler.run_apart` runs it."""

from __future__ import annotations

import dataclasses
from typing import Any

from lordjax.finetune.recipes import Recipe
from lordjax.finetune.step import Settings
from lordjax.forecast.compiled import whole_models
from lordjax.forecast.compiled.programs import Compiler
from lordjax.forecast.compiled.stages import compiled_stages
from lordjax.forecast.job import CalibrationSpec
from lordjax.runtime import target
from lordjax.runtime.cards import Card
from lordjax.runtime.gpu_compiler import absent_mesh, answer


@dataclasses.dataclass(frozen=True)
class Task:
    """What is compiled.

    Attributes:
      spec: the job.
      card: the GPU.
      count: number of them.
      before: shapes of the stored model, as a nested dict.
      after: shapes of the result.
      batch: rows that are decoded.
      fine_tuned: recipe and settings of a fine-tuning step of the result; None: no step.
    """

    spec: CalibrationSpec
    card: Card
    count: int
    before: Any
    after: Any
    batch: int
    fine_tuned: tuple[Recipe, Settings] | None = None


def run(task: Task) -> dict[str, Any]:
    """Returns stage -> what `compiled_stages` says of it, with decoding and fine-tuning."""
    spec, config = task.spec, task.spec.config
    with target.absent_gpus(task.count):
        compiler = Compiler(absent_mesh(task.card, task.count), spec)
        found = compiled_stages(spec, compiler, task.card, task.before, task.after)
    with target.absent_gpus():
        where = compiler, task.card
        if config.causal and config.head == "causal":
            given = task.batch, spec.length
            found["decoding"] = whole_models.decoding(config, task.after, *where, *given)
        if task.fine_tuned is not None:
            given = *task.fine_tuned, spec.length
            found["fine-tuning"] = whole_models.fine_tuning(config, task.after, *where, *given)
    for row in found.values():
        row["fits"] = row["bytes"] <= task.card.memory
    return found


if __name__ == "__main__":
    answer(run)
