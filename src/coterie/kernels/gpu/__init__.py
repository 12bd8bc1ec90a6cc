"""Kernels of GPU units, in OpenCL C and for numba-cuda; `signatures` says what each takes."""
