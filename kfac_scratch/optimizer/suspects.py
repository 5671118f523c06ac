"""What a step may not take: values that could be not finite, by words that name them.

The words begin a sentence, and say which advice goes with it.
"""

from typing import Any

from kfac_scratch.optimizer.finite import Suspects, first_not_finite
from kfac_scratch.optimizer.observed import LayerIOs
from kfac_scratch.optimizer.progress import Progress
from kfac_scratch.optimizer.step_control import Step, Values


def suspect_rows(ios: LayerIOs) -> dict[str, Any]:
    """The inputs of all blocks on a batch, and the vectors sent to them."""
    inputs = {f"The input of block {name!r}": io.a for name, io in ios.items()}
    return inputs | {f"A vector sent to block {name!r}": io.g for name, io in ios.items()}


def suspect_matrices(new: Progress, old: Progress) -> dict[str, Any]:
    """The matrices that are new."""
    return {
        f"The curvature of block {name!r}, with this batch,": M
        for name, M in new.matrices.items()
        if M is not old.matrices.get(name)
    }


def suspect_step(new: Progress, old: Progress, step: Step, change: Values) -> dict[str, Any]:
    """The inverses that are new, the proposed change, and the memory of controls."""
    inverses = {
        f"The inverse of block {name!r} with damping {new.dampings[name]:g}": M
        for name, M in new.inverses.items()
        if M is not old.inverses.get(name)
    }
    changes = {f"The proposed change of {name!r}": d for name, d in change.items()}
    memory = {f"The memory of controls for {n!r}": kept for n, kept in step.memory.items()}
    return inverses | changes | memory


ADVICE = {
    "The gradient": "Skip the batch, or, with float16, step through a torch.amp.GradScaler, which "
    "does so.",
    "The curvature": "An input or a vector of the layer is not finite, or too large to be squared: "
    "skip the batch.",
    "The inverse": "Use a larger damping.",
    "The input": "Skip the batch.",
    "A vector": "Skip the batch.",
}


def check_finite(suspects: Suspects, cause: Exception | None = None) -> None:
    """Refuse the first value that is not finite.

    Raises:
        ValueError: Naming it.
    """
    name = first_not_finite(suspects)
    if name is not None:
        advice = next((a for start, a in ADVICE.items() if name.startswith(start)), "")
        advice = advice or "Skip the batch, or look for the cause in the controls."
        raise ValueError(f"{name} is not finite; nothing was changed. {advice}") from cause
