"""The suite's own check of annotations finds what jaxtyping's decorator finds."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import jaxtyping
import pytest
import torch
from jaxtyping import Float
from torch import Tensor, ones

from tests.annotations import checked

if TYPE_CHECKING:
    from nowhere import Something


@checked(typechecker=None)
def product(A: Float[Tensor, "n m"], B: Float[Tensor, "m k"]) -> Float[Tensor, "n k"]:
    return A @ B if A.shape != (1, 1) else A.new_zeros(7, 7)


@checked
def count(number: int) -> str:
    return str(number) if number else number


@checked
def cannot_be_read(value: "Something") -> "Something":
    return value


@checked
def each(rows: Float[Tensor, "n m"]) -> Iterator[Float[Tensor, " m"]]:
    yield from rows


@checked
def pairs(values: dict[str, list[Float[Tensor, "n m"]]], f: Callable[[int], int]) -> None: ...


@checked
@dataclasses.dataclass(frozen=True)
class Pair:
    A: Float[Tensor, "n m"]
    B: Float[Tensor, " n"]

    @property
    @checked
    def size(self) -> int:
        return self.A.shape[0] if self.A.shape[1] else "none"

    @classmethod
    @checked
    def of(cls, A: Float[Tensor, "n m"]) -> "Pair":
        return cls(A, A.sum(1))

    @checked
    @staticmethod
    def rows(A: Float[Tensor, "n m"]) -> int:
        return len(A)


RIGHT = [
    lambda: product(ones(2, 3), ones(3, 4)),
    lambda: count(1),
    lambda: cannot_be_read(3),
    lambda: list(each(ones(2, 3))),
    lambda: pairs({"a": [ones(2, 3)], "b": []}, abs),
    lambda: Pair.of(ones(2, 3)).size,
    lambda: Pair.rows(ones(2, 3)),
]
WRONG = [
    lambda: product(ones(2, 3), ones(4, 4)),
    lambda: product(ones(2, 3), [1.0]),
    lambda: product(ones(1, 1), ones(1, 4)),
    lambda: count("1"),
    lambda: count(0),
    lambda: list(each(ones(2))),
    lambda: pairs({"a": [ones(2)]}, abs),
    lambda: pairs({}, 3),
    lambda: Pair(ones(2, 3), ones(3)),
    lambda: Pair.of(ones(3)),
    lambda: Pair.of(ones(3, 0)).size,
    lambda: Pair.rows(ones(3)),
]


@pytest.mark.parametrize("call", RIGHT)
def test_what_fits_its_annotations_passes(call):
    call()


@pytest.mark.parametrize("call", WRONG)
def test_what_does_not_fit_its_annotations_is_refused(call):
    with pytest.raises(jaxtyping.TypeCheckError):
        call()


def test_a_size_holds_for_one_call_only():
    for n in (2, 3):
        assert product(ones(n, n), ones(n, 4)).shape == (n, 4)


def test_annotations_and_names_stay_as_they_were():
    assert cannot_be_read.__annotations__["value"] == "Something"
    assert product.__name__ == "product"
    assert Pair.rows.__annotations__["A"].dim_str == "n m"


def test_where_checks_are_off_nothing_is_checked():
    jaxtyping.config.update("jaxtyping_disable", True)
    try:
        assert count("1") == "1"
        assert Pair(torch.ones(2, 3), torch.ones(3)).size == 2
    finally:
        jaxtyping.config.update("jaxtyping_disable", False)
