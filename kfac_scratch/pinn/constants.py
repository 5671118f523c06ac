r"""Unknown constants of an equation: trainable parameters that a residual uses and no layer holds.

An inverse problem learns a viscosity or a rate together with the solution. The constant is a
parameter of the model beside the network,

$$
r(x_n) = \partial_t u + u \, \partial_x u - \nu \, \partial_x^2 u ,
\qquad \frac{\partial \rho_n}{\partial \nu} = - \sqrt{w / N} \; \partial_x^2 u(x_n) .
$$

It is a block of its own: a layer whose input is 1 at every point, at one position. So its `W` is
`[entries, 1]`, its block is exact, and `kfac` of it is exact, too.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import Module

from kfac_scratch.capture.layer_groups import LayerGroup, layer_groups, uncovered
from kfac_scratch.layer_io import LayerIO


@dataclass(frozen=True, eq=False)
class Constant:
    """A trainable parameter that no layer holds, as a block with one column.

    Attributes:
        name: Its name in the model.
        value: The parameter, of any shape.
    """

    name: str
    value: Tensor

    @property
    def names(self) -> list[str]:
        """The name of the one block."""
        return [self.name]

    def matrices(self, values: Mapping[str, Tensor]) -> list[Float[Tensor, "d_out 1"]]:
        """The value as a column."""
        return [values[self.name].reshape(-1, 1)]

    def parameters(self, Ws: Sequence[Float[Tensor, "d_out 1"]]) -> dict[str, Tensor]:
        """The value, given the column: the inverse of `matrices`."""
        return {self.name: Ws[0].reshape(self.value.shape)}

    def io(self, slopes: Float[Tensor, "M N d_out"]) -> LayerIO:
        """The block as a layer with the input 1, given the derivatives of every residual."""
        return LayerIO(slopes.new_ones(slopes.shape[1], 1, 1), slopes.unsqueeze(2))


def constants(model: Module, groups: list[LayerGroup]) -> list[Constant]:
    """The trainable parameters of a model that are in none of the groups."""
    return [Constant(name, model.get_parameter(name)) for name in uncovered(model, groups)]


def pinn_blocks(model: Module) -> list[LayerGroup | Constant]:
    """The blocks of a PINN: those of its layers, then its unknown constants."""
    groups = layer_groups(model)
    return [*groups, *constants(model, groups)]


def slopes_of(
    r: Float[Tensor, "N M"], of: Sequence[Constant]
) -> list[Float[Tensor, "M N d_out"] | None]:
    """The derivatives of residuals with respect to constants; None for one that they do not use.

    A reverse pass is linear in what is sent back, and its derivative is a forward pass.

    Cost: one reverse pass of the residuals, without the network, and one for each entry.
    """
    if not of or not r.requires_grad:
        return [None] * len(of)
    sent = torch.zeros_like(r, requires_grad=True)
    options = {"create_graph": True, "allow_unused": True}
    rows = torch.autograd.grad(r, [constant.value for constant in of], sent, **options)
    return [None if row is None else _columns(row, sent) for row in rows]


def _columns(row: Float[Tensor, "..."], sent: Float[Tensor, "N M"]) -> Float[Tensor, "M N d_out"]:
    entries = row.reshape(-1)
    columns = [torch.autograd.grad(e, sent, retain_graph=True)[0] for e in entries]
    return torch.stack(columns, dim=-1).transpose(0, 1)
