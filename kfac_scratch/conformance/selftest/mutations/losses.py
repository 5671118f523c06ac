"""What the loss says: Hessians, likelihoods, divisors."""

from kfac_scratch.conformance.selftest.mutations.mutant import Mutant
from kfac_scratch.conformance.vocabulary import Flavour

CE, MSE, BCE = "mlp-cross-entropy-sum", "mlp-mse-sum", "mlp-bce-sum"


def losses(name: str, before: str, after: str, case: str, flavour: Flavour = "expand") -> Mutant:
    """A mutant of `losses`."""
    return Mutant(name, before, after, (case, flavour))


MUTANTS = [
    losses(
        "half the squared error", "torch.full_like(rows, 2**0.5)", "torch.full_like(rows, 1.0)", MSE
    ),
    losses(
        "twice the squared error",
        "torch.full_like(rows, 2**0.5)",
        "torch.full_like(rows, 2.0)",
        MSE,
    ),
    losses(
        "softmax over the batch",
        "logp = rows.log_softmax(-1)",
        "logp = rows.log_softmax(0)",
        CE,
    ),
    losses(
        "the first datum's prediction for all",
        "logp = rows.log_softmax(-1)",
        "logp = rows[:1].log_softmax(-1).expand_as(rows)",
        CE,
    ),
    losses(
        "the softmax's Hessian without its outer product",
        "return size * (own - later)",
        "return logp.gather(2, index).div(2).exp() * own",
        CE,
    ),
    losses(
        "the softmax's root transposed",
        "classes > c.unsqueeze(1), logp - rest",
        "classes < c.unsqueeze(1), logp - rest",
        CE,
    ),
    losses(
        "probabilities for their roots",
        "size = ((logp.gather(2, index) + rest - here) / 2).exp()",
        "size = (logp.gather(2, index) + rest - here).exp()",
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
        "columns = self.weight[:, p].sqrt() *",
        "columns = self.weight[:, p] *",
        "class-weights-mlp-sum",
    ),
    losses(
        "every vector at all positions",
        "S[torch.arange(len(v), device=rows.device), :, p] = columns.transpose(0, 1)\n",
        "S[:] = columns.transpose(0, 1).unsqueeze(2)\n",
        "attention-tokens-mse",
    ),
    losses(
        "the last class's column for the first's",
        "c, p = v // P, v % P",
        "c, p = v // P + 1, v % P",
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
        "the sum of entries' weights for their number",
        'return 1.0 if loss.reduction == "sum" else float(f.numel())\n    if y.',
        'w = getattr(loss, "weight", None)\n'
        "        terms = f.numel() if w is None else w.expand_as(f).sum()\n"
        '        return 1.0 if loss.reduction == "sum" else float(terms)\n    if y.',
        "entry-weights-mlp-mean",
    ),
    losses(
        "a mean over everything, classes included",
        "    return float(D)\n",
        "    return float(f.numel())\n",
        "mlp-cross-entropy-mean",
    ),
    losses(
        "ignored positions counted",
        "D = kept.sum()",
        "D = torch.ones_like(kept).sum()",
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
        "if loss.weight is None:\n        D = kept",
        "if True:\n        D = kept",
        "class-weights-mlp-mean",
    ),
    losses(
        "class weights left out of the Hessian",
        "w = f.new_ones(C) if loss.weight is None else loss.weight.to(f.dtype)",
        "w = f.new_ones(C)",
        "class-weights-mlp-sum",
    ),
    losses(
        "label smoothing left out of the weights",
        "weight = (1 - smoothing) * w[label] + smoothing * w.mean()",
        "weight = w[label]",
        "label-smoothing-class-weights-mlp-sum",
    ),
    losses(
        "the weight of the most likely class",
        "return (soft * w).sum(-1)",
        "return (soft * w).amax(-1)",
        "probabilities-class-weights-sum",
    ),
    losses(
        "every class of a probability as a term",
        "float(f.numel() / f.shape[1])",
        "float(f.numel())",
        "probabilities-cross-entropy-mean",
    ),
    losses(
        "weights of entries ignored",
        "weight = loss.weight * weight",
        "pass",
        "entry-weights-mlp-mean",
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
        "weight = _hessian_weights(loss, f, y) / samples",
        "weight = _hessian_weights(loss, f, y) / samples**2",
        "sampled-mse-mean",
    ),
    losses(
        "labels drawn uniformly",
        "drawn = p.multinomial(",
        "drawn = torch.ones_like(p).multinomial(",
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
        "return torch.bernoulli(p, generator=generator)",
        "return (p + 1e-9 * torch.rand(p.shape, generator=generator).to(p) > 0.5).to(p)",
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
        "    return HessianRoot(loss, ",
        "    return empirical(loss, f, y)\n    return HessianRoot(loss, ",
        "one-datum-mse-tanh-mean",
    ),
]
