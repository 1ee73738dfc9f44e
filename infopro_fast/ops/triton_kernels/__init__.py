"""Triton kernels: a file an op, and what several share. Imported when a kernel first runs, since importing triton takes long."""
