"""Kernels in C for a CPU, and the calls of them. What they need of C is compiled by `qvl.kernels.native`."""
