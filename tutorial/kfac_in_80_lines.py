"""KFAC in 80 lines of PyTorch, beside Adam. Needs torch alone: python kfac_in_80_lines.py
KFAC replaces the curvature (exact Fisher) of a linear layer by B ⊗ A, where A is the mean of
a aᵀ over its inputs a, and B the sum of g gᵀ over what the loss sends back to its outputs, g."""

import torch
from torch.nn import Linear, Sequential, Tanh
from torch.nn.functional import cross_entropy, mse_loss


def cross_entropy_vectors(f):  # exact Fisher of a loss that is a mean over N examples
    p = f.detach().softmax(1)  # [N, C]: what the model predicts; no label of the data
    gradients = p - torch.eye(p.shape[1])[:, None]  # [C, N, C]: of -log p_c for all c
    return (p.T[:, :, None] / len(p)) ** 0.5 * gradients  # roots, since g gᵀ squares them


class KFAC:
    def __init__(self, model, lr, damping, decay=0.95):
        self.layers = [layer for layer in model if isinstance(layer, Linear)]
        self.lr, self.damping, self.decay = lr, damping, decay
        for layer in self.layers:
            layer.register_forward_hook(self.record)

    def record(self, layer, args, output):  # a bias is a weight with input 1
        layer.a = torch.cat([args[0].detach(), torch.ones(len(output), 1)], 1)
        layer.z = output  # [N, outputs], and a is [N, inputs + 1]

    def observe(self, f, vectors):  # before backward() frees the graph
        z = [layer.z for layer in self.layers]
        gs = torch.autograd.grad(f, z, vectors, retain_graph=True, is_grads_batched=True)
        for layer, g in zip(self.layers, gs, strict=True):  # g: [C, N, outputs]
            A = layer.a.T @ layer.a / len(layer.a)  # a mean
            B = torch.einsum("cni,cnj->ij", g, g)  # a sum: the loss's 1/N is in g
            layer.A = A.lerp(getattr(layer, "A", A), self.decay)  # running averages
            layer.B = B.lerp(getattr(layer, "B", B), self.decay)

    @torch.no_grad()
    def step(self):  # subtract lr (B ⊗ A + damping I)⁻¹ gradient
        for layer in self.layers:
            (eig_B, Q_B), (eig_A, Q_A) = map(torch.linalg.eigh, (layer.B, layer.A))
            gradient = torch.cat([layer.weight.grad, layer.bias.grad[:, None]], 1)
            scaled = (Q_B.T @ gradient @ Q_A) / (eig_B[:, None] * eig_A + self.damping)
            step = self.lr * Q_B @ scaled @ Q_A.T
            layer.weight -= step[:, :-1]
            layer.bias -= step[:, -1]


def train(lr, damping=None, seed=0, steps=100):  # with KFAC; without damping, with Adam
    torch.manual_seed(seed)
    model = Sequential(Linear(10, 16), Tanh(), Linear(16, 16), Tanh(), Linear(16, 3))
    adam, losses = torch.optim.Adam(model.parameters(), lr), []
    optimizer = KFAC(model, lr, damping) if damping else adam
    for _ in range(steps):
        X = torch.randn(256, 10)  # new in every step: the loss is on unseen examples
        f, y = model(X), (X[:, :3] + X[:, 3:6].abs()).argmax(1)  # three classes
        losses.append(cross_entropy(f, y))
        if damping:
            optimizer.observe(f, cross_entropy_vectors(f))
        model.zero_grad()
        losses[-1].backward()
        optimizer.step()
    return torch.stack(losses).detach()


def check_exactness():  # no activations, squared error: B ⊗ A is a layer's Hessian
    model = Sequential(Linear(5, 4), Linear(4, 3), Linear(3, 2))
    kfac, X, y = KFAC(model, lr=1, damping=1), torch.randn(11, 5), torch.randn(11, 2)
    kfac.observe(model(X), (2 / y.numel()) ** 0.5 * torch.eye(2)[:, None].expand(-1, 11, 2))
    hessian = torch.autograd.functional.hessian(
        lambda W: mse_loss(model[2](model[1].a @ W.T), y), torch.zeros(3, 5)
    )
    torch.testing.assert_close(torch.kron(model[1].B, model[1].A), hessian.reshape(15, 15))


if __name__ == "__main__":
    torch.set_default_dtype(torch.float64)
    for setting in [(0.01,), (0.02,), (0.05,), (0.1, 0.003), (0.1, 0.01), (0.1, 0.03)]:
        means = train(*setting).view(5, 20).mean(1)  # of steps 1 to 20, 21 to 40, and so on
        print("KFAC" if setting[1:] else "Adam", setting, *(f"{x:.2f}" for x in means))
    check_exactness()
    print("B ⊗ A is exact for a network of linear layers with squared error")
