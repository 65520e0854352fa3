"""Statistics of activations and gradients, collected block by block."""
