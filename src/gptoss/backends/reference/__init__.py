"""The NumPy reference as a backend: slow, obvious, always available."""

from gptoss.backends.reference.backend import ReferenceBackend

__all__ = ["ReferenceBackend"]
