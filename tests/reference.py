"""What curvlinops and BackPACK compute, in this package's layout.

The only file that imports them. Matrices of the whole network are in the order of
`model.named_parameters()` (trainable ones), blocks on `vec(W)` with rows stacked and the bias as
the last column of `W`. Where a library is missing, the test that asks for it is skipped, except
in continuous integration.
"""

import copy
import importlib
import inspect
import os
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import pytest
import torch
from torch import Tensor, nn


def ggn(model, loss, X, y) -> Tensor:
    """curvlinops's GGN of the whole network."""
    return _dense("GGNLinearOperator", model, loss, X, y)


def hessian(model, loss, X, y) -> Tensor:
    """curvlinops's Hessian of the whole network."""
    return _dense("HessianLinearOperator", model, loss, X, y)


def empirical_fisher(model, loss, X, y) -> Tensor:
    """curvlinops's empirical Fisher; every position of a per-token loss is a datum of its own."""
    return _dense("EFLinearOperator", model, loss, X, y)


def kfac(model, loss, X, y, fisher_type="type-2", kfac_approx="expand", **options):
    """curvlinops's KFAC: a dense block for every linear and 2d convolution layer, by name."""
    settings = {"fisher_type": fisher_type, "kfac_approx": kfac_approx, **options}
    return _blocks("KFACLinearOperator", model, loss, X, y, **settings)


def ekfac(model, loss, X, y, fisher_type="type-2", **options):
    """curvlinops's EKFAC, in the same form."""
    return _blocks("EKFACLinearOperator", model, loss, X, y, fisher_type=fisher_type, **options)


def _blocks(operator, model, loss, X, y, **settings):
    layers = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)}
    chosen = {id(p) for layer in layers.values() for p in layer.parameters()}
    names = {id(p): n for n, p in _trainable(model).items() if id(p) in chosen}
    M = _dense(
        *(operator, model, loss, X, y),
        names=list(names.values()),
        **settings,
        separate_weight_and_bias=False,
    )
    places, start = {}, 0
    for name in names.values():
        p = _trainable(model)[name]
        places[name] = torch.arange(start, start + p.numel(), device=p.device)
        start += p.numel()
    blocks = {}
    for name, layer in layers.items():
        parts = [p for p in (layer.weight, layer.bias) if p is not None and id(p) in names]
        if parts:
            columns = [places[names[id(p)]].reshape(len(layer.weight), -1) for p in parts]
            index = torch.cat(columns, dim=1).flatten()
            blocks[name] = M[index][:, index]
    return blocks


def kfac_operator(model, loss, X, y, **options) -> Any:
    """curvlinops's KFAC of the linear and 2d convolution layers with its factors computed."""
    layers = [m for m in model.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    chosen = {id(p) for layer in layers for p in layer.parameters()}
    names = {n for n, p in _trainable(model).items() if id(p) in chosen}
    options = {"separate_weight_and_bias": False, "num_data": len(X)} | options
    operator = _operator("KFACLinearOperator", model, loss, X, y, names, **options)
    if hasattr(operator, "compute_kronecker_factors"):  # later releases have computed them
        operator.compute_kronecker_factors()
    return operator


def diag_ggn(model, loss, X, y) -> Tensor:
    """BackPACK's exact diagonal of the GGN."""
    parameters = _backpack_run(model, loss, X, y, "DiagGGNExact")
    return torch.cat([p.diag_ggn_exact.flatten() for p in parameters.values()])


def kflr(model, loss, X, y) -> dict[str, list[Tensor]]:
    """BackPACK's KFLR, that is KFAC of the exact Fisher: factors [B, A] or [B] by parameter."""
    return {name: p.kflr for name, p in _backpack_run(model, loss, X, y, "KFLR").items()}


def distance(ours: Tensor, theirs: Tensor) -> float:
    """Largest difference of two matrices, relative to the largest entry of the second."""
    assert ours.shape == theirs.shape
    return float((ours - theirs).abs().max() / theirs.abs().max())


def is_newer_than(release: str) -> bool:
    """Whether the installed curvlinops comes after a release."""
    _library("curvlinops")
    number = lambda v: [int(part) for part in v.split(".")[:3] if part.isdigit()]  # noqa: E731
    installed = version("curvlinops-for-pytorch")
    return number(installed) > number(release) or "dev" in installed


def _library(name: str) -> Any:
    if "CI" in os.environ:
        return importlib.import_module(name)
    return pytest.importorskip(name, reason=f"{name} is not installed")


def _trainable(model) -> dict[str, Tensor]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def _operator(kind, model, loss, X, y, names=None, **options) -> Any:
    """A linear operator; its parameters are a list in release 3.0.1 and a dict after it."""
    cls = getattr(_library("curvlinops"), kind)
    named = {n: p for n, p in _trainable(model).items() if names is None or n in names}
    as_dict = "dict" in str(inspect.signature(cls).parameters["params"].annotation).lower()
    params = named if as_dict else list(named.values())
    return cls(model, loss, params, [(X, y)], check_deterministic=False, **options)


def _dense(kind, model, loss, X, y, names=None, **options) -> Tensor:
    operator = _operator(kind, model, loss, X, y, names, **options)
    columns = sum(p.numel() for n, p in _trainable(model).items() if names is None or n in names)
    p = next(model.parameters())
    return (operator @ torch.eye(columns, dtype=p.dtype, device=p.device)).detach()


def _backpack_run(model, loss, X, y, extension: str) -> dict[str, Tensor]:
    """The parameters of a copy of the model with BackPACK's results written into them."""
    return backpack_runner(model, loss, extension)(X, y)


def backpack_runner(model, loss, extension: str, **options) -> Callable[[Tensor, Tensor], dict]:
    """A function of (X, y) that runs a BackPACK extension on a copy of the model.

    Of a copy, because BackPACK's hooks would stay. Returns the parameters, which hold the results.
    """
    backpack = _library("backpack")
    kind = getattr(importlib.import_module("backpack.extensions"), extension)
    model = backpack.extend(copy.deepcopy(model))
    loss = backpack.extend(copy.deepcopy(loss))

    def run(X: Tensor, y: Tensor) -> dict[str, Tensor]:
        model.zero_grad()
        with backpack.backpack(kind(**options)):
            loss(model(X), y).backward()
        return _trainable(model)

    return run
