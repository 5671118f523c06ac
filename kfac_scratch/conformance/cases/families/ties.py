"""The weight of an embedding that the head of a language model has, too.

The embedding looks rows of it up, the head multiplies by it. Its exact block has products of both
uses, which no product of two factors has. KFAC is the sum of two Kronecker products.
"""

from kfac_scratch.conformance.cases.case import Case
from kfac_scratch.conformance.cases.families.common import (
    BOTH_DEFINITION,
    in_single_precision,
    loss,
)
from kfac_scratch.conformance.cases.families.embeddings import words
from kfac_scratch.conformance.cases.ops import (
    classes_first,
    embedding,
    linear,
    mean_positions,
    tanh,
    tied_linear,
)

PLACE = 15  # in reports and vectors
BODY = (embedding("words", 5, 4), linear("inner", 4, 4), tanh())
HEAD = tied_linear("head", "words", 4, 5)
FLAGS = ("one of two uses of a weight", "a weight and its transpose")

TOKENS = Case(
    "tied-head-tokens-cross-entropy",
    "definition",
    (*BODY, HEAD, classes_first()),
    loss("cross-entropy"),
    (7, 3),
    BOTH_DEFINITION,
    data=words,
    tags=("embedding", "tied", "sequence", "cross-entropy"),
    flags=FLAGS,
)
POOLED = Case(
    "tied-head-pooled-mse",
    "definition",
    (*BODY, mean_positions(), HEAD),
    loss("mse"),
    (7, 3),
    BOTH_DEFINITION,
    data=words,
    tags=("embedding", "tied", "pool", "mse"),
    flags=FLAGS,
)
BATCHES = Case(
    "tied-head-in-batches",
    "definition",
    (*BODY, HEAD, classes_first()),
    loss("cross-entropy"),
    (7, 3),
    BOTH_DEFINITION,
    batches=(2, 5),
    data=words,
    tags=("embedding", "tied", "sequence", "cross-entropy", "batches"),
    flags=(*FLAGS, "equal weights for unequal batches"),
)
CASES = [TOKENS, POOLED, BATCHES, in_single_precision(TOKENS)]
