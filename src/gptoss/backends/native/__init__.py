"""The native backend: gpt-oss on a CPU, through the compiled core. Needs no torch."""

from gptoss.backends.native.backend import NativeBackend

__all__ = ["NativeBackend"]
