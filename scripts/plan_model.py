"""``lordjax plan``: what a compressed model will weigh and cost, before anything is paid."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from lordjax.scripts.common import KEEP, quiet_transformers


def plan_model(
    model: str,
    *,
    method: str,
    keep: float | None,
    ranks: dict[str, int] | None,
    allocation: str | None,
    seq_len: int,
    dtype: str,
    recipe: str | None,
    batch: int,
    accumulate: int | None,
    rank: int | None,
) -> dict[str, Any]:
    """Counts weights, bytes and operations; arguments are the flags.

    Where ranks depend on calibration data, what comes after is what the budget allows at most.

    Raises:
      KeyError: if the method, the policy or a layer of ``ranks`` is unknown.
      ValueError: if ranks do not fit, or the budget cannot be met.
    """
    import jax.numpy as jnp

    from lordjax import sizing
    from lordjax.allocation import CURVELESS
    from lordjax.checkpoint import is_compressed
    from lordjax.compression import check_method
    from lordjax.conversions.huggingface import read_config
    from lordjax.factoring import site_sizes
    from lordjax.methods import METHODS
    from lordjax.plan import Plan
    from lordjax.prepared import check_policy

    quiet_transformers()
    check_method(method)
    if is_compressed(Path(model).expanduser()):
        raise ValueError(f"{model}: is compressed already; give the original model")
    config = read_config(model)[1]
    sizes = site_sizes(sizing.shapes(config), method)
    policy = allocation or METHODS[method].allocation
    check_policy(policy)
    share = KEEP if keep is None else keep
    if ranks is not None:
        plan = Plan(method, sizing.ranks_by_pattern(sizes, ranks), None, sizing.GIVEN)
    elif policy in CURVELESS:
        plan = sizing.plan_by_shapes(config, method, share, policy)
    else:
        plan = Plan(method, {}, share, policy)
    untouched = Plan(method, dict.fromkeys(sizes), 1.0, "uniform")
    before = _counts(sizing.outline(config, untouched), config, seq_len, dtype)
    if plan.ranks:
        after = _counts(sizing.outline(config, plan), config, seq_len, dtype)
    else:
        saved = (1 - share) * before["block_linear_weights"]
        itemsize = jnp.dtype(dtype).itemsize
        scale = {"bytes": itemsize, "multiplications": seq_len}
        after = {key: round(count - saved * scale.get(key, 1)) for key, count in before.items()}
    found = {
        "model": model,
        "settings": {"method": method, "policy": plan.policy, "keep": plan.keep, "ranks": ranks}
        | {"seq_len": seq_len, "dtype": dtype},
        "before": before,
        "after": after,
        "ranks": dict(plan.ranks),
    }
    if recipe is not None:
        if not plan.ranks:
            raise ValueError(
                "--finetune needs ranks, which depend on calibration data here; give --ranks, or "
                "an --allocation that needs none"
            )
        memory = {"recipe": recipe, "rank": rank, "batch": batch, "accumulate": accumulate}
        for name, tree in (("before", untouched), ("after", plan)):
            shapes = sizing.outline(config, tree)
            memory[name] = _memory(config, shapes, recipe, rank, batch, accumulate, seq_len, dtype)
        found["finetune"] = memory
    return found


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
    from lordjax.finetune import Settings
    from lordjax.memory import predict
    from lordjax.recipes import changed, named

    settings = Settings(1, batch, accumulate, dtype=dtype)
    settings.check()
    return predict(config, shapes, changed(named(recipe), rank=rank), settings, seq_len)


def _counts(tree: Any, config: Any, seq_len: int, dtype: str) -> dict[str, int]:
    """Of a model's shapes: parameters, block linear weights, bytes in a dtype, multiplications."""
    import jax.numpy as jnp

    from lordjax import sizing, trees
    from lordjax.kernels import weights
    from lordjax.sites import is_block_linear

    flat = trees.flatten(tree)
    floating = [leaf for leaf in flat.values() if jnp.issubdtype(leaf.dtype, jnp.floating)]
    count, every = (sum(map(weights, leaves)) for leaves in (floating, flat.values()))
    return {
        "parameters": count,
        "block_linear_weights": sum(
            weights(a) for path, a in flat.items() if is_block_linear(path)
        ),
        "bytes": count * jnp.dtype(dtype).itemsize + 4 * (every - count),  # indices are int32
        "multiplications": sizing.multiplications(config, tree, seq_len),
    }


def show(result: dict[str, Any]) -> None:
    """Prints the counts for people."""
    from lordjax.sites import layer_type

    settings, before, after = (result[key] for key in ("settings", "before", "after"))
    print(f"{result['model']}: {settings['method']}, {settings['policy']} ranks\n")
    print(f"{'':30}{'before':>22}{'after':>22}{'ratio':>8}")
    names = {"bytes": f"bytes in {settings['dtype']}"}
    names["multiplications"] = f"multiplications, {settings['seq_len']} tokens"
    for key, count in before.items():
        name = names.get(key, key.replace("_", " "))
        print(f"{name:30}{count:>22,}{after[key]:>22,}{after[key] / count:>8.4f}")
    if memory := result.get("finetune"):
        print(f"\n{memory['recipe']}, {memory['batch']} examples, bytes of a step:")
        for key, count in memory["before"].items():
            ratio = memory["after"][key] / max(count, 1)
            print(f"{key:30}{count:>22,}{memory['after'][key]:>22,}{ratio:>8.4f}")
    if not result["ranks"]:
        print("\nranks depend on calibration data; 'after' is what the budget allows at most")
        return
    print(f"\n{'layer':24}{'rank':>8}{'blocks':>8}")
    found = Counter((layer_type(path), rank) for path, rank in result["ranks"].items())
    for (name, rank), count in found.items():
        print(f"{name:24}{'dense' if rank is None else rank:>8}{count:>8}")
