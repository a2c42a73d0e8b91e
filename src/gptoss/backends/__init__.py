"""Ways to run the model. One room per way; the engine sees only ``protocol.py``."""

from gptoss.backends.protocol import Backend
from gptoss.errors import BackendUnavailable
from gptoss.model.config import ModelConfig
from gptoss.model.weights import Read

NAMES = ("reference", "native", "torch", "mlx")
PRECISIONS = {"native": ("exact", "fast"), "mlx": ("exact", "fast", "small")}
CACHES = ("bfloat16", "float32", "int8")  # how native keeps keys and values
NARROW = 512  # hidden size below which native computes in float32 whatever the precision


def is_narrow(config: ModelConfig) -> bool:
    """Whether rounding saves little here, and may turn near ties between experts over."""
    return config.hidden_size < NARROW


def load_backend(
    name: str,
    config: ModelConfig,
    read: Read,
    *,
    dtype: str | None = None,
    device: str = "cpu",
    precision: str | None = None,
    threads: int | None = None,
    kv: str | None = None,
    resident: int | None = None,
) -> Backend:
    """Open one room. Imports stay inside the arms so that no room pays for another.

    Args:
        name: one of ``NAMES``.
        read: a tensor by canonical name, asked once for each; ``Checkpoint.read`` or a dict's
            ``__getitem__``.
        dtype: compute dtype; the reference takes float32 (default) or float64, torch float32,
            bfloat16 (default) or float64, mlx float32 or bfloat16 (default).
        device: of torch "cpu" or "cuda", of mlx "cpu" or "gpu".
        precision: of native, "exact" computes with the weights as published, "fast" (default)
            in 8 bits with dense matrices rounded to 8 bits, unless the model is ``NARROW``. Of
            mlx, how the dense matrices are kept: "exact" (default) as published, "fast" in 8,
            "small" in 4 bits.
        threads: native only; None: as many as the machine has cores.
        kv: of native, how keys and values are kept, one of ``CACHES``; None: bfloat16 with fast,
            float32 with exact precision. Of mlx "int8", or None: in its dtype.
        resident: native only: most bytes of packed experts in memory; None: no limit.

    Raises:
        ValueError: an unknown name, dtype, device or precision, or one that is another room's.
        BackendUnavailable: this machine lacks what the room needs.
    """
    check_options(name, dtype=dtype, precision=precision, threads=threads, kv=kv, memory=resident)
    if name == "native" and device != "cpu":
        raise ValueError(f"the native backend runs on the cpu, not on {device!r}")
    match name:
        case "reference":
            from gptoss.backends.reference import ReferenceBackend

            return ReferenceBackend(config, read, dtype or "float32")
        case "native":
            try:
                from gptoss.backends.native import NativeBackend
            except ImportError as error:
                raise _without_core(error) from None
            return NativeBackend(config, read, precision or "fast", threads, kv, resident)
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
        case "mlx":
            try:
                from gptoss.backends.mlx import MlxBackend
            except ImportError as error:
                raise _without_mlx(error) from None
            return MlxBackend(config, read, dtype or "bfloat16", device, precision or "exact", kv)
        case _:
            raise AssertionError("unreachable")


def check_options(
    name: str,
    *,
    dtype: str | None,
    precision: str | None,
    threads: int | None,
    kv: str | None = None,
    memory: int | None = None,
) -> None:
    """Raises ValueError for a room that does not exist, or an option that is not its own."""
    if name not in NAMES:
        raise ValueError(f"unknown backend {name!r}; one of {', '.join(NAMES)}")
    if name not in PRECISIONS and precision is not None:
        raise ValueError(f"the {name} backend takes no precision ({precision}) but a dtype")
    if precision not in (None, *(known := PRECISIONS.get(name, ()))):
        raise ValueError(f"unknown precision {precision!r}; of {name} one of {', '.join(known)}")
    if kv not in (None, *CACHES):
        raise ValueError(f"unknown kind of cache {kv!r}; one of {', '.join(CACHES)}")
    if threads is not None and threads < 1:
        raise ValueError(f"threads must be at least 1, not {threads}")
    if name == "native" and dtype is not None:
        raise ValueError(
            f"the native backend takes no dtype ({dtype}) but a precision, exact or fast"
        )
    if name != "native" and threads is not None:
        raise ValueError(
            f"threads are the native backend's to choose; the {name} backend takes none"
        )
    if name == "mlx" and kv not in (None, "int8"):
        raise ValueError(f"the mlx backend keeps keys and values in its dtype or int8, not in {kv}")
    if name not in ("native", "mlx") and kv is not None:
        raise ValueError(f"the {name} backend keeps keys and values in its dtype, not in {kv}")
    if name != "native" and memory is not None:
        raise ValueError(
            f"only the native backend keeps within a given memory; the {name} backend does not"
        )


def has_native() -> bool:
    """Whether the compiled core is here and can be loaded."""
    try:
        import gptoss.backends.native  # noqa: F401
    except ImportError:
        return False
    return True


def _without_core(error: ImportError) -> Exception:
    """What an import of the native room that failed has to say."""
    culprit = error.name or ""
    if culprit.startswith("gptoss.backends"):
        return error  # a fault of ours, which no installing mends
    if culprit == "gptoss._core" and not isinstance(error, ModuleNotFoundError):
        return BackendUnavailable(
            f"the package's compiled core is installed, but importing it fails: {error}"
        )
    return BackendUnavailable(
        "the native backend needs the package's compiled core, which this installation lacks; "
        "install a wheel or build with a C++20 compiler"
    )


def _without_mlx(error: ImportError) -> Exception:
    """What an import of the mlx room that failed has to say."""
    culprit = error.name or ""
    if culprit.split(".")[0] == "gptoss":
        return error  # a fault of ours, which no installing mends
    if isinstance(error, ModuleNotFoundError) and culprit.split(".")[0] == "mlx":
        return BackendUnavailable(
            "the mlx backend needs MLX, which is not installed; pip install 'gptoss[mlx]'"
        )
    return BackendUnavailable(f"MLX is installed, but importing it fails: {error}")
