"""Quantized weights and activations: see fastrl.kernels for the public functions."""
