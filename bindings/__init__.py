"""Adapters that put the kernels into other image generators; each is a call, nothing is patched."""
