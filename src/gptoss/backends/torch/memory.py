"""How much room there is on the GPU."""

import torch


def free_memory(device: str = "cuda") -> int | None:
    """Bytes free on a CUDA device; None where there is none."""
    if not torch.cuda.is_available():
        return None
    return int(torch.cuda.mem_get_info(device)[0])
