"""Merging: linear models become the model of all data; the start is counted once."""

import pytest
import torch
from torch.nn import Conv2d, Embedding, Linear, Sequential, Tanh

from kfac_scratch import (
    Kronecker,
    KroneckerSum,
    foof,
    kfac,
    layer_ios,
    over_loader,
)
from kfac_scratch.applications.merging import merged, merged_block
from kfac_scratch.applications.trained import parameters_from, trained_weights
from tests.applications.structures import SQUARES, STRUCTURES, SUM, dense
from tests.laws import check_differs, check_equal

D, C, DECAY = 6, 3, 0.4


def inputs_summed(io):
    """RegMean: the input factor as a sum over data, where `foof` has the mean."""
    M = foof(io)
    return Kronecker(io.rows * M.A, M.B)


def parts(device):
    """Three data sets of different sizes and directions."""
    torch.manual_seed(0)
    return [
        (
            torch.randn(n, D, device=device) @ torch.randn(D, D, device=device),
            torch.randn(n, C, device=device),
        )
        for n in (20, 35, 15)
    ]


def ridge(X, y, decay, start):
    """The minimum of the squared error and the decay towards a start."""
    Phi = torch.cat([X, torch.ones_like(X[:, :1])], 1)
    H = 2 * Phi.T @ Phi + decay * torch.eye(D + 1, device=X.device)
    return torch.linalg.solve(H, 2 * Phi.T @ y + decay * start.T).T


def linear_models(device, structure, start):
    """The weights and the curvature of one linear model for each data set, and that of all."""
    data = parts(device)
    model = Sequential(Linear(D, C)).to(device)
    Ws = [{"0": ridge(*part, DECAY, start)} for part in data]
    Ms = [{"0": structure(layer_ios(model, SQUARES, *part)["0"])} for part in data]
    union = ridge(*(torch.cat(t) for t in zip(*data, strict=True)), DECAY, start)
    return Ws, Ms, union


def starts(device):
    torch.manual_seed(3)
    return {
        "zeros": torch.zeros(C, D + 1, device=device),
        "elsewhere": torch.randn(C, D + 1, device=device),
    }


@pytest.mark.parametrize("start", ["zeros", "elsewhere"])
@pytest.mark.parametrize("structure", STRUCTURES)
def test_linear_models_merge_to_the_model_of_all_data(structure, start, device):
    W0 = starts(device)[start]
    Ws, Ms, union = linear_models(device, STRUCTURES[structure], W0)
    found = merged(Ws, Ms, DECAY, {"0": W0})["0"]
    check = check_differs if structure == "diagonal" else check_equal
    check(found, union)


def test_the_average_and_the_start_counted_for_each_model_are_not_the_model_of_all_data(device):
    W0 = starts(device)["elsewhere"]
    Ws, Ms, union = linear_models(device, kfac, W0)
    check_differs(sum(W["0"] for W in Ws) / 3, union, by=0.1)
    eye = torch.eye(W0.numel(), device=device)
    damped = [M["0"].dense() + DECAY * eye for M in Ms]
    products = sum(H @ W["0"].flatten() for H, W in zip(damped, Ws, strict=True))
    thrice = torch.linalg.solve(sum(damped), products).reshape(W0.shape)
    check_differs(thrice, union)


def test_regmean_is_merging_by_the_sum_of_the_input_factor(device):
    """For the squared error without decay; means of the inputs weigh data sets, not data."""
    Ws, Ms, _ = linear_models(device, inputs_summed, torch.zeros(C, D + 1, device=device))
    regmean = torch.linalg.solve(
        sum(M["0"].A for M in Ms),
        sum(W["0"] @ M["0"].A for W, M in zip(Ws, Ms, strict=True)),
        left=False,
    )
    zero = {"0": torch.zeros(C, D + 1, device=device)}
    check_equal(merged(Ws, Ms, 0.0, zero)["0"], regmean)
    _, exact, _ = linear_models(device, kfac, zero["0"])
    check_equal(merged(Ws, exact, 0.0, zero)["0"], regmean)
    _, means, _ = linear_models(device, foof, zero["0"])
    check_differs(merged(Ws, means, 0.0, zero)["0"], regmean, by=0.1)


def test_two_kronecker_products_merge_directly(device):
    """The inverse of a sum of two products, which needs no conjugate gradients."""
    Ws, Ms, _ = linear_models(device, kfac, torch.zeros(C, D + 1, device=device))
    (W1, W2, _), (K1, K2, _) = [[t["0"] for t in ts] for ts in (Ws, Ms)]
    direct = KroneckerSum(K1, K2).inverse(0.0) @ (K1 @ W1 + K2 @ W2)
    check_equal(merged_block([W1, W2], [K1, K2], 0.0, torch.zeros_like(W1)), direct)


def test_the_second_task_alone_is_trained_with_the_first_as_its_prior(device):
    """A product of posteriors: training on in turn ends where merging does, for linear models."""
    W0 = starts(device)["elsewhere"]
    Ws, Ms, _ = linear_models(device, dense, W0)
    X, y = parts(device)[1]
    Phi = torch.cat([X, torch.ones_like(X[:, :1])], 1)
    eye = torch.eye(W0.numel(), device=device)
    prior = Ms[0]["0"].dense() + DECAY * eye
    by_data = 2 * (y.T @ Phi).flatten()
    precision = prior + Ms[1]["0"].dense()
    trained = torch.linalg.solve(precision, by_data + prior @ Ws[0]["0"].flatten())
    found = merged(Ws[:2], Ms[:2], DECAY, {"0": W0})["0"]
    check_equal(found, trained.reshape(W0.shape))


def test_equal_networks_stay_as_they_are(device):
    torch.manual_seed(0)
    model = Sequential(Conv2d(2, 4, 2, groups=2), Tanh(), torch.nn.Flatten(), Linear(16, 3))
    model = model.to(device)
    X, y = torch.randn(7, 2, 3, 3, device=device), torch.randint(3, (7,), device=device)
    Ms = over_loader(kfac, model, SUM, [(X, y)])
    assert list(Ms) == ["0[0]", "0[1]", "3"]
    Ws = trained_weights(model, Ms)
    found = merged([Ws, Ws], [Ms, Ms], 1e-9, Ws)
    for name, W in Ws.items():
        check_equal(found[name], W)
    new = parameters_from(model, found)
    for name, p in model.named_parameters():
        check_equal(new[name], p.detach())


def test_a_network_without_curvature_gives_way(device):
    """Its weights are where the start is, up to the decay, in which it has no part of its own."""
    Ws, Ms, _ = linear_models(device, kfac, torch.zeros(C, D + 1, device=device))
    K = Ms[0]["0"]
    nothing = Kronecker(torch.zeros_like(K.A), torch.zeros_like(K.B))
    zero = torch.zeros(C, D + 1, device=device)
    check_equal(merged_block([Ws[0]["0"], zero], [K, nothing], DECAY, zero), Ws[0]["0"])


def test_in_single_precision_the_merge_is_near_double_precision():
    Ws, Ms, _ = linear_models("cpu", kfac, torch.zeros(C, D + 1))
    zero = torch.zeros(C, D + 1)
    double = merged_block([W["0"] for W in Ws], [M["0"] for M in Ms], DECAY, zero)
    halves = [Kronecker(M["0"].A.float(), M["0"].B.float()) for M in Ms]
    single = merged_block([W["0"].float() for W in Ws], halves, DECAY, zero.float())
    assert single.dtype == torch.float32
    assert 1e-12 < float((single - double).abs().max() / double.abs().max()) < 1e-4


def test_embeddings_merge_word_by_word(device):
    torch.manual_seed(0)
    model = Sequential(Embedding(5, 2), torch.nn.Flatten(), Linear(6, 3)).to(device)
    X, y = torch.randint(5, (9, 3), device=device), torch.randint(3, (9,), device=device)
    Ms = over_loader(kfac, model, SUM, [(X, y)])
    Ws = trained_weights(model, Ms)
    other = {name: W + 1 for name, W in Ws.items()}
    found = merged([Ws, other], [Ms, Ms], 0.1, Ws)
    for name, W in Ws.items():
        M = Ms[name].dense()
        damped = M + 0.1 * torch.eye(len(M), device=device)
        both = torch.linalg.solve(M + damped, damped @ torch.ones(len(M), device=device))
        check_equal(found[name] - W, both.reshape(W.shape))


# ---- refusals -----------------------------------------------------------------------------------


def bad(change):
    Ws, Ms, _ = linear_models("cpu", kfac, torch.zeros(C, D + 1))
    call = {"weights": Ws, "matrices": Ms, "decay": DECAY, "start": {"0": torch.zeros(C, D + 1)}}
    change(call)
    return merged(**call)


def one(call):
    call["weights"], call["matrices"] = call["weights"][:1], call["matrices"][:1]


def fewer_matrices(call):
    call["matrices"] = call["matrices"][:2]


def negative(call):
    call["decay"] = -0.1


def another_block(call):
    call["weights"][1] = {"head": call["weights"][1]["0"]}


def another_matrix(call):
    call["matrices"][2] = {}


def another_shape(call):
    call["weights"][1] = {"0": torch.zeros(C, D)}


def another_kind(call):
    K = call["matrices"][1]["0"]
    call["matrices"][1] = {"0": KroneckerSum(K, K).inverse(0.0)}


def no_curvature(call):
    call["decay"] = 0.0
    for Ms in call["matrices"]:
        K = Ms["0"]
        keep = (torch.arange(len(K.A)) != 2).to(K.A)
        Ms["0"] = Kronecker(keep * K.A * keep[:, None], K.B)


def no_start(call):
    call["start"] = {}


BAD = {
    one: "weights of 1 networks",
    fewer_matrices: "3 networks and the matrices of 2",
    negative: "at least 0",
    another_block: r"weights\[1\] has the blocks \['head'\]",
    another_matrix: r"matrices\[2\] has the blocks \[\]",
    another_shape: r"shape \(3, 6\) in weights\[1\]",
    another_kind: r"matrices\[1\]\['0'\] is a Congruence",
    no_curvature: "no curvature in any network",
    no_start: r"start \[\]",
}


@pytest.mark.parametrize("change", BAD, ids=lambda change: change.__name__)
@pytest.mark.usefixtures("as_users_run_it")
def test_bad_input_is_refused_with_a_way_out(change):
    with pytest.raises((ValueError, TypeError), match=BAD[change]):
        bad(change)
