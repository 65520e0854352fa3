"""The compression methods by name. A new method is an entry of `METHODS`, with tests."""

from typing import Any

from lordjax.methods.base import STOCK, Factors, Method, Module, ModuleFactors, truncate
from lordjax.methods.low_rank import LOW_RANK_METHODS
from lordjax.methods.modular.heads import heads_module
from lordjax.methods.modular.mlp import SHRINKAGE, mlp_module
from lordjax.methods.modular.query_key import query_key_module
from lordjax.methods.modular.value_output import value_output_module

_LOSS_MLP = mlp_module(("moments", "gradients"), score="elimination", shrinkage=SHRINKAGE)


def _published(summary: str, **mlp: Any) -> Method:
    """Returns MoDeGPT as published, with options for how the MLP's neurons are chosen and refit."""
    modules = {
        "mlp": mlp_module(("moments",), **mlp),
        "vo": value_output_module(("values",), fit=False),
        "qk": query_key_module(("queries", "keys"), select=True),
    }
    return Method(summary, None, modules=modules, allocation="block-influence")


METHODS: dict[str, Method] = {
    **LOW_RANK_METHODS,
    "modegpt": Method(
        "prunes MLP neurons and factors attention matrices, in the metric of the loss",
        LOW_RANK_METHODS["lord"].factor,
        LOW_RANK_METHODS["lord"].needs,
        errors=LOW_RANK_METHODS["lord"].errors,
        modules={"mlp": _LOSS_MLP},
        allocation="global",
    ),
    "modegpt-stock": Method(
        "prunes MLP neurons and whole heads alike in all blocks, and removes blocks",
        None,
        modules={"mlp": _LOSS_MLP, "heads": heads_module()},
        allocation=STOCK,
        multiple=64,
    ),
    "modegpt-per-layer": Method(
        "prunes MLP neurons, with a width for each block; attention stays as it is",
        None,
        modules={"mlp": _LOSS_MLP},
        allocation="global",
        multiple=256,
    ),
    "modegpt-cr": Method(
        "prunes MLPs, values, queries and keys (smaller cache), in the metric of the loss",
        None,
        modules={
            "mlp": _LOSS_MLP,
            "vo": value_output_module(("moments", "gradients"), fit=True),
            "qk": query_key_module(("queries", "keys", "gates")),
        },
        allocation="global",
    ),
    "modegpt-published": _published(
        "MoDeGPT as published: Nystroem MLP, CR queries/keys, SVD values, block influence",
        score="leverage",
    ),
    "modegpt-slice": _published(
        "baseline: modegpt-published, with the MLP neurons of highest energy and no refit",
        score="energy",
        fit=False,
    ),
    "modegpt-random": _published(
        "baseline: modegpt-published, with random MLP neurons and no refit",
        score="random",
        fit=False,
    ),
}


# Shape -> method -> the method that fits as it does, in shapes that engines run with the gain.
SHAPED = {
    "stock": {"modegpt": "modegpt-stock"},
    "per-layer": {"modegpt": "modegpt-per-layer"},
}
SHAPES = ("free", *SHAPED)

DEFAULT_METHOD = "modegpt"  # loses least at every budget measured (docs/pages/results)


def shape_of(name: str) -> str:
    """Returns the kind of shapes that a method compresses to, one of `SHAPES`."""
    return next((shape for shape, own in SHAPED.items() if name in own.values()), SHAPES[0])


def method_of_shape(name: str, shape: str) -> str:
    """Returns the name of the method that compresses as ``name`` does, to shapes of a kind.

    Args:
      name: name of the method.
      shape: ``free``; ``stock``: the same shapes in all blocks, which a config can say; or
        ``per-layer``: one MLP width for each block.

    Raises:
      ValueError: if the shape is unknown, or the method has no such shapes.
    """
    if shape not in SHAPES:
        raise ValueError(f"shape must be one of {', '.join(SHAPES)}, got {shape!r}")
    if shape == SHAPES[0] or name in SHAPED[shape].values():
        return name
    if name not in SHAPED[shape]:
        raise ValueError(
            f"method {name!r} has no {shape} shapes; expected {' or '.join(SHAPED[shape])}, or "
            "leave the shape out"
        )
    return SHAPED[shape][name]


def method_at(name: str, layer: str) -> str:
    """Returns the name of the method that a method uses for a layer: itself, or an exception.

    Args:
      name: name of the method.
      layer: layer in the block, such as ``attention/v``.
    """
    return METHODS[name].exceptions.get(layer, name)


def corrects_bias(name: str, kind: str, layer: str) -> bool:
    """Returns whether a method's result has a bias correction at a site.

    Args:
      name: name of the method.
      kind: kind of the site: ``linear``, ``mlp``, ``qk`` or ``vo``.
      layer: layer in the block, for a linear site.
    """
    if kind == "linear":
        return METHODS[method_at(name, layer)].bias
    modules = METHODS[name].modules
    return kind in modules and modules[kind].bias


__all__ = [
    "DEFAULT_METHOD",
    "METHODS",
    "SHAPES",
    "STOCK",
    "Factors",
    "Method",
    "Module",
    "ModuleFactors",
    "corrects_bias",
    "method_at",
    "method_of_shape",
    "shape_of",
    "truncate",
]
