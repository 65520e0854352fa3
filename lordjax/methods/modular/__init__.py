"""MoDeGPT: layers that share an inner width are pruned together and stay dense.

Each method shortens the inner width of one pair of layers. z is the hidden state of the MLP, q, k
and v are queries, keys and values of one head, C is a second moment, ``W_O`` the output projection:

========  =====================  =======================================================
module    pair                   decomposition
========  =====================  =======================================================
``mlp``   up (and gate), down    Nyström: keep columns S of z, refit ``down`` on them
``qk``    query, key             CR: keep the rotary pairs with the largest ``‖q_p‖·‖k_p‖``;
                                 without rotary positions a truncated SVD of ``C_Q^½ C_K^½``
``vo``    value, output          SVD of ``C^½ W_O``, then ``W_O`` refit on all heads
========  =====================  =======================================================

A matrix inside a nonlinearity (up, gate; queries and keys under a rotation) can only lose columns.
A matrix outside of one (down, output) is free, and is fitted by least squares.

Differences from the paper: errors are measured in the metric M of the loss gradient at the module's
output, so that they compare across modules; one factorization serves all widths; query heads that
share a key head are decided together; the output projection is fitted to all heads at once.

The functions that factor are pure and jittable. The ``prune_*`` functions take and return host
arrays and multiply in float64, because they would otherwise be compiled for every width.

Arrays are in head form: q ``[m, h, d]``, k and v ``[m, k, d]``, o ``[h, d, m]``, with h query
heads, k key/value heads, head width d, model width m, MLP width f.

Source: MoDeGPT, arXiv 2408.09632; theory/modegpt §2 to §4 for the exact, cheaper forms.
"""
