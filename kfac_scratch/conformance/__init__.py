"""The oracle: tell any KFAC implementation whether it is right, and what is wrong with it.

`cases` say what is given and what is expected, `truth` computes it by plain autodiff, an adapter
(`protocol`) presents an implementation, `judge` compares. See the chapter "Is your KFAC right?".
"""

from kfac_scratch.conformance.protocol import (
    Adapter,
    Capabilities,
    DenseAnswer,
    EigenAnswer,
    KroneckerAnswer,
    LayerBlock,
    NotSupported,
    Request,
    VectorAnswer,
)

__all__ = [
    "Adapter",
    "Capabilities",
    "DenseAnswer",
    "EigenAnswer",
    "KroneckerAnswer",
    "LayerBlock",
    "NotSupported",
    "Request",
    "VectorAnswer",
]
