"""Training in several processes, one per GPU, started by torchrun.

Each process has its own copy of the network and takes its share of each batch. Gradients are added up after the
backward passes, over the parameters themselves: torch's DistributedDataParallel hooks into one `forward`, but an
iteration of interactive training calls the encoder once, the mask decoder many times and runs several backward passes.
"""

import os
from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
from torch import nn

from ..core.errors import DeviceError
from ..core.settings import get_device


def is_active() -> bool:
    """Whether this process is one of several that train together."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def world_size() -> int:
    """Number of processes that train together."""
    return dist.get_world_size() if is_active() else 1


def rank() -> int:
    """Number of this process; process 0 writes files and reports."""
    return dist.get_rank() if is_active() else 0


def setup_distributed(device: str | torch.device | None = None) -> torch.device:
    """Join the processes that torchrun started, if it did, and return the device of this one.

    Without torchrun (`WORLD_SIZE` is unset or 1) only the device is chosen.

    Args:
        device: `cpu`, or a kind of device; None chooses. With CUDA each process takes the GPU of its `LOCAL_RANK`.

    Returns:
        The device to train on.

    Raises:
        DeviceError: If there are fewer GPUs than processes on this machine.

    Example:
        `torchrun --nproc-per-node 2 train.py`, where `train.py` starts with

            device = setup_distributed()
    """
    device = torch.device(get_device(device))
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        return device
    if device.type == "cuda":
        local, available = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
        if local >= available:
            raise DeviceError(
                f"Process {local} of this machine has no GPU of its own: {available} found. Pass "
                f"--nproc-per-node {available} to torchrun, or device='cpu'."
            )
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return device


def finish_distributed() -> None:
    """Leave the group of processes, at the end of a program that called `setup_distributed`."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def add_up(values: Sequence[float], device: torch.device) -> list[float]:
    """The sums of numbers over all processes."""
    if not is_active():
        return [float(value) for value in values]
    total = torch.tensor(list(values), dtype=torch.float64 if device.type != "mps" else torch.float32, device=device)
    dist.all_reduce(total)
    return total.tolist()


def any_process(values: Sequence[bool], device: torch.device) -> list[bool]:
    """Whether each of some conditions holds in any process."""
    return [value > 0 for value in add_up([float(value) for value in values], device)]


def share_weights(networks: Iterable[nn.Module]) -> None:
    """Give all processes the parameters and buffers of process 0."""
    if is_active():
        with torch.no_grad():
            for network in networks:
                for value in (*network.parameters(), *network.buffers()):
                    dist.broadcast(value, src=0)


def add_up_gradients(parameters: Sequence[nn.Parameter], device: torch.device) -> None:
    """Replace gradients by their sums over all processes.

    A parameter that no process used keeps no gradient, so that the optimizer leaves it alone as in one process.
    """
    if not is_active():
        return
    used = torch.tensor([float(p.grad is not None) for p in parameters], device=device)
    dist.all_reduce(used)
    pending = []
    for parameter, n_used in zip(parameters, used.tolist()):
        if n_used == 0:
            continue
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        pending.append(dist.all_reduce(parameter.grad, async_op=True))
    for work in pending:
        work.wait()


def average_statistics(networks: Iterable[nn.Module]) -> None:
    """Average the running statistics (BatchNorm), which each process collected from its own images."""
    if not is_active():
        return
    with torch.no_grad():
        for network in networks:
            for module in network.modules():
                if not isinstance(module, nn.modules.batchnorm._BatchNorm) or module.running_mean is None:
                    continue
                for value in (module.running_mean, module.running_var):
                    dist.all_reduce(value)
                    value /= world_size()
