"""Triton kernels and their launchers, one op a file. Importing a module here imports Triton."""
