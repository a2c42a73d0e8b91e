"""MLX: Apple silicon's GPU, and any CPU."""

from gptoss.backends.mlx.backend import MlxBackend

__all__ = ["MlxBackend"]
