"""Train a transformer on handwritten digits, in one process or in several, with the same result.

    python examples/digits.py
    torchrun --nproc-per-node 2 examples/digits.py

It needs scikit-learn, which brings the digits. All ranks have all images and take their part of
every batch; a `DistributedSampler` would do the same.
"""

import os

import torch
from sklearn.datasets import load_digits
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from kfac_scratch import KFAC, distribute, type2

STEPS, BATCH = 60, 100


class Digits(nn.Module):
    """Every row of an image is a word of eight numbers."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.rows, self.head = nn.Linear(8, width), nn.Linear(width, 10)
        self.place = nn.Parameter(0.02 * torch.randn(8, width))
        layer = nn.TransformerEncoderLayer(width, 4, 2 * width, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, X: Tensor) -> Tensor:
        """The scores of ten classes, from images `[N, 8, 8]`."""
        return self.head(self.encoder(self.rows(X) + self.place).mean(1))


def main() -> None:
    """Train, and print the loss on all images."""
    rank, size = 0, 1
    if "RANK" in os.environ:  # torchrun sets it
        distributed.init_process_group("gloo")
        rank, size = distributed.get_rank(), distributed.get_world_size()
    torch.set_default_dtype(torch.float64)  # so that the result can be compared to many digits
    torch.manual_seed(0)
    digits = load_digits()
    X, y = torch.tensor(digits.images / 16), torch.tensor(digits.target)
    model = Digits()
    wrapped = DistributedDataParallel(model) if size > 1 else model
    loss = nn.CrossEntropyLoss()
    optimizer = KFAC(wrapped, loss, fisher=type2)
    # the mean that DistributedDataParallel takes, right for parts of any sizes
    of_part = distribute(optimizer).joint_loss if size > 1 else loss
    order = torch.randperm(len(X))
    for step in range(STEPS):
        batch = order[(step * BATCH + torch.arange(BATCH)) % len(X)][rank::size]
        optimizer.zero_grad()
        of_part(wrapped(X[batch]), y[batch]).backward()
        optimizer.observe(X[batch], y[batch])
        optimizer.step()
    if rank == 0:
        with torch.no_grad():
            print(f"{size} processes: loss {float(loss(model(X), y)):.12f} after {STEPS} steps")
    if size > 1:
        distributed.destroy_process_group()


if __name__ == "__main__":
    main()
