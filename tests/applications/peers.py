"""Compare Laplace and influence with the libraries that people use, each in its own environment.

The libraries are no dependency of the tests: laplace-torch needs a torchvision that belongs to the
build of torch, or none. So a comparison is run by hand, and its errors are stored:

    python -m venv peers && peers/bin/pip install laplace-torch==0.3 kronfluence==1.0.1 -e .
    peers/bin/python -m tests.applications.peers --json tests/applications/peers.json

`test_peers.py` reads the file, and runs what is installed. Where a library has a bias as a block of
its own, our joint block is cut into both parts first.
"""

import argparse
import json
import tempfile
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from kfac_scratch import Dense, Diagonal, Kronecker, LayerIO, ekfac, kfac, layer_ios, over_loader
from kfac_scratch.applications.influence import influence_scores, self_influence
from kfac_scratch.applications.laplace import Laplace, evidence_gradient, log_evidence
from kfac_scratch.applications.predictive import output_vectors
from kfac_scratch.applications.trained import trained_weights
from kfac_scratch.curvature import ggn, parameter_vector
from kfac_scratch.losses import empirical
from tests.applications.structures import diagonal

Comparison = tuple[str, Tensor, Tensor]
PRIOR, SIGMA, TEMPERATURE = 0.7, 0.4, 1.5


def problem(loss: str) -> tuple[nn.Module, nn.Module, Tensor, Tensor]:
    """A network, a loss as a sum, and data."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))
    X = torch.randn(30, 5)
    if loss == "regression":
        return model, nn.MSELoss(reduction="sum"), X, torch.randn(30, 3)
    return model, nn.CrossEntropyLoss(reduction="sum"), X, torch.randint(3, (30,))


# ---- laplace-torch ------------------------------------------------------------------------------


def parts_of(name: str, W: Tensor, M: Kronecker | Diagonal) -> dict[str, tuple[Tensor, object]]:
    """Weight and bias of a block as two blocks."""
    if isinstance(M, Diagonal):
        return {name: (W, M)}
    weight, bias = Kronecker(M.A[:-1, :-1], M.B), Kronecker(M.A[-1:, -1:], M.B)
    return {f"{name} weight": (W[:, :-1], weight), f"{name} bias": (W[:, -1:], bias)}


def ours(
    structure: str, model: nn.Module, loss: nn.Module, batches: list, beta: float
) -> tuple[Laplace, Callable[[LayerIO, str, Laplace], Tensor]]:
    """Our posterior with the blocks of a structure of theirs, and its part of a covariance."""
    X, y = (torch.cat(t) for t in zip(*batches, strict=True))
    total = float(loss(model(X), y).detach())
    numbers = y.numel() if isinstance(loss, nn.MSELoss) else 0
    if structure == "full":
        W = {"all": parameter_vector(model).detach().unsqueeze(0)}
        Ms = {"all": Dense(ggn(model, loss, X, y)).eigen()}
        return Laplace(W, Ms, total, numbers, {"all": PRIOR}, beta), lambda *_: torch.zeros(())
    found = over_loader({"kron": kfac, "diag": diagonal}[structure], model, loss, batches)
    blocks: dict = {}
    for name, W in trained_weights(model, found).items():
        blocks |= parts_of(name, W, found[name])
    posterior = Laplace(
        {n: W for n, (W, _) in blocks.items()},
        {n: M.eigen() for n, (_, M) in blocks.items()},  # type: ignore[attr-defined]
        total,
        numbers,
        dict.fromkeys(blocks, PRIOR),
        beta,
    )
    return posterior, _covariance


def _covariance(io: LayerIO, name: str, posterior: Laplace) -> Tensor:
    """The part of a layer's blocks in the outputs' covariance."""
    G, S = io.gradients(), posterior.covariances()
    cut = {f"{name} weight": G[..., :-1], f"{name} bias": G[..., -1:], name: G}
    used = {n: rows for n, rows in cut.items() if n in S}
    return sum(torch.einsum("unoi,vnoi->nuv", rows, S[n] @ rows) for n, rows in used.items())


def laplace_torch() -> Iterator[Comparison]:
    """Evidence, its gradient, and the covariance of outputs."""
    import laplace
    from laplace.curvature import CurvlinopsGGN

    kinds = {
        "full": laplace.FullLaplace,
        "kron": laplace.KronLaplace,
        "diag": laplace.DiagLaplace,
    }
    for loss_name in ("classification", "regression"):
        for structure, kind in kinds.items():
            for size in (30, 8):
                model, loss, X, y = problem(loss_name)
                batches = list(zip(X.split(size), y.split(size), strict=True))
                regression = loss_name == "regression"
                options = {"sigma_noise": SIGMA} if regression else {"temperature": TEMPERATURE}
                beta = 1 / (2 * SIGMA**2) if regression else 1 / TEMPERATURE
                theirs = kind(
                    model, loss_name, prior_precision=PRIOR, backend=CurvlinopsGGN, **options
                )
                theirs.fit(DataLoader(TensorDataset(X, y), batch_size=size))
                log_prior = torch.tensor(PRIOR).log().requires_grad_()
                value = theirs.log_marginal_likelihood(log_prior.exp())
                (by_prior,) = torch.autograd.grad(value, log_prior)
                posterior, covariance = ours(structure, model, loss, batches, beta)
                case = f"{loss_name}, {structure}, batches of {size}"
                yield f"evidence: {case}", log_evidence(posterior), value.detach()
                total = sum(g.sum() for g in evidence_gradient(posterior).log_prior.values())
                yield f"its derivative by the prior: {case}", total, by_prior
                if structure == "full":
                    continue
                theirs.prior_precision = PRIOR
                _, expected = theirs._glm_predictive_distribution(X[:6])
                ios = layer_ios(model, loss, X[:6], y[:6], output_vectors)
                found = sum(covariance(io, name, posterior) for name, io in ios.items())
                yield f"covariance of outputs: {case}", found, expected.detach()


# ---- kronfluence --------------------------------------------------------------------------------


def kronfluence() -> Iterator[Comparison]:
    """Pairwise and self scores, with the empirical Fisher."""
    from kronfluence.analyzer import Analyzer, prepare_model
    from kronfluence.arguments import FactorArguments, ScoreArguments
    from kronfluence.task import Task

    class Summed(Task):
        def compute_train_loss(self, batch, model, sample=False):
            X, y = batch
            return nn.functional.cross_entropy(model(X), y, reduction="sum")

        def compute_measurement(self, batch, model):
            return self.compute_train_loss(batch, model)

    double = torch.float64
    structures = {"kfac": kfac, "ekfac": ekfac, "diagonal": diagonal}
    for strategy, structure in structures.items():
        model, loss, X, y = problem("classification")
        queries = X[:7] + 0.1, y[:7]
        N, damping = len(X), 0.02  # theirs belongs to the mean over samples
        ios = layer_ios(model, loss, X, y, empirical)
        inverses = {name: structure(io).inverse(N * damping) for name, io in ios.items()}
        data, asked = TensorDataset(X, y), TensorDataset(*queries)
        with tempfile.TemporaryDirectory() as folder:
            task = Summed()
            analyzer = Analyzer(
                "peer",
                prepare_model(model, task),
                task,
                cpu=True,
                output_dir=folder,
                disable_tqdm=True,
            )
            analyzer.fit_all_factors(
                "factors",
                data,
                per_device_batch_size=8,
                factor_args=FactorArguments(
                    strategy,
                    use_empirical_fisher=True,
                    activation_covariance_dtype=double,
                    gradient_covariance_dtype=double,
                    per_sample_gradient_dtype=double,
                    lambda_dtype=double,
                ),
            )
            options = ScoreArguments(
                damping_factor=damping,
                per_sample_gradient_dtype=double,
                precondition_dtype=double,
                score_dtype=double,
            )
            analyzer.compute_pairwise_scores(
                "pairs",
                "factors",
                asked,
                data,
                per_device_query_batch_size=4,
                per_device_train_batch_size=8,
                score_args=options,
            )
            analyzer.compute_self_scores(
                "own", "factors", data, per_device_train_batch_size=8, score_args=options
            )
            pairs = analyzer.load_pairwise_scores("pairs")["all_modules"]
            own = analyzer.load_self_scores("own")["all_modules"]
        fresh, *_ = problem("classification")
        found = influence_scores(fresh, loss, inverses, [queries], [(X, y)])
        yield f"pairwise scores: {strategy}", N * found, pairs
        found = self_influence(fresh, loss, inverses, [(X, y)])
        yield f"self scores: {strategy}", N * found, own


LIBRARIES = {"laplace-torch": laplace_torch, "kronfluence": kronfluence}


def errors_of(library: str) -> dict[str, float]:
    """The relative error of every comparison, by its name."""
    torch.set_default_dtype(torch.float64)
    return {
        what: float((found.to(expected) - expected).abs().max() / expected.abs().max())
        for what, found, expected in LIBRARIES[library]()
    }


def main() -> None:
    """Compare with every library that is installed, and store the errors."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("libraries", nargs="*", help=f"of {', '.join(LIBRARIES)}; default: all")
    parser.add_argument("--json", type=Path, required=True)
    arguments = parser.parse_args()
    unknown = set(arguments.libraries) - set(LIBRARIES)
    if unknown:
        parser.error(f"there is no comparison with {', '.join(sorted(unknown))}")
    file = arguments.json
    stored = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    for library in arguments.libraries or LIBRARIES:
        try:
            found = version(library)
        except PackageNotFoundError:
            print(f"{library} is not installed")
            continue
        stored[library] = {
            "version": found,
            "torch": version("torch"),
            "errors": errors_of(library),
        }
        print(library, found, max(stored[library]["errors"].values()))
    file.write_text(json.dumps(stored, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
