"""Embeddings: layers whose input is one-hot, so that the factor of their inputs is diagonal.

EKFAC is asked for where it is exact only. Words that occur equally often have equal eigenvalues,
and KFAC's eigenvectors are not determined.
"""

from dataclasses import replace
from math import prod

import torch

from kfac_scratch.conformance.cases.case import (
    DEFINITION,
    EXACT,
    Case,
    Data,
    generator,
    parameters,
    targets,
)
from kfac_scratch.conformance.cases.families.common import (
    ALL_EXACT,
    BOTH_DEFINITION,
    LOSSES,
    REDUCTIONS,
    loss,
)
from kfac_scratch.conformance.cases.ops import (
    classes_first,
    embedding,
    forward,
    linear,
    mean_positions,
    tanh,
)

PLACE = 11  # in reports and vectors


def words(case: Case) -> Data:
    """Numbers of words, of which the last one never occurs."""
    random, count = generator(case), case.ops[0]["d_in"] - 1
    theta = parameters(random, case.ops)
    X = torch.tensor([random.randrange(count) for _ in range(prod(case.shape))])
    X = X.reshape(case.shape)
    return Data(theta, X, targets(random, case.loss, forward(case.ops, theta, X)))


FIRST = embedding("embedding", 6, 3)
SINGLE_WORDS = [
    Case(
        f"embedding-deep-linear-mse-{reduction}",
        "deep-linear",
        (FIRST, linear("fc", 3, 2)),
        loss("mse", reduction),
        (11,),
        ALL_EXACT,
        data=words,
        tags=("embedding", "mse"),
    )
    for reduction in REDUCTIONS
]
SINGLE_WORDS += [
    Case(
        "embedding-one-datum-cross-entropy",
        "one-datum",
        (FIRST, tanh(), linear("fc", 3, 5)),
        loss("cross-entropy"),
        (1,),
        ALL_EXACT,
        data=words,
        tags=("embedding", "cross-entropy"),
    )
]
SINGLE_WORDS += [
    Case(
        f"embedding-mlp-{kind}",
        "definition",
        (FIRST, tanh(), linear("fc", 3, 5)),
        loss(kind),
        (11,),
        BOTH_DEFINITION,
        data=words,
        tags=("embedding", kind),
    )
    for kind in LOSSES[:2]
]
EMBEDDED_TOKENS = Case(
    "embedding-tokens-cross-entropy",
    "definition",
    (embedding("embedding", 6, 4), tanh(), linear("fc", 4, 2), classes_first()),
    loss("cross-entropy"),
    (7, 3),
    {"expand": DEFINITION},
    data=words,
    tags=("embedding", "sequence", "cross-entropy"),
)
EMBEDDED_POOL = Case(
    "embedding-pooled-mse",
    "deep-linear-pooled",
    (FIRST, mean_positions(), linear("head", 3, 2)),
    loss("mse"),
    (7, 5),
    {"reduce": EXACT, "expand": DEFINITION},
    layers=("embedding",),
    data=words,
    tags=("embedding", "sequence", "pool", "mse"),
)
EMBEDDED_POOL_TANH = replace(
    EMBEDDED_POOL,
    id="embedding-pooled-cross-entropy",
    theorem="definition",
    ops=(FIRST, mean_positions(), tanh(), linear("head", 3, 2)),
    loss=loss("cross-entropy"),
    flavours=BOTH_DEFINITION,
    layers=(),
    tags=("embedding", "sequence", "pool", "cross-entropy"),
)
CASES = [*SINGLE_WORDS, EMBEDDED_TOKENS, EMBEDDED_POOL, EMBEDDED_POOL_TANH]
