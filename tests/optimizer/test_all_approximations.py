"""Every variant in the optimizer: it descends, on expand and reduce views, and it resumes."""

import io as files
from collections import Counter
from copy import deepcopy
from functools import partial

import pytest
import torch
from torch.nn import Conv2d, CrossEntropyLoss, Flatten, Linear, Sequential, Tanh

import kfac_scratch.approximations.brand as brand
import kfac_scratch.approximations.randomized as sketches
from kfac_scratch import (
    EXPAND,
    KFAC,
    REDUCE,
    Latest,
    empirical,
    factored_inverse,
    graft,
    kfac,
    kfac_reduce,
    layer_ios,
    type2,
)
from kfac_scratch.approximations.adaptive_rank import AdaptiveRank, rank_by_ratio
from kfac_scratch.approximations.batch_gradients import OfBatch
from kfac_scratch.approximations.brand import (
    Brand,
    ContinuedInverse,
    Repaired,
    corrected,
    refreshed,
)
from kfac_scratch.approximations.cg_fac import cg_fac, kernel_inverse, truncated_inverse
from kfac_scratch.approximations.ekfac import AmortisedEKFAC, ekfac, ekfac_reduce
from kfac_scratch.approximations.estimators import MovingAverage
from kfac_scratch.approximations.kl_shampoo import KLShampoo
from kfac_scratch.approximations.kpsvd import (
    Recompressed,
    deflation,
    ekpsvd,
    guarded_inverse,
    kfac_corrected,
    kpsvd,
    lanczos,
    nearest_product,
    nearest_sum,
)
from kfac_scratch.approximations.mini_block import mini_block, mini_block_rows, mini_block_shared
from kfac_scratch.approximations.randomized import (
    Sketch,
    SketchedInverse,
    randomized,
    smallest_kept,
    srevd,
    zero_tail,
)
from kfac_scratch.approximations.shampoo import one_sided, shampoo_bound, shampoo_inverse
from kfac_scratch.approximations.skfac import Window, reduce_sum, skfac, spatial_subsampling
from kfac_scratch.approximations.soap import soap
from kfac_scratch.approximations.tekfac import tekfac
from kfac_scratch.approximations.tkfac import even_traces_inverse, tkfac
from kfac_scratch.matrices.damping import relative_factored_inverse, relative_inverse
from kfac_scratch.matrices.matrix import exact_inverse
from kfac_scratch.matrices.roots import inverse_root
from kfac_scratch.optimizer.coarse_spaces import krylov_space, nicolaides_space, residual_space
from kfac_scratch.optimizer.preconditioner import preconditioner
from kfac_scratch.optimizer.step_control import kl_clip
from kfac_scratch.optimizer.two_level import (
    additive,
    adef1,
    adef2,
    bnn,
    coarse_correction,
    two_level,
)
from tests.laws import check_differs, check_equal
from tests.thinned import thinned

pytestmark = pytest.mark.long
PLAIN = {"lr": 0.03, "momentum": 0.9, "damping": 1e-3, "decay": 0.95, "controls": [graft()]}
PLAIN |= {"invert": exact_inverse}
VARIANTS = {
    "tkfac": {"approximation": tkfac},
    "tkfac-damping": {"approximation": tkfac, "invert": even_traces_inverse},
    "tekfac": {"approximation": tekfac},
    "tekfac-amortised": {"approximation": AmortisedEKFAC(2, MovingAverage(tkfac))},
    "kpsvd": {"approximation": kpsvd},
    "kpsvd-recompressed": {"approximation": Recompressed(nearest_product)},
    "ekpsvd": {"approximation": ekpsvd},
    "deflation": {"approximation": Latest(deflation), "invert": guarded_inverse},
    "deflation-recompressed": {
        "approximation": Recompressed(nearest_sum),
        "invert": guarded_inverse,
    },
    "lanczos": {"approximation": Latest(lanczos), "invert": guarded_inverse},
    "kfac-corrected": {"approximation": Latest(kfac_corrected), "invert": guarded_inverse},
    "skfac": {"approximation": Latest(skfac), "invert": factored_inverse},
    "skfac-window": {"approximation": Window(3)},
    "skfac-reduce-sum": {"approximation": Window(3, lambda io: skfac(reduce_sum(io)))},
    "skfac-subsampling": {
        "approximation": Window(3, lambda io: skfac(spatial_subsampling(io, 2))),
    },
    "rs": {"approximation": randomized(3, oversampling=2)},
    "rs-relative": {
        "approximation": randomized(3),
        "invert": SketchedInverse(tail=smallest_kept, invert=relative_factored_inverse),
        "damping": 0.1,
    },
    "rs-adaptive": {"approximation": AdaptiveRank(Sketch(3), rank_by_ratio(step=1), 2)},
    "sre": {"approximation": randomized(3), "invert": SketchedInverse(srevd)},
    "kfac-relative": {"approximation": kfac, "invert": relative_inverse, "damping": 0.01},
    "b": {"approximation": Brand(3)},
    "b-r": {"approximation": Repaired(Brand(3), refreshed(Sketch(3, 2)), 2)},
    "b-c": {"approximation": Repaired(Brand(3), corrected(0.5), 2)},
    "ekfac-reduce": {"approximation": AmortisedEKFAC(2, MovingAverage(kfac_reduce))},
    "mini-block": {"approximation": mini_block},
    "mini-block-empirical": {"approximation": mini_block, "fisher": empirical, "damping": 0.1},
    "mini-block-rows": {"approximation": Latest(mini_block_rows)},
    "mini-block-shared": {"approximation": mini_block_shared, "invert": factored_inverse},
    "cg-fac": {"approximation": Latest(cg_fac), "invert": truncated_inverse},
    "cg-kfac": {"approximation": kfac, "invert": truncated_inverse},
    "cg-fac-direct": {"approximation": Latest(cg_fac), "invert": kernel_inverse},
    "shampoo": {"approximation": OfBatch(shampoo_bound), "invert": shampoo_inverse},
    "shampoo-exact": {"approximation": shampoo_bound, "invert": inverse_root},
    "shampoo-squared": {"approximation": OfBatch(tkfac), "invert": inverse_root},
    "one-sided": {"approximation": OfBatch(one_sided), "invert": inverse_root},
    "soap": {"approximation": OfBatch(soap(2)), "invert": inverse_root},
    "kl-shampoo": {"approximation": OfBatch(KLShampoo(1e-3)), "invert": inverse_root},
    "kl-soap": {
        "approximation": OfBatch(AmortisedEKFAC(2, KLShampoo(1e-3))),
        "invert": inverse_root,
    },
    "two-level": {"controls": [coarse_correction(type2), graft()]},
    "two-level-adef2": {"controls": [coarse_correction(type2, combine=adef2), graft()]},
    "two-level-bnn": {"controls": [coarse_correction(type2, combine=bnn), graft()]},
    "b-continued": {"approximation": Brand(3, zero_tail), "invert": ContinuedInverse()},
}


def problem(device):
    torch.manual_seed(0)
    model = Sequential(Conv2d(2, 3, 3), Tanh(), Flatten(), Linear(27, 7), Tanh(), Linear(7, 3))
    X, y = torch.randn(11, 2, 5, 5, device=device), torch.randint(3, (11,), device=device)
    return model.to(device), CrossEntropyLoss(), X, y


KEEP_THE_FACTORS = {"skfac", "skfac-window", "rs", "sre", "b", "b-r", "b-c", "b-continued"}
KEEP_THE_FACTORS |= {"rs-relative", "rs-adaptive", "kfac-relative", "cg-kfac"}
KEEP_THE_FACTORS |= {"skfac-reduce-sum", "skfac-subsampling"}
KEEP_THE_FACTORS |= {name for name, settings in VARIANTS.items() if "controls" in settings}


def used_once(device):
    """A model whose layers have one position: the convolution sees its whole image at once."""
    torch.manual_seed(0)
    model = Sequential(Conv2d(2, 3, 5), Tanh(), Flatten(), Linear(3, 7), Tanh(), Linear(7, 3))
    return model.to(device), *problem(device)[1:]


def trained(settings, device, steps, flavour=EXPAND, problem=problem):
    model, loss, X, y = problem(device)
    optimizer = KFAC(
        model,
        loss,
        **PLAIN | {"flavour": flavour} | settings,
        factor_every=2,
        inverse_every=2,
        generator=torch.Generator(device).manual_seed(0),
    )
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        value = loss(model(X), y)
        value.backward()
        losses.append(float(value.detach()))
        optimizer.observe(X, y)
        optimizer.step()
    return optimizer, losses


@pytest.mark.parametrize("name", VARIANTS)
def test_training_descends_with_every_approximation(name, device):
    _, losses = trained(VARIANTS[name], device, 13)
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize("name", sorted(KEEP_THE_FACTORS))
def test_training_descends_in_the_reduced_view_with_what_keeps_the_factors(name, device):
    _, losses = trained(VARIANTS[name], device, 13, REDUCE)
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize("name", sorted(set(VARIANTS) - KEEP_THE_FACTORS))
def test_what_needs_gradients_of_data_refuses_the_reduced_view_of_several_positions(name, device):
    with pytest.raises(ValueError, match=r"stands for 9 positions.*flavour=EXPAND.*ekfac_reduce"):
        trained(VARIANTS[name], device, 1, REDUCE)


@pytest.mark.parametrize("name", sorted(set(VARIANTS) - KEEP_THE_FACTORS))
def test_with_one_position_both_views_are_the_same_for_every_approximation(name, device):
    expand, _ = trained(VARIANTS[name], device, 1, EXPAND, used_once)
    reduce, _ = trained(VARIANTS[name], device, 1, REDUCE, used_once)
    for key, M in expand.matrices.items():
        check_equal(reduce.matrices[key].dense(), M.dense())


@pytest.mark.parametrize("name", thinned(VARIANTS))
def test_checkpoint_restores_matrices_and_inverses(name, device):
    optimizer, _ = trained(VARIANTS[name], device, 4)
    file = files.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    other, _ = trained(VARIANTS[name], device, 1)
    other.load_state_dict(torch.load(file, weights_only=True))
    for key, M in optimizer.matrices.items():
        W = torch.randn(*_shape(optimizer, key), device=device)
        assert torch.equal(other.matrices[key] @ W, M @ W)
        assert torch.equal(other.inverses[key] @ W, optimizer.inverses[key] @ W)


def wide(device):
    """Layers that are wider than the rank and a batch together."""
    torch.manual_seed(0)
    model = Sequential(Linear(14, 16), Tanh(), Linear(16, 12)).to(device)
    X, y = torch.randn(8, 14, device=device), torch.randint(12, (8,), device=device)
    return model, CrossEntropyLoss(), X, y


@pytest.fixture
def calls(monkeypatch):
    """How often the parts of Brand new K-FACs are called."""
    found = Counter()
    parts = [(brand, "brand_update"), (brand, "updated_in_full"), (brand, "ritz")]
    for module, name in [*parts, (sketches, "range_basis")]:
        function = getattr(module, name)
        monkeypatch.setattr(module, name, partial(counted, found, name, function))
    return found


def counted(found, name, function, *args):
    found[name] += 1
    return function(*args)


REPAIRS = {"b": {}, "b-r": {"range_basis": 8}, "b-c": {"ritz": 8}}  # of two layers' factors, twice


@pytest.mark.parametrize("name", REPAIRS)
def test_brand_new_kfacs_train_by_low_rank_updates_alone(name, calls, device):
    """Five updates of two layers' factors in ten steps, every second one with a repair."""
    _, losses = trained(VARIANTS[name], device, 10, problem=wide)
    assert calls == {"brand_update": 20} | REPAIRS[name]
    assert losses[-1] < 0.5 * losses[0]


def continued(optimizer, X, y, steps):
    for _ in range(steps):
        optimizer.zero_grad()
        optimizer.loss(optimizer.model(X), y).backward()
        optimizer.observe(X, y)
        optimizer.step()
    return [p.detach().clone() for p in optimizer.model.parameters()]


AT_LABELS = {"fisher": empirical}  # one vector for each sample, and nothing is drawn


def resumed(name, optimizer, device):
    file = files.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    other, _ = trained(VARIANTS[name] | AT_LABELS, device, 1, problem=wide)
    other.load_state_dict(torch.load(file, weights_only=True))
    other.model.load_state_dict(optimizer.model.state_dict())
    return other


COPIES = {"checkpoint": resumed, "deepcopy": lambda name, optimizer, device: deepcopy(optimizer)}


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("name", REPAIRS)
def test_a_run_of_brand_new_kfacs_goes_on_bit_by_bit(name, how, device):
    """The repairs after the copy included, which are two and choose by the number of batches."""
    optimizer, _ = trained(VARIANTS[name] | AT_LABELS, device, 6, problem=wide)
    taken, (X, y) = COPIES[how](name, optimizer, device), wide(device)[2:]
    ends = [continued(run, X, y, 6) for run in (optimizer, taken)]
    assert all(torch.equal(*pair) for pair in zip(*ends, strict=True))


def test_with_the_empirical_fisher_mini_blocks_are_those_of_the_samples_own_gradients(device):
    """A neuron's block is the mean of `v v^T`, where `v` is its gradient of one sample's loss."""
    model, loss, X, y = problem(device)
    optimizer = KFAC(model, loss, approximation=mini_block, fisher=empirical)
    optimizer.observe(X, y)
    for index in (3, 5):
        layer, blocks = model[index], 0
        for x, label in zip(X.split(1), y.split(1), strict=True):
            W, b = torch.autograd.grad(loss(model(x), label), (layer.weight, layer.bias))
            G = torch.cat([W, b.unsqueeze(1)], 1)
            blocks = blocks + G.unsqueeze(2) * G.unsqueeze(1) / len(X)
        check_equal(optimizer.matrices[str(index)].blocks, blocks)
    other = KFAC(model, loss, approximation=mini_block, fisher=type2)
    other.observe(X, y)
    check_differs(other.matrices["5"].blocks, optimizer.matrices["5"].blocks)


def test_amortised_ekfac_reduce_in_training_begins_as_ekfac_reduce(device):
    """With rows of all positions: the second moments are those of the samples' gradients."""
    model, loss, X, y = problem(device)
    optimizer = KFAC(model, loss, fisher=type2, **VARIANTS["ekfac-reduce"])
    optimizer.observe(X, y)
    for name, io in layer_ios(model, loss, X, y, type2).items():
        check_equal(optimizer.matrices[name].trace(), io.block().trace())
        check_equal(optimizer.matrices[name].dense(), ekfac_reduce(io).dense())
    check_differs(ekfac(layer_ios(model, loss, X, y)["0"]).dense(), optimizer.matrices["0"].dense())


def _shape(optimizer, name):
    layer = optimizer.model.get_submodule(name)
    return len(layer.weight), layer.weight[0].numel() + 1


# ---- two levels -------------------------------------------------------------------------------


@pytest.mark.parametrize("combine", [additive, adef1, adef2, bnn])
@pytest.mark.parametrize(
    "space", [nicolaides_space, residual_space, krylov_space(nicolaides_space)]
)
@pytest.mark.filterwarnings("default:.*coarse directions are zero or depend")
def test_coarse_correction_is_the_two_level_step(space, combine, device):
    optimizer, _ = trained({"fisher": type2, "momentum": 0.0, "damping": 0.1}, device, 1)
    model, loss, X, y = optimizer.model, *problem(device)[1:]
    optimizer.controls = (coarse_correction(type2, space, combine),)
    optimizer.zero_grad()
    loss(model(X), y).backward()
    gradient = {n: p.grad.clone() for n, p in model.named_parameters()}
    ios = layer_ios(model, loss, X, y, type2)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    step = two_level(model, ios, optimizer.inverses, 0.1, space=space, combine=combine)(gradient)
    plain = preconditioner(model, optimizer.inverses)(gradient)
    optimizer.observe(X, y)
    optimizer.step()
    for name, p in model.named_parameters():
        check_equal(before[name] - p.detach(), 0.03 * step[name])
    assert any((step[n] - plain[n]).abs().max() > 1e-3 * plain[n].abs().max() for n in step)


def test_a_coarse_level_needs_the_batch_and_one_damping(device):
    optimizer, _ = trained({"controls": [coarse_correction(type2), kl_clip(1e-2)]}, device, 1)
    with pytest.raises(ValueError, match="observe"):
        optimizer.step()
    model, loss, X, y = problem(device)
    groups = [
        {"params": model[0].parameters(), "damping": 0.1},
        {"params": [*model[3].parameters(), *model[5].parameters()]},
    ]
    optimizer = KFAC(model, loss, groups, controls=[coarse_correction(type2)])
    loss(model(X), y).backward()
    optimizer.observe(X, y)
    with pytest.raises(ValueError, match="one damping for all"):
        optimizer.step()
