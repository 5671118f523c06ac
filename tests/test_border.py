"""What is passed wrongly is refused where it is passed: its name, its value, the way out.

The other tests run with annotations checked, which would refuse first. Users have no such checks.
"""

from functools import partial

import pytest
import torch
from torch.nn import CrossEntropyLoss, Linear, MSELoss, ReLU, Sequential
from torch.nn.functional import cross_entropy

import kfac_scratch as ks
from kfac_scratch.approximations.mini_block import mini_block_filters
from kfac_scratch.border import check_count, check_function, checked_names, makes_a_function
from kfac_scratch.pinn.solvers import kernel_solver

LOSS = CrossEntropyLoss()


pytestmark = pytest.mark.usefixtures("as_users_run_it")


def model():
    return Sequential(Linear(4, 3), ReLU(), Linear(3, 2))


def batch():
    return torch.randn(5, 4), torch.tensor([0, 1, 1, 0, 1])


def optimizer(**options):
    return ks.KFAC(model(), LOSS, **options)


def capture(**options):
    return ks.layer_ios(*({"model": model(), "loss": LOSS} | options).values(), *batch())


def ios(**options):
    return ks.layer_ios(model(), LOSS, *batch(), **options)


def over(data=None, approximation=ks.kfac, **options):
    data = [batch()] if data is None else data
    return ks.over_loader(approximation, model(), LOSS, data, **options)


def term(**options):
    right = {"residual": lambda u, x: u.lap, "X": torch.rand(3, 2), "expansion": ks.laplacian(2)}
    return ks.Term(**right | options)


def stepped(**options):
    tuned = optimizer(**options)
    X, y = batch()
    LOSS(tuned.model(X), y).backward()
    tuned.observe(X, y)
    return tuned.step()


REFUSED = [
    # a name in place of the function
    (
        optimizer,
        {"approximation": "ekfac"},
        r"approximation='ekfac' is a string: pass the function",
    ),
    (optimizer, {"invert": "factored"}, "invert='factored' is a string.*invert=factored_inverse"),
    (optimizer, {"fisher": "type-2"}, "fisher='type-2' is a string.*fisher=type2"),
    (optimizer, {"flavour": "reduce"}, "flavour must be a Flavour.*REDUCE.*got 'reduce'"),
    (optimizer, {"controls": "graft"}, r"controls must be a list.*got 'graft'"),
    (optimizer, {"controls": ["graft"]}, r"control='graft' is a string.*controls=\[graft\(\)\]"),
    (optimizer, {"rest": "adamw"}, "rest='adamw' is a string.*rest=lambda"),
    (ios, {"fisher": "empirical"}, "fisher='empirical' is a string"),
    (ios, {"flavour": "expand"}, "flavour must be a Flavour.*got 'expand'"),
    (over, {"approximation": "kfac"}, "approximation='kfac' is a string"),
    (over, {"fisher": "type2"}, "fisher='type2' is a string"),
    (ks.coarse_correction, {"fisher": "type2"}, "fisher='type2' is a string"),
    (ks.GaussNewton, {"solver": "dense"}, "solver='dense' is a string.*solver=kernel_solver"),
    # the function that makes one
    (optimizer, {"approximation": ks.randomized}, r"call it, approximation=randomized\(...\)"),
    (optimizer, {"approximation": ks.soap}, r"call it, approximation=soap\(...\)"),
    (ks.OfBatch, {"inner": ks.soap}, r"inner=soap is a function that makes one: call it"),
    (ks.OfBatch, {"inner": "soap"}, "inner='soap' is a string: pass the function.*inner=tkfac"),
    (ks.OfBatch, {"inner": ks.KLShampoo}, r"inner=KLShampoo is a class: make an instance"),
    (optimizer, {"approximation": ks.OfBatch}, r"approximation=OfBatch is a class: make an inst"),
    (ks.MovingAverage, {"approximation": ks.soap}, r"call it, approximation=soap\(...\)"),
    (optimizer, {"approximation": mini_block_filters}, r"approximation=mini_block_filters\(...\)"),
    (optimizer, {"controls": [ks.graft]}, r"control=graft is a function that makes one: call it"),
    (optimizer, {"controls": [ks.quadratic_model]}, r"control=quadratic_model is a function that"),
    (optimizer, {"controls": ks.graft}, "controls must be a list.*got graft"),
    (optimizer, {"controls": ks.graft()}, r"controls must be a list, for example"),
    (optimizer, {"fisher": ks.monte_carlo}, r"call it, fisher=monte_carlo\(...\)"),
    (ios, {"fisher": ks.monte_carlo}, r"call it, fisher=monte_carlo\(...\)"),
    (over, {"fisher": ks.monte_carlo}, r"call it, fisher=monte_carlo\(...\)"),
    (over, {"approximation": ks.randomized}, r"call it, approximation=randomized\(...\)"),
    (ks.MovingAverage, {"approximation": ks.randomized}, r"approximation=randomized\(...\)"),
    (ks.Latest, {"approximation": ks.randomized}, r"approximation=randomized\(...\)"),
    (ks.Gathered, {"approximation": ks.randomized}, r"approximation=randomized\(...\)"),
    (ks.Joined, {"approximation": ks.randomized}, r"approximation=randomized\(...\)"),
    (partial(ks.Window, 3), {"approximation": ks.randomized}, r"approximation=randomized\(...\)"),
    (
        partial(ks.Repaired, ks.Brand(2)),
        {"repair": ks.corrected, "period": 2},
        r"repair=corrected\(",
    ),
    (partial(ks.coarse_correction, ks.type2), {"space": ks.krylov_space}, r"space=krylov_space\("),
    (term, {"expansion": ks.laplacian}, r"expansion must be a Expansion.*laplacian\(2\)"),
    # a class in place of its instance, or the other way round
    (optimizer, {"approximation": ks.AmortisedEKFAC}, r"approximation=AmortisedEKFAC is a class"),
    (optimizer, {"approximation": ks.Window}, r"make an instance of it, approximation=Window\("),
    (over, {"approximation": ks.FactorSums}, r"approximation=FactorSums is a class"),
    (ks.PinnKFAC, {"preconditioner": ks.TermWise}, r"TermWise\(\); got the class TermWise"),
    (ks.KFACKrylov, {"preconditioner": ks.TermWise}, r"TermWise\(\); got the class TermWise"),
    (
        ks.AmortisedEKFAC,
        {"factors": ks.MovingAverage},
        "factors must be a Estimator.*class Mov",
    ),
    (ks.AmortisedEKFAC, {"factors": ks.kfac}, "factors must be a Estimator, for example"),
    (capture, {"model": Sequential}, "model must be a Module.*got the class Sequential"),
    (capture, {"loss": CrossEntropyLoss}, "loss must be a Module.*got the class CrossEntropyLoss"),
    (
        optimizer,
        {"rest": torch.optim.SGD(Linear(1, 1).parameters())},
        "rest must make an optimizer",
    ),
    (capture, {"loss": cross_entropy}, "loss must be a Module, for example nn.CrossEntropyLoss"),
    (ios, {"counted": "mask"}, "counted='mask' is a string.*counted=lambda X, y"),
    (ios, {"counted": torch.ones(5, 7) > 0}, "counted must be a function.*got a Tensor"),
    (over, {"counted": "mask"}, "counted='mask' is a string"),
    (optimizer, {"counted": "mask"}, "counted='mask' is a string"),
    # numbers
    (ios, {"chunk": 2.5}, "chunk must be a whole number of at least 1, got 2.5"),
    (ios, {"plan": {}}, r"plan must be a Plan, for example plan\(model, X\); got \{\}"),
    (ios, {"chunk": True}, "chunk must be a whole number of at least 1, got True"),
    (optimizer, {"factor_every": 2.5}, "factor_every must be a whole number"),
    (optimizer, {"inverse_every": "10"}, "inverse_every must be a whole number"),
    (optimizer, {"generator": 0}, r"generator must be a Generator.*manual_seed\(0\); got 0"),
    (ks.monte_carlo, {"samples": 2.0}, "samples must be a whole number of at least 1, got 2.0"),
    (partial(ks.monte_carlo, 1), {"generator": 3}, "generator must be a Generator.*got 3"),
    (ks.randomized, {"rank": 2.5}, "rank must be a whole number"),
    (ks.Brand, {"rank": None}, "rank must be a whole number"),
    # names of layers
    (ios, {"layers": "0"}, r"layers must list names, for example \['0', '2'\]; got '0'"),
    (optimizer, {"layers": [0, 2]}, "layers must list names of layers, got 0 among them"),
    (optimizer, {"layers": 3}, "layers must list names.*got 3"),
    # data
    (over, {"data": batch()[0]}, r"data must yield batches \(X, y\).*got a Tensor.*\[\(X, y\)\]"),
    (over, {"data": 7}, r"data must yield batches \(X, y\)"),
    (over, {"data": [{"x": 1, "y": 2}]}, "Batch 0 of data is a dict, not a pair"),
    (over, {"data": [batch()[0]]}, "Batch 0 of data is a Tensor, not a pair"),
    (partial(ks.linearize, model()), {"terms": term()}, r"got one Term: pass \[term\]"),
    (partial(ks.pinn_loss, model()), {"terms": [term]}, r"terms\[0\] must be a Term"),
    (term, {"residual": "u.lap"}, "residual='u.lap' is a string"),
    (term, {"X": [[0.0, 1.0]]}, "X must be a Tensor"),
    # what functions of the user return
    (ios, {"fisher": lambda loss, f, y: None}, r"fisher must return vectors.*\[5, 2\].*a NoneType"),
    (over, {"fisher": lambda loss, f, y: 1.0}, "fisher must return vectors.*returned a float"),
    (over, {"approximation": lambda io: io.a}, "approximation must return a Matrix.*a Tensor"),
    (stepped, {"approximation": lambda io: io.a}, "approximation must return a Matrix.*a Tensor"),
    (stepped, {"controls": [lambda step: None]}, "controls must return the Step.*a NoneType"),
    (
        stepped,
        {"invert": lambda M, damping: 3},
        "invert must return the inverse, a LinearMap.* an? int",
    ),
    (
        partial(ks.preconditioner, model()),
        {"maps": {"0": 1, "2": 2}},
        r"maps\['0'\] must be a Linear",
    ),
    (partial(ks.preconditioner, model()), {"maps": [1, 2]}, "maps must be a Mapping"),
]


@pytest.mark.parametrize(("call", "wrong", "message"), REFUSED)
def test_a_wrong_kind_is_refused_with_the_way_out(call, wrong, message):
    with pytest.raises(TypeError, match=f"(?s){message}"):
        call(**wrong)


def test_arguments_of_the_right_kind_pass():
    class Mine:
        def __call__(self, io):
            return ks.kfac(io)

    rest, record = torch.optim.AdamW, [].append
    approximations = (ks.ekfac, partial(ks.kpsvd, tolerance=0.1), lambda io: ks.kfac(io), Mine())
    for approximation in (*approximations, ks.randomized(2), ks.AmortisedEKFAC(2), ks.Window(2)):
        optimizer(approximation=approximation, controls=(ks.graft(), lambda step: step), rest=rest)
    optimizer(record=record, adapt_damping=ks.levenberg_marquardt, fisher=ks.monte_carlo(2))
    assert list(ios(layers=(name for name in ["2"]))) == ["2"]  # a generator is read twice
    assert set(over(iter([batch(), batch()]))) == {"0", "2"}
    ks.Spring(solver=kernel_solver)
    ks.two_level  # noqa: B018


def test_functions_that_make_functions_are_known_by_their_annotation():
    assert all(map(makes_a_function, (ks.graft, ks.randomized, ks.monte_carlo, ks.krylov_space)))
    assert not any(map(makes_a_function, (ks.kfac, ks.type2, len, lambda: lambda: 0, print)))


def test_a_function_that_returns_an_estimator_makes_one_and_one_that_returns_numbers_does_not():
    def numbers(io) -> dict[str, float]:
        return {}

    def more(io) -> dict:
        return {}

    assert makes_a_function(ks.soap)
    assert not any(map(makes_a_function, (numbers, more, ks.tkfac, ks.one_sided)))


def test_counts_and_names_are_checked():
    check_count("n", 3)
    check_count("n", 0, minimum=0)
    with pytest.raises(ValueError, match="n must be at least 2, got 1"):
        check_count("n", 1, minimum=2)
    assert checked_names("layers", None) is None
    assert list(checked_names("layers", ["a"])) == ["a"]
    with pytest.raises(TypeError, match="f must be a function, for example g; got a int: 3"):
        check_function("f", 3, "g")


@pytest.mark.parametrize("controls", [[lambda step: None]])
def test_a_control_that_returns_nothing_changes_nothing(controls):
    tuned = optimizer(controls=controls)
    before = [p.clone() for p in tuned.model.parameters()]
    X, y = batch()
    MSELoss()(tuned.model(X), torch.zeros(5, 2)).backward()
    tuned.observe(X, y)
    with pytest.raises(TypeError):
        tuned.step()
    assert all(torch.equal(a, b) for a, b in zip(before, tuned.model.parameters(), strict=True))
    assert tuned.steps == 0
