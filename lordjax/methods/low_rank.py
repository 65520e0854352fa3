"""Low-rank factorisations of one kernel: all of them PCA of the outputs in some metric.

With ``y = x K`` and ``K' = left[:, :r] @ right[:r]`` every method here minimises::

    tr( (K - K')ᵀ C (K - K') M )

and they differ in what they take for the inputs' second moment ``C`` and the outputs' metric
``M``:

=============  ======================  ==================  ====
method         C                       M                   bias
=============  ======================  ==================  ====
svd            identity                identity            no
fwsvd          diag(row Fisher)        identity            no
asvd           diag(mean|x|)^2α        identity            no
svd-llm        E xᵀx                   identity            no
lord-linear    E xᵀx                   identity            no
lord-affine    cov x                   identity            yes
lord-centred   cov x                   identity            yes, but for the values
rom            cov x                   identity            no
lord           E xᵀx                   E gᵀg (gradients)   no
=============  ======================  ==================  ====

Why values are not centred: an attention head that has nothing to do looks at a sink token, whose
value is close to zero. The bias that restores the *mean* value is added to the sink's value too,
and through the sink's attention weight to every output. With all layers centred SmolLM2's
perplexity at keep 0.8 is 136, with none 86, with all but the values 74 (docs, results).

Sources: FWSVD arXiv 2207.00112; ASVD 2312.05821; SVD-LLM 2403.07378; LoRD 2309.14021 and AFM
(AAAI 2023); ROM 2312.07046. That ASVD's ``svd(S K) S⁻¹`` and SVD-LLM's whitening are this formula
without the inverse is shown in theory/lord_rom §3.2.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

from jaxtyping import Array, Float

from lordjax.methods import linalg
from lordjax.methods.base import Factors, Method
from lordjax.methods.linalg import mm

ASVD_ALPHA = 0.5  # ASVD's published exponent on the mean magnitude


def _output_moment(kernel: Array, stats: Mapping[str, Any], centred: bool) -> Float[Array, "m m"]:
    """Second moment (or covariance) of the outputs, from the inputs' or from the outputs' own."""
    moments = stats.get("output") or stats["input"]
    matrix = moments.covariance() if centred else moments.second_moment()
    return matrix if "output" in stats else mm(kernel.T, matrix, kernel)


def _diagonal_moment(weights: Float[Array, "in"], kernel: Array) -> Float[Array, "m m"]:
    """``Kᵀ diag(weights) K``."""
    return mm((kernel * weights[:, None]).T, kernel)


def factor(
    kernel: Float[Array, "in out"],
    stats: Mapping[str, Any],
    *,
    inputs: str,
    gradient_metric: bool = False,
    bias: bool = False,
) -> Factors:
    """Factors one kernel for all ranks.

    Args:
      kernel: ``[in, out]``, in the dtype to compute in.
      stats: ``input`` or ``output`` `Moments`, ``abs_mean``, ``row_fisher`` ``[in]``,
        ``gradients`` `Moments` of the loss gradient at the outputs, in the coordinates of
        ``basis`` ``[out, m]`` (None: as they are), as ``inputs`` and ``gradient_metric`` ask.
        Without ``basis``, `linalg.row_space` of the kernel.
      inputs: ``identity``, ``row_fisher``, ``abs_mean``, ``moments`` or ``covariance``.
      gradient_metric: weigh output errors by the gradients' second moment.
      bias: correct the mean of the output by a bias.
    """
    # Gradients come with the coordinates they were taken in: a corrective target is another
    # kernel with the same row space, and its own basis would be a rotated one.
    basis = stats["basis"] if "basis" in stats else linalg.row_space(kernel)
    narrow = kernel if basis is None else mm(kernel, basis)
    match inputs:
        case "identity":
            outputs = mm(narrow.T, narrow)
        case "row_fisher":
            outputs = _diagonal_moment(stats["row_fisher"], narrow)
        case "abs_mean":
            outputs = _diagonal_moment(stats["abs_mean"].mean() ** (2 * ASVD_ALPHA), narrow)
        case "moments" | "covariance":
            outputs = _output_moment(narrow, stats, centred=inputs == "covariance")
        case _:
            raise ValueError(f"unknown input statistic {inputs!r}")
    metric = stats["gradients"].second_moment() if gradient_metric else None
    left, right, spectrum = linalg.metric_pca(narrow, outputs, metric)
    if basis is not None:
        right = mm(right, basis.T)
    means = {}
    if bias:
        means = _means(kernel, left, right, stats)
    return Factors(left, right, spectrum, **means)


def _means(kernel: Array, left: Array, right: Array, stats: Mapping[str, Any]) -> dict[str, Array]:
    """Means of the latent and of the output, from whichever moments there are."""
    if "output" in stats:
        # Without the inputs' mean: left spans the outputs, so its latent mean is right's
        # pseudo-inverse applied to the output mean; right has orthonormal rows without a metric.
        mean = stats["output"].mean
        return {"mean_out": mean, "mean_in": mm(mean[None], right.T)[0]}
    mean = stats["input"].mean[None]
    # The corrective target: the mean to be met is the untouched model's.
    out = stats["target_mean"] if "target_mean" in stats else mm(mean, kernel)[0]
    return {"mean_out": out, "mean_in": mm(mean, left)[0]}


def _method(
    summary: str, inputs: str, needs: tuple[str, ...] = ("moments",), **kwargs: Any
) -> Method:
    method = {k: kwargs.pop(k) for k in ("allocation", "prefix", "exceptions") if k in kwargs}
    return Method(
        summary,
        functools.partial(factor, inputs=inputs, **kwargs),
        needs,
        bias=kwargs.get("bias", False),
        **method,
    )


LOW_RANK_METHODS: dict[str, Method] = {
    "svd": _method("truncated SVD of the weights, no data", "identity", ()),
    "fwsvd": _method("rows weighted by Fisher information", "row_fisher", ("row_fisher",)),
    "asvd": _method("rows weighted by mean activation magnitude", "abs_mean", ("abs_mean",)),
    "svd-llm": _method("whitened by the activations, uniform ranks", "moments"),
    "lord": _method(
        "PCA of outputs in the metric of the loss, global ranks",
        "moments",
        ("moments", "gradients"),
        gradient_metric=True,
        allocation="global",
    ),
    "lord-linear": _method("PCA of outputs, no bias: LoRD's linear variant", "moments"),
    "lord-affine": _method(
        "PCA of centred outputs with a bias: LoRD as published",
        "covariance",
        bias=True,
    ),
    "lord-centred": _method(
        "PCA of centred outputs with a bias, values uncentred",
        "covariance",
        bias=True,
        exceptions={"attention/v": "lord-linear"},
    ),
    "rom": _method(
        "PCA of centred outputs, last blocks, on the compressed prefix: ROM as published",
        "covariance",
        allocation="last-k",
        prefix="compressed",
    ),
}
