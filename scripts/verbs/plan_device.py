"""``lordjax plan --device``: a job as it is compiled for GPUs that are not here."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lordjax.runtime import gpu_compiler
from lordjax.runtime.cards import Card, parse_device
from lordjax.scripts.console import format_bytes, say

if TYPE_CHECKING:
    from lordjax.scripts.verbs.plan import FineTuning

WORKER = "lordjax.forecast.compiled.worker"
DTYPE = "bfloat16"  # computing dtype of a fine-tuning step


def asked_card(device: str, mesh: str | None) -> tuple[Card, int]:
    """Returns the card and the number of devices of ``--device``.

    Raises:
      ImportError: if what compiles for a GPU is not installed.
      ValueError: if the card is unknown, or ``--mesh`` is given, too.
    """
    found = parse_device(device)
    if mesh is not None:
        raise ValueError(
            f"--device {device} and --mesh {mesh}: both say how many devices there are; leave "
            "--mesh out, and give --device CARD:N"
        )
    gpu_compiler.require_plugin()
    return found


def on_device(
    asked: tuple[Card, int],
    job: Any,
    before: Any,
    after: Any,
    batch: int,
    step: FineTuning | None,
) -> dict[str, Any]:
    """Returns the card's facts, and memory and least time of every stage of a job.

    Args:
      asked: the card and the number of devices.
      job: the job.
      before: shapes of the stored model, as a nested dict.
      after: shapes of the result.
      batch: rows that are decoded together.
      step: the fine-tuning step of the result; None: none.
    """
    from lordjax.forecast.compiled.worker import Task

    card, count = asked
    say(f"compiling for {count} x {card.title} in a process of its own; this takes minutes")
    tuned = None if step is None else step.asked(DTYPE)
    task = Task(job, card, count, before, after, batch, tuned)
    stages = gpu_compiler.run_apart(WORKER, task)
    return {
        "card": card.title,
        "count": count,
        "memory": card.memory,
        "stages": stages,
        "deciding": max(stages, key=lambda name: stages[name]["bytes"], default=None),
    }


def show_device(found: dict[str, Any]) -> None:
    """Prints the stages for people."""
    count, memory = found["count"], found["memory"]
    print(f"\nas compiled for {count} x {found['card']}, {format_bytes(memory)} each")
    print(f"{'stage':24}{'memory':>12}{'forecast':>12}{'at least':>12}{'launches':>14}{'sent':>12}")
    for name, row in found["stages"].items():
        forecast = format_bytes(row["forecast"]) if row.get("forecast") else "-"
        sent = format_bytes(row["sent"]) if row.get("sent") else "-"
        seconds = f"{row['seconds']:.3g} s"
        print(
            f"{name:24}{format_bytes(row['bytes']):>12}{forecast:>12}{seconds:>12}"
            f"{row['launches']:>14,}{sent:>12}{'' if row['fits'] else '  does not fit'}"
        )
    if found["deciding"] is not None:
        largest = found["stages"][found["deciding"]]
        verdict = "fits" if largest["fits"] else "does not fit"
        print(
            f"{verdict}: stage {found['deciding']} needs the most, {format_bytes(largest['bytes'])}"
        )
    print(
        "memory and bytes sent are those of one device; the time is a bound, which operations or "
        "bytes of the compiled programs set"
    )
