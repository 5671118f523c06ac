"""`curvature` is what its definitions say, and what curvlinops and BackPACK compute."""

import copy
from itertools import combinations
from math import gcd

import pytest
import torch
from torch import nn

from kfac_scratch import layer_ios
from kfac_scratch.capture.layer_groups import layer_groups, uncovered
from kfac_scratch.curvature import (
    block_index,
    diagonal_blocks,
    empirical_fisher,
    empirical_fisher_product,
    fisher,
    ggn,
    ggn_product,
    hessian,
    hessian_product,
    jacobian,
    parameter_vector,
)
from kfac_scratch.losses import divisor
from tests import reference
from tests.nets import BY_NAME, LOSSES, NETS, REDUCTIONS, C, N, Unused, problem
from tests.reference import distance
from tests.thinned import thinned

TOLERANCE = 1e-10
FIXED = "fixed upstream, remove this exception"


def without(name):
    assert name in BY_NAME
    return [net for net in NETS if str(net) != name]


all_nets = pytest.mark.parametrize("net", thinned(NETS), ids=str)
losses = pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: loss.__name__)
reductions = pytest.mark.parametrize("reduction", REDUCTIONS)


def each_problem(test):
    return all_nets(losses(reductions(test)))


@pytest.mark.long
@each_problem
def test_ggn_is_that_of_curvlinops(net, loss, reduction):
    args = problem(net, loss, reduction)
    assert distance(ggn(*args), reference.ggn(*args)) <= TOLERANCE


@pytest.mark.long
@pytest.mark.parametrize("net", without("layer_norm"), ids=str)  # wrong there, see below
@losses
@reductions
def test_hessian_is_that_of_curvlinops(net, loss, reduction):
    args = problem(net, loss, reduction)
    assert distance(hessian(*args), reference.hessian(*args)) <= TOLERANCE


@all_nets
@losses
def test_hessian_holds_the_gradient_of_every_gradient_entry(net, loss):
    model, loss, X, y = problem(net, loss)
    value = loss(model(X), y)
    gradient = torch.autograd.grad(value, list(model.parameters()), create_graph=True)
    rows = gradients(model, torch.cat([g.flatten() for g in gradient]))
    assert distance(hessian(model, loss, X, y), rows) <= TOLERANCE


@pytest.mark.long
@pytest.mark.filterwarnings("ignore:.*forward AD")
def test_hessian_of_layer_norm_is_wrong_in_curvlinops():
    """PyTorch 2.13's `vmap` over two backward passes of a layer norm: not even symmetric.

    One backward pass is right, so GGN and Fishers are.
    """
    if torch.__version__ >= "2.14" or reference.is_newer_than("3.0.1"):
        pytest.skip("seen with PyTorch 2.13 and curvlinops 3.0.1 only")
    args = problem("layer_norm", nn.CrossEntropyLoss)
    theirs = reference.hessian(*args)
    assert distance(theirs, theirs.T) > 0.01, f"{FIXED}: and compare layer_norm above"
    assert distance(hessian(*args), hessian(*args).T) <= TOLERANCE


@each_problem
def test_fisher_by_its_definition_is_the_ggn(net, loss, reduction):
    args = problem(net, loss, reduction)
    assert distance(fisher(*args), ggn(*args)) <= TOLERANCE


# curvlinops 3.0.1 fails inside PyTorch where a module is called twice
@pytest.mark.long
@pytest.mark.parametrize("net", [n for n in without("tied_calls") if not n.per_token], ids=str)
@losses
@reductions
def test_empirical_fisher_is_that_of_curvlinops(net, loss, reduction):
    args = problem(net, loss, reduction)
    assert distance(empirical_fisher(*args), reference.empirical_fisher(*args)) <= TOLERANCE


@pytest.mark.long
@each_problem
def test_empirical_fisher_sums_over_data_and_curvlinops_over_every_position(net, loss, reduction):
    """The same for outputs [N, C]; with a loss per token ours has one gradient per sequence."""
    args = problem(net, loss, reduction)
    G, D = position_gradients(*args), divisor(args[1], args[0](args[2]), args[3])
    per_datum = G.reshape(N, -1, G.shape[-1]).sum(1)
    assert distance(empirical_fisher(*args), per_datum.T @ per_datum / D) <= TOLERANCE
    if net.per_token:
        theirs = reference.empirical_fisher(*args)
        assert distance(G.T @ G / D, theirs) <= TOLERANCE
        assert distance(empirical_fisher(*args), theirs) > 0.01


@all_nets
def test_empirical_fisher_of_a_sum_of_squares_is_four_times_the_residuals(net):
    model, loss, X, y = problem(net, nn.MSELoss, "sum")
    r = (model(X) - y).detach().reshape(N, -1)
    Jr = torch.einsum("nkd,nk->nd", jacobian(model, X).reshape(*r.shape, -1), r)
    E = empirical_fisher(model, loss, X, y)
    assert distance(E, 4 * Jr.T @ Jr) <= TOLERANCE


@pytest.mark.parametrize("function", [(hessian, hessian_product), (ggn, ggn_product)])
@all_nets
@losses
def test_product_is_the_dense_matrix_times_a_vector(net, loss, function):
    check_product(*function, problem(net, loss))


@all_nets
@losses
def test_empirical_fisher_product_is_the_dense_matrix_times_a_vector(net, loss):
    check_product(empirical_fisher, empirical_fisher_product, problem(net, loss))


def check_product(dense, product, args):
    M = dense(*args)
    v = torch.randn(len(M))
    assert distance(product(*args)(v), M @ v) <= TOLERANCE


@all_nets
def test_jacobian_holds_the_gradient_of_every_output_entry(net):
    model, _, X, _ = problem(net)
    rows = gradients(model, model(X).flatten())
    assert distance(jacobian(model, X), rows) <= TOLERANCE


def test_jacobian_is_the_limit_of_differences():
    model, _, X, _ = problem("mlp")
    theta, eps = parameter_vector(model), 1e-5
    columns = []
    for i in range(len(theta)):
        sides = []
        for sign in (1, -1):
            moved = theta.clone()
            moved[i] += sign * eps
            nn.utils.vector_to_parameters(moved, model.parameters())
            sides.append(model(X).detach().flatten())
        columns.append((sides[0] - sides[1]) / (2 * eps))
    nn.utils.vector_to_parameters(theta, model.parameters())
    assert distance(jacobian(model, X), torch.stack(columns, 1)) <= 1e-8  # eps^2 and eps_64 / eps


CLASS_WEIGHTS = torch.tensor([0.3, 1.1, 2.0], dtype=torch.float64)


@pytest.mark.parametrize("net", ["mlp", "tokens"])
@pytest.mark.parametrize(
    "options",
    [
        {"weight": CLASS_WEIGHTS},
        {"label_smoothing": 0.2},
        {"weight": CLASS_WEIGHTS, "label_smoothing": 0.2},
        {"ignore_index": 1},
    ],
    ids=lambda options: "+".join(options),
)
@reductions
def test_ggn_of_cross_entropy_knows_weights_smoothing_and_ignored_targets(net, options, reduction):
    model, _, X, y = problem(net, nn.CrossEntropyLoss)
    args = model, nn.CrossEntropyLoss(reduction=reduction, **options), X, y
    assert distance(ggn(*args), reference.ggn(*args)) <= TOLERANCE


@pytest.mark.parametrize("net", ["mlp", "tokens"])
@pytest.mark.parametrize("option", ["weight", "pos_weight"])
@reductions
def test_ggn_of_binary_cross_entropy_knows_weights(net, option, reduction):
    model, _, X, y = problem(net, nn.BCEWithLogitsLoss)
    args = model, nn.BCEWithLogitsLoss(reduction=reduction, **{option: CLASS_WEIGHTS}), X, y
    assert distance(ggn(*args), reference.ggn(*args)) <= TOLERANCE


# in-place activations, free functions, shared layers and outputs [N, S, C] are beyond BackPACK
@pytest.mark.parametrize(
    "net",
    [
        "mlp",
        "mlp_without_bias",
        "batch_norm_in_eval_mode",
        "two_convolutions",
        "conv3d",
        "grouped_conv2d",
    ],
)
@pytest.mark.parametrize("loss", [nn.MSELoss, nn.CrossEntropyLoss])
@reductions
def test_diagonal_of_the_ggn_is_that_of_backpack(net, loss, reduction):
    args = problem(net, loss, reduction)
    assert distance(ggn(*args).diagonal(), reference.diag_ggn(*args)) <= TOLERANCE


@pytest.mark.parametrize("net", NETS, ids=str)
def test_block_index_finds_every_covered_parameter_once(net):
    model, _, _, _ = problem(net)
    places = torch.cat([index.flatten() for index in block_index(model).values()])
    missing = sum(
        model.get_parameter(name).numel() for name in uncovered(model, layer_groups(model))
    )
    assert len(places) == len(places.unique())
    assert len(places) + missing == len(parameter_vector(model))


@pytest.mark.parametrize("net", NETS, ids=str)
def test_block_index_is_laid_out_as_the_weight_and_bias_columns(net):
    model, _, _, _ = problem(net)
    theta = parameter_vector(model)
    for name, index in block_index(model).items():
        layer, _, group = name.partition("[")
        block = next(b for b in layer_groups(model) if b.name == layer)
        weight = model.get_submodule(layer).weight.detach()
        weight = weight.T if block.kind is nn.Embedding else weight
        columns = [weight.flatten(1)] + [b.detach().unsqueeze(1) for b in block.biases.values()]
        W = torch.cat(columns, 1).chunk(block.groups)[int(group.rstrip("]") or 0)]
        torch.testing.assert_close(theta[index], W, rtol=0, atol=0)


@pytest.mark.parametrize("net", NETS, ids=str)
@losses
@pytest.mark.filterwarnings("ignore:No block covers")
def test_block_of_the_ggn_is_that_of_layer_io(net, loss):
    args = problem(net, loss)
    exact, ios = diagonal_blocks(args[0], ggn(*args)), layer_ios(*args)
    assert exact.keys() == ios.keys()
    for name, io in ios.items():
        assert distance(io.block(), exact[name]) <= TOLERANCE


@pytest.mark.parametrize("function", [ggn, hessian, empirical_fisher])
@pytest.mark.parametrize("frozen", ["0.weight", "0.bias", "2.weight"])
def test_frozen_parameters_have_no_rows(function, frozen):
    model, *rest = problem("mlp", nn.CrossEntropyLoss)
    full = function(model, *rest)
    keep = torch.cat(
        [torch.full((p.numel(),), name != frozen) for name, p in model.named_parameters()]
    )
    model.get_parameter(frozen).requires_grad_(False)
    assert distance(function(model, *rest), full[keep][:, keep]) <= TOLERANCE
    theirs = getattr(reference, function.__name__)(model, *rest)
    assert distance(function(model, *rest), theirs) <= TOLERANCE


@pytest.mark.parametrize("function", [ggn, hessian, empirical_fisher, fisher])
def test_unused_parameters_have_rows_of_zeros(function):
    model, loss, X, y = problem("mlp", nn.CrossEntropyLoss)
    used = function(model, loss, X, y)
    M = function(Unused(*model), loss, X, y)
    D = len(used)
    assert distance(M[:D, :D], used) <= TOLERANCE
    assert M.shape[0] == D + 9
    assert not M[D:].any()
    assert not M[:, D:].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("function", [ggn, hessian, empirical_fisher, fisher])
@losses
def test_dtype_is_that_of_the_parameters(function, loss, dtype):
    args = problem("mlp", loss, dtype=dtype)
    other = {torch.float32: torch.float64, torch.float64: torch.float32}[dtype]
    torch.set_default_dtype(other)
    M = function(*args)
    assert M.dtype == dtype
    assert diagonal_blocks(args[0], M)["0"].dtype == dtype
    if function in (products := dict(zip(MATRICES, PRODUCTS, strict=True))):
        assert products[function](*args)(torch.ones(len(M), dtype=dtype)).dtype == dtype


MATRICES = (ggn, hessian, empirical_fisher)
PRODUCTS = (ggn_product, hessian_product, empirical_fisher_product)


@pytest.mark.parametrize("function", [*MATRICES, fisher])
@pytest.mark.parametrize("net", ["mlp_in_place", "conv2d", "fused_attention", "embedding"])
@losses
def test_device_is_that_of_the_parameters(function, net, loss, device):
    args = problem(net, loss)
    expected = function(*args)
    there = [copy.deepcopy(arg).to(device) for arg in args]
    M = function(*there)
    assert M.device.type == device.type
    assert distance(M.cpu(), expected) <= TOLERANCE
    if "embedding" not in net:  # a product too, where every operation has a forward-mode rule
        product = dict(zip(MATRICES, PRODUCTS, strict=True)).get(function)
        if product is not None:
            v = torch.randn(len(M), device=device)
            assert distance(product(*there)(v), M @ v) <= TOLERANCE


@pytest.mark.parametrize("function", [ggn, hessian, empirical_fisher, fisher])
def test_nothing_is_left_behind(function):
    model, loss, X, y = problem("mlp_in_place", nn.CrossEntropyLoss)
    before = copy.deepcopy(model.state_dict())
    X_before = X.clone()
    function(model, loss, X, y)
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert torch.equal(X, X_before)


@pytest.mark.filterwarnings("ignore:No block covers")
@pytest.mark.parametrize("net", NETS, ids=str)
def test_sizes_of_the_nets_have_no_common_factor(net):
    """Except where the architecture makes two of them the same."""
    model, loss, X, y = problem(net)
    for name, io in layer_ios(model, loss, X, y).items():
        block = next(b for b in layer_groups(model) if name.startswith(b.name))
        square = str(net).startswith("tied")  # applied to its own output, S is the calls
        for part, biases in zip(io.parts, (len(block.biases), 0), strict=False):
            S = 1 if square else part.a.shape[1]
            sizes = {N, S, C, part.a.shape[2] - biases, part.g.shape[3]}
            assert all(gcd(a, b) == 1 for a, b in combinations(sizes, 2)), (name, sizes)


def test_distance_sees_one_wrong_entry_and_nan():
    M = torch.diag(torch.tensor([4.0, 1.0]))
    assert distance(M, M) == 0
    assert distance(M + torch.tensor([[0.0, 0.0], [0.0, 1.0]]), M) == 0.25
    assert not distance(torch.full_like(M, torch.nan), M) <= TOLERANCE


def test_all_nets_are_compared():
    assert len(NETS) == len(BY_NAME) >= 12


def gradients(model, values):
    """The gradient of every value by all trainable parameters, one by one."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    rows = []
    for value in values:
        parts = torch.autograd.grad(value, parameters, retain_graph=True, allow_unused=True)
        rows.append(
            torch.cat(
                [
                    torch.zeros(p.numel()) if g is None else g.flatten()
                    for p, g in zip(parameters, parts, strict=True)
                ]
            )
        )
    return torch.stack(rows)


def position_gradients(model, loss, X, y):
    """The gradient of every position's own loss term, one by one: rows [N * positions]."""
    terms = type(loss)(reduction="none")(model(X), y)
    if not isinstance(loss, nn.CrossEntropyLoss):
        terms = terms.sum(-1)
    return gradients(model, terms.flatten())
