"""Studies of trained networks: what their features know, and the tables of the paper at a small scale."""
