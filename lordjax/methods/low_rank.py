"""Low-rank factorizations of one kernel: PCA of the outputs in some metric.

With ``y = x K`` and ``K' = left[:, :r] @ right[:r]`` every method here minimizes::

    tr( (K - K')ᵀ C (K - K') M )

The methods differ in the second moment ``C`` of the inputs and in the metric ``M`` of the outputs:

=============  ======================  ==================  ====
method         C                       M                   bias
=============  ======================  ==================  ====
svd            identity                identity            no
fwsvd          diag(row Fisher)        identity            no
asvd           diag(mean|x|)^2α        identity            no
svd-llm        E xᵀx                   identity            no
lord-linear    E xᵀx                   identity            no
lord-affine    cov x                   identity            yes
lord-centred   cov x                   identity            yes, except values
rom            cov x                   identity            no
lord           E xᵀx                   E gᵀg (gradients)   no
=============  ======================  ==================  ====

Values are not centered in ``lord-centred``. An idle attention head attends to a sink token, whose
value is close to zero. A bias that restores the *mean* value is added to the sink's value too, and
through the sink's attention weight to every output. SmolLM2's perplexity at keep 0.8 is 136 if all
layers are centered, 86 if none is, and 74 if all but the values are (docs/pages/results).

Sources: FWSVD arXiv 2207.00112; ASVD 2312.05821; SVD-LLM 2403.07378; LoRD 2309.14021 and AFM
(AAAI 2023); ROM 2312.07046. theory/lord_rom §3.2 shows that ASVD's ``svd(S K) S⁻¹`` and SVD-LLM's
whitening are this formula without the inverse.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from lordjax.methods import linalg
from lordjax.methods.base import Factors, Method
from lordjax.methods.linalg import mm

ASVD_ALPHA = 0.5  # exponent of the mean magnitude, as published for ASVD


def _output_moment(kernel: Array, stats: Mapping[str, Any], centred: bool) -> Float[Array, "m m"]:
    """Returns the second moment (or covariance) of the outputs.

    It is read from the statistics of the outputs, or computed from those of the inputs.
    """
    moments = stats.get("output") or stats["input"]
    matrix = moments.covariance() if centred else moments.second_moment()
    return matrix if "output" in stats else mm(kernel.T, matrix, kernel)


def _diagonal_moment(weights: Float[Array, "in"], kernel: Array) -> Float[Array, "m m"]:
    """Returns ``Kᵀ diag(weights) K``."""
    return mm((kernel * weights[:, None]).T, kernel)


def factor(
    kernel: Float[Array, "in out"],
    stats: Mapping[str, Any],
    *,
    inputs: str,
    gradient_metric: bool = False,
    bias: bool = False,
) -> Factors:
    """Factorizes a kernel for all ranks at once.

    Args:
      kernel: the matrix ``[in, out]``, in the dtype to compute in.
      stats: the statistics that ``inputs`` and ``gradient_metric`` need: ``input`` or ``output``
        (`Moments`), ``abs_mean``, ``row_fisher`` ``[in]``, ``gradients`` (second moment of the loss
        gradient at the outputs). ``basis`` ``[out, m]`` gives the coordinates of the gradients;
        None means the outputs themselves. Without ``basis`` they are `linalg.row_space` of the
        kernel.
      inputs: C of this module's table: ``identity``, ``row_fisher``, ``abs_mean``, ``moments`` or
        ``covariance``.
      gradient_metric: whether to weigh output errors by the gradients' second moment.
      bias: whether to correct the mean of the output by a bias.

    Returns:
      Factors; rank r is a slice of them.

    Raises:
      ValueError: if ``inputs`` is unknown.
    """
    # Gradients come with their coordinates. A corrective target is another kernel with the same row
    # space, whose own basis would be rotated.
    basis = stats["basis"] if "basis" in stats else linalg.row_space(kernel)
    projected = kernel if basis is None else mm(kernel, basis)
    match inputs:
        case "identity":
            outputs = mm(projected.T, projected)
        case "row_fisher":
            outputs = _diagonal_moment(stats["row_fisher"], projected)
        case "abs_mean":
            outputs = _diagonal_moment(stats["abs_mean"].mean() ** (2 * ASVD_ALPHA), projected)
        case "moments" | "covariance":
            outputs = _output_moment(projected, stats, centred=inputs == "covariance")
        case _:
            raise ValueError(
                f"unknown input statistic {inputs!r}; expected identity, row_fisher, abs_mean, "
                "moments or covariance"
            )
    metric = stats["gradients"].second_moment() if gradient_metric else None
    left, right, spectrum = linalg.metric_pca(projected, outputs, metric)
    if basis is not None:
        right = mm(right, basis.T)
    means = {}
    if bias:
        means = _means(kernel, left, right, stats)
    return Factors(left, right, spectrum, **means)


def errors(
    kernel: Float[Array, "in out"],
    factors: Factors,
    stats: Mapping[str, Any],
    *,
    inputs: str,
    gradient_metric: bool = False,
    bias: bool = False,
) -> Float[Array, "m+1"]:
    """Returns the errors of factors at every rank, by statistics of other tokens.

    The output is ``Σ_i z_i right_i`` with ``z = x @ left``; rank r drops the terms from r on.

    Args:
      kernel: the matrix ``[in, out]``.
      factors: what `factor` returned for it, from statistics of some tokens.
      stats: the same statistics of other tokens.
      inputs: as for `factor`: ``moments`` or ``covariance``.
      gradient_metric: as for `factor`.
      bias: as for `factor`.
    """
    basis = stats["basis"] if "basis" in stats else linalg.row_space(kernel)
    right = factors.right if basis is None else mm(factors.right, basis)
    moments, turn = (
        (stats["input"], factors.left)
        if "input" in stats
        else (stats["output"], jnp.linalg.inv(right))
    )
    matrix = moments.covariance() if inputs == "covariance" else moments.second_moment()
    terms = mm(turn.T, matrix, turn)
    if bias:  # the bias restores the mean of the first tokens
        shift = mm(moments.mean[None], turn)[0] - factors.mean_in
        terms = terms + jnp.outer(shift, shift)
    if not gradient_metric:
        return linalg.tail_errors(terms * mm(right, right.T))
    root, _ = linalg.root_pair(stats["gradients"].second_moment(), linalg.GRADIENT_DAMPING)
    weighted = mm(right, root)
    return linalg.tail_errors(terms * mm(weighted, weighted.T))


def _means(kernel: Array, left: Array, right: Array, stats: Mapping[str, Any]) -> dict[str, Array]:
    """Returns the means of the latent and of the output, from the available moments."""
    if "output" in stats:
        # The inputs' mean is not known. The latent mean is the output mean times the
        # pseudo-inverse of ``right``, which has orthonormal rows, since there is no metric.
        mean = stats["output"].mean
        return {"mean_out": mean, "mean_in": mm(mean[None], right.T)[0]}
    mean = stats["input"].mean[None]
    # With a corrective target, the mean to restore is the original model's.
    out = stats["target_mean"] if "target_mean" in stats else mm(mean, kernel)[0]
    return {"mean_out": out, "mean_in": mm(mean, left)[0]}


def _method(
    summary: str, inputs: str, needs: tuple[str, ...] = ("moments",), **kwargs: Any
) -> Method:
    """Returns a `Method`; keyword arguments are fields of it or arguments of `factor`."""
    method = {k: kwargs.pop(k) for k in ("allocation", "prefix", "exceptions") if k in kwargs}
    if inputs in ("moments", "covariance"):
        method["errors"] = functools.partial(errors, inputs=inputs, **kwargs)
    return Method(
        summary,
        functools.partial(factor, inputs=inputs, **kwargs),
        needs,
        bias=kwargs.get("bias", False),
        **method,
    )


LOW_RANK_METHODS: dict[str, Method] = {
    "svd": _method("truncated SVD of the weights; needs no data", "identity", ()),
    "fwsvd": _method("SVD with rows weighted by Fisher information", "row_fisher", ("row_fisher",)),
    "asvd": _method(
        "SVD with rows weighted by mean activation magnitude", "abs_mean", ("abs_mean",)
    ),
    "svd-llm": _method("SVD whitened by the activations, uniform ranks", "moments"),
    "lord": _method(
        "PCA of the outputs in the metric of the loss, global ranks",
        "moments",
        ("moments", "gradients"),
        gradient_metric=True,
        allocation="global",
    ),
    "lord-linear": _method("PCA of the outputs without a bias: LoRD's linear variant", "moments"),
    "lord-affine": _method(
        "PCA of centered outputs with a bias: LoRD as published",
        "covariance",
        bias=True,
    ),
    "lord-centred": _method(
        "PCA of centered outputs with a bias, except values",
        "covariance",
        bias=True,
        exceptions={"attention/v": "lord-linear"},
    ),
    "rom": _method(
        "PCA of centered outputs of the last blocks, compressed in sequence: ROM as published",
        "covariance",
        allocation="last-k",
        prefix="compressed",
    ),
}
