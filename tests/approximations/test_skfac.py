import pytest
import torch
from torch.nn import AdaptiveAvgPool2d, Conv2d, CrossEntropyLoss, Flatten, Sequential

from kfac_scratch.approximations.estimators import Estimator, MovingAverage, weight_of_newest
from kfac_scratch.approximations.kfac import kfac
from kfac_scratch.approximations.skfac import (
    Window,
    at_positions,
    mean_over_positions,
    push_through,
    reduce_sum,
    skfac,
    spatial_subsampling,
    subsampled,
)
from kfac_scratch.capture.forward_pass import layer_ios
from kfac_scratch.layer_io import LayerIO, concatenate
from kfac_scratch.linalg import eye_like
from kfac_scratch.losses import empirical, type2
from kfac_scratch.matrices.damping import factored_inverse
from kfac_scratch.matrices.dense import Dense
from kfac_scratch.matrices.kronecker import Kronecker
from kfac_scratch.optimizer.checkpoints import restored, tensors
from tests.cases import CONV_PER_LOCATION, NONLINEAR, ONE_DATUM, SEVERAL_DATA
from tests.laws import check_differs, check_equal, check_matrix

D_IN, D_OUT = 7, 5
VIEWS = pytest.mark.parametrize("view", [lambda io: io, reduce_sum, mean_over_positions])


def random_io(device, N=3, S=1, V=1, dtype=torch.float64):
    a = torch.randn(N, S, D_IN, device=device, dtype=dtype)
    return LayerIO(a, torch.randn(V, N, S, D_OUT, device=device, dtype=dtype))


def on_basis(linear_map, device):
    eye = torch.eye(D_OUT * D_IN, device=device)
    return (linear_map @ eye.unflatten(1, (D_OUT, D_IN))).flatten(1)


# ---- the same matrix as KFAC, in fewer numbers --------------------------------------------------


@VIEWS
@pytest.mark.parametrize("case", [NONLINEAR[0], CONV_PER_LOCATION[10]], ids=str)
def test_obeys_the_laws_of_matrices(case, view, device):
    for io in layer_ios(*case.build(device)).values():
        M, shape = skfac(view(io)), (io.g.shape[-1], io.a.shape[-1])
        check_matrix(M, shape)
        check_equal(M.dense(), kfac(view(io)).dense())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("V", [1, 3])
@pytest.mark.parametrize("S", [1, 4])
@pytest.mark.parametrize("N", [1, 3, 20])
def test_skfac_is_kfac_by_columns(N, S, V, dtype, device):
    """With fewer rows than the factors have and with more."""
    io = random_io(device, N, S, V, dtype)
    M, K = skfac(io), kfac(io)
    check_matrix(M, (D_OUT, D_IN), damping=1.0)
    check_equal(M.dense(), K.dense())
    check_equal(M.inverse(1.0).dense(), K.inverse(1.0).dense())
    G = io.gradients()[0, 0]
    check_equal(factored_inverse(M, 0.1) @ G, factored_inverse(K, 0.1) @ G)


def test_keeps_rows_of_all_vectors_and_positions_but_no_more_than_a_factor_has(device):
    M = skfac(random_io(device, N=2, S=1, V=2))
    assert (M.UA.shape, M.UB.shape) == ((D_IN, 2), (D_OUT, 4))
    M = skfac(random_io(device, N=2, S=3, V=2))
    assert (M.UA.shape, M.UB.shape) == ((D_IN, 6), (D_OUT, D_OUT))


@pytest.mark.parametrize("case", ONE_DATUM[:6], ids=str)
def test_skfac_is_exact_for_one_sample(case, device):
    for io in layer_ios(*case.build(device)).values():
        check_equal(skfac(io).dense(), io.block())


def test_exact_over_a_product_measure(device):
    a = torch.randn(5, 1, 4, device=device).repeat_interleave(3, 0)
    io = LayerIO(a, torch.randn(2, 3, 1, 7, device=device).repeat(1, 5, 1, 1))
    check_equal(skfac(io).dense(), io.block())


@pytest.mark.parametrize("case", NONLINEAR, ids=str)
def test_not_exact_on_nonlinear_nets(case, device):
    io = next(iter(layer_ios(*case.build(device)).values()))
    check_differs(skfac(io).dense(), io.block())


def test_skfac_of_a_zero_batch_divides_by_the_damping(device):
    """No curvature at all: both inverses divide by the damping."""
    io = LayerIO(torch.zeros(3, 1, D_IN, device=device), torch.zeros(1, 3, 1, D_OUT, device=device))
    V = torch.randn(D_OUT, D_IN, device=device)
    check_equal(skfac(io).inverse(0.1) @ V, 10 * V)
    check_equal(factored_inverse(skfac(io), 0.1) @ V, 10 * V)


def test_duplicated_data_change_nothing(device):
    io = random_io(device)
    twice = concatenate([io, io], [1.0, 1.0])
    twice = LayerIO(twice.a, twice.g / 2**0.5)
    V = torch.randn(D_OUT, D_IN, device=device)
    for damping in (1e-6, 0.1):
        check_equal(skfac(twice).inverse(damping) @ V, skfac(io).inverse(damping) @ V)
    check_equal(
        factored_inverse(skfac(twice), 0.1) @ V,
        factored_inverse(skfac(io), 0.1) @ V,
    )


def test_the_bias_is_a_column_like_any_other(device):
    """Public code leaves it out: then the bias is not preconditioned, and the weights otherwise."""
    io = next(iter(layer_ios(*NONLINEAR[0].build(device)).values()))
    without = LayerIO(io.a[..., :-1], io.g)
    G = io.gradients().sum((0, 1))
    whole, part = (factored_inverse(skfac(i), 0.1) for i in (io, without))
    check_differs((whole @ G)[:, :-1], part @ G[:, :-1])


# ---- positions ----------------------------------------------------------------------------------


def test_the_papers_mean_of_vectors_divides_reduce_by_the_square_of_positions(device):
    io = random_io(device, S=4, V=2)
    check_equal(16 * skfac(mean_over_positions(io)).dense(), kfac(io.reduced()).dense())


def test_one_position_leaves_nothing_to_choose(device):
    io = random_io(device, V=2)
    views = (io.reduced(), mean_over_positions(io), subsampled(io, 1), subsampled(io, 3))
    for other in (*views, reduce_sum(io), spatial_subsampling(io, 2)):
        check_equal(skfac(other).dense(), skfac(io).dense())


def test_a_stride_of_one_keeps_all_positions(device):
    io = random_io(device, S=4, V=2)
    check_equal(skfac(subsampled(io, 1)).dense(), kfac(io).dense())


@pytest.mark.parametrize(("S", "stride", "start"), [(6, 2, 0), (6, 2, 1), (7, 3, 2), (5, 9, 4)])
def test_subsampling_keeps_every_stride_th_position(S, stride, start, device):
    io = random_io(device, S=S, V=2)
    kept = [s for s in range(S) if s >= start and (s - start) % stride == 0]
    A = sum(io.a[:, s].T @ io.a[:, s] for s in kept) / (3 * len(kept))
    B = sum(io.g[v, :, s].T @ io.g[v, :, s] for s in kept for v in range(2)) * S / len(kept)
    check_equal(skfac(subsampled(io, stride, start)).dense(), Kronecker(A, B).dense())


@pytest.mark.parametrize("stride", [2, 3, 6])
def test_subsampled_factors_average_to_those_of_all_positions(stride, device):
    io = random_io(device, S=6, V=2)
    parts = [kfac(subsampled(io, stride, start)) for start in range(stride)]
    check_equal(sum(p.A for p in parts) / stride, kfac(io).A)
    check_equal(sum(p.B for p in parts) / stride, kfac(io).B)
    check_differs(parts[0].dense(), kfac(io).dense())


@pytest.mark.parametrize(
    ("rows", "columns", "stride", "start"),
    [(4, 4, 2, (0, 0)), (3, 5, 2, (1, 0)), (2, 6, 3, (0, 2)), (5, 5, 9, (3, 4))],
)
def test_spatial_subsampling_keeps_every_stride_th_row_and_column(
    rows, columns, stride, start, device
):
    io = random_io(device, S=rows * columns, V=2)
    kept = [
        r * columns + c
        for r in range(rows)
        for c in range(columns)
        if r in range(start[0], rows, stride) and c in range(start[1], columns, stride)
    ]
    A = sum(io.a[:, s].T @ io.a[:, s] for s in kept) / (3 * len(kept))
    B = sum(io.g[v, :, s].T @ io.g[v, :, s] for s in kept for v in range(2))
    expected = Kronecker(A, B * rows * columns / len(kept)).dense()
    height = None if rows == columns else rows
    check_equal(skfac(spatial_subsampling(io, stride, start, height)).dense(), expected)


def test_the_parts_of_a_grid_average_to_all_positions(device):
    io = random_io(device, S=24, V=2)
    parts = [kfac(spatial_subsampling(io, 2, (r, c), height=4)) for r in range(2) for c in range(2)]
    check_equal(sum(p.A for p in parts) / 4, kfac(io).A)
    check_equal(sum(p.B for p in parts) / 4, kfac(io).B)
    check_differs(parts[0].dense(), kfac(io).dense())


@pytest.mark.parametrize(
    ("stride", "fits"), [(1, (6, 6)), (2, (3, 3)), (3, (2, 2)), (4, (2, 2)), (6, (1, 1))]
)
def test_a_grid_of_a_convolution_is_the_output_of_one_with_a_larger_stride(stride, fits, device):
    """The rows that are kept are those of the same layer moved `stride` pixels at a time."""
    torch.manual_seed(0)
    X = torch.randn(3, 2, 8, 8, device=device)
    y = torch.randint(4, (3,), device=device)
    slow = Sequential(Conv2d(2, 4, 3), AdaptiveAvgPool2d(1), Flatten()).to(device)
    fast = Sequential(Conv2d(2, 4, 3, stride=stride), AdaptiveAvgPool2d(1), Flatten()).to(device)
    fast.load_state_dict(slow.state_dict())
    all_rows, rows = (layer_ios(m, CrossEntropyLoss(), X, y)["0"] for m in (slow, fast))
    kept = spatial_subsampling(all_rows, stride)
    assert kept.a.shape[1] == fits[0] * fits[1] == rows.a.shape[1]
    check_equal(kept.a, rows.a)
    if stride in (2, 3):  # as many positions of the flat axis are others
        check_differs(subsampled(all_rows, stride**2).a, rows.a)


def test_reduce_sum_is_kfac_reduce(device):
    io = random_io(device, S=4, V=2)
    M = skfac(reduce_sum(io))
    check_equal(M.dense(), kfac(io.reduced()).dense())
    assert M.UA.shape[1] == 3  # one column for each sample
    summed = LayerIO(io.a.sum(1, keepdim=True), io.g.sum(2, keepdim=True))
    check_equal(kfac(summed).dense(), 16 * M.dense())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stride": 2}, "6 positions are no grid of 2 rows.*height="),
        ({"stride": 2, "height": 4}, "no grid of 4 rows"),
        ({"stride": 2, "height": 0}, "no grid of 0 rows"),
        ({"stride": 0, "height": 2}, "keeps none of 2 × 3"),
        ({"stride": 2, "height": 2, "start": (2, 0)}, "keeps none"),
        ({"stride": 2, "height": 2, "start": (0, -1)}, "keeps none"),
    ],
)
def test_what_is_no_grid_and_what_keeps_nothing_is_refused(options, message, device):
    with pytest.raises(ValueError, match=message):
        spatial_subsampling(random_io(device, S=6), **options)


def test_constant_positions_need_only_one(device):
    io = random_io(device, V=2)
    io = LayerIO(io.a.expand(3, 4, D_IN), io.g.expand(2, 3, 4, D_OUT))
    check_equal(skfac(subsampled(io, 4)).dense(), kfac(io).dense())


def test_reduce_is_exact_for_one_datum_with_constant_patches(device):
    io = random_io(device, N=1, S=4)
    io = LayerIO(io.a[:, :1].expand(1, 4, D_IN), io.g)
    check_equal(skfac(io.reduced()).dense(), io.block())
    check_differs(skfac(io).dense(), io.block())


def test_positions_may_be_any_pattern(device):
    io = random_io(device, S=6, V=2)
    grid = at_positions(io, torch.tensor([0, 2], device=device))  # of 2 rows and 3 columns
    check_equal(grid.a, io.a[:, [0, 2]])
    check_equal(grid.g, 3**0.5 * io.g[:, :, [0, 2]])


@pytest.mark.parametrize(("stride", "start"), [(0, 0), (-1, 0), (2, 4), (2, -1)])
def test_a_stride_that_keeps_nothing_is_refused(stride, start, device):
    with pytest.raises(ValueError, match="keeps none"):
        subsampled(random_io(device, S=4), stride, start)


# ---- three ways to one step ---------------------------------------------------------------------


@pytest.mark.parametrize("V", [1, 2])
@pytest.mark.parametrize("S", [1, 3])
@pytest.mark.parametrize("N", [1, 4, 20])
def test_explicit_applied_and_pushed_through_agree(N, S, V, device):
    io, c = random_io(device, N, S, V), torch.randn(V, N, device=device)
    G = torch.einsum("vn,vnoi->oi", c, io.gradients())
    inverse = skfac(io).inverse_of_damped_factors(0.2, 0.3)
    explicit = (on_basis(inverse, device) @ G.flatten()).unflatten(0, (D_OUT, D_IN))
    A, B = kfac(io).A, kfac(io).B
    dense = Kronecker(Dense(A).inverse(0.2).M, Dense(B).inverse(0.3).M)
    check_equal(explicit, dense @ G)
    check_equal(inverse @ G, dense @ G)
    check_equal(push_through(io, c, 0.2, 0.3), dense @ G)


@pytest.mark.parametrize("case", [c for c in SEVERAL_DATA if c.name == "tanh"][::2], ids=str)
@pytest.mark.parametrize("fisher", [type2, empirical])
def test_the_gradient_of_the_batch_is_a_sum_of_its_vectors(fisher, case, device):
    """With the data's labels or with type-2 vectors: every step of the batch can be pushed."""
    model, loss, X, y = case.build(device)
    f = model(X)
    (head,) = torch.autograd.grad(loss(f, y), f)
    vectors = fisher(loss, f.detach(), y)[:]  # [V, N, C]
    c = torch.linalg.lstsq(vectors.permute(1, 2, 0), head.unsqueeze(2)).solution.squeeze(2).T
    check_equal(torch.einsum("vn,vnc->nc", c, vectors), head)
    for layer, io in layer_ios(model, loss, X, y, fisher).items():
        gradient = torch.autograd.grad(loss(model(X), y), list(model[int(layer)].parameters()))
        G = torch.cat([gradient[0].flatten(1), gradient[1].unsqueeze(1)], 1)
        step = skfac(io).inverse_of_damped_factors(0.2, 0.3) @ G
        check_equal(push_through(io, c, 0.2, 0.3), step)


def test_pushing_through_divides_by_no_damping(device):
    """In single precision, a small damping leaves the other form without a digit."""
    io = random_io(device)
    c, single = torch.ones(1, 3, device=device), LayerIO(io.a.float(), io.g.float())
    G = io.gradients().sum((0, 1))
    right = skfac(io).inverse_of_damped_factors(1e-4, 1e-4) @ G
    pushed = push_through(single, c.float(), 1e-4, 1e-4).double()
    divided = (skfac(single).inverse_of_damped_factors(1e-4, 1e-4) @ G.float()).double()
    assert (pushed - right).abs().max() < 1e-4 * right.abs().max()
    assert (divided - right).abs().max() > 1e-2 * right.abs().max()


def test_what_another_batch_adds_is_divided_by_the_dampings(device):
    io = random_io(device)
    inverse = skfac(io).inverse_of_damped_factors(0.01, 0.02)
    M = skfac(io)
    x = torch.linalg.svd(M.UA.T).Vh[-1]  # orthogonal to all inputs, y to all vectors
    y = torch.linalg.svd(M.UB.T).Vh[-1]
    check_equal(inverse @ torch.outer(y, x), torch.outer(y, x) / (0.01 * 0.02))


@pytest.mark.parametrize("damping", [0.0, -1.0, float("nan")])
def test_pushing_through_needs_positive_dampings(damping, device):
    io, c = random_io(device), torch.ones(1, 3, device=device)
    with pytest.raises(ValueError, match="positive damping"):
        push_through(io, c, damping, 1.0)
    with pytest.raises(ValueError, match="positive damping"):
        push_through(io, c, 1.0, damping)


# ---- several batches ----------------------------------------------------------------------------


def follow(estimator, ios, decay):
    state = None
    for t, io in enumerate(ios, start=1):
        state = estimator.update(state, io, weight_of_newest(decay, t))
    return state


@pytest.mark.parametrize("decay", [0.0, 0.8, 1.0])
@pytest.mark.parametrize("sizes", [(3, 3, 3, 3), (3, 5, 2, 9), (1,)])
def test_a_long_window_is_the_moving_average(sizes, decay, device):
    ios = [random_io(device, N, S=2, V=2) for N in sizes]
    M, K = follow(Window(4), ios, decay), follow(MovingAverage(kfac), ios, decay)
    check_matrix(M, (D_OUT, D_IN))
    check_equal(M.dense(), K.dense())
    check_equal(M.inverse(0.1).dense(), K.inverse(0.1).dense())
    V = torch.randn(D_OUT, D_IN, device=device)
    check_equal(factored_inverse(M.columns(), 0.1) @ V, factored_inverse(K, 0.1) @ V)


@pytest.mark.parametrize("window", [1, 2, 3])
def test_a_short_window_is_the_average_of_what_is_left(window, device):
    ios = [random_io(device, N) for N in (3, 5, 2, 4, 4)]
    M = follow(Window(window), ios, decay=0.8)
    assert len(M.shares) == window
    assert all(U.shape[1] <= len(U) for U in vars(M.columns()).values())
    weights = [0.8**age for age in range(window)]
    kept = [kfac(io) for io in reversed(ios[-window:])]
    A = sum(w * K.A for w, K in zip(weights, kept, strict=True)) / sum(weights)
    B = sum(w * K.B for w, K in zip(weights, kept, strict=True)) / sum(weights)
    check_equal(M.dense(), Kronecker(A, B).dense())


def test_a_window_takes_any_view_of_a_layer(device):
    ios = [random_io(device, S=4) for _ in range(3)]
    M = follow(Window(3, lambda io: skfac(io.reduced())), ios, 0.9)
    K = follow(MovingAverage(lambda io: kfac(io.reduced())), ios, 0.9)
    check_equal(M.dense(), K.dense())


def test_averages_of_inverses_are_something_else(device):
    ios = [random_io(device) for _ in range(3)]
    inverses = [kfac(io).inverse(0.1).dense() for io in ios]
    M = follow(Window(3), ios, decay=1.0)
    check_differs(sum(inverses) / 3, M.inverse(0.1).dense(), by=0.1)


def test_a_window_is_an_estimator_and_columns_are_never_averaged(device):
    io = random_io(device)
    assert isinstance(Window(3), Estimator)
    average = MovingAverage(skfac)
    with pytest.raises(TypeError, match="no method mixed"):
        average.update(skfac(io), io, 0.5)


def test_a_window_survives_a_checkpoint(device):
    ios = [random_io(device, N) for N in (3, 5, 2)]
    M = follow(Window(2), ios, 0.9)
    check_equal(restored(M, tensors(M)).dense(), M.dense())
    short = follow(Window(2), ios[:1], 0.9)
    check_equal(restored(short, tensors(M)).dense(), M.dense())


def test_updating_leaves_the_state_as_it_is(device):
    first, second = random_io(device), random_io(device)
    state = follow(Window(2), [first], 0.9)
    before = state.dense()
    Window(2).update(state, second, 0.5)
    check_equal(state.dense(), before)


def test_an_empty_window_is_refused(device):
    with pytest.raises(ValueError, match="batches must be at least 1"):
        Window(0).update(None, random_io(device), 1.0)


def test_pi_is_that_of_the_factors(device):
    """The paper's code damps both factors by the same root, which depends on how they are split."""
    io = random_io(device)
    V, M, root = torch.randn(D_OUT, D_IN, device=device), skfac(io), 0.1**0.5
    unbalanced = M.inverse_of_damped_factors(root, root)
    check_differs(unbalanced @ V, factored_inverse(M, 0.1) @ V)
    A, B = kfac(io).A, kfac(io).B
    expected = (
        torch.linalg.inv(B + root * eye_like(B)) @ V @ torch.linalg.inv(A + root * eye_like(A))
    )
    check_equal(unbalanced @ V, expected)
