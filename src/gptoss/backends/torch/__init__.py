"""PyTorch, eager. Compiled and distributed runs are this room with a wrapper."""
