"""The compiled part of gptoss; absent where no compiler was at hand when it was installed."""

def cpu_features() -> list[str]:
    """Instruction sets of this processor that kernels may be chosen by, such as 'avx2'."""
