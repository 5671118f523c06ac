"""The weight of an embedding that the head of a language model has, too.

The embedding looks rows of it up, the head multiplies by it. Its exact block has products of both
uses, which no product of two factors has. KFAC is the sum of two Kronecker products.
"""

from dataclasses import replace

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
TIED_BODY = (embedding("words", 5, 4), linear("inner", 4, 4), tanh())
TIED_HEAD = tied_linear("head", "words", 4, 5)

TIED_TOKENS = Case(
    "tied-head-tokens-cross-entropy",
    "definition",
    (*TIED_BODY, TIED_HEAD, classes_first()),
    loss("cross-entropy"),
    (7, 3),
    BOTH_DEFINITION,
    data=words,
    tags=("embedding", "tied", "sequence", "cross-entropy"),
)
TIED_POOL = replace(
    TIED_TOKENS,
    id="tied-head-pooled-mse",
    ops=(*TIED_BODY, mean_positions(), TIED_HEAD),
    loss=loss("mse"),
    tags=("embedding", "tied", "pool", "mse"),
)
TIED_BATCHES = replace(
    TIED_TOKENS,
    id="tied-head-in-batches",
    batches=(2, 5),
    tags=(*TIED_TOKENS.tags, "batches"),
)
CASES = [TIED_TOKENS, TIED_POOL, TIED_BATCHES, in_single_precision(TIED_TOKENS)]
