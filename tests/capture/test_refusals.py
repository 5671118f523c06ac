"""What capture cannot do is refused, with the layer, the value and the way out."""

import warnings
from types import SimpleNamespace

import pytest
import torch
from torch.nn import (
    BatchNorm1d,
    Conv1d,
    CrossEntropyLoss,
    Embedding,
    LayerNorm,
    Linear,
    Module,
    MSELoss,
    Sequential,
)
from torch.nn.functional import linear

from kfac_scratch import KFAC, kfac, layer_ios, over_loader, plan
from kfac_scratch.curvature import diagonal_blocks, ggn
from tests.capture.test_forward_pass import C, D, N, simple
from tests.laws import check_differs, check_equal


def test_parameters_without_a_block_are_named_in_a_warning(device):
    model = Sequential(Linear(D, C), LayerNorm(C)).to(device)
    data = MSELoss(), torch.randn(N, D, device=device), torch.randn(N, C, device=device)
    with pytest.warns(UserWarning, match=r"'1\.weight', '1\.bias'"):
        layer_ios(model, *data)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layer_ios(model, *data, layers=["0"])


def test_a_model_without_supported_layers_is_refused():
    with pytest.raises(ValueError, match="no trainable layer"):
        layer_ios(Sequential(LayerNorm(D)), MSELoss(), torch.randn(N, D), torch.randn(N, D))


def test_a_layer_that_never_runs_is_refused_by_name():
    class Model(Sequential):
        def forward(self, x):
            return self[1](x)

    data = MSELoss(), torch.randn(N, D), torch.randn(N, C)
    with pytest.raises(ValueError, match=r"'0' \(Linear\) never ran.*layers="):
        layer_ios(Model(Linear(D, D), Linear(D, C)), *data)
    assert list(layer_ios(Model(Linear(D, D), Linear(D, C)), *data, layers=["1"])) == ["1"]


def test_a_convolution_without_a_batch_axis_is_refused():
    class Single(Sequential):
        def forward(self, x):
            return self[0](x[:, 0])

    with pytest.raises(ValueError, match=r"fails on 2 of the samples alone.*axis 0"):
        layer_ios(Single(Conv1d(N, N, 1)), MSELoss(), torch.randn(N, 1, 7), torch.randn(N, 7))


def test_an_empty_batch_is_refused():
    model, loss, X, y = simple("cpu")
    with pytest.raises(ValueError, match="batch is empty"):
        layer_ios(model, loss, X[:0], y[:0])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_numbers_are_traced_to_layer_and_datum(bad, device):
    model, loss, X, y = simple(device)
    X[3, 1] = bad
    with pytest.raises(ValueError, match="input of layer '0' is not finite, first for sample 3"):
        layer_ios(model, loss, X, y)
    model, loss, X, y = simple(device)
    with torch.no_grad():
        model[2].weight[0, 0] = bad
    with pytest.raises(ValueError, match="output of layer '2' is not finite, first for sample 0"):
        layer_ios(model, loss, X, y)


def test_batch_statistics_are_refused(device):
    model = Sequential(Linear(D, C), BatchNorm1d(C, affine=False)).to(device)
    data = MSELoss(), torch.randn(N, D, device=device), torch.randn(N, C, device=device)
    with pytest.raises(ValueError, match=r"'1' \(BatchNorm1d\).*model.eval\(\)"):
        layer_ios(model, *data)
    layer_ios(model.eval(), *data)
    no_statistics = BatchNorm1d(C, affine=False, track_running_stats=False).eval()
    with pytest.raises(ValueError, match="statistics of the batch"):
        layer_ios(Sequential(Linear(D, C), no_statistics).to(device), *data)


def test_inference_mode_is_refused_with_the_way_out():
    model, loss, X, y = simple("cpu")
    with torch.inference_mode():
        for capture in (lambda: layer_ios(model, loss, X, y), lambda: plan(model, X)):
            with pytest.raises(ValueError, match=r"inference_mode.*no_grad\(\) may stay"):
                capture()
    with torch.no_grad():
        layer_ios(model, loss, X, y)


def test_another_device_than_the_data_is_refused():
    model, loss, X, y = simple("cpu")
    with pytest.raises(ValueError, match="X is on meta but the model is on cpu"):
        layer_ios(model, loss, X.to("meta"), y)


def test_an_input_modified_after_use_is_refused():
    class Modifies(Sequential):
        def forward(self, x):
            h = self[0](x)
            z = self[1](h)
            h += 1
            return z

    model = Modifies(Linear(D, D), Linear(D, C))
    with pytest.raises(ValueError, match=r"'1' \(Linear\) was modified in place"):
        layer_ios(model, MSELoss(), torch.randn(N, D), torch.randn(N, C))


def test_vectors_of_another_shape_are_refused():
    with pytest.raises(ValueError, match=r"not \[V, \*\(5, 2\)\]"):
        layer_ios(*simple("cpu"), lambda loss, f, y: f)


def test_no_vector_at_a_time_is_refused():
    with pytest.raises(ValueError, match="chunk must be at least 1"):
        layer_ios(*simple("cpu"), chunk=0)


def test_an_operation_that_cannot_be_batched_needs_chunk_1(device):
    class NoVmap(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, g):
            return torch.from_numpy(g.cpu().numpy()).to(g.device)

    class Model(Sequential):
        def forward(self, x):
            return self[1](NoVmap.apply(self[0](x)))

    model = Model(Linear(D, 4), Linear(4, C)).to(device)
    data = MSELoss(), torch.randn(N, D, device=device), torch.randn(N, C, device=device)
    with pytest.raises(RuntimeError, match="pass chunk=1"):
        layer_ios(model, *data, chunk=2)
    exact = diagonal_blocks(model, ggn(Sequential(*model), *data))
    for chunk in (1, None):  # the default finds it out
        check_equal(layer_ios(model, *data, chunk=chunk)["0"].block(), exact["0"])


def test_model_must_return_a_tensor():
    class Tuple(Sequential):
        def forward(self, x):
            return (self[0](x),)

    with pytest.raises(ValueError, match=r"returns a tuple, but it must return one tensor"):
        layer_ios(Tuple(Linear(D, C)), MSELoss(), torch.randn(N, D), torch.randn(N, C))


class Output(SimpleNamespace):
    """What a library's model returns: several tensors in one object."""


class Library(Module):
    """A model with several inputs by name, which returns an object."""

    def __init__(self):
        super().__init__()
        self.words, self.head = Embedding(6, D), Linear(D, C)

    def forward(self, ids, weights=None):
        hidden = (self.words(ids) * weights.unsqueeze(-1)).sum(1)
        return Output(logits=self.head(hidden), hidden=hidden)


class Logits(Module):
    """The way out."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, X):
        return self.model(**X).logits


class Whole(Logits):
    """It hands on what the library's model returns."""

    def forward(self, X):
        return self.model(**X)


class OfOneTensor(Logits):
    """The same function with both inputs in one tensor, as `curvature` takes it."""

    def forward(self, X):
        return self.model(X[:, :3].long(), X[:, 3:]).logits


def test_a_model_that_returns_an_object_is_wrapped():
    X = {"ids": torch.randint(6, (N, 3)), "weights": torch.rand(N, 3)}
    loss, y, library = CrossEntropyLoss(), torch.randint(C, (N,)), Library()
    with pytest.raises(ValueError, match=r"returns a Output, .*self.model\(\*\*X\).logits"):
        layer_ios(Whole(library), loss, X, y)
    model, whole = Logits(library), OfOneTensor(library)
    exact = diagonal_blocks(whole, ggn(whole, loss, torch.cat([*X.values()], 1), y))
    for name, io in layer_ios(model, loss, X, y).items():
        check_equal(io.block(), exact[name])
    over = over_loader(kfac, model, loss, [(X, y)])
    optimizer = KFAC(model, loss)
    optimizer.observe(X, y)
    loss(model(X), y).backward()
    before = library.head.weight.detach().clone()
    optimizer.step()
    assert set(over) == {"model.words", "model.head"}
    check_differs(library.head.weight, before)


def test_tokens_out_of_the_vocabulary():
    model = Sequential(Embedding(4, 3), Linear(3, C))
    with pytest.raises(IndexError):
        layer_ios(model, MSELoss(), torch.tensor([1, 9]), torch.randn(2, C))


class TiedHead(Module):
    """A language model's head that borrows the embedding's weight."""

    def __init__(self, head=None):
        super().__init__()
        self.embed, self.head = Embedding(D, 4), head

    def forward(self, x):
        h = self.embed(x).tanh()
        return linear(h, self.embed.weight) if self.head is None else self.head(h)


class Deeper(TiedHead):
    """With a layer between both."""

    def __init__(self, tied):
        super().__init__(Linear(4, D))
        self.features = Linear(4, 4)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, x):
        return self.head(self.features(self.embed(x)).tanh())


def test_both_layers_of_a_tie_must_be_left_out(device):
    """Leaving out one of the two would leave a use of its weight that nothing explains."""
    data = MSELoss(), torch.randint(D, (N,), device=device), torch.randn(N, D, device=device)
    tied, untied = Deeper(True).to(device), Deeper(False).to(device)
    with pytest.raises(NotImplementedError, match=r"'embed\.weight' is not the sum"):
        layer_ios(tied, *data, layers=["features", "head"])
    untied.load_state_dict(tied.state_dict())
    exact = diagonal_blocks(untied, ggn(untied, *data))
    check_equal(layer_ios(tied, *data, layers=["features"])["features"].block(), exact["features"])


@pytest.mark.parametrize("way_out", ["frozen", "left out"])
def test_the_way_out_of_a_refused_bias_works(way_out, device):
    model = Sequential(Linear(D, D), Linear(D, D), Linear(D, C)).to(device)
    model[1].bias = model[0].bias
    data = MSELoss(), torch.randn(N, D, device=device), torch.randn(N, C, device=device)
    with pytest.raises(ValueError, match="freeze it, or leave both"):
        layer_ios(model, *data)
    if way_out == "frozen":
        model[0].bias.requires_grad_(False)
        exact, layers = diagonal_blocks(model, ggn(model, *data)), None
    else:
        untied, layers = Sequential(Linear(D, D), Linear(D, D), Linear(D, C)).to(device), ["2"]
        untied.load_state_dict(model.state_dict())
        exact = diagonal_blocks(untied, ggn(untied, *data))
    for name, io in layer_ios(model, *data, layers=layers).items():
        check_equal(io.block(), exact[name])


def test_a_weight_used_by_a_function_is_refused(device):
    data = MSELoss(), torch.randint(D, (N,), device=device), torch.randn(N, D, device=device)
    with pytest.raises(
        NotImplementedError, match=r"'embed\.weight' is not the sum.*used somewhere"
    ):
        layer_ios(TiedHead().to(device), *data)
    own = TiedHead(Linear(4, D)).to(device)
    exact = diagonal_blocks(own, ggn(own, *data))
    for name, io in layer_ios(own, *data).items():
        check_equal(io.block(), exact[name])
