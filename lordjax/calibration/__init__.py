"""Calibration: statistics of activations and loss gradients, collected block by block.

* `calibration_set`: the tokens, and the batches in which they run;
* `forward_pass`: runs block after block forward, for statistics of activations;
* `backward_pass`: runs forward and then backward, for statistics of loss gradients;
* `observers`: the jitted step of both, one block and one batch;
* `gradient_updates`: how gradients are added to the accumulators;
* `statistics`: the accumulators that a step updates;
* `hidden_states`: the residual stream between two blocks, in memory or on disk.
"""
