from unittest.mock import patch

import pytest
import torch
from torch import nn
from torch.nn import BCEWithLogitsLoss, CrossEntropyLoss, L1Loss, MSELoss

from kfac_scratch import losses
from kfac_scratch.curvature import loss_hessian
from kfac_scratch.losses import (
    BLOCK,
    ScaledVectors,
    divisor,
    empirical,
    monte_carlo,
    type2,
    type2_classwise,
)
from tests.laws import check_differs, check_equal

N, C, P1, P2 = 5, 3, 2, 7
WEIGHT = torch.tensor([1.0, 2.0, 5.0])


def labels(*shape, ignored=None):
    y = torch.randint(C, shape)
    if ignored is not None:
        y.view(-1)[::4] = ignored
    return y


def soft(*shape):
    return torch.rand(shape).softmax(1)


LOSSES = {
    "mse": (lambda r: MSELoss(reduction=r), (N, C), lambda: torch.randn(N, C)),
    "mse-vector": (lambda r: MSELoss(reduction=r), (N,), lambda: torch.randn(N)),
    "mse-grid": (lambda r: MSELoss(reduction=r), (N, P1, C), lambda: torch.randn(N, P1, C)),
    "ce": (lambda r: CrossEntropyLoss(reduction=r), (N, C), lambda: labels(N)),
    "ce-grid": (
        lambda r: CrossEntropyLoss(reduction=r),
        (N, C, P1, P2),
        lambda: labels(N, P1, P2),
    ),
    "ce-soft": (lambda r: CrossEntropyLoss(reduction=r), (N, C, P1), lambda: soft(N, C, P1)),
    "ce-weight": (
        lambda r: CrossEntropyLoss(WEIGHT, reduction=r),
        (N, C, P1),
        lambda: labels(N, P1),
    ),
    "ce-ignored": (
        lambda r: CrossEntropyLoss(reduction=r),
        (N, C, P1),
        lambda: labels(N, P1, ignored=-100),
    ),
    "ce-ignored-class": (
        lambda r: CrossEntropyLoss(WEIGHT, ignore_index=1, reduction=r, label_smoothing=0.2),
        (N, C),
        lambda: labels(N),
    ),
    "ce-smoothed": (
        lambda r: CrossEntropyLoss(label_smoothing=0.3, reduction=r),
        (N, C),
        lambda: labels(N),
    ),
    "ce-everything": (
        lambda r: CrossEntropyLoss(WEIGHT, label_smoothing=0.3, reduction=r),
        (N, C, P1),
        lambda: soft(N, C, P1),
    ),
    "ce-sums-not-one": (
        lambda r: CrossEntropyLoss(WEIGHT, reduction=r, label_smoothing=0.2),
        (N, C, P1),
        lambda: 3 * torch.rand(N, C, P1),
    ),
    "ce-negative-entries": (
        lambda r: CrossEntropyLoss(reduction=r),
        (N, C),
        lambda: torch.tensor([[-0.5, 1.0, 0.2]]).repeat(N, 1),
    ),
    "ce-negative-unused": (
        lambda r: CrossEntropyLoss(torch.tensor([1.0, 2.0, -3.0]), reduction=r),
        (N, C),
        lambda: labels(N) % 2,
    ),
    "mse-whole-numbers": (lambda r: MSELoss(reduction=r), (N, C), lambda: labels(N, C)),
    "bce-outside": (
        lambda r: BCEWithLogitsLoss(torch.rand(C), reduction=r),
        (N, C),
        lambda: 3 * torch.randn(N, C),
    ),
    "bce-elementwise": (
        lambda r: BCEWithLogitsLoss(3 * torch.rand(N, C), reduction=r),
        (N, C),
        lambda: torch.rand(N, C),
    ),
    "bce": (lambda r: BCEWithLogitsLoss(reduction=r), (N, C), lambda: torch.rand(N, C)),
    "bce-grid": (
        lambda r: BCEWithLogitsLoss(reduction=r),
        (N, P1, P2),
        lambda: torch.rand(N, P1, P2).round(),
    ),
    "bce-weighted": (
        lambda r: BCEWithLogitsLoss(torch.rand(N, 1), reduction=r, pos_weight=WEIGHT),
        (N, C),
        lambda: torch.rand(N, C),
    ),
}
EVERY = pytest.mark.parametrize("name", LOSSES)
REDUCTIONS = pytest.mark.parametrize("reduction", ["mean", "sum"])


def example(name, reduction, device, dtype=torch.float64):
    make, shape, targets = LOSSES[name]
    loss, f, y = make(reduction), torch.randn(shape), targets()
    y = y.to(device, dtype) if y.is_floating_point() else y.to(device)
    return loss.to(device, dtype), f.to(device, dtype), y


def per_datum(vectors):
    """Sum of outer products for every datum: block diagonal over the whole batch."""
    S = vectors[:].flatten(2) if len(vectors.shape) > 2 else vectors[:].unsqueeze(2)
    return torch.block_diag(*torch.einsum("vni,vnj->nij", S, S))


@EVERY
@REDUCTIONS
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_type2_is_a_root_of_the_loss_hessian(name, reduction, dtype, device):
    loss, f, y = example(name, reduction, device, dtype)
    vectors = type2(loss, f, y)
    assert vectors.shape == vectors[:].shape == (len(vectors), *f.shape)
    check_equal(per_datum(vectors), loss_hessian(loss, f, y))


@pytest.mark.parametrize("name", LOSSES)
def test_slices_of_vectors_are_those_of_all_of_them(name, device):
    loss, f, y = example(name, "mean", device)
    generator = torch.Generator(device).manual_seed(0)
    for fisher in (type2, monte_carlo(7, generator)):
        vectors = fisher(loss, f, y)
        whole = vectors[:]
        for part in (slice(0, 1), slice(1, 3), slice(2, 1000), slice(-1, None)):
            assert torch.equal(vectors[part], whole[part])
        assert torch.equal(ScaledVectors(vectors, 3.0)[1:], 3.0 * whole[1:])
        assert ScaledVectors(vectors, 3.0).shape == whole.shape


@pytest.mark.parametrize("classes", [1, 2, 3, 10])
def test_type2_of_cross_entropy_has_a_vector_less_than_classes(classes, device):
    """The softmax does not see a shift of all logits, so that its Hessian has rank `C - 1`."""
    f, y = torch.randn(N, classes, P1, device=device), torch.zeros(N, P1, device=device).long()
    vectors = type2(CrossEntropyLoss(), f, y)
    assert len(vectors) == P1 * max(classes - 1, 1)
    if classes == 1:
        assert not vectors[:].any()
    else:
        check_equal(per_datum(vectors), loss_hessian(CrossEntropyLoss(), f, y))


@pytest.mark.parametrize("size", [1, 30, 100])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_type2_of_a_saturated_softmax_loses_no_digits(size, dtype, device):
    """`1 - p` in the Hessian's diagonal is the sum of the other probabilities, however small."""
    f = size * torch.randn(20, 10, device=device, dtype=dtype)
    y = torch.zeros(20, dtype=torch.long, device=device)
    p = f.double().softmax(1)
    H = -torch.einsum("ni,nj->nij", p, p)
    H.diagonal(dim1=1, dim2=2).zero_()
    H = H - H.sum(2).diag_embed()
    S = type2(CrossEntropyLoss(reduction="sum"), f, y)[:].double()
    error = (torch.einsum("vni,vnj->nij", S, S) - H).abs().amax((1, 2)) / H.abs().amax((1, 2))
    assert error.max() <= 20 * size * torch.finfo(dtype).eps  # that of the logits' differences


@EVERY
@REDUCTIONS
def test_divisor_is_sum_over_mean(name, reduction, device):
    loss, f, y = example(name, reduction, device)
    total = example(name, "sum", device)[0]
    if hasattr(loss, "weight") and loss.weight is not None:
        total.weight = loss.weight
    expected = total(f, y) / loss(f, y) if reduction == "mean" else torch.ones_like(f.sum())
    check_equal(torch.tensor(divisor(loss, f, y), device=device), expected)


@EVERY
@REDUCTIONS
def test_empirical_are_gradients_over_the_root_of_the_divisor(name, reduction, device):
    loss, f, y = example(name, reduction, device)
    leaf = f.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(leaf, y), leaf)
    (vector,) = empirical(loss, f, y)
    check_equal(vector, gradient * divisor(loss, f, y) ** 0.5)
    assert not f.requires_grad


def test_empirical_of_summed_squared_error_is_four_times_the_residuals(device):
    loss, f, y = example("mse", "sum", device)
    r = f - y
    expected = torch.block_diag(*(4 * torch.einsum("ni,nj->nij", r, r)))
    check_equal(per_datum(empirical(loss, f, y)), expected)


@EVERY
def test_empirical_is_not_type2(name, device):
    loss, f, y = example(name, "mean", device)
    check_differs(per_datum(empirical(loss, f, y)), per_datum(type2(loss, f, y)))


# ---- Monte Carlo: what can be drawn, how often, and with which scale ---------------------------


@pytest.mark.parametrize("name", [n for n in LOSSES if n.startswith(("ce", "bce"))])
@REDUCTIONS
def test_monte_carlo_draws_scores_at_possible_labels(name, reduction, device):
    """Every vector is, per position, one of the finitely many scaled scores."""
    samples = 4
    loss, f, y = example(name, reduction, device)
    drawn = monte_carlo(samples, torch.Generator(device).manual_seed(1))(loss, f, y)[:]
    hessian = loss_hessian(loss, f, y).diagonal().reshape(f.shape)
    if name.startswith("bce"):
        p = f.sigmoid()
        scale = (hessian / (p * (1 - p)) / samples).sqrt()
        possible = torch.stack([scale * (p - 1), scale * p])
        nearest = (drawn.unsqueeze(1) - possible).abs().amin(1)
    else:
        p = f.softmax(1)
        scale = (hessian / (p * (1 - p)) / samples).sqrt()
        onehot = torch.eye(C, device=device).reshape(C, 1, C, *[1] * (f.ndim - 2))
        possible = scale * (p - onehot)  # [C, N, C, ...]
        nearest = (drawn.unsqueeze(1) - possible).abs().amax(3).amin(1)
    assert drawn.shape == (samples, *f.shape)
    assert nearest.max() <= 1e-12 * possible.abs().max()


@pytest.mark.parametrize("name", LOSSES)
def test_monte_carlo_averages_to_type2(name, device):
    """5 standard errors, estimated from 100 batches of samples, under a fixed seed."""
    loss, f, y = example(name, "mean", device)
    generator = torch.Generator(device).manual_seed(0)
    fisher = monte_carlo(50, generator)
    estimates = torch.stack([per_datum(fisher(loss, f, y)) for _ in range(100)])
    standard_error = estimates.std(0) / 10
    exact = per_datum(type2(loss, f, y))
    assert ((estimates.mean(0) - exact).abs() <= 5 * standard_error + 1e-12).all()
    shown = exact.abs() > 0.1 * exact.abs().max()
    assert (standard_error < 0.1 * exact.abs())[shown].all()  # half of it would be noticed


@pytest.mark.everywhere
def test_monte_carlo_is_reproducible_by_its_generator(device):
    loss, f, y = example("ce-grid", "mean", device)

    def draw(seed):
        return monte_carlo(3, torch.Generator(device).manual_seed(seed))(loss, f, y)[:]

    check_equal(draw(0), draw(0))
    check_differs(draw(1), draw(0))


@pytest.mark.everywhere
@pytest.mark.parametrize("name", ["mse", "ce", "bce"])
def test_many_labels_are_drawn_in_blocks_and_are_the_same_at_every_reading(name, device):
    """Memory is bounded in their number: what is held is one block."""
    loss, f, y = example(name, "mean", device)
    samples = 2 * BLOCK + 7
    vectors = monte_carlo(samples, torch.Generator(device).manual_seed(3))(loss, f, y)
    whole = vectors[:]
    assert whole.shape == vectors.shape == (samples, *f.shape)
    for chunk in (1, BLOCK - 1, BLOCK, samples):
        parts = [vectors[i : i + chunk] for i in range(0, samples, chunk)]
        assert torch.equal(torch.cat(parts), whole)
    assert torch.equal(vectors[BLOCK - 1 : BLOCK + 1], whole[BLOCK - 1 : BLOCK + 1])
    assert vectors[5:5].shape == (0, *f.shape)
    assert len({v.cpu().numpy().tobytes() for v in whole.split(BLOCK)}) == 3  # no block twice
    again = monte_carlo(samples, torch.Generator(device).manual_seed(3))(loss, f, y)
    assert torch.equal(again[:], whole)
    generator = torch.Generator(device).manual_seed(3)
    first, second = (monte_carlo(samples, generator)(loss, f, y)[:] for _ in range(2))
    check_differs(second, first)


@pytest.mark.parametrize("name", ["mse", "ce", "bce"])
def test_many_labels_average_to_type2(name, device):
    """5 standard errors over vectors, all of which are draws of the same distribution."""
    loss, f, y = example(name, "mean", device)
    samples = 20 * BLOCK + 1
    drawn = monte_carlo(samples, torch.Generator(device).manual_seed(0))(loss, f, y)
    each = torch.stack([samples * per_datum(v.unsqueeze(0)) for v in drawn[:]])
    error = each.mean(0) - per_datum(type2(loss, f, y))
    assert (error.abs() <= 5 * each.std(0) / samples**0.5 + 1e-12).all()


def test_no_more_than_one_block_of_labels_is_held():
    loss, f, y = example("mse", "mean", "cpu")
    made = []
    original = losses._sampled

    def watched(loss, rows, samples, generator):
        made.append(samples)
        return original(loss, rows, samples, generator)

    with patch.object(losses, "_sampled", watched):
        vectors = monte_carlo(3 * BLOCK)(loss, f, y)
        assert made == []
        for i in range(3 * BLOCK):
            vectors[i : i + 1]
    assert made == [BLOCK] * 3


def test_monte_carlo_needs_a_sample():
    with pytest.raises(ValueError, match="samples must be at least 1"):
        monte_carlo(0)


# ---- one vector per class ---------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mse", "ce", "bce"])
def test_classwise_is_another_root_of_the_same_hessian_for_one_position(name, device):
    loss, f, y = example(name, "mean", device)
    check_equal(per_datum(type2_classwise(loss, f, y)), per_datum(type2(loss, f, y)))


@pytest.mark.parametrize("name", ["mse-grid", "ce-grid", "ce-ignored", "bce-grid"])
def test_classwise_is_type2_at_each_position_with_cross_terms_between_them(name, device):
    loss, f, y = example(name, "mean", device)
    few, all_ = per_datum(type2_classwise(loss, f, y)), per_datum(type2(loss, f, y))
    positions = torch.arange(f[0].numel(), device=device).reshape(f[0].shape)
    positions = positions % f[0, 0].numel() if name.startswith("ce") else positions // f.shape[-1]
    own = positions.flatten() == positions.reshape(-1, 1)
    check_equal(few * own.repeat(N, N), all_)
    check_differs(few, all_)


# ---- what is refused --------------------------------------------------------------------------

FISHERS = pytest.mark.parametrize("fisher", [type2, type2_classwise, empirical, monte_carlo(1)])


@FISHERS
@pytest.mark.parametrize("loss", [L1Loss(), nn.HuberLoss(), nn.NLLLoss()])
def test_other_losses_are_refused_with_a_way_out(fisher, loss):
    with pytest.raises(NotImplementedError, match=r"fisher\(loss, f, y\)"):
        fisher(loss, torch.randn(N, C), torch.randn(N, C))


@FISHERS
def test_a_subclass_of_a_loss_may_be_another_loss(fisher):
    class Half(MSELoss):
        def forward(self, f, y):
            return super().forward(f, y) / 2

    with pytest.raises(NotImplementedError, match="Half"):
        fisher(Half(), torch.randn(N, C), torch.randn(N, C))


@FISHERS
def test_no_reduction_is_refused(fisher):
    with pytest.raises(NotImplementedError, match="'mean' or 'sum'"):
        fisher(MSELoss(reduction="none"), torch.randn(N, C), torch.randn(N, C))


@FISHERS
@pytest.mark.parametrize("loss", [MSELoss(), BCEWithLogitsLoss()])
def test_targets_that_would_be_broadcast_are_refused(fisher, loss):
    with pytest.raises(ValueError, match="broadcast"):
        fisher(loss, torch.randn(N, 1), torch.rand(N))


@FISHERS
@pytest.mark.parametrize("shape", [(N, C), (N + 1,), (N, P1)])
def test_labels_of_another_shape_are_refused(fisher, shape):
    with pytest.raises(ValueError, match="classes on axis 1"):
        fisher(CrossEntropyLoss(), torch.randn(N, C), torch.zeros(shape, dtype=torch.long))


@FISHERS
@pytest.mark.parametrize("ignored", [-100, 1])
def test_labels_as_bytes_are_labels(fisher, ignored, device):
    """PyTorch takes them in some forms of cross-entropy only; an index of bytes is a mask."""
    loss = CrossEntropyLoss(WEIGHT, ignore_index=ignored, label_smoothing=0.2).to(
        device, torch.float64
    )
    f, y = torch.randn(N, C, P1, device=device), labels(N, P1).to(device)
    draw = (
        [fisher, fisher]
        if fisher in (type2, type2_classwise, empirical)
        else [monte_carlo(1, torch.Generator(device).manual_seed(0)) for _ in range(2)]
    )
    check_equal(draw[0](loss, f, y.to(torch.uint8))[:], draw[1](loss, f, y)[:])
    assert divisor(loss, f, y.to(torch.uint8)) == divisor(loss, f, y)


WRONG_TARGETS = {
    "the label -1": (CrossEntropyLoss(), [0, 2, -1, 1, 0]),
    "the label -2": (CrossEntropyLoss(reduction="sum"), [0, 2, -2, 1, 0]),
    "the label 3, but the outputs have 3 classes, 0 to 2": (CrossEntropyLoss(), [0, 3, 1, 1, 0]),
    "the label -100": (CrossEntropyLoss(ignore_index=-1), [0, -100, -1, 1, 0]),
    "labels of torch.int32.*y.long": (CrossEntropyLoss(), torch.tensor([0, 1, 1, 1, 0]).int()),
    "labels of torch.bool.*y.long": (CrossEntropyLoss(), torch.tensor([0, 1, 1, 1, 0]).bool()),
    "Class indices are integers: pass y.long": (CrossEntropyLoss(), torch.zeros(N)),
    "no meaning for class probabilities": (CrossEntropyLoss(ignore_index=1), torch.rand(N, C)),
    r"shape \(2,\).*one weight for each class": (CrossEntropyLoss(torch.ones(2)), [0, 1, 1, 1, 0]),
    "label_smoothing must lie": (CrossEntropyLoss(label_smoothing=1.5), [0, 1, 1, 1, 0]),
    "negative sum of weights": (CrossEntropyLoss(-WEIGHT), [0, 1, 2, 1, 0]),
    "torch.int64, which PyTorch refuses": (BCEWithLogitsLoss(), torch.ones(N, C).long()),
    r"pos_weight of shape \(2,\)": (BCEWithLogitsLoss(pos_weight=torch.ones(2)), torch.ones(N, C)),
    r"weight of shape \(2, 5, 3\)": (BCEWithLogitsLoss(torch.ones(2, N, C)), torch.ones(N, C)),
}


@FISHERS
@pytest.mark.parametrize("message", WRONG_TARGETS)
def test_targets_that_pytorch_refuses_are_refused_in_words(fisher, message):
    loss, y = WRONG_TARGETS[message]
    y = torch.as_tensor(y)
    f = torch.randn(N, C)
    if "negative sum" not in message:
        with pytest.raises((RuntimeError, IndexError)):
            loss(f, y)
    with pytest.raises(ValueError, match=message):
        fisher(loss, f, y)


NEGATIVE = {
    "class": (CrossEntropyLoss(torch.tensor([4.0, 4, -1])), [0, 1, 2, 1, 0]),
    "soft": (CrossEntropyLoss(), [[0.5, -1, 0.2]] * N),
    "undefined": (CrossEntropyLoss(), [[0.5, float("nan"), 0.2]] * N),
    "pos_weight": (BCEWithLogitsLoss(pos_weight=-torch.ones(C)), [[1.0, 0, 1]] * N),
    "weight": (BCEWithLogitsLoss(torch.tensor([1.0, -1, 1])), [[1.0, 0, 1]] * N),
}


@pytest.mark.parametrize("fisher", [type2, type2_classwise, monte_carlo(1)])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("name", NEGATIVE)
def test_a_negative_weight_of_a_target_has_no_root_and_is_refused(fisher, name, reduction):
    """PyTorch computes such a loss; its Hessian is not positive semi-definite."""
    loss, y = NEGATIVE[name]
    loss.reduction = reduction
    with pytest.raises(ValueError, match="no square root"):
        fisher(loss, torch.randn(N, C), torch.as_tensor(y))


@FISHERS
def test_targets_that_are_all_ignored_are_refused(fisher):
    with pytest.raises(ValueError, match="every target is ignored"):
        fisher(CrossEntropyLoss(), torch.randn(N, C), torch.full((N,), -100))
