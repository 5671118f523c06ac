"""Over a data loader: any approximation, as if all batches were one."""

from functools import partial

import pytest
import torch
from torch.nn import (
    BCEWithLogitsLoss,
    Conv1d,
    CrossEntropyLoss,
    HuberLoss,
    L1Loss,
    Linear,
    MSELoss,
    Sequential,
    Tanh,
)

from kfac_scratch import (
    EXPAND,
    REDUCE,
    FactorSums,
    cg_fac,
    ekfac,
    empirical,
    foof,
    kfac,
    kfac_over,
    kl_factors,
    kpsvd,
    layer_ios,
    mini_block,
    monte_carlo,
    one_sided,
    over_loader,
    pooled,
    tkfac,
    type2,
)
from tests.laws import check_differs, check_equal
from tests.thinned import thinned


def problem_for(loss, device):
    torch.manual_seed(0)
    model = Sequential(Linear(5, 4), Tanh(), Linear(4, 3)).to(device)
    X = torch.randn(11, 5, device=device)
    y = torch.randn(11, 3, device=device)
    if isinstance(loss, CrossEntropyLoss):
        y = torch.randint(3, (11,), device=device)
        y[4] = loss.ignore_index
    if isinstance(loss, BCEWithLogitsLoss):
        y = y.sigmoid()
    return model, X, y


LOADER_LOSSES = [
    lambda r, device: MSELoss(reduction=r),
    lambda r, device: BCEWithLogitsLoss(reduction=r),
    lambda r, device: CrossEntropyLoss(reduction=r),
    lambda r, device: CrossEntropyLoss(
        torch.tensor([1.0, 2.0, 5.0], device=device), reduction=r, label_smoothing=0.1
    ),
]


@pytest.mark.parametrize("flavour", [EXPAND, REDUCE], ids=["expand", "reduce"])
@pytest.mark.parametrize("fisher", [type2, empirical], ids=["type2", "empirical"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("make", thinned(LOADER_LOSSES, 2), ids=["mse", "bce", "ce", "ce-weighted"])
def test_unequal_batches_are_one_batch(make, reduction, fisher, flavour, device):
    loss = make(reduction, device)
    model, X, y = problem_for(loss, device)
    batches = [(X[:2], y[:2]), (X[2:3], y[2:3]), (X[3:], y[3:])]
    for chunk in (1, 2, 32):
        whole = kfac_over(model, loss, batches, fisher, flavour=flavour, chunk=chunk)
        for name, io in layer_ios(model, loss, X, y, fisher, flavour=flavour).items():
            check_equal(whole[name].A, kfac(io).A)
            check_equal(whole[name].B, kfac(io).B)


def test_equal_weights_for_unequal_batches_would_be_wrong(device):
    loss = MSELoss()
    model, X, y = problem_for(loss, device)
    parts = [kfac(layer_ios(model, loss, X[s], y[s])["0"]) for s in (slice(2), slice(2, 11))]
    average = (parts[0].B + parts[1].B) / 2
    check_differs(average, kfac(layer_ios(model, loss, X, y)["0"]).B)


def test_monte_carlo_over_a_loader_draws_anew_in_every_batch(device):
    loss = CrossEntropyLoss(reduction="sum")
    model, X, y = problem_for(loss, device)
    fisher = monte_carlo(3, torch.Generator(device).manual_seed(0))
    twice = kfac_over(model, loss, [(X, y), (X, y)], fisher)
    again = monte_carlo(3, torch.Generator(device).manual_seed(0))
    parts = [kfac(layer_ios(model, loss, X, y, again)["2"]).B for _ in range(2)]
    check_equal(twice["2"].B, parts[0] + parts[1])
    check_differs(parts[0], parts[1])


def gradients_of_terms(loss, f, y):
    """An own Fisher: the gradient of every sample, with the scale of its batch's loss."""
    terms = f.numel() if loss.reduction == "mean" else 1
    with torch.enable_grad():
        f = f.detach().requires_grad_()
        total = type(loss)(reduction="sum")(f, y)
    return (torch.autograd.grad(total, f)[0] / terms**0.5).unsqueeze(0)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("kind", [HuberLoss, L1Loss])
def test_another_loss_needs_an_own_fisher_and_the_number_of_its_terms(kind, reduction, device):
    loss = kind(reduction=reduction)
    model, X, y = problem_for(loss, device)
    batches = [(X[:4], y[:4]), (X[4:], y[4:])]
    with pytest.raises(NotImplementedError, match=r"fisher\(loss, f, y\)"):
        kfac_over(model, loss, batches)
    with pytest.raises(NotImplementedError, match=r"count_terms\(loss, f, y\).*f\.numel\(\)"):
        kfac_over(model, loss, batches, gradients_of_terms)

    def count_terms(loss, f, y):
        return f.numel() if loss.reduction == "mean" else 1

    options = {"fisher": gradients_of_terms, "count_terms": count_terms}
    found = kfac_over(model, loss, batches, **options)
    for name, io in layer_ios(model, loss, X, y, gradients_of_terms).items():
        check_equal(found[name].dense(), kfac(io).dense())


def test_a_loader_without_batches_is_an_error():
    with pytest.raises(ValueError, match="no batch"):
        kfac_over(Linear(2, 1), MSELoss(), [])


def test_progress_is_shown_on_request(capsys):
    model, X, y = problem_for(MSELoss(), "cpu")
    kfac_over(model, MSELoss(), [(X, y)], progress=True)
    assert "KFAC" in capsys.readouterr().err
    kfac_over(model, MSELoss(), [(X, y)])
    assert capsys.readouterr().err == ""


# ---- any approximation ---------------------------------------------------------------------------

ANY = {
    "kfac": kfac,
    "foof": foof,
    "ekfac": ekfac,
    "tkfac": tkfac,
    "one-sided": one_sided,
    "kl-shampoo": partial(kl_factors, damping=0.1),
    "tkfac-of-the-batch": lambda io: tkfac(pooled(io)),
    "kpsvd": partial(kpsvd, tolerance=1e-12),
    "mini-block": mini_block,
    "exact": cg_fac,
}


@pytest.mark.parametrize("fisher", [type2, empirical], ids=["type2", "empirical"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("name", ANY)
def test_any_approximation_of_unequal_batches_is_that_of_one_batch(name, reduction, fisher, device):
    loss = LOADER_LOSSES[3](reduction, device)
    model, X, y = problem_for(loss, device)
    batches = [(X[:2], y[:2]), (X[2:3], y[2:3]), (X[3:], y[3:])]
    whole = over_loader(ANY[name], model, loss, batches, fisher, chunk=2)
    for layer, io in layer_ios(model, loss, X, y, fisher).items():
        check_equal(whole[layer].dense(), ANY[name](io).dense())


def test_the_mean_over_batches_is_another_matrix(device):
    """What one gets from a loop of one's own: batches of unequal size with equal weights."""
    loss = MSELoss()
    model, X, y = problem_for(loss, device)
    parts = [tkfac(layer_ios(model, loss, X[s], y[s])["0"]) for s in (slice(2), slice(2, 11))]
    whole = over_loader(tkfac, model, loss, [(X[:2], y[:2]), (X[2:], y[2:])])["0"]
    check_differs((parts[0].dense() + parts[1].dense()) / 2, whole.dense())


def test_kfac_by_running_sums_is_kfac_of_everything_gathered(device):
    loss = CrossEntropyLoss()
    model, X, y = problem_for(loss, device)
    batches = [(X[:4], y[:4]), (X[4:], y[4:])]
    sums, gathered = (over_loader(a, model, loss, batches) for a in (FactorSums(), kfac))
    for layer in sums:
        check_equal(sums[layer].A, gathered[layer].A)
        check_equal(sums[layer].B, gathered[layer].B)


def sequences(lengths, device):
    """A network along a sequence, and batches of one sample each with these lengths."""
    torch.manual_seed(0)
    model = Sequential(Conv1d(2, 3, 2), Tanh(), Conv1d(3, 2, 1)).to(device)
    batches = [(torch.randn(1, 2, n, device=device),) * 2 for n in lengths]
    return model, [(X, model(X).detach() + 1) for X, _ in batches]


def test_batches_of_several_lengths_are_joined_by_sums_only(device):
    model, batches = sequences([4, 6], device)
    loss = MSELoss(reduction="sum")
    whole = kfac_over(model, loss, batches)["0"]
    ios = [layer_ios(model, loss, X, y)["0"] for X, y in batches]
    rows = torch.cat([io.a.flatten(0, 1) for io in ios])
    check_equal(whole.A, rows.T @ rows / len(rows))
    check_equal(whole.B, sum(kfac(io).B for io in ios))
    with pytest.raises(ValueError, match="met 3 positions in one batch and 5 in another"):
        over_loader(ekfac, model, loss, batches)
    reduced = over_loader(kfac, model, loss, batches, type2, flavour=REDUCE)
    by_sums = kfac_over(model, loss, batches, type2, flavour=REDUCE)
    check_equal(reduced["0"].dense(), by_sums["0"].dense())
    with pytest.raises(ValueError, match=r"stands for 5 positions.*ekfac_reduce"):
        over_loader(ekfac, model, loss, batches, type2, flavour=REDUCE)
