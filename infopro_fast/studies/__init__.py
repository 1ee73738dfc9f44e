"""Studies of trained networks: what their features know, and the paper's tables at a small scale."""
