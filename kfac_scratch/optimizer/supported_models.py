"""Models that the optimizer cannot train: each is refused by name, with the way out."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import Module
from torch.nn.parallel import DataParallel, DistributedDataParallel


def check_trainable(model: Module) -> None:
    """Refuse compiled models, and those whose parameters are spread over devices.

    Raises:
        ValueError: Naming the cause and the way out.
    """
    if hasattr(model, "_orig_mod") or getattr(model, "_compiled_call_impl", None) is not None:
        raise ValueError(
            "The model is compiled, so that its layers do not run one by one. Give KFAC the model "
            "itself, and train with another object: compiled = torch.compile(model), then "
            "KFAC(model, loss), loss(compiled(X), y).backward(), optimizer.observe(X, y)."
        )
    if isinstance(model, DataParallel):
        raise ValueError(
            "The model is a DataParallel, whose layers run as copies. Give KFAC the model in it, "
            "model.module."
        )
    for name, p in model.named_parameters():
        if _is_sharded(p):
            raise ValueError(
                f"Parameter {name!r} is a DTensor, of which every process has a part, as "
                "fully_shard makes them. KFAC needs whole parameters: train with "
                "DistributedDataParallel, or without a wrapper, and call distribute(optimizer)."
            )


def _is_sharded(p: Tensor) -> bool:
    """Whether a parameter is a `DTensor`; its class is only imported if somebody uses it."""
    return any(cls.__name__ == "DTensor" for cls in type(p).__mro__)


def inside(model: Any) -> Module:
    """The network in a `DistributedDataParallel`, whose parameters have the names of the network.

    Any other model is returned as it is.
    """
    return model.module if isinstance(model, DistributedDataParallel) else model


def check_processes(size: int) -> None:
    """Refuse a step in one of several processes that do not take it together.

    Args:
        size: The number of processes that the optimizer knows.

    Raises:
        ValueError: Naming the way out.
    """
    there = world_size()
    if there != size:
        raise ValueError(
            f"There are {there} processes, and the optimizer was made for {size}: every process "
            "would draw its own labels and average its own curvature, and parameters would drift "
            "apart. After torch.distributed.init_process_group and KFAC(model, loss), call "
            "kfac_scratch.distribute(optimizer) in every process."
        )


def world_size() -> int:
    """The number of processes, 1 without `torch.distributed`."""
    distributed = torch.distributed
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_world_size()
    return 1
