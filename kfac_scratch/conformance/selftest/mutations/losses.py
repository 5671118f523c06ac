"""What the loss says: Hessians, likelihoods, divisors."""

from kfac_scratch.conformance.selftest.mutations.mutant import Mutant
from kfac_scratch.conformance.vocabulary import Flavour

CE, MSE, BCE = "mlp-cross-entropy-sum", "mlp-mse-sum", "mlp-bce-sum"


def losses(name: str, before: str, after: str, case: str, flavour: Flavour = "expand") -> Mutant:
    """A mutant of `losses`."""
    return Mutant(name, before, after, (case, flavour))


MUTANTS = [
    losses("half the squared error", "2**0.5).diag_embed()", "1.0).diag_embed()", MSE),
    losses("twice the squared error", "2**0.5).diag_embed()", "2.0).diag_embed()", MSE),
    losses(
        "softmax over the batch",
        "p = rows.softmax(-1)\n            S =",
        "p = rows.softmax(0)\n            S =",
        CE,
    ),
    losses(
        "the first datum's prediction for all",
        "p = rows.softmax(-1)\n            S =",
        "p = rows[:1].softmax(-1).expand_as(rows)\n            S =",
        CE,
    ),
    losses(
        "the softmax's Hessian without its outer product",
        "p.sqrt().diag_embed() - p.unsqueeze(-1) * p.sqrt().unsqueeze(-2)",
        "p.sqrt().diag_embed()",
        CE,
    ),
    losses(
        "the softmax's root transposed",
        "p.unsqueeze(-1) * p.sqrt().unsqueeze(-2)",
        "p.unsqueeze(-2) * p.sqrt().unsqueeze(-1)",
        CE,
    ),
    losses(
        "probabilities for their roots",
        "S = p.sqrt().diag_embed() - p.unsqueeze(-1) * p.sqrt().unsqueeze(-2)",
        "S = p.diag_embed() - p.unsqueeze(-1) * p.unsqueeze(-2)",
        CE,
    ),
    losses(
        "p^2 for p (1 - p)",
        "(rows.sigmoid() * (-rows).sigmoid()).sqrt()",
        "(rows.sigmoid() * rows.sigmoid()).sqrt()",
        BCE,
    ),
    losses(
        "p (1 - p) without its root",
        "(rows.sigmoid() * (-rows).sigmoid()).sqrt()",
        "(rows.sigmoid() * (-rows).sigmoid())",
        BCE,
    ),
    losses(
        "weights for their roots",
        "S = weight.sqrt().unsqueeze(-1) * S",
        "S = weight.unsqueeze(-1) * S",
        "class-weights-mlp-sum",
    ),
    losses(
        "one vector per class for all positions",
        "    if P > 1:\n",
        "    if False:\n",
        "attention-tokens-mse",
    ),
    losses(
        "rows for columns of the root",
        "return S.movedim(-1, 0)",
        "return S.movedim(-2, 0)",
        CE,
    ),
    losses(
        "the last axis for axis 1",
        "f = f.movedim(1, -1)\n    elif",
        "pass\n    elif",
        "tokens-cross-entropy-all-sum",
    ),
    losses(
        "a mean over the batch only",
        "float(f.numel())\n    if y.",
        "float(len(f))\n    if y.",
        "last-layer-mse-tanh-mean",
    ),
    losses(
        "a mean over everything, classes included",
        "    return float(D)\n",
        "    return float(f.numel())\n",
        "mlp-cross-entropy-mean",
    ),
    losses(
        "ignored positions counted",
        "D = (weights[y.where(kept & ~wrong, 0)] * kept).sum()",
        "D = weights[y.where(kept & ~wrong, 0)].sum()",
        "tokens-cross-entropy-ignored-mean",
    ),
    losses(
        "ignored positions not ignored",
        "return (weight * kept).reshape(len(f), -1, 1) / D",
        "return weight.reshape(len(f), -1, 1) / D",
        "tokens-cross-entropy-ignored-sum",
    ),
    losses(
        "class weights left out of the divisor",
        "if loss.weight is None else loss.weight.double()",
        "if True else loss.weight.double()",
        "class-weights-mlp-mean",
    ),
    losses(
        "class weights left out of the Hessian",
        "w = f.new_ones(C) if loss.weight is None else loss.weight.to(f.dtype)",
        "w = f.new_ones(C)",
        "class-weights-mlp-sum",
    ),
    losses(
        "pos_weight ignored",
        "positive = 1.0 if loss.pos_weight is None else loss.pos_weight",
        "positive = 1.0",
        "pos-weight-mlp-sum",
    ),
    losses(
        "pos_weight for the negatives",
        "weight = positive * y + (1 - y)",
        "weight = y + positive * (1 - y)",
        "pos-weight-mlp-sum",
    ),
    losses(
        "a sum divided like a mean",
        'if loss.reduction == "sum":\n        return 1.0',
        'if loss.reduction == "total":\n        return 1.0',
        "empirical-constant-cross-entropy-sum",
    ),
    losses(
        "the loss averaged over samples",
        "scale = _hessian_weights(loss, f, y) / samples",
        "scale = _hessian_weights(loss, f, y) / samples**2",
        "sampled-mse-mean",
    ),
    losses(
        "labels drawn uniformly",
        "drawn = p.flatten(0, 1).multinomial(",
        "drawn = torch.ones_like(p).flatten(0, 1).multinomial(",
        "sampled-cross-entropy-mean",
    ),
    losses(
        "a Gaussian of variance 1",
        "return 2**0.5 * normal",
        "return 2.0 * normal",
        "sampled-mse-mean",
    ),
    losses(
        "the same draw for every seed",
        "normal = rows.new_empty(samples, *rows.shape).normal_(generator=generator)",
        "normal = torch.ones(samples, *rows.shape).to(rows)",
        "sampled-mse-mean",
    ),
    losses(
        "the model's most likely labels",
        "return p - torch.bernoulli(p, generator=generator)",
        "return p - (p + 1e-9 * torch.rand(p.shape, generator=generator).to(p) > 0.5).to(p)",
        "sampled-bce-sum",
    ),
    losses(
        "gradients of the mean loss for those of a datum",
        "return D**0.5 * gradient.unsqueeze(0)",
        "return gradient.unsqueeze(0)",
        "empirical-mlp-cross-entropy-mean",
    ),
    losses(
        "gradients of the sum for those of the mean",
        "return D**0.5 * gradient.unsqueeze(0)",
        "return D * gradient.unsqueeze(0)",
        "empirical-mlp-cross-entropy-mean",
    ),
    losses(
        "the empirical Fisher taken for the Fisher",
        "    S = _class_vectors(loss, f, y)  # [C, N, P, C]\n",
        "    return empirical(loss, f, y)\n    S = _class_vectors(loss, f, y)  # [C, N, P, C]\n",
        "one-datum-mse-tanh-mean",
    ),
]
