"""``lordjax plan``: what a compressed model will weigh and cost, before anything is paid."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lordjax.forecast.predict import EXACT, asked, cost
from lordjax.scripts.console import format_bytes
from lordjax.scripts.jobs import QUANTIZED, job_of
from lordjax.scripts.opened_model import quiet_transformers

if TYPE_CHECKING:
    from lordjax.allocation.plan import Plan
    from lordjax.models.config import ModelConfig
    from lordjax.models.source import InMemory

STORED = ("float32", "bfloat16", "float16")


def plan_model(
    model: str,
    *,
    method: str,
    keep: float | None,
    ranks: dict[str, int] | None,
    allocation: str | None,
    seq_len: int | None,
    dtype: str | None,
    recipe: str | None,
    batch: int,
    accumulate: int | None,
    rank: int | None,
    samples: int = 64,
    prefix: str | None = None,
    temperature: float | None = None,
    measure: bool = True,
    elastic: bool | None = None,
    mesh: str | None = None,
    num_processes: int = 1,
    **coding: Any,
) -> dict[str, Any]:
    """Counts weights, bytes, operations, memory and seconds; arguments are the flags.

    Of the model its config and the headers of its files are read. ``coding`` are those of methods
    with codes.

    Raises:
      KeyError: if the method, the policy or a layer of ``ranks`` is unknown.
      ValueError: if ranks do not fit, or the budget cannot be met.
    """
    from lordjax.forecast import machine_rates
    from lordjax.forecast import shapes as sizing
    from lordjax.scripts.token_inputs import WINDOW
    from lordjax.storage.saved_model import is_compressed

    quiet_transformers()
    if is_compressed(Path(model).expanduser()):
        raise ValueError(f"{model}: is compressed already; give the original model")
    options = {"keep": keep, "ranks": ranks, "temperature": temperature, "prefix": prefix}
    options |= {"allocation": allocation, "dtype": dtype, "elastic": elastic, **coding}
    options |= {"rank": None if recipe is not None else rank}
    options = dict.fromkeys((*QUANTIZED, "factors")) | options
    job_of(method, options)  # what is wrong with the options is found before a model is opened
    config, source, stored_dtype = open_shapes(model, dtype)
    _, settings, needs_tokens, _ = job_of(method, options, stored_dtype)
    length = seq_len or min(WINDOW, config.max_positions)
    shape = (samples if needs_tokens else 0, length)
    settings = {"method": method, **settings} | ({} if mesh is None else {"mesh": mesh})
    job, after, sure, plan = asked(config, source, shape, settings)
    rates = machine_rates.measure_rates() if measure else None
    found = {
        "model": model,
        "settings": settings
        | {"policy": _policy(settings, plan, sure)}
        | {"samples": shape[0], "seq_len": length},
        "before": _counts(source.params, config, length),
        "after": _counts(after, config, length),
        "ranks": plan.ranks if plan else {path: o.rank for path, o in job.options.items()},
        "formats": {} if plan else {path: str(o.form) for path, o in job.options.items()},
        "ranks_are": sure,
        "cost": cost(job, source, after, rates, mesh, num_processes),
    }
    if recipe is not None:
        if plan is None:
            raise ValueError(f"--finetune counts factor pairs; method {method!r} makes codes")
        if sure != EXACT:
            raise ValueError(
                "--finetune needs ranks, which depend on calibration data here; give --ranks, or "
                "an --allocation that needs none"
            )
        stored = dtype or "float32"
        memory = {"recipe": recipe, "rank": rank, "batch": batch, "accumulate": accumulate}
        from lordjax.allocation.plan import Plan

        untouched = Plan(method, dict.fromkeys(plan.ranks), 1.0, "uniform")
        for name, tree in (("before", untouched), ("after", plan)):
            shapes = sizing.outline(config, tree)
            memory[name] = _memory(config, shapes, recipe, rank, batch, accumulate, length, stored)
        found["finetune"] = memory
    return found


def _policy(settings: dict[str, Any], plan: Plan | None, sure: str) -> str:
    """How a budget is shared out."""
    if plan is None:
        return "uniform" if settings["form"] else settings["solver"]
    return plan.policy if sure == EXACT else settings["allocation"]


def open_shapes(model: str, dtype: str | None) -> tuple[ModelConfig, InMemory, str | None]:
    """A model's config, its parameters as shapes in the dtypes that are stored, and `stored_dtype`.

    Of a directory of safetensors their headers are read, else the config alone; then all is of the
    config's dtype, or of the one that is asked for.
    """
    from lordjax.conversions.readers.checkpoint import open_checkpoint, read_config
    from lordjax.forecast import shapes as sizing

    path = Path(model).expanduser()
    if path.suffix == ".gguf" or (path.is_dir() and any(path.glob("*.safetensors*"))):
        opened = open_checkpoint(path)
        before = sizing.stored(opened.config, opened.leaves())
        return opened.config, before, opened.stored_dtype
    hf_config, config = read_config(model)
    own = hf_config.get("dtype") or hf_config.get("torch_dtype")
    used = dtype or (own if own in STORED else "float32")
    return config, sizing.stored(config, _leaves(sizing.shapes(config)), used), None


def _leaves(source: InMemory) -> dict[str, Any]:
    from lordjax.kernels import trees

    return trees.flatten(source.params)


def _memory(
    config: Any,
    shapes: Any,
    recipe: str,
    rank: int | None,
    batch: int,
    accumulate: int | None,
    seq_len: int,
    dtype: str,
) -> dict[str, int]:
    """Bytes of a step of fine-tuning."""
    from lordjax.finetune.memory import predict
    from lordjax.finetune.recipes import changed, named
    from lordjax.finetune.step import Settings

    settings = Settings(1, batch, accumulate, dtype=dtype)
    settings.check()
    return predict(config, shapes, changed(named(recipe), rank=rank), settings, seq_len)


def _counts(tree: Any, config: Any, seq_len: int) -> dict[str, int]:
    """Of a model's shapes: parameters, block linear weights, bytes, multiplications."""
    import jax.numpy as jnp

    from lordjax.forecast import shapes as sizing
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
        "multiplications": sizing.multiplications(config, tree, seq_len),
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
        print(f"\n{memory['recipe']}, {memory['batch']} examples, bytes of a step:")
        for key, count in memory["before"].items():
            ratio = memory["after"][key] / max(count, 1)
            print(f"{key:30}{count:>22,}{memory['after'][key]:>22,}{ratio:>8.4f}")
    _show_ranks(result)
    _show_cost(result["cost"], settings)


def _show_ranks(result: dict[str, Any]) -> None:
    from lordjax.names import layer_type

    if result["ranks_are"] != EXACT:
        print(f"\nranks and what follows from them: {result['ranks_are']}")
    forms, nothing = result["formats"], "no product" if result["formats"] else "dense"
    print(f"\n{'layer':24}{'rank':>12}{'blocks':>8}")
    found = Counter(
        (layer_type(path), forms.get(path, ""), rank) for path, rank in result["ranks"].items()
    )
    for (name, form, rank), count in found.items():
        print(f"{name:24}{nothing if rank is None else rank:>12}{count:>8}  {form}")


def _show_cost(found: dict[str, Any], settings: dict[str, Any]) -> None:
    seconds = found.get("seconds", {})
    if settings["samples"]:
        print(f"\n{settings['samples']} windows of {settings['seq_len']} tokens")
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
            f"expected: {duration(low)} to {duration(high)} on this machine as busy as it is now, "
            f"about {duration(seconds['compiling'])} of it compiling; reading calibration data is "
            "not counted"
        )
    for name, row in found.get("devices", {}).items():
        print(f"share of each device, {name}: {', '.join(f'{s:.2f}' for s in row['shares'])}")
    for name, memory in found["memory"].items():
        where = "each device" if "devices" in found else "the device"
        device = f", {format_bytes(memory['device'])} on {where}" if memory["device"] else ""
        disk = f", {format_bytes(memory['disk'])} of disk" if "disk" in memory else ""
        print(
            f"peak memory {name}: {format_bytes(memory['host'])}{device}{disk} ({memory['stage']})"
        )


def duration(seconds: float) -> str:
    """Seconds as people read them: ``44 s``, ``12 min``, ``3.2 h``, ``12 days``."""
    for unit, length, most in (("s", 1, 120), ("min", 60, 120), ("h", 3600, 48)):
        if seconds < most * length:
            return (
                f"{seconds / length:.1f} {unit}"
                if unit == "h"
                else f"{seconds / length:.0f} {unit}"
            )
    return f"{seconds / 86400:.0f} days"
