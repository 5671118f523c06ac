"""How many steps lie between two updates of the curvature, or between two inversions.

A period is a whole number, or a function from the number of steps taken so far to one.

Source: Martens and Grosse 2015 (arXiv:1503.05671), §8, for constant periods. That they grow is a
choice of this package.
"""

from collections.abc import Callable
from dataclasses import dataclass

from kfac_scratch.border import check_callable, check_count

Period = int | Callable[[int], int]
"""A number of steps, or a function from the steps so far to it."""


@dataclass(frozen=True)
class Growing:
    """A period that begins with 1 and grows by 1 every `rise` steps, until it is `limit`.

    Use it where training begins far from where it goes: gradients and curvature then change within
    a few steps, and the average has few batches. Not where every step must cost the same.

    Cost: about three times the updates of a constant period in the first `limit * rise` steps, and
    the same from then on.

    Attributes:
        limit: The largest period.
        rise: Steps between two increments.

    Raises:
        TypeError: If one of them is no whole number.
        ValueError: If one of them is below 1.
    """

    limit: int = 10
    rise: int = 20

    def __post_init__(self) -> None:
        check_count("limit", self.limit)
        check_count("rise", self.rise)

    def __call__(self, steps: int) -> int:
        """The period after so many steps."""
        return min(self.limit, 1 + steps // self.rise)


EARLY_OFTEN = Growing(limit=10, rise=20)
"""The default of the optimizer `KFAC` for both of its periods."""


def check_period(name: str, period: object) -> None:
    """Refuse what is neither a number of steps nor a function.

    Raises:
        TypeError: Naming the argument, its value and the way out.
        ValueError: If a number is below 1.
    """
    if callable(period):
        check_callable(name, period, f"{name}=Growing(10)")
    else:
        check_count(name, period)


def is_due(name: str, period: Period, steps: int, last: int | None) -> bool:
    """Whether a period has passed between the step `last` (None: never) and the one to come.

    Raises:
        TypeError: If a function does not return a whole number.
        ValueError: If it returns one below 1.
    """
    if last is None:
        return True
    wait = period(steps) if callable(period) else period
    check_count(f"What {name} returns after {steps} steps", wait)
    return steps - last >= wait
