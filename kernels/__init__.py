"""Triton kernels, installed as `onerec.kernels`; triton is imported only where it is used."""
