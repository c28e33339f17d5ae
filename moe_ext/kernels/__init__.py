"""Computes in one pass over memory, in kernels of Triton, what torch computes in several.

Kernels are taken where `fused.takes` says so; torch's functions in `moe_ext/layers/` are what they
are compared with, and what computes everywhere else.
"""
