"""Well-known mistakes: what a case's answer becomes if one of them is made.

Each is a computation by `ways` with one step replaced (`steps`, `damping`), the right answer to
another question (`questions`), or the right answer in another layout (`layouts`). It is tried only
on a case that it concerns (`concerns`): `padding_mode` where a convolution has one, say. To add a
mistake, write the step and one line of a list, and export the vectors, which list it. Its key is
published, as the flag of cases that catch it (see `flags`): it never changes its meaning.
"""

from collections.abc import Iterator

from kfac_scratch.conformance.judging.mistakes.damping import DAMPING
from kfac_scratch.conformance.judging.mistakes.mistake import Mistake
from kfac_scratch.conformance.judging.mistakes.questions import QUESTIONS
from kfac_scratch.conformance.judging.mistakes.steps import STEPS
from kfac_scratch.conformance.judging.pieces import Pieces
from kfac_scratch.conformance.judging.ways import Question

MISTAKES: list[Mistake] = [*QUESTIONS, *STEPS, *DAMPING]


def answers(asked: Question) -> Iterator[tuple[Mistake, Pieces]]:
    """Every mistake that a question is about and that can be made there, with what is got."""
    for mistake in MISTAKES:
        try:
            if mistake.concerns(asked):
                yield mistake, mistake.answer(asked)
        except (RuntimeError, ValueError):  # the steps do not fit together on this case
            continue
