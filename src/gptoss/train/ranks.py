"""The processes of a run, and what they tell each other.

``torchrun`` starts them; a run that it did not start is one process, which tells nobody anything.
Several stand on a grid of three axes:

    data      each place has batches of its own
    expert    each place here, too; but they divide the experts, and send each other tokens
    tensor    neighbours, who compute the same batches: each some of the heads and of the experts

They speak through torch's collectives: gloo between CPUs, NCCL between GPUs.
"""

import atexit
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from gptoss.backends.torch.backend import open_device
from gptoss.errors import GptOssError
from gptoss.train.config import TrainConfig

X = TypeVar("X")
GONE = ("Connection closed", "Connection reset", "Broken pipe", "NCCL")  # torch has no class for it


class Ranks:
    """See the module.

    Args:
        rank, size: which of how many processes this is.
        tensor, expert: places on these axes. ValueError: they do not divide ``size``.
        device: "cpu" or "cuda".
    """

    def __init__(
        self, rank: int = 0, size: int = 1, tensor: int = 1, expert: int = 1, device: str = "cpu"
    ) -> None:
        if size % (tensor * expert):
            raise ValueError(
                f"tensor {tensor} and expert {expert} take a multiple of {tensor * expert} "
                f"processes, not {size}: torchrun --nproc-per-node {tensor * expert} -m gptoss ..."
            )
        self.rank, self.size, self.device = rank, size, device
        self.tensor, self.expert, self.data = tensor, expert, size // (tensor * expert)
        self.places = self.data * expert  # with batches of their own
        self.place = rank // tensor  # which of these this is

    @property
    def tensor_place(self) -> int:
        """Where this is on the last axis."""
        return self.rank % self.tensor

    @property
    def expert_place(self) -> int:
        """Where this is on the axis before it."""
        return self.place % self.expert

    @property
    def alone(self) -> bool:
        """Whether there is nobody else."""
        return self.size == 1

    @property
    def first(self) -> bool:
        """Whether this is the one that writes what must be written once."""
        return self.rank == 0

    def share(self, batches: Sequence[X]) -> list[X]:
        """What this process computes of a step: whole batches, or its ``part`` of each."""
        if len(batches) % self.places == 0:
            return list(batches[self.place :: self.places])
        divisible: Sequence[Any] = batches
        return [batch.part(self.place, self.places) for batch in divisible]

    def led(self, does: Callable[[], None]) -> None:
        """The first process alone does something, the others wait. What it raises, all raise."""
        self.agreed(does if self.first else lambda: None)

    def agreed(self, does: Callable[[], X]) -> list[X | None]:
        """What each process makes of it, in order. What one raises, all raise."""
        found: X | None = None
        error: BaseException | None = None
        try:
            found = does()
        except (GptOssError, OSError, ValueError, KeyboardInterrupt) as raised:
            error = raised
        each = self.gather((found, error))
        for _, met in each:
            if met is not None:
                raise met
        return [made for made, _ in each]

    def any(self, x: X | None) -> X | None:
        """What one of them says, if one does."""
        return next((said for said in self.gather(x) if said is not None), None)

    def gather(self, x: X) -> list[X]:
        """What each process says, in order."""
        if self.alone:
            return [x]
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, x)
        return found

    def total(self, found: dict[str, float]) -> dict[str, float]:
        """The sums over what each place says of its batches."""
        whole: dict[str, float] = {}
        for each in self.gather(found)[:: self.tensor]:
            for name, value in each.items():
                whole[name] = whole.get(name, 0.0) + value
        return whole

    def lost(self, error: BaseException) -> bool:
        """Whether it says that somebody else is no longer there."""
        return not self.alone and any(said in str(error) for said in GONE)

    @cached_property
    def dense(self) -> DeviceMesh:
        """[tensor, place]: how all parameters but experts are divided."""
        grid = torch.arange(self.size).view(self.places, self.tensor).T
        return DeviceMesh(self.device, grid, mesh_dim_names=("tensor", "place"))

    @cached_property
    def sparse(self) -> DeviceMesh:
        """[expert, tensor, data]: how experts are divided."""
        grid = torch.arange(self.size).view(self.data, self.expert, self.tensor).permute(1, 2, 0)
        return DeviceMesh(self.device, grid, mesh_dim_names=("expert", "tensor", "data"))


ALONE = Ranks()


def join(config: TrainConfig) -> Ranks:
    """This process among those that ``torchrun`` started, if it did.

    Raises:
        ValueError: ``config`` does not fit so many processes.
        BackendUnavailable: this machine has no GPU for each.
    """
    if not (dist.is_initialized() or dist.is_torchelastic_launched()):
        return Ranks(tensor=config.tensor, expert=config.expert)
    device = torch.device(config.device).type
    if not dist.is_initialized():
        if device == "cuda":
            torch.cuda.set_device(open_device(f"cuda:{dist.get_node_local_rank()}"))
        dist.init_process_group("cpu:gloo,cuda:nccl" if device == "cuda" else "gloo")
        atexit.register(_leave)
    ranks = Ranks(dist.get_rank(), dist.get_world_size(), config.tensor, config.expert, device)
    if config.offload and not ranks.alone:
        raise ValueError("offload is for one process; several divide what it would put away")
    return ranks


def _leave() -> None:
    """End the threads that speak with the others: one that outlives Python aborts the process."""
    if dist.is_initialized():
        dist.destroy_process_group()


def speaks(first: bool) -> bool:
    """Whether this process says why the run ends: of several, who wants to before the others.

    ``first``: whether this is the first one, which speaks where they have not met yet.
    """
    if not dist.is_initialized():
        return first
    store: Any = dist.distributed_c10d._get_default_store()
    try:
        return bool(store.add("gptoss ends", 1) == 1)
    except RuntimeError:  # who kept it is gone, too
        return True
