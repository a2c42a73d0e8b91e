"""How much room there is on the GPU."""

import torch


def free_memory(device: str = "cuda") -> int | None:
    """Bytes free on a CUDA device; None where there is none, or none of that name."""
    if not torch.cuda.is_available():
        return None
    try:
        where = torch.device(device)
    except RuntimeError:
        return None
    if where.type != "cuda" or (where.index or 0) >= torch.cuda.device_count():
        return None
    return int(torch.cuda.mem_get_info(device)[0])
