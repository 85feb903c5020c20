"""Circuits: effective weights between units of two layers, also where other layers lie between, as small kernels."""
