"""`kfac` against curvlinops and BackPACK, and where those differ and why.

Kronecker products are compared, never single factors: every library splits the scale of a block
between its factors in its own way.
"""

import pytest
import torch
from torch import nn

from kfac_scratch import (
    EXPAND,
    REDUCE,
    Kronecker,
    ekfac,
    ekfac_reduce,
    empirical,
    foof,
    kfac,
    layer_ios,
    type2,
    type2_classwise,
)
from kfac_scratch.curvature import block_index, diagonal_blocks
from tests import reference
from tests.nets import BY_NAME, LOSSES, REDUCTIONS, N, problem, targets
from tests.reference import distance
from tests.thinned import thinned

TOLERANCE = 1e-10
FIXED = "fixed upstream, remove this exception"
FLAVOURS = {"expand": EXPAND, "reduce": REDUCE}
CLASS_WEIGHTS = torch.tensor([0.3, 1.1, 2.0], dtype=torch.float64)

# what curvlinops covers by definition; the exceptions are below
NETS = [
    net
    for name, net in BY_NAME.items()
    if name not in ("tied_calls", "tied_weights", "tied_to_embedding", "circular_conv2d")
]
nets = pytest.mark.parametrize("net", thinned(NETS), ids=str)
losses = pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: loss.__name__)
reductions = pytest.mark.parametrize("reduction", REDUCTIONS)
flavours = pytest.mark.parametrize("flavour", FLAVOURS)
ignore_uncovered = pytest.mark.filterwarnings("ignore:No block covers")
pytestmark = [ignore_uncovered, pytest.mark.long]


@pytest.fixture
def of_curvlinops_3_0_1():
    if reference.is_newer_than("3.0.1"):
        pytest.skip("about curvlinops 3.0.1; a newer one is installed")


def ours(args, fisher=type2, flavour="expand"):
    """The blocks of KFAC that curvlinops has too: linear layers and ungrouped 2d convolutions."""
    ios = layer_ios(*args, fisher, flavour=FLAVOURS[flavour])
    layers = dict(args[0].named_modules())
    return {
        name: kfac(io).dense()
        for name, io in ios.items()
        if isinstance(layers.get(name), nn.Linear | nn.Conv2d)
    }


def check_equal(mine, theirs):
    """Every block, relative to the largest entry of all: some blocks are zero by theory."""
    assert mine.keys() == {name for name in theirs if name in mine} != set()
    scale = max(block.abs().max() for block in theirs.values())
    for name, block in mine.items():
        assert float((block - theirs[name]).abs().max() / scale) <= TOLERANCE, name


@nets
@losses
@reductions
@flavours
def test_type2_is_that_of_curvlinops(net, loss, reduction, flavour):
    """For one loss term per datum; per token, curvlinops has the cheaper vectors per class."""
    args = problem(net, loss, reduction)
    fisher = type2_classwise if net.per_token else type2
    check_equal(ours(args, fisher, flavour), reference.kfac(*args, "type-2", flavour))


@nets
@losses
@reductions
@flavours
def test_empirical_is_that_of_curvlinops(net, loss, reduction, flavour):
    args = problem(net, loss, reduction)
    check_equal(ours(args, empirical, flavour), reference.kfac(*args, "empirical", flavour))


@nets
@flavours
def test_foof_is_that_of_curvlinops(net, flavour):
    args = problem(net, nn.CrossEntropyLoss)
    ios = layer_ios(*args, flavour=FLAVOURS[flavour])
    theirs = reference.kfac(*args, "forward-only", flavour)
    names = [name for name in theirs if name in ios]
    check_equal({name: foof(ios[name]).dense() for name in names}, theirs)


@pytest.mark.parametrize("net", ["mlp", "mlp_without_bias", "two_convolutions"])
@pytest.mark.parametrize("loss", [nn.MSELoss, nn.CrossEntropyLoss])
@reductions
def test_kflr_of_backpack_takes_one_factor_from_each_setting(net, loss, reduction):
    """KFLR is KFAC with type-2 vectors; of a convolution, BackPACK sums patches, not only vectors.

    Its A is the sum over positions (S times that of expand), its B is that of reduce. For linear
    layers on [N, d] both flavours are the same, and so is BackPACK.
    """
    args = problem(net, loss, reduction)
    expand, reduced = layer_ios(*args), layer_ios(*args, flavour=REDUCE)
    theirs = reference.kflr(*args)
    checked = 0
    for name, io in expand.items():
        S, d_in = io.a.shape[1], args[0].get_submodule(name).weight[0].numel()
        A, B = S * kfac(io).A[:d_in, :d_in], kfac(reduced[name]).B
        assert distance(torch.kron(B, A), torch.kron(*theirs.pop(f"{name}.weight"))) <= TOLERANCE
        if (bias := theirs.pop(f"{name}.bias", None)) is not None:
            assert distance(B, bias[0]) <= TOLERANCE
        if S > 1:
            assert distance(kfac(io).dense(), kfac(reduced[name]).dense()) > 0.01
        checked += 1
    assert checked >= 2
    assert not theirs


@flavours
def test_tokens_that_do_not_mix_need_no_vector_of_their_own(flavour):
    """In the expand flavour `type2_classwise` is `type2`; with reduce it adds cross terms."""
    args = problem("tokens", nn.CrossEntropyLoss)
    exact, classwise = ours(args, type2, flavour), ours(args, type2_classwise, flavour)
    for name in exact:
        if flavour == "expand":
            assert distance(classwise[name], exact[name]) <= TOLERANCE
        else:
            assert distance(classwise[name], exact[name]) > 0.01


@pytest.mark.parametrize("net", ["fused_attention", "attention"])
@losses
def test_kfac_reduce_of_a_key_projection_is_zero(net, loss):
    """Softmax attention ignores a shift of all keys, so their vectors sum to zero over positions.

    Left is round-off, which no comparison relative to the block itself survives.
    """
    args = problem(net, loss)
    name = next(n for n, _ in args[0].named_modules() if n.endswith(".k"))
    others = [B.abs().max() for n, B in ours(args, flavour="reduce").items() if n != name]
    assert ours(args, flavour="reduce")[name].abs().max() <= 1e-20 * max(others)
    assert ours(args, flavour="expand")[name].abs().max() >= 1e-6 * max(others)


# ---------------------------------------------------------------- exceptions, one by one


@pytest.mark.usefixtures("of_curvlinops_3_0_1")
@losses
def test_vectors_per_class_in_curvlinops_differ_where_tokens_mix(loss):
    """curvlinops sends each class's vector to all positions at once: cross terms in B.

    The loss Hessian has none between positions. The last layer mixes nothing and agrees.
    """
    args = problem("attention", loss)
    exact, theirs = ours(args), reference.kfac(*args)
    for name in ("0.k", "0.v"):
        assert distance(exact[name], theirs[name]) > 0.01, FIXED
    assert distance(exact["1"], theirs["1"]) <= TOLERANCE


@pytest.mark.usefixtures("of_curvlinops_3_0_1")
@reductions
def test_type2_with_reduce_and_a_loss_per_token_is_s_times_too_large_in_curvlinops(reduction):
    """Against its own Monte Carlo limit, whose labels are independent between positions.

    `type2` has the Hessian of such labels. With squared errors the factor is S exactly: the same
    vector at S positions sums to S times itself, S independent ones to sqrt(S) times.
    """
    args = problem("tokens", nn.MSELoss, reduction)
    S = args[2].shape[1]
    limit, theirs = (
        ours(args, flavour="reduce")["2"],
        reference.kfac(*args, "type-2", "reduce")["2"],
    )
    assert distance(S * limit, theirs) <= TOLERANCE, FIXED


@pytest.mark.usefixtures("of_curvlinops_3_0_1")
@pytest.mark.parametrize(
    "loss",
    [
        nn.CrossEntropyLoss(weight=CLASS_WEIGHTS),
        nn.CrossEntropyLoss(weight=CLASS_WEIGHTS, reduction="sum"),
        nn.CrossEntropyLoss(ignore_index=1, reduction="sum"),
        nn.BCEWithLogitsLoss(pos_weight=CLASS_WEIGHTS),
        nn.BCEWithLogitsLoss(weight=CLASS_WEIGHTS),
    ],
    ids=str,
)
def test_curvlinops_ignores_weights_in_kfac_but_not_in_its_ggn(loss):
    """The GGN block of a bias is the corner of KFAC's block: exactly, on any net of this kind."""
    model, _, X, y = problem("mlp", type(loss))
    bias = block_index(model)["0"][:, -1]
    exact = reference.ggn(model, loss, X, y)[bias][:, bias]

    def corner(block):
        d = block.shape[0] // len(bias)
        return block[d - 1 :: d, d - 1 :: d]

    theirs = reference.kfac(model, loss, X, y)["0"]
    assert distance(corner(ours((model, loss, X, y))["0"]), exact) <= TOLERANCE
    assert distance(corner(theirs), exact) > 0.01, FIXED
    unweighted = type(loss)(reduction=loss.reduction)
    assert distance(theirs, reference.kfac(model, unweighted, X, y)["0"]) <= TOLERANCE, FIXED


@pytest.mark.usefixtures("of_curvlinops_3_0_1")
@losses
@reductions
def test_curvlinops_counts_the_calls_of_a_layer_in_both_factors(loss, reduction):
    """A layer called twice is a layer with twice the positions: A is a mean over both calls.

    curvlinops adds up A as well as B, so its block is twice as large.
    """
    args = problem("tied_calls", loss, reduction)
    theirs = reference.kfac(*args)
    assert distance(2 * ours(args)["0"], theirs["0"]) <= TOLERANCE, FIXED
    assert distance(ours(args)["4"], theirs["4"]) <= TOLERANCE


@pytest.mark.usefixtures("of_curvlinops_3_0_1")
@flavours
def test_curvlinops_takes_every_padding_for_zeros(flavour):
    """With circular padding its patches are not those that the convolution saw."""
    args = problem("circular_conv2d", nn.CrossEntropyLoss)
    theirs = reference.kfac(*args, kfac_approx=flavour)["0"]
    assert distance(ours(args, flavour=flavour)["0"], theirs) > 0.01, FIXED
    B = kfac(layer_ios(*args, flavour=FLAVOURS[flavour])["0"]).B
    args[0][0].padding_mode = "zeros"
    A = kfac(layer_ios(*args, flavour=FLAVOURS[flavour])["0"]).A
    assert distance(Kronecker(A, B).dense(), theirs) <= TOLERANCE


@pytest.mark.usefixtures("of_curvlinops_3_0_1")
def test_curvlinops_averages_the_groups_of_a_convolution():
    """Its block has one A for all groups, from the mean of their inputs; ours has one for each."""
    args = problem("grouped_conv2d", nn.CrossEntropyLoss)
    ios, theirs = layer_ios(*args), reference.kfac(*args)["0"]
    mean = torch.stack([ios["0[0]"].a, ios["0[1]"].a]).mean(0)
    half = theirs[: len(theirs) // 2, : len(theirs) // 2]  # rows of the first group
    of_mean = kfac(type(ios["0[0]"])(mean, ios["0[0]"].g)).dense()
    assert distance(of_mean, half) <= TOLERANCE, FIXED
    assert distance(kfac(ios["0[0]"]).dense(), half) > 0.01, FIXED


def test_references_use_the_layout_of_block_index():
    """One datum: KFAC is the exact block, so that the two references check each other's layout."""
    model, loss, X, y = problem("mlp", nn.CrossEntropyLoss)
    args = model, loss, X[:1], y[:1]
    exact = diagonal_blocks(model, reference.ggn(*args))
    for name, block in reference.kfac(*args).items():
        assert distance(block, exact[name]) <= TOLERANCE
    args = model, loss, X, y
    exact = diagonal_blocks(model, reference.ggn(*args))
    assert N > 1
    assert distance(reference.kfac(*args)["0"], exact["0"]) > 0.01


@pytest.mark.parametrize("net", [net for net in NETS if not net.per_token], ids=str)
@losses
@reductions
@pytest.mark.parametrize("fisher", [type2, empirical])
def test_ekfac_is_that_of_curvlinops(net, loss, reduction, fisher):
    """For one loss term per datum: with more, curvlinops squares the gradient of every term."""
    args = problem(net, loss, reduction)
    ios = layer_ios(*args, fisher)
    theirs = reference.ekfac(*args, "type-2" if fisher is type2 else "empirical")
    check_equal({n: ekfac(io).dense() for n, io in ios.items() if n in theirs}, theirs)


@pytest.mark.parametrize("net", ["mlp", "conv2d", "two_convolutions"])
@losses
@pytest.mark.parametrize("fisher", [type2, empirical])
def test_ekfac_reduce_is_that_of_curvlinops(net, loss, fisher):
    """With samples enough for factors of full rank: a null space has no one basis."""
    model, loss, X, _ = problem(net, loss, "mean")
    X = torch.randn(40, *X.shape[1:])
    args = model, loss, X, targets(loss, model(X).detach())
    name = "type-2" if fisher is type2 else "empirical"
    ios, theirs = layer_ios(*args, fisher), reference.ekfac(*args, name, kfac_approx="reduce")
    check_equal({n: ekfac_reduce(io).dense() for n, io in ios.items() if n in theirs}, theirs)
