"""What ranks run for `test_behaviour`, all of it in one job: processes take seconds to start."""

import copy
import functools
import itertools
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from kfac_scratch import (
    KFAC,
    LayerIO,
    Ranks,
    distribute,
    graft,
    kfac,
    kfac_over_ranks,
    layer_ios,
    monte_carlo,
    quadratic_model,
    type2,
)
from kfac_scratch.approximations.estimators import weight_of_newest
from kfac_scratch.distributed.distribute import Together
from kfac_scratch.distributed.packing import leaves
from kfac_scratch.distributed.ranks import AgreedError
from kfac_scratch.distributed.sharing import assignment
from kfac_scratch.optimizer.preconditioner import block_matrices
from tests.distributed.jobs import attempted
from tests.distributed.runs import (
    LOSSES,
    SHARDS,
    Case,
    flat,
    shard,
    together,
    train,
)

CASE = Case()
SIZE = 2
UNEQUAL = SHARDS[SIZE]["unequal"]


def built(case=CASE, workers=0.0, ddp=False, owner_local=False, **options):
    """A model and its optimizer on this rank."""
    model = case.model()
    wrapped = DistributedDataParallel(model) if ddp else model
    optimizer = case.optimizer(wrapped, **options)
    placed = distribute(optimizer, workers, owner_local=owner_local, timeout=30)
    return model, wrapped, optimizer, placed


def equal_everywhere(values, size):
    """Whether a tensor is the same on all ranks, bit for bit."""
    found = [torch.empty_like(values) for _ in range(size)]
    dist.all_gather(found, values)
    return all(torch.equal(values, other) for other in found)


# ---- runs of every rank ------------------------------------------------------------------------


def with_ddp(rank, size, name, shards):
    return together(LOSSES[name], rank, size, shards, 0.0, ddp=True)[0]


def ddp_without_joint_loss(rank, size, name, shards):
    case = LOSSES[name]
    model, wrapped, optimizer, _ = built(case, ddp=True)
    part = shard(SHARDS[size][shards], rank)
    try:
        return train(case, model, optimizer, part, wrapped)
    except AgreedError as error:
        return str(error)


def through_the_module(rank, size):
    """KFAC has the DistributedDataParallel, and the forward pass is that of the module in it."""
    model, _, optimizer, _ = built(Case(targets="labels"), ddp=True)
    try:
        return train(Case(targets="labels"), model, optimizer, shard(SHARDS[size]["equal"], rank))
    except AgreedError as error:
        return str(error)


def behind_its_back(rank, size):
    """The forward pass is a DistributedDataParallel's that KFAC does not have."""
    case = Case(targets="labels")
    model, _, optimizer, _ = built(case)
    wrapped = DistributedDataParallel(model)
    try:
        return train(case, model, optimizer, shard(UNEQUAL, rank), wrapped)
    except AgreedError as error:
        return str(error)


def ddp_micro_batches(rank, size):
    """Two micro-batches of unequal size, with the share that both have on all ranks together."""
    case = Case(targets="labels")
    model, wrapped, optimizer, placed = built(case, 1.0, ddp=True)
    loss = placed.joint_loss
    for X, y in case.batches():
        X, y = X[shard(UNEQUAL, rank)], y[shard(UNEQUAL, rank)]
        optimizer.zero_grad()
        cut = (2, 9)[rank]
        for part, count in ((slice(0, cut), 11), (slice(cut, None), 13)):
            (count / 24 * loss(wrapped(X[part]), y[part])).backward()
            optimizer.observe(X[part], y[part])
        optimizer.step()
    return flat(model)


def curvature_under_ddp(rank, size):
    case = LOSSES["labels-sum"]
    model, wrapped, optimizer, placed = built(case, ddp=True)
    part = shard(UNEQUAL, rank)
    for X, y in itertools.islice(case.batches(), 3):
        optimizer.update_curvature(X[part], y[part])
    return train(case, model, optimizer, part, wrapped, placed.joint_loss)


def one_overflow(rank, size):
    """With DP-KFAC, a matrix overflows at its owner alone; then the loop goes on."""
    model, _, optimizer, placed = built(owner_local=True, factor_every=1)
    train(CASE, model, optimizer, shard(UNEQUAL, rank), steps=2)
    X, y = next(CASE.batches())
    X, y = X[shard(UNEQUAL, rank)], y[shard(UNEQUAL, rank)]
    optimizer.zero_grad()
    CASE.loss()(model(X), y).backward()
    said = []
    try:
        optimizer.observe(X * (1e200 if placed.owners["0"] == rank else 1.0), y)
        optimizer.step()
    except ValueError as error:
        said.append(str(error))
    theta = train(CASE, model, optimizer, shard(UNEQUAL, rank), steps=2)
    return said, equal_everywhere(theta, size)


def fully_sharded(rank, size):
    """A model whose parameters are spread over the ranks."""
    model = fully_shard(CASE.model())
    try:
        CASE.optimizer(model)
    except ValueError as error:
        return str(error)


def owner_local_and_more(rank, size, more):
    """DP-KFAC whose curvature gets one batch more between observe and step."""
    model, _, optimizer, placed = built(owner_local=True, factor_every=1, lr=0.0)
    batches = list(CASE.batches())
    for step in range(3):
        X, y = (t[shard(UNEQUAL, rank)] for t in batches[step])
        optimizer.zero_grad()
        CASE.loss()(model(X), y).backward()
        optimizer.observe(X, y)
        part = shard(SHARDS[size][more], rank)
        optimizer.update_curvature(*(t[part] for t in batches[5]))
        optimizer.step()
    return {name: leaves(M) for name, M in optimizer.matrices.items()}, placed.owners


def unsendable(rank, size):
    """An inverse of a class that only one function knows, which has to be sent."""
    model, _, optimizer, _ = built(
        workers=1.0, invert=lambda M, damping: local_class()(M.inverse(damping))
    )
    try:
        train(CASE, model, optimizer, shard(UNEQUAL, rank))
    except AgreedError as error:
        return str(error)


def promoting(rank, size, workers):
    """Inverses in double precision of matrices in single precision."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 4)).float()
    optimizer = CASE.optimizer(model, invert=in_double)
    if size > 1:
        distribute(optimizer, workers, timeout=30)
    for X, y in CASE.batches():
        part = shard(UNEQUAL, rank) if size > 1 else slice(None)
        X, y = X[part], y[part]
        optimizer.zero_grad()
        CASE.loss()(model(X.float()), y).backward()
        optimizer.observe(X.float(), y)
        optimizer.step()
    return flat(model)


def in_double(M, damping):
    return Promoting(M.inverse(damping))


def recorder_of_one(rank, size):
    """With DP-KFAC, the record needs all ranks."""
    try:
        built(owner_local=True, record=print if rank == 0 else None)
    except AgreedError as error:
        return str(error)


def not_distributed(rank, size):
    model = CASE.model()
    optimizer = CASE.optimizer(model)
    try:
        return train(CASE, model, optimizer, shard(UNEQUAL, rank))
    except ValueError as error:
        return str(error)


def own_labels(rank, size):
    """Labels drawn from a generator of each rank."""
    generator = torch.Generator().manual_seed(5 + rank)
    model, _, optimizer, _ = built(fisher=monte_carlo(2, generator), generator=generator)
    return train(CASE, model, optimizer, shard(UNEQUAL, rank))


def streams(rank, size, given):
    """The first number that each rank draws, from a generator or from PyTorch's."""
    torch.manual_seed(3)
    generator = torch.Generator().manual_seed(3) if given else None
    _, _, optimizer, _ = built(fisher=None, generator=generator)
    source = optimizer.generator if given else optimizer.placement.generator
    return float(torch.rand((), generator=source)), optimizer.generator is generator


def micro_batches(rank, size, reduction):
    """Two micro-batches of unequal size on each rank, and what all of them make of them."""
    case = Case(targets="labels", reduction=reduction)
    model, wrapped, optimizer, _ = built(case, 1.0)
    loss = case.loss()
    for X, y in case.batches():
        X, y = X[shard(UNEQUAL, rank)], y[shard(UNEQUAL, rank)]
        optimizer.zero_grad()
        for part in (slice(0, 2), slice(2, None)):
            share = len(y[part]) / len(y) if reduction == "mean" else 1.0
            (share * loss(wrapped(X[part]), y[part])).backward()
            optimizer.observe(X[part], y[part])
        optimizer.step()
    return flat(model)


def epochs(rank, size):
    """Two epochs of 53 samples, of which the sampler repeats one, in batches of five."""
    generator = torch.Generator().manual_seed(3)
    X = torch.randn(53, 6, generator=generator, dtype=torch.float64)
    data = TensorDataset(X, torch.randint(4, (53,), generator=generator))
    sampler = DistributedSampler(data, size, rank, shuffle=True, seed=1)
    for epoch in range(2):
        sampler.set_epoch(epoch)
        yield from DataLoader(data, 5, sampler=sampler)


def over_epochs(rank, size):
    model, _, optimizer, _ = built()
    return trained_on(model, optimizer, epochs(rank, size))


def trained_on(model, optimizer, batches):
    for X, y in batches:
        optimizer.zero_grad()
        CASE.loss()(model(X), y).backward()
        optimizer.observe(X, y)
        optimizer.step()
    return flat(model)


def recorded(rank, size, owner_local):
    """What `record` gets on a rank."""
    rows = []
    model, _, optimizer, _ = built(owner_local=owner_local, record=rows.append)
    train(CASE, model, optimizer, shard(UNEQUAL, rank))
    return rows


def partly_used(rank, size):
    """A layer that only one rank's batches reach, and none in every third step."""
    model, _, optimizer, _ = built()
    for i, (X, y) in enumerate(CASE.batches()):
        X, y = X[shard(UNEQUAL, rank)], y[shard(UNEQUAL, rank)]
        optimizer.zero_grad()
        CASE.loss()(model(X), y).backward()
        optimizer.observe(X, y)
        if i % 3 == 2 or rank == 1:
            model[2].weight.grad = model[2].bias.grad = None
        optimizer.step()
    return flat(model)


def frozen_meanwhile(rank, size):
    model, _, optimizer, _ = built(workers=1.0)
    part = shard(UNEQUAL, rank)
    train(CASE, model, optimizer, part, steps=3)
    model[2].requires_grad_(False)
    train(CASE, model, optimizer, part, steps=3)
    model[2].requires_grad_(True)
    return train(CASE, model, optimizer, part, steps=3)


def from_a_copy(rank, size):
    """A copy of an optimizer of one process is distributed."""
    optimizer = copy.deepcopy(CASE.optimizer(CASE.model()))
    distribute(optimizer, timeout=30)
    return train(CASE, optimizer.model, optimizer, shard(UNEQUAL, rank))


def started_with_averages(rank, size):
    model, _, optimizer, _ = built()
    part = shard(UNEQUAL, rank)
    for X, y in itertools.islice(CASE.batches(), 3):
        optimizer.update_curvature(X[part], y[part])
    return train(CASE, model, optimizer, part)


# ---- over a data set ---------------------------------------------------------------------------


class TiedWords(nn.Module):
    """An embedding whose weight is the head's, too."""

    def __init__(self):
        super().__init__()
        self.words, self.head = nn.Embedding(9, 5), nn.Linear(5, 9)
        self.head.weight = self.words.weight

    def forward(self, X):
        return self.head(torch.tanh(self.words(X))).flatten(0, 1)


def data_set(net, reduction):
    """A model, a loss, and batches of each of two ranks: one of 5 samples, and 10 and 9."""
    if net == "tied":
        torch.manual_seed(0)
        model = TiedWords()
        X, y = torch.randint(9, (24, 3)), torch.randint(9, (24, 3))
    else:
        case = Case(net)
        model = case.model()
        X, y = next(case.batches())
    y[0] = y[7] = -100
    cuts = [[slice(0, 5)], [slice(5, 15), slice(15, 24)]]
    loss = nn.CrossEntropyLoss(reduction=reduction)
    return model, loss, [[(X[cut], y[cut].flatten()) for cut in each] for each in cuts]


def over_data(rank, size, net, reduction):
    model, loss, parts = data_set(net, reduction)
    return {
        name: [torch.as_tensor(t) for t in leaves(M)]
        for name, M in kfac_over_ranks(Ranks(30.0), model, loss, parts[rank]).items()
    }


def no_data(rank, size):
    model, loss, parts = data_set("dense", "mean")
    try:
        kfac_over_ranks(Ranks(30.0), model, loss, parts[rank] if rank == 0 else [])
    except AgreedError as error:
        return str(error)


# ---- mistakes ----------------------------------------------------------------------------------


class OwnModel(Together):
    """The quadratic model and the loss of the shard alone."""

    def summed(self, value):
        return value


class MeanOfMeans(Together):
    """Gradients averaged without weights, as DistributedDataParallel does."""

    def join_gradients(self, trained, share):
        return super().join_gradients(trained, 1 / self.size)


class OwnCurvature(Together):
    """No word between the ranks about one layer."""

    def updated(self, part, estimator, states, ios, weights):
        joint = super().updated(part, estimator, states, ios, weights)
        return joint | {"0": estimator.update(states.get("0"), ios["0"], weights["0"])}


class OwnDivisor(Together):
    """The vectors of every rank with the divisor of its own loss."""

    def updated(self, part, estimator, states, ios, weights):
        own = {name: replace(io, g=part**-0.5 * io.g) for name, io in ios.items()}
        return super().updated(part, estimator, states, own, weights)


class MeanFactors(Together):
    """Both factors averaged without weights, as gpauloski/kfac-pytorch does."""

    def updated(self, part, estimator, states, ios, weights):
        own = {
            name: kfac(replace(io, g=(part * self.size) ** -0.5 * io.g)) for name, io in ios.items()
        }
        sums = iter(self.ranks.summed("factors", [t for K in own.values() for t in leaves(K)]))
        return {
            name: mixed(
                states.get(name), type(K)(next(sums) / self.size, next(sums)), weights[name]
            )
            for name, K in own.items()
        }


class DecayOfTheNew(Together):
    """The share of the old matrix given to the new one."""

    def updated(self, part, estimator, states, ios, weights):
        swapped = {name: 1 - weight if weight < 1 else 1.0 for name, weight in weights.items()}
        return super().updated(part, estimator, states, ios, swapped)


class DampedInPlace(Together):
    """The damping of every inversion added to the average itself."""

    def inverted(self, invert, blocks, matrices, damping):
        made = super().inverted(invert, blocks, matrices, damping)
        for K in matrices.values():
            K.A.diagonal().add_(max(damping.values()) ** 0.5)
            K.B.diagonal().add_(max(damping.values()) ** 0.5)
        return made


def mixed(state, new, weight):
    return new if state is None else state.mixed(new, weight)


MISTAKES = {
    OwnModel: Case(options={"controls": [quadratic_model()]}),
    MeanOfMeans: CASE,
    OwnCurvature: CASE,
    OwnDivisor: CASE,
    MeanFactors: CASE,
    DecayOfTheNew: CASE,
    DampedInPlace: CASE,
}


def mistaken(rank, size, kind):
    """A run with a mistake put in."""
    case = MISTAKES[kind]
    model, _, optimizer, placed = built(case)
    placed.__class__ = kind
    return train(case, model, optimizer, shard(UNEQUAL, rank), steps=4)


# ---- DP-KFAC -----------------------------------------------------------------------------------


def owner_local(rank, size, shards, reduction):
    case = Case(targets="labels", reduction=reduction)
    return together(case, rank, size, shards, 0.0, owner_local=True)[0]


def owner_local_defined(sizes, reduction):
    """Every layer's matrix from the shard of its owner, the gradient of all: in one process."""
    case = Case(targets="labels", reduction=reduction)
    model = case.model()
    optimizer = case.optimizer(model)
    blocks = optimizer._arranged().blocks
    values = block_matrices(blocks, dict(model.named_parameters()))
    owners = assignment({n: float(sum(d**3 for d in W.shape)) for n, W in values.items()}, SIZE)
    counts = {}

    def of_owners(part, estimator, states, ios, weights):
        X, y = seen[-1]
        found = {}
        for name, owner in owners.items():
            own = shard(sizes, owner)
            io = layer_ios(model, case.loss(), X[own], y[own], type2)[name]
            scale = (len(y) / sizes[owner]) ** 0.5 if reduction == "sum" else 1.0
            counts[name] = counts.get(name, 0) + 1
            weight = weight_of_newest(optimizer.decay, counts[name])
            assert weight == weights[name]
            found[name] = estimator.update(states.get(name), LayerIO(io.a, scale * io.g), weight)
        return found

    class Owners(type(optimizer.placement)):
        updated = staticmethod(of_owners)

    optimizer.placement = Owners()
    seen = []
    for X, y in case.batches():
        seen.append((X, y))
        optimizer.zero_grad()
        case.loss()(model(X), y).backward()
        optimizer.observe(X, y)
        optimizer.step()
    return flat(model)


# ---- differences at the beginning --------------------------------------------------------------


def two_named(first, second):
    torch.manual_seed(0)
    model = nn.Sequential()
    model.add_module(first, nn.Linear(6, 6).double())
    model.add_module(second, nn.Linear(6, 6).double())
    return model


def one_entry(rank):
    model = CASE.model()
    model[0].weight.data[0, 0] += 1e-9 * rank
    return model


def one_frozen(rank):
    model = CASE.model()
    model[2].bias.requires_grad_(rank == 0)
    return model


DIFFERENT = {
    "names": lambda rank: KFAC(two_named(*("pq" if rank else "qp")), nn.MSELoss()),
    "width": lambda rank: KFAC(nn.Sequential(nn.Linear(6, 8 + rank)).double(), nn.MSELoss()),
    "dtype": lambda rank: KFAC(CASE.model() if rank else CASE.model().float(), nn.MSELoss()),
    "value": lambda rank: CASE.optimizer(one_entry(rank)),
    "frozen": lambda rank: KFAC(one_frozen(rank), nn.MSELoss()),
    "period": lambda rank: CASE.optimizer(CASE.model(), inverse_every=3 + rank),
    "lr": lambda rank: CASE.optimizer(CASE.model(), lr=0.1 * (1 + rank)),
    "damping": lambda rank: CASE.optimizer(CASE.model(), damping=0.1 * (1 + rank)),
    "reduction": lambda rank: KFAC(
        CASE.model(), nn.CrossEntropyLoss(reduction="sum" if rank else "mean")
    ),
    "class weights": lambda rank: KFAC(
        CASE.model(), nn.CrossEntropyLoss(weight=torch.tensor([1.0, 1.0, 1.0, 1.0 + rank]))
    ),
    "loss": lambda rank: KFAC(CASE.model(), nn.MSELoss() if rank else nn.CrossEntropyLoss()),
    "control": lambda rank: CASE.optimizer(CASE.model(), controls=[graft(eps=1e-8 * (1 + rank))]),
    "approximation": lambda rank: KFAC(
        CASE.model(), nn.MSELoss(), approximation=kfac if rank else other_kfac
    ),
}


def other_kfac(io):
    return kfac(io)


def differences(rank, size):
    """What `distribute` says of each difference."""
    said = {}
    for name, build in DIFFERENT.items():
        try:
            distribute(build(rank), timeout=30)
        except AgreedError as error:
            said[name] = str(error)
    return said


# ---- refusals ----------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Transposing:
    """A map whose result has another shape than its argument."""

    M: object

    def __matmul__(self, V):
        return (self.M @ V).mT


@dataclass(frozen=True, eq=False)
class Promoting(Transposing):
    """A map whose results are in double precision."""

    def __matmul__(self, V):
        return (self.M @ V).double()


def local_class():
    @dataclass(frozen=True, eq=False)
    class Local(Transposing):
        """A map that cannot be pickled."""

        def __matmul__(self, V):
            return self.M @ V

    return Local


def raising(*_):
    raise ValueError("no inverse here")


class Refusals:
    """Each method makes one rank refuse, by a name; all ranks call it."""

    def __init__(self, rank, size):
        self.rank, self.size = rank, size
        self.rows = []
        self.model, _, self.optimizer, self.placed = built(
            factor_every=1, inverse_every=1, record=self.rows.append
        )
        self.data = list(CASE.batches())
        self.part = shard(UNEQUAL, rank)
        train(CASE, self.model, self.optimizer, self.part, steps=2)

    def batch(self):
        X, y = self.data[2]
        return X[self.part].clone(), y[self.part].clone()

    def backward(self, X, y):
        self.optimizer.zero_grad()
        CASE.loss()(self.model(X), y).backward()

    def good(self):
        X, y = self.batch()
        self.backward(X, y)
        self.optimizer.observe(X, y)
        self.optimizer.step()

    def not_a_number(self):
        X, y = self.batch()
        if self.rank == 1:
            X[0, 0] = torch.nan
        self.backward(X, y)
        self.optimizer.observe(X, y)
        self.optimizer.step()

    def empty(self):
        X, y = self.batch()
        self.backward(X, y)
        self.optimizer.observe(*((X[:0], y[:0]) if self.rank == 1 else (X, y)))

    def singular(self):
        X, y = self.batch()
        self.backward(X, y)
        self.optimizer.observe(X, y)
        before = self.optimizer.invert
        try:
            if self.rank == 1:
                self.optimizer.invert = raising
            self.optimizer.step()
        finally:
            self.optimizer.invert = before

    def recorder(self):
        X, y = self.batch()
        self.backward(X, y)
        self.optimizer.observe(X, y)
        before = self.optimizer.record
        try:
            if self.rank == 1:
                self.optimizer.record = raising
            self.optimizer.step()
        finally:
            self.optimizer.record = before

    def unobserved(self):
        self.backward(*self.batch())
        self.optimizer.step()

    def closure(self):
        self.optimizer.step(lambda: 0.0)

    def other_order(self):
        X, y = self.batch()
        self.backward(X, y)
        if self.rank == 0:
            self.optimizer.observe(X, y)
        else:
            self.optimizer.state_dict()

    def other_parameters(self):
        X, y = self.batch()
        self.backward(X, y)
        self.optimizer.observe(X, y)
        try:
            self.model[2].bias.requires_grad_(self.rank == 0)
            self.optimizer.step()
        finally:
            self.model[2].bias.requires_grad_(True)

    def other_rate(self):
        X, y = self.batch()
        self.backward(X, y)
        self.optimizer.observe(X, y)
        group, before = self.optimizer.param_groups[0], self.optimizer.param_groups[0]["lr"]
        try:
            group["lr"] = before * (1 + self.rank)
            self.optimizer.step()
        finally:
            group["lr"] = before

    def frozen_before(self):
        """One rank freezes a layer before its batch is observed."""
        X, y = self.batch()
        try:
            self.model[2].requires_grad_(self.rank == 0)
            self.backward(X, y)
            self.optimizer.observe(X, y)
        finally:
            self.model[2].requires_grad_(True)

    def other_layers(self):
        """The ranks freeze different layers of one shape after the batch was observed."""
        X, y = self.batch()
        self.backward(X, y)
        self.optimizer.observe(X, y)
        layer = self.model[0 if self.rank == 0 else 6]
        try:
            layer.requires_grad_(False)
            self.optimizer.step()
        finally:
            layer.requires_grad_(True)

    def other_shape(self):
        X, y = self.batch()
        self.backward(X, y)
        self.optimizer.observe(X, y)
        before = self.optimizer.invert
        try:
            self.optimizer.invert = lambda M, damping: Transposing(M.inverse(damping))
            self.optimizer.step()
        finally:
            self.optimizer.invert = before

    def state(self):
        matrices = self.optimizer._progress.matrices
        values = {f"matrix {n}": t for n, M in matrices.items() for t in leaves(M)}
        values |= {
            f"previous {i}": s["previous"] for i, s in enumerate(self.optimizer.state.values())
        }
        values |= {"steps": torch.tensor(self.optimizer.steps), "theta": flat(self.model)}
        return copy.deepcopy(values)


REFUSED = {
    "not_a_number": "Rank 1 of 2 refused in 'observe' of step 2",
    "empty": "Rank 1 of 2 refused in 'observe' of step 2",
    "singular": r"Rank 1 of 2 refused in 'inversion' of step 2.*no inverse here",
    "recorder": r"Rank 1 of 2 refused in 'step' of step 2.*no inverse here",
    "unobserved": r"refused in 'step' of step 2.*Call observe\(X, y\) in every step",
    "closure": r"refused in 'step' of step 2.*Pass no closure",
    "other_order": r"rank 0 at '\w+' of step 2, rank 1 at '\w+' of step 2.*same order",
    "other_rate": r"The ranks differ in parameters and groups: .*'lr': 0.1, .*'lr': 0.2",
    "frozen_before": r"rank 0 .*rank 1|The ranks have different layers in 'factors'",
    "other_layers": r"The ranks differ in parameters and groups: .*'0.weight'",
    "other_shape": r"The inverse of block '\w+' makes",
    "other_parameters": r"differ in parameters and groups|Only a part|refused",
}


def refusals(rank, size):
    """What every refusal says, whether anything has changed, and whether the loop goes on."""
    run = Refusals(rank, size)
    found = {}
    for name in REFUSED:
        before = run.state()
        try:
            getattr(run, name)()
            said = "nothing was raised"
        except ValueError as error:
            said = str(error)
        after = run.state()
        kept = set(before) == set(after) and all(torch.equal(before[k], after[k]) for k in before)
        found[name] = said, kept
    run.good()
    return found, equal_everywhere(flat(run.model), size), flat(run.model)


def after_refusals():
    """The parameters of one process that met none of it."""
    model = CASE.model()
    optimizer = CASE.optimizer(model, factor_every=1, inverse_every=1)
    return train(CASE, model, optimizer, steps=3)


# ---- the job -----------------------------------------------------------------------------------

RUNS = {
    **{
        f"ddp {name} {shards}": functools.partial(with_ddp, name=name, shards=shards)
        for name in ("labels-mean", "labels-sum", "ignored-mean")
        for shards in ("equal", "unequal")
    },
    **{
        f"ddp alone {name} {shards}": functools.partial(
            ddp_without_joint_loss, name=name, shards=shards
        )
        for name in ("labels-mean", "labels-sum")
        for shards in ("equal", "unequal")
    },
    "not distributed": not_distributed,
    "through the module": through_the_module,
    "behind its back": behind_its_back,
    "micro-batches with DDP": ddp_micro_batches,
    "update_curvature with DDP": curvature_under_ddp,
    "one overflow": one_overflow,
    "recorder of one": recorder_of_one,
    "unsendable": unsendable,
    **{
        f"promoting {workers}": functools.partial(promoting, workers=workers)
        for workers in (0.0, 1.0)
    },
    **{
        f"more {more}": functools.partial(owner_local_and_more, more=more)
        for more in ("equal", "unequal")
    },
    "fully sharded": fully_sharded,
    "own labels": own_labels,
    "streams of a generator": functools.partial(streams, given=True),
    "streams of PyTorch": functools.partial(streams, given=False),
    "micro-batches mean": functools.partial(micro_batches, reduction="mean"),
    "micro-batches sum": functools.partial(micro_batches, reduction="sum"),
    "epochs": over_epochs,
    "record": functools.partial(recorded, owner_local=False),
    "partly used": partly_used,
    "frozen meanwhile": frozen_meanwhile,
    "update_curvature": started_with_averages,
    "copied": from_a_copy,
    **{
        f"DP-KFAC {shards} {reduction}": functools.partial(
            owner_local, shards=shards, reduction=reduction
        )
        for shards in ("equal", "unequal")
        for reduction in ("mean", "sum")
    },
    "DP-KFAC's record": functools.partial(recorded, owner_local=True),
    **{
        f"over data {net} {reduction}": functools.partial(over_data, net=net, reduction=reduction)
        for net in ("dense", "words", "tied")
        for reduction in ("mean", "sum")
    },
    "no data": no_data,
    **{kind.__name__: functools.partial(mistaken, kind=kind) for kind in MISTAKES},
    "differences": differences,
    "refusals": refusals,
}


def work(rank, size):
    return {name: attempted(functools.partial(run, rank, size)) for name, run in RUNS.items()}
