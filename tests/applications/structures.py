"""The losses and approximations that tests of what curvature is used for share."""

from torch.nn import CrossEntropyLoss, MSELoss

from kfac_scratch import Dense, Diagonal, LayerIO, ekfac, kfac

SUM = CrossEntropyLoss(reduction="sum")
SQUARES = MSELoss(reduction="sum")


def dense(io: LayerIO) -> Dense:
    """The exact block."""
    return Dense(io.block())


def diagonal(io: LayerIO) -> Diagonal:
    """The exact diagonal of a block."""
    return Diagonal(io.gradients().square().sum((0, 1)))


STRUCTURES = {"dense": dense, "kfac": kfac, "ekfac": ekfac, "diagonal": diagonal}
