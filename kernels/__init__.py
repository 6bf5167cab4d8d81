"""Triton kernels, installed as `onerec.kernels`; each needs triton, which is imported where used."""
