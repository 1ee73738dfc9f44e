"""Processes that share a training: who does what, what they send, and the watch that names a fault."""
