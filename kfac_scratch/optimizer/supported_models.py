"""Models that the optimizer cannot train: each is refused by name, with the way out."""

import torch
from torch.nn import Module
from torch.nn.parallel import DataParallel, DistributedDataParallel


def check_trainable(model: Module) -> None:
    """Refuse compiled models, and training in several processes.

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
    size = world_size(model)
    if size > 1:
        raise ValueError(
            f"KFAC trains in one process, but there are {size}: every process would draw its own "
            "labels and average its own curvature, and parameters would drift apart. Train in one "
            "process, or with one of PyTorch's own optimizers."
        )


def world_size(model: Module) -> int:
    """The number of processes that train a model together, 1 without `torch.distributed`."""
    if isinstance(model, DistributedDataParallel):
        return int(model.process_group.size())
    distributed = torch.distributed
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_world_size()
    return 1
