"""Where a library differs from the definition that it states, with a reproduction of each.

These are findings about what curvature is used for; those about curvature itself are in
`kfac_scratch/conformance/audit/findings`.
Each is a function whose docstring is for the maintainer. Its numbers are stored, each library in an
environment of its own:

    python -m venv peers && peers/bin/pip install laplace-torch==0.3 dattri==0.3.0
    peers/bin/python -m tests.applications.differences --json tests/applications/differences.json

A finding is one release's, and no judgement of the library, whose other results agree with ours
(`peers`).
"""

import argparse
import json
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

Numbers = dict[str, float]


def evidence_training_of_several_outputs() -> Numbers:
    r"""laplace-torch 0.3: `marglik_training` of C regression outputs has C times the stated decay.

    `marglik_training` minimises `MSELoss(reduction="mean")`, which divides by N and by C, plus the
    penalty divided by N alone (marglik_training.py, line 255). So the minimum is that of the prior
    precision C * delta, while the evidence is computed with delta: the weights are no maximum of
    the posterior, at which Laplace's approximation has to be made.

    Expected: at the end of a training with a fixed prior and a fixed noise, a linear model has the
    weights of ridge regression with delta * sigma^2. Measured: the relative distance
    from them, and from those with C times the decay.

    Suggestion: divide the penalty by `N * C`.
    """
    from laplace.curvature import CurvlinopsGGN
    from laplace.marglik_training import marglik_training

    found = {}
    for C in (1, 5):
        torch.manual_seed(0)
        X, y, delta, sigma = torch.randn(20, 3), torch.randn(20, C), 4.0, 0.7
        model = nn.Sequential(nn.Linear(3, C, bias=False))
        marglik_training(
            model,
            DataLoader(TensorDataset(X, y), batch_size=20),
            "regression",
            "diag",
            CurvlinopsGGN,
            optimizer_cls=torch.optim.SGD,
            optimizer_kwargs={"lr": 0.3},
            n_epochs=400 * C,
            lr_hyp=0.0,
            n_hypersteps=1,
            marglik_frequency=400 * C,
            prior_structure="scalar",
            prior_prec_init=delta,
            sigma_noise_init=sigma,
            fix_sigma_noise=True,
        )
        for what, factor in (("the stated decay", 1), ("C times the decay", C)):
            ridge = factor * delta * sigma**2 * torch.eye(3)
            W = torch.linalg.solve(X.T @ X + ridge, X.T @ y).T
            distance = (model[0].weight - W).norm() / W.norm()
            found[f"{C} outputs, from {what}"] = float(distance)
    return found


def damping_of_kronecker_factors() -> Numbers:
    """laplace-torch 0.3: `KronLaplace(damping=True)` has no effect.

    `KronDecomposed.__mul__` and `__add__` make a new object without the flag (utils/matrix.py,
    lines 381 and 400), so that the posterior precision, which is `H * factor + prior`, has
    `damping=False`. The evidence is the same with both values of the option.

    Expected: with `damping=True` the logarithm of the determinant is that of the damped factors, as
    the docstring says. Measured: the evidence with both, and what it would be with the flag set by
    hand on the posterior precision.

    Suggestion: pass `damping=self.damping` on in both methods.
    """
    import laplace
    from laplace.curvature import CurvlinopsGGN

    torch.manual_seed(0)
    X, y = torch.randn(20, 3), torch.randint(4, (20,))
    model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 4))

    def fitted(damping: bool) -> laplace.KronLaplace:
        made = laplace.KronLaplace(
            model, "classification", prior_precision=0.5, backend=CurvlinopsGGN, damping=damping
        )
        made.fit(DataLoader(TensorDataset(X, y), batch_size=20))
        return made

    without, having = fitted(False), fitted(True)
    by_hand = having.posterior_precision
    by_hand.damping = True
    ratio = by_hand.logdet() - having.prior_precision_diag.log().sum()
    return {
        "evidence, damping=False": float(without.log_marginal_likelihood()),
        "evidence, damping=True": float(having.log_marginal_likelihood()),
        "evidence, the flag set by hand": float(
            having.log_likelihood - (having.scatter + ratio) / 2
        ),
    }


def inverses_of_batches() -> Numbers:
    """dattri 0.3.0: `IFAttributorExplicit` and `IFAttributorCG` add up solutions of single batches.

    `transform_test_rep` adds, over the batches of the training data, the inverse of that batch's
    Hessian times the vector (algorithm/influence_function.py, line 114). The inverse of a mean of
    matrices is no sum of their inverses: with k batches the scores are about k times as large, and
    so their scale depends on the batch size.

    Expected: scores do not depend on the batch size of the loader. Measured: the slope of the
    scores with 2 and 4 batches against those with one, for softmax regression.

    Suggestion: add up the Hessians, or their products in conjugate gradients, and solve once.
    """
    from dattri.algorithm.influence_function import IFAttributorCG, IFAttributorExplicit
    from dattri.task import AttributionTask

    torch.manual_seed(0)
    model = nn.Linear(3, 4)
    X, y, X_test, y_test = (
        torch.randn(60, 3),
        torch.randint(4, (60,)),
        torch.randn(5, 3),
        torch.randint(4, (5,)),
    )
    cross_entropy = nn.CrossEntropyLoss()

    def loss(params: dict[str, Tensor], data: tuple[Tensor, Tensor]) -> Tensor:
        inputs, targets = data
        outputs = torch.func.functional_call(model, params, (inputs.reshape(-1, 3),))
        return cross_entropy(outputs, targets.reshape(-1))

    def scores(kind: type, size: int) -> Tensor:
        task = AttributionTask(loss, model, [model.state_dict()])
        attributor = kind(task, regularization=0.1)
        batches = DataLoader(TensorDataset(X, y), batch_size=size)
        attributor.cache(batches)
        test = DataLoader(TensorDataset(X_test, y_test), batch_size=5)
        result: Tensor = attributor.attribute(batches, test)
        return result.detach()

    found = {}
    for kind in (IFAttributorExplicit, IFAttributorCG):
        once = scores(kind, 60)
        for batches in (2, 4):
            other = scores(kind, 60 // batches)
            slope = (once * other).sum() / once.square().sum()
            found[f"{kind.__name__}, {batches} batches"] = float(slope)
    return found


@dataclass(frozen=True)
class Difference:
    """A finding, and whether its numbers show it.

    Attributes:
        library: Its name on the package index.
        version: The release that it was found in.
        measure: The numbers.
        shows: Whether they show the finding.
    """

    library: str
    version: str
    measure: Callable[[], Numbers]
    shows: Callable[[Numbers], bool]


def _of_training(n: Numbers) -> bool:
    right = n["1 outputs, from the stated decay"] < 1e-6
    return (
        right
        and n["5 outputs, from the stated decay"] > 0.1
        and n["5 outputs, from C times the decay"] < 1e-6
    )


def _of_damping(n: Numbers) -> bool:
    same = n["evidence, damping=True"] == n["evidence, damping=False"]
    return same and abs(n["evidence, the flag set by hand"] - n["evidence, damping=True"]) > 0.1


def _of_inverses(n: Numbers) -> bool:
    return all(int(case.split()[-2]) <= slope for case, slope in n.items())


DIFFERENCES = {
    "evidence_training_of_several_outputs": Difference(
        "laplace-torch", "0.3", evidence_training_of_several_outputs, _of_training
    ),
    "damping_of_kronecker_factors": Difference(
        "laplace-torch", "0.3", damping_of_kronecker_factors, _of_damping
    ),
    "inverses_of_batches": Difference("dattri", "0.3.0", inverses_of_batches, _of_inverses),
}


def installed(difference: Difference) -> bool:
    """Whether the release that a finding is about is installed."""
    try:
        return version(difference.library) == difference.version
    except PackageNotFoundError:
        return False


def measured(name: str) -> Numbers:
    """The numbers of a finding, in double precision."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return DIFFERENCES[name].measure()
    finally:
        torch.set_default_dtype(before)


def main() -> None:
    """Measure what is installed, and store the numbers."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--json", type=Path, required=True)
    file = parser.parse_args().json
    stored = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    for name, difference in DIFFERENCES.items():
        if not installed(difference):
            print(f"{name}: {difference.library} {difference.version} is not installed")
            continue
        numbers = measured(name)
        stored[name] = {"version": difference.version, "torch": version("torch")}
        stored[name]["numbers"] = numbers
        print(name, "shown" if difference.shows(numbers) else "NOT SHOWN", numbers)
    file.write_text(json.dumps(stored, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
