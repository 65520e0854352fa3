"""Methods by name. A new method is a row here, a theorem test and a number from a script."""

from typing import Any

from lordjax.methods.base import Factors, Method, Module, ModuleFactors, truncate
from lordjax.methods.low_rank import LOW_RANK_METHODS
from lordjax.methods.modular.mlp import SHRINKAGE, mlp_module
from lordjax.methods.modular.query_key import query_key_module
from lordjax.methods.modular.value_output import value_output_module

_LOSS_MLP = mlp_module(("moments", "gradients"), score="elimination", shrinkage=SHRINKAGE)


def _published(summary: str, **mlp: Any) -> Method:
    """MoDeGPT as published, but for how the MLP's neurons are chosen and fitted."""
    modules = {
        "mlp": mlp_module(("moments",), **mlp),
        "vo": value_output_module(("values",), fit=False),
        "qk": query_key_module(("queries", "keys"), select=True),
    }
    return Method(summary, None, modules=modules, allocation="block-influence")


METHODS: dict[str, Method] = {
    **LOW_RANK_METHODS,
    "modegpt": Method(
        "narrower MLPs, low-rank attention, in the metric of the loss",
        LOW_RANK_METHODS["lord"].factor,
        LOW_RANK_METHODS["lord"].needs,
        modules={"mlp": _LOSS_MLP},
        allocation="global",
    ),
    "modegpt-cr": Method(
        "narrower MLPs, values, queries and keys (smaller cache), in the metric of the loss",
        None,
        modules={
            "mlp": _LOSS_MLP,
            "vo": value_output_module(("moments", "gradients"), fit=True),
            "qk": query_key_module(("queries", "keys", "gates")),
        },
        allocation="global",
    ),
    "modegpt-published": _published(
        "Nystroem MLP, CR queries/keys, SVD values, ranks by block influence: as published",
        score="leverage",
    ),
    "modegpt-slice": _published(
        "modegpt-published with the MLP's most energetic neurons and no refit: a baseline",
        score="energy",
        fit=False,
    ),
    "modegpt-random": _published(
        "modegpt-published with random neurons of the MLP and no refit: a baseline",
        score="random",
        fit=False,
    ),
}


DEFAULT_METHOD = "modegpt"  # loses least at every budget measured (docs/pages/results)


def method_at(name: str, layer: str) -> str:
    """The method that ``name`` uses for a layer (``attention/v``): itself, or an exception."""
    return METHODS[name].exceptions.get(layer, name)


def corrects_bias(name: str, kind: str, layer: str) -> bool:
    """Whether a method's result carries a bias correction at a site.

    Args:
      name: of the method.
      kind: of the site.
      layer: a linear site's layer type.
    """
    if kind == "linear":
        return METHODS[method_at(name, layer)].bias
    modules = METHODS[name].modules
    return kind in modules and modules[kind].bias


__all__ = [
    "DEFAULT_METHOD",
    "METHODS",
    "Factors",
    "Method",
    "Module",
    "ModuleFactors",
    "corrects_bias",
    "method_at",
    "truncate",
]
