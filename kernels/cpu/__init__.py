"""Kernels for CPUs: a small C++ library that is built when CLIF is installed; torch's operators serve without it."""
