"""What KFAC's factors take at least: the limit that `benchmarks.factors` holds every row against.

One forward pass; as many backward passes to the layers' outputs as the Fisher has needed vectors;
and for every factor, a sum of `r r^T` over `R` rows of width `d`, half of the `2 R d^2` operations
of a plain matrix product, because the result is symmetric, at the rate that the plain products of
rows of these very shapes are measured to have. All passes are one measurement and all products
another, since the smallest time of a short piece, times its number, may be less than any long run
takes. Both take turns with the contenders.

Nothing else counts: no averages over positions, no patches of convolutions, no copies, no checks. A
backward pass is taken one vector at a time. Where several at once are faster, which is so for small
networks, a ratio to the limit may be below that of the plain loop.
"""

from collections import Counter
from dataclasses import dataclass

import torch

from benchmarks.measure import Run
from benchmarks.nets import Problem
from kfac_scratch import layer_ios, monte_carlo
from kfac_scratch.capture.flavours import Flavour

Shape = tuple[int, int]  # rows, width


@dataclass(frozen=True)
class Limit:
    """How often each part is needed: vectors sent backward, and products by shape of the rows."""

    vectors: int
    products: Counter[Shape]

    @property
    def flops(self) -> int:
        """Additions and multiplications of all products, at half of the plain ones'."""
        return sum(count * half_flops(shape) for shape, count in self.products.items())

    def seconds(self, parts: dict[str, float]) -> dict[str, float]:
        """The limit from the measured parts, and what it consists of."""
        products = parts["products"] / 2
        split = {"forward": parts["forward"], "backward": parts["backward"], "products": products}
        counts = {"vectors": self.vectors, "flops": self.flops}
        rate = {"flops per second": self.flops / products}
        return {"seconds": sum(split.values())} | split | counts | rate


def half_flops(shape: Shape) -> int:
    rows, d = shape
    return rows * d**2


def limit(problem: Problem, vectors: int, flavour: Flavour) -> Limit:
    """What the factors of a network need for so many vectors."""
    found: Counter[Shape] = Counter()
    options = {"flavour": flavour, "layers": problem.layers}
    ios = layer_ios(problem.model, problem.loss, problem.X, problem.y, monte_carlo(1), **options)
    for io in ios.values():
        N, S, d_in = io.a.shape
        found[N * S, d_in] += 1
        found[vectors * N * S, io.g.shape[-1]] += 1
    return Limit(vectors, found)


def parts(problem: Problem, of: Limit) -> dict[str, Run]:
    """What is timed: a forward pass, all backward passes, and all plain products."""
    outputs: list[torch.Tensor] = []
    modules = [problem.model.get_submodule(name) for name in problem.layers]
    handles = [m.register_forward_hook(lambda m, x, z: outputs.append(z)) for m in modules]
    f = problem.model(problem.X)
    for handle in handles:
        handle.remove()
    v = torch.randn_like(f)
    rows = {shape: torch.randn(shape, device=problem.X.device) for shape in of.products}

    def backward() -> None:
        for _ in range(of.vectors):
            torch.autograd.grad(f, outputs, v, retain_graph=True)

    def products() -> None:
        for shape in of.products.elements():
            rows[shape].T @ rows[shape]

    return {
        "forward": lambda: problem.model(problem.X),
        "backward": backward,
        "products": products,
    }
