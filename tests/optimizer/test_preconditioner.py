import pytest
import torch
from torch.nn import Conv1d, Embedding, Flatten, LayerNorm, Linear, MSELoss, Sequential, Tanh

from kfac_scratch import Dense, kfac, layer_groups, layer_ios, preconditioner
from kfac_scratch.curvature import block_index, ggn
from kfac_scratch.optimizer.preconditioner import inverses
from tests.laws import check_equal

DAMPING = 0.1


def problem(device):
    torch.manual_seed(0)
    model = Sequential(Conv1d(4, 6, 3, groups=2), Tanh(), Flatten(), Linear(18, 2)).to(device)
    return model, MSELoss(), torch.randn(7, 4, 5, device=device), torch.randn(7, 2, device=device)


def gradients(model, loss, X, y):
    wanted = dict(model.named_parameters())
    found = torch.autograd.grad(loss(model(X), y), list(wanted.values()))
    return dict(zip(wanted, found, strict=True))


@pytest.mark.everywhere
def test_step_solves_the_block_diagonal_system(device):
    """With exact blocks, the step is the dense block-diagonal natural-gradient step."""
    model, loss, X, y = problem(device)
    grads = gradients(model, loss, X, y)
    layer_groups = {name: io.block() for name, io in layer_ios(model, loss, X, y).items()}
    inverses = {name: Dense(M).inverse(DAMPING) for name, M in layer_groups.items()}
    step = preconditioner(model, inverses)(grads)
    G = ggn(model, loss, X, y)
    kept = torch.zeros_like(G)
    for index in block_index(model).values():
        i = index.flatten()
        kept[i.unsqueeze(1), i] = G[i.unsqueeze(1), i]
    flat = torch.cat([g.flatten() for g in grads.values()])
    expected = torch.linalg.solve(kept + DAMPING * torch.eye(len(G), device=device), flat)
    check_equal(torch.cat([step[name].flatten() for name in grads]), expected)
    assert {n: s.shape for n, s in step.items()} == {n: g.shape for n, g in grads.items()}


def test_step_undoes_the_damped_product(device):
    model, *data = problem(device)
    grads = gradients(model, *data)
    ms = {name: kfac(io) for name, io in layer_ios(model, *data).items()}
    forward = preconditioner(model, ms)(grads)
    damped = {name: forward[name] + DAMPING * grads[name] for name in grads}
    back = preconditioner(model, {name: M.inverse(DAMPING) for name, M in ms.items()})(damped)
    for name in grads:
        check_equal(back[name], grads[name])


@pytest.mark.everywhere
def test_embedding_in_its_own_layout(device):
    model = Sequential(Embedding(5, 3), Linear(3, 2)).to(device)
    X, y = torch.randint(5, (7,), device=device), torch.randn(7, 2, device=device)
    grads = gradients(model, MSELoss(), X, y)
    io = layer_ios(model, MSELoss(), X, y)
    step = preconditioner(model, {n: Dense(i.block()).inverse(DAMPING) for n, i in io.items()})
    eye = torch.eye(15, device=device)
    W = grads["0.weight"].T
    expected = torch.linalg.solve(io["0"].block() + DAMPING * eye, W.flatten()).reshape(3, 5).T
    check_equal(step(grads)["0.weight"], expected)


def test_parameters_without_a_block_need_a_rule(device):
    model = Sequential(Linear(3, 3), LayerNorm(3)).to(device)
    data = MSELoss(), torch.randn(5, 3, device=device), torch.randn(5, 3, device=device)
    ios = layer_ios(model, *data, layers=["0"])
    maps, grads = {n: kfac(io) for n, io in ios.items()}, gradients(model, *data)
    with pytest.raises(ValueError, match=r"'1.weight', '1.bias'"):
        preconditioner(model, maps)(grads)
    step = preconditioner(model, maps, rest=lambda v: 2 * v)(grads)
    check_equal(step["1.bias"], 2 * grads["1.bias"])


def test_maps_must_belong_to_the_blocks(device):
    model, *data = problem(device)
    maps = {name: kfac(io) for name, io in layer_ios(model, *data).items()}
    del maps["3"]
    with pytest.raises(ValueError, match=r"without a map: \['3'\]"):
        preconditioner(model, maps)
    with pytest.raises(ValueError, match=r"without a block: \['5'\]"):
        preconditioner(model, maps | {"3": maps["0[0]"], "5": maps["0[0]"]})


# ---- inverses ---------------------------------------------------------------------------------


def test_inverses_have_the_damping_of_their_block(device):
    model = Sequential(Linear(5, 4), Linear(4, 3)).to(device)
    found = layer_groups(model)
    matrices = {
        name: Dense(torch.eye(b.matrices(dict(model.named_parameters()))[0].numel(), device=device))
        for b in found
        for name in b.names
    }
    damping = {"0.weight": 1.0, "0.bias": 1.0, "1.weight": 3.0, "1.bias": 3.0}
    result = inverses(found, matrices, damping)
    check_equal(result["0"].dense(), matrices["0"].dense() / 2)
    check_equal(result["1"].dense(), matrices["1"].dense() / 4)
    with pytest.raises(ValueError, match=r"block '0' are in groups with the dampings \[1.0, 2.0\]"):
        inverses(found, matrices, damping | {"0.bias": 2.0})
    with pytest.raises(ValueError, match=r"block '0' has no inverse with damping 0\. "):
        inverses(
            found, {n: Dense(0 * M.M) for n, M in matrices.items()}, dict.fromkeys(damping, 0.0)
        )
