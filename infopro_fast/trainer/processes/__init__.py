"""Several processes: their places, connections, messages and watch."""
