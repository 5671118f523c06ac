"""One-hot rows: those of an embedding, kept as the numbers of their columns.

A layer that looks words up applies its matrix to rows with a single one. For a vocabulary of 50,000
words these rows are 50,000 times as large as the words' numbers, and so are products with them.

Source: torch.utils' guide to extending PyTorch (wrapper subclasses), for the mechanism.
"""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils._pytree import tree_map


class OneHot(Tensor):
    """Rows `[N, S, d]` with a single one each, kept as the numbers of their columns.

    Use it as the `a` of a `LayerIO`. It is a tensor: every operation on it forms the rows first,
    and gives what it gives for them. Not for rows that are written to.

    `counts` and `sum` need no rows.

    Cost: memory `N * S`; an operation that forms the rows takes `N * S * d` numbers.

    Attributes:
        columns: The number of every row's column; -1 for a row of zeros.
    """

    columns: Int[Tensor, "N S"]

    def __new__(cls, columns: Int[Tensor, "N S"], d: int, dtype: torch.dtype) -> "OneHot":
        """Rows with `d` columns, of a dtype, on the device of `columns`."""
        made: OneHot = Tensor._make_wrapper_subclass(
            cls, (*columns.shape, d), dtype=dtype, device=columns.device
        )
        made.columns = columns
        return made

    def __init__(self, columns: Int[Tensor, "N S"], d: int, dtype: torch.dtype) -> None:
        super().__init__()

    def dense(self) -> Float[Tensor, "N S d"]:
        """The rows."""
        ones = (self.columns >= 0).to(self.dtype).unsqueeze(-1)
        rows = torch.zeros(self.shape, dtype=self.dtype, device=self.device)
        return rows.scatter_(-1, self.columns.clamp(min=0).unsqueeze(-1), ones)

    def counts(self) -> Float[Tensor, " d"]:
        """The number of rows with a one in each column, the diagonal of `sum_r r r^T`.

        All other entries of that matrix are zero.
        """
        columns = self.columns.flatten()
        counts = columns.new_zeros(self.shape[-1])
        return counts.scatter_add_(0, columns.clamp(min=0), (columns >= 0).long()).to(self.dtype)

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls,
        func: Any,
        types: Any,
        args: Any = (),
        kwargs: Any = None,
    ) -> Any:
        """Every operation of PyTorch, on the rows."""
        if func is torch.ops.aten.sum.default:
            return args[0].counts().sum()
        args, kwargs = tree_map(_formed, (args, kwargs or {}))
        return func(*args, **kwargs)


def _formed(value: Any) -> Any:
    return value.dense() if isinstance(value, OneHot) else value
