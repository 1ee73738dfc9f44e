"""Triton kernels, one file an op. Imported when a kernel first runs, since importing triton takes long."""
