"""Padded sentences: positions that a mask leaves out are in no mean.

Their targets are ignored, so that no gradient depends on them. Only KFAC's `A` does, if it is a
mean over all positions.
"""

from dataclasses import replace

from kfac_scratch.conformance.cases.case import IGNORED, Case, Data, spread
from kfac_scratch.conformance.cases.families.common import (
    ALL_DEFINITION,
    ALL_EXACT,
    BOTH_DEFINITION,
    chain,
    in_single_precision,
    loss,
)
from kfac_scratch.conformance.cases.ops import classes_first, tanh

PLACE = 14  # in reports and vectors


def padded(case: Case) -> Data:
    """Sentences of 3, 1 and 2 words in turn; what is behind the last word is ignored."""
    data = spread(case)
    y = data.y.clone()
    for n, targets in enumerate(y):
        targets[(3, 1, 2)[n % 3] :] = IGNORED
    return Data(data.parameters, data.X, y)


def second_alone(case: Case) -> Data:
    """Of every datum, the second position alone is part of the data."""
    data = spread(case)
    y = data.y.clone()
    y[:, [0, 2]] = IGNORED
    return Data(data.parameters, data.X, y)


PADDED_SENTENCES = Case(
    "padded-sentences-cross-entropy",
    "definition",
    (*chain(4, 6, 5, between=tanh()), classes_first()),
    loss("cross-entropy"),
    (7, 3, 4),
    ALL_DEFINITION,
    masked=True,
    data=padded,
    tags=("sequence", "padding", "cross-entropy"),
)
ONE_WORD = replace(
    PADDED_SENTENCES,
    id="padded-one-position-cross-entropy",
    theorem="one-datum",
    shape=(1, 3, 4),
    flavours=ALL_EXACT,
    data=second_alone,
)
PADDED_SUM = replace(
    PADDED_SENTENCES,
    id="padded-sentences-cross-entropy-sum",
    loss=loss("cross-entropy", "sum"),
)
PADDED_BATCHES = replace(
    PADDED_SENTENCES,
    id="padded-sentences-in-batches",
    flavours=BOTH_DEFINITION,
    batches=(2, 5),
    tags=(*PADDED_SENTENCES.tags, "batches"),
)
CASES = [
    ONE_WORD,
    PADDED_SENTENCES,
    PADDED_SUM,
    PADDED_BATCHES,
    in_single_precision(PADDED_SENTENCES),
]
