"""Ways to run the model. One room per way; the engine sees only ``protocol.py``."""

from gptoss.backends.protocol import Backend
from gptoss.errors import BackendUnavailable
from gptoss.model.config import ModelConfig
from gptoss.model.weights import Read

NAMES = ("reference", "torch")


def load_backend(
    name: str, config: ModelConfig, read: Read, *, dtype: str | None = None, device: str = "cpu"
) -> Backend:
    """Open one room. Imports stay inside the arms so that no room pays for another.

    Args:
        name: one of ``NAMES``.
        read: a tensor by canonical name, asked once for each; ``Checkpoint.read`` or a dict's
            ``__getitem__``.
        dtype: compute dtype; the reference takes float32 (default) or float64, torch float32,
            bfloat16 (default) or float64.
        device: torch only: "cpu" or "cuda".

    Raises:
        ValueError: an unknown name, dtype or device.
        BackendUnavailable: this machine lacks what the room needs.
    """
    match name:
        case "reference":
            from gptoss.backends.reference import ReferenceBackend

            return ReferenceBackend(config, read, dtype or "float32")
        case "torch":
            try:
                from gptoss.backends.torch import TorchBackend
            except (ImportError, OSError) as error:
                culprit = getattr(error, "name", None) or ""
                if culprit.split(".")[0] == "gptoss":
                    raise  # a fault of ours, which no installing mends
                if isinstance(error, ModuleNotFoundError) and culprit == "torch":
                    raise BackendUnavailable(
                        "the torch backend needs PyTorch, which is not installed; "
                        "pip install 'gptoss[torch]'"
                    ) from None
                raise BackendUnavailable(
                    f"PyTorch is installed, but importing it fails: {error}"
                ) from error
            return TorchBackend(config, read, dtype or "bfloat16", device)
        case _:
            raise ValueError(f"unknown backend {name!r}; one of {', '.join(NAMES)}")
