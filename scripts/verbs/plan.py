"""``lordjax plan``: size and cost of a compressed model, before any weights are read."""

from __future__ import annotations

import dataclasses
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lordjax.forecast import machine_rates
from lordjax.forecast.job_settings import EXACT, parse_settings
from lordjax.forecast.predict import cost
from lordjax.forecast.quantized_cost import QuantizationSpec
from lordjax.forecast.shapes import dense_shapes, multiplications, outline, stored
from lordjax.scripts.console import format_bytes, say
from lordjax.scripts.flags.options import ignored_keys
from lordjax.scripts.jobs import QUANTIZED, WHOLE_FILE, job_of
from lordjax.scripts.opened_model import quiet_transformers
from lordjax.scripts.token_inputs import WINDOW
from lordjax.scripts.verbs.plan_device import asked_card, on_device, show_device

if TYPE_CHECKING:
    from lordjax.allocation.plan import Plan
    from lordjax.finetune.recipes import Recipe
    from lordjax.finetune.step import Settings
    from lordjax.forecast.job import CalibrationSpec
    from lordjax.models.config import ModelConfig
    from lordjax.models.source import InMemory

STORED = ("float32", "bfloat16", "float16")
COMPRESSION_OPTIONS = (
    *("keep", "ranks", "allocation", "temperature", "prefix", "elastic"),
    *("dtype", "factors", *QUANTIZED, *WHOLE_FILE, "shape", "multiple"),
)


@dataclasses.dataclass(frozen=True)
class FineTuning:
    """The flags of a fine-tuning step whose memory is predicted.

    Attributes:
      recipe: a key of `RECIPES`.
      rank: rank of new adapters; None: the recipe's.
      batch: examples of a step.
      accumulate: micro-batches of a step; None: the default of ``lordjax finetune``.
    """

    recipe: str
    rank: int | None
    batch: int
    accumulate: int | None

    def asked(self, dtype: str) -> tuple[Recipe, Settings]:
        """Returns the recipe and the settings of the step; raises as these do."""
        from lordjax.finetune.recipes import changed, named
        from lordjax.finetune.step import Settings

        settings = Settings(1, self.batch, self.accumulate, dtype=dtype)
        settings.check()
        return changed(named(self.recipe), rank=self.rank), settings


def plan_model(
    model: str,
    *,
    method: str,
    seq_len: int | None,
    recipe: str | None,
    batch: int,
    accumulate: int | None,
    rank: int | None,
    samples: int | None = None,
    measure: bool = True,
    mesh: str | None = None,
    num_processes: int = 1,
    device: str | None = None,
    decode_batch: int = 1,
    **options: Any,
) -> dict[str, Any]:
    """Counts weights, bytes, operations, memory and seconds; arguments are the flags.

    Only the model's config and the headers of its files are read. ``options`` are those of
    `COMPRESSION_OPTIONS`, where ``rank`` is one if no recipe is given.

    Raises:
      ImportError: if ``device`` is given and what compiles for a GPU is not installed.
      KeyError: if the method, the policy or a layer of ``ranks`` is unknown.
      ValueError: if ranks do not fit, or the budget cannot be met.
    """
    card = None if device is None else asked_card(device, mesh)
    quiet_transformers()
    _check_original(model)
    options = dict.fromkeys(COMPRESSION_OPTIONS) | options
    options |= {"rank": None if recipe is not None else rank}
    job_of(method, options)  # finds wrong options before a model is opened
    config, source, stored_dtype = open_shapes(model, options["dtype"])
    _, settings, needs_tokens, _ = job_of(method, options, stored_dtype)
    length = seq_len or min(WINDOW, config.max_positions)
    calibration = (_sequences(config, samples, length) if needs_tokens else 0, length)
    settings = {"method": method, **settings} | ({} if mesh is None else {"mesh": mesh})
    method = settings["method"]  # the one of the shape that was asked for
    job, after, sure, plan = parse_settings(config, source, calibration, settings)
    rates = machine_rates.measure_rates() if measure else None
    chosen = {"policy": _policy(settings, plan, sure), "samples": calibration[0], "seq_len": length}
    found = {
        "model": model,
        "settings": settings | chosen,
        "before": _counts(source.params, config, length),
        "after": _counts(after, config, length),
        **_ranks_and_formats(job, plan),
        "ranks_are": sure,
        "cost": cost(job, source, after, rates, mesh, num_processes),
    }
    step = None if recipe is None else FineTuning(recipe, rank, batch, accumulate)
    if card is not None:
        found["device"] = on_device(card, job, source.params, after, decode_batch, step)
    if step is not None:
        dtype = options["dtype"] or "float32"
        found["finetune"] = _fine_tuning_memory(
            config, method, _exact_plan(method, plan, sure), step, length, dtype
        )
    return found


def _check_original(model: str) -> None:
    from lordjax.storage.saved_model import is_compressed

    if is_compressed(Path(model).expanduser()):
        raise ValueError(f"{model}: is compressed already; give the original model")


def _sequences(config: ModelConfig, samples: int | None, length: int) -> int:
    """The calibration sequences that `compress` would read; says if they are too few."""
    from lordjax.data import token_count

    sequences = samples or token_count.default_windows(config, length)
    warning = token_count.shortage(config, sequences * length)
    if warning is not None:
        say(warning)
    return sequences


def _ranks_and_formats(job: CalibrationSpec, plan: Plan | None) -> dict[str, Any]:
    """Rank of every site; and its format, if the method quantizes."""
    if plan is not None:
        return {"ranks": plan.ranks, "formats": {}}
    assert isinstance(job, QuantizationSpec)
    return {
        "ranks": {path: chosen.rank for path, chosen in job.options.items()},
        "formats": {path: str(chosen.form) for path, chosen in job.options.items()},
    }


def _policy(settings: dict[str, Any], plan: Plan | None, sure: str) -> str:
    """The policy or solver that allocates the budget."""
    if plan is None:
        return "uniform" if settings["form"] else settings["solver"]
    return plan.policy if sure == EXACT else settings["allocation"]


def open_shapes(model: str, dtype: str | None) -> tuple[ModelConfig, InMemory, str | None]:
    """Returns a model's config, its parameters as shapes, and `Model.stored_dtype`.

    Args:
      model: a GGUF file, a Hugging Face directory or hub id, or a ``config.json``. Headers of GGUF
        and safetensors files are read. Otherwise only the config is read.
      dtype: dtype of all parameters if only the config is read; None: the config's dtype.
    """
    from lordjax.conversions.readers.checkpoint import open_checkpoint, read_config
    from lordjax.conversions.readers.gguf.shards import is_gguf
    from lordjax.kernels import trees

    path = Path(model).expanduser()
    if is_gguf(path) or (path.is_dir() and any(path.glob("*.safetensors*"))):
        opened = open_checkpoint(path, ignore_keys=ignored_keys())
        before = stored(opened.config, opened.leaves())
        return opened.config, before, opened.stored_dtype
    hf_config, config = read_config(model, ignore_keys=ignored_keys())
    own = hf_config.get("dtype") or hf_config.get("torch_dtype")
    used = dtype or (own if own in STORED else "float32")
    return config, stored(config, trees.flatten(dense_shapes(config).params), used), None


def _exact_plan(method: str, plan: Plan | None, sure: str) -> Plan:
    """The plan, if the memory of fine-tuning can be predicted from it.

    Raises:
      ValueError: if the method quantizes, or its ranks depend on calibration data.
    """
    if plan is None:
        raise ValueError(
            f"--finetune predicts the memory of training low-rank factors; method {method!r} "
            "quantizes; choose a low-rank --method, or leave --finetune out"
        )
    if sure != EXACT:
        raise ValueError(
            "--finetune needs ranks, which depend on calibration data here; give --ranks, or "
            "an --allocation that needs none (uniform, last-k)"
        )
    return plan


def _fine_tuning_memory(
    config: ModelConfig, method: str, plan: Plan, step: FineTuning, seq_len: int, dtype: str
) -> dict[str, Any]:
    """Bytes of a fine-tuning step of the original and of the compressed model."""
    from lordjax.allocation.plan import Plan
    from lordjax.finetune.memory import predict

    recipe, settings = step.asked(dtype)
    original = Plan(method, dict.fromkeys(plan.ranks), 1.0, "uniform")
    return dataclasses.asdict(step) | {
        name: predict(config, outline(config, ranks), recipe, settings, seq_len)
        for name, ranks in (("before", original), ("after", plan))
    }


def _counts(tree: Any, config: ModelConfig, seq_len: int) -> dict[str, int]:
    """Parameters, block linear weights, bytes and multiplications of a model's shapes."""
    import jax.numpy as jnp

    from lordjax.kernels import trees
    from lordjax.kernels.base import nbytes
    from lordjax.kernels.kinds import weights
    from lordjax.names import is_block_linear

    flat = trees.flatten(tree)
    floating = [leaf for leaf in flat.values() if jnp.issubdtype(leaf.dtype, jnp.floating)]
    return {
        "parameters": sum(map(weights, floating)),
        "block_linear_weights": sum(
            weights(a) for path, a in flat.items() if is_block_linear(path)
        ),
        "bytes": nbytes(tree),
        "multiplications": multiplications(config, tree, seq_len),
    }


def show(result: dict[str, Any]) -> None:
    """Prints the counts for people."""
    settings, before, after = (result[key] for key in ("settings", "before", "after"))
    what = "ranks" if not result["formats"] else "formats"
    print(f"{result['model']}: {settings['method']}, {settings['policy']} {what}\n")
    print(f"{'':30}{'before':>22}{'after':>22}{'ratio':>8}")
    names = {"multiplications": f"multiplications, {settings['seq_len']} tokens"}
    for key, count in before.items():
        name = names.get(key, key.replace("_", " "))
        print(f"{name:30}{count:>22,}{after[key]:>22,}{after[key] / count:>8.4f}")
    if memory := result.get("finetune"):
        print(f"\nbytes of a fine-tuning step ({memory['recipe']}, {memory['batch']} examples):")
        for key, count in memory["before"].items():
            ratio = memory["after"][key] / max(count, 1)
            print(f"{key:30}{count:>22,}{memory['after'][key]:>22,}{ratio:>8.4f}")
    _show_ranks(result)
    _show_cost(result["cost"], settings)
    if "device" in result:
        show_device(result["device"])


def _show_ranks(result: dict[str, Any]) -> None:
    from lordjax.names import layer_type

    if result["ranks_are"] != EXACT:
        what = "formats" if result["formats"] else "ranks"
        print(f"\n{what}, and all that depends on them: {result['ranks_are']}")
    forms, nothing = result["formats"], "none" if result["formats"] else "dense"
    print(f"\n{'layer':24}{'rank':>12}{'blocks':>8}")
    found = Counter(
        (layer_type(path), forms.get(path, ""), rank) for path, rank in result["ranks"].items()
    )
    for (name, form, rank), count in found.items():
        print(f"{name:24}{nothing if rank is None else rank:>12}{count:>8}  {form}")


def _show_cost(found: dict[str, Any], settings: dict[str, Any]) -> None:
    seconds = found.get("seconds", {})
    if settings["samples"]:
        print(f"\n{settings['samples']} calibration sequences of {settings['seq_len']} tokens")
    else:
        print("\nno calibration")
    print(f"{'stage':24}{'TFLOP':>12}{'seconds':>12}")
    names = [name for name in {**found["flops"], **seconds} if name not in ("total", "compiling")]
    for name in names:
        time = f"{seconds[name]:>12.1f}" if name in seconds else ""
        print(f"{name:24}{found['flops'].get(name, 0) / 1e12:>12.3f}{time}")
    print(f"{'total':24}{sum(found['flops'].values()) / 1e12:>12.3f}", end="")
    print(f"{seconds['total']:>12.1f}" if seconds else "")
    if seconds:
        low, high = found["range"]
        print(
            f"expected time: {duration(low)} to {duration(high)} on this machine under its current "
            f"load, about {duration(seconds['compiling'])} of it compiling; reading calibration "
            "data is not included"
        )
    for name, row in found.get("devices", {}).items():
        print(f"share of each device in {name}: {', '.join(f'{s:.2f}' for s in row['shares'])}")
    for name, memory in found["memory"].items():
        where = "each device" if "devices" in found else "the device"
        device = f", {format_bytes(memory['device'])} on {where}" if memory["device"] else ""
        disk = f", {format_bytes(memory['disk'])} on disk" if "disk" in memory else ""
        stage = f"in stage {memory['stage']}"
        print(f"peak memory {name}: {format_bytes(memory['host'])}{device}{disk} ({stage})")


def duration(seconds: float) -> str:
    """Formats seconds for people: ``44 s``, ``12 min``, ``3.2 h``, ``12 days``."""
    for unit, length, most in (("s", 1, 120), ("min", 60, 120), ("h", 3600, 48)):
        if seconds < most * length:
            return (
                f"{seconds / length:.1f} {unit}"
                if unit == "h"
                else f"{seconds / length:.0f} {unit}"
            )
    return f"{seconds / 86400:.0f} days"
