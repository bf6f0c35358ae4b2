"""Kernels for a GPU in Triton and in Gluon, its part that says which warps do what.

Importing any of these files imports Triton: their neighbours in `qvl.kernels` do so only where there is a GPU.
"""
