import pytest
import torch

from kfac_scratch.matrices.dense import Dense
from kfac_scratch.matrices.diagonal import Diagonal
from kfac_scratch.matrices.kronecker import Kronecker, KroneckerEigen
from kfac_scratch.matrices.kronecker_sum import KroneckerSum
from kfac_scratch.matrices.matrix import LinearMap, Matrix
from tests.laws import check_differs, check_equal, check_matrix, check_spectrum

D_OUT, D_IN = 4, 3
DTYPES = [torch.float64, torch.float32]


def psd(d, rank=None):
    root = torch.randn(d, rank or d + 2)
    return root @ root.T / root.shape[1]


def kronecker():
    return Kronecker(psd(D_IN), psd(D_OUT))


def kronecker_sum():
    """A positive definite sum whose second term is indefinite."""
    second = Kronecker(0.1 * torch.diag(torch.tensor([1.0, -1.0, 0.5])), psd(D_OUT))
    first = Kronecker(psd(D_IN) + torch.eye(D_IN), psd(D_OUT) + torch.eye(D_OUT))
    return KroneckerSum(first, second)


MATRICES = {
    "dense": lambda: Dense(psd(D_OUT * D_IN)),
    "diagonal": lambda: Diagonal(torch.rand(D_OUT, D_IN) + 0.1),
    "kronecker": kronecker,
    "kronecker-low-rank": lambda: Kronecker(psd(D_IN, 1), psd(D_OUT, 2)),
    "kronecker-eigen": lambda: KroneckerEigen(
        torch.linalg.qr(torch.randn(D_IN, D_IN)).Q,
        torch.linalg.qr(torch.randn(D_OUT, D_OUT)).Q,
        torch.rand(D_OUT, D_IN),
    ),
    "kronecker-sum": kronecker_sum,
    "one-by-one": lambda: Kronecker(psd(1), psd(1)),
}


def to(M, *target):
    """A matrix with all its tensors on another device or in another precision."""
    fields = {
        name: value.to(*target) if isinstance(value, torch.Tensor) else to(value, *target)
        for name, value in vars(M).items()
    }
    return type(M)(**fields)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("make", MATRICES.values(), ids=MATRICES)
def test_every_matrix_obeys_the_laws(make, dtype, device):
    M = to(make(), device, dtype)
    assert isinstance(M, Matrix)
    assert isinstance(M.inverse(0.1), LinearMap)
    check_matrix(M, (1, 1) if make is MATRICES["one-by-one"] else (D_OUT, D_IN))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("make", MATRICES.values(), ids=MATRICES)
def test_every_spectrum_is_that_of_the_dense_twin(make, dtype, device):
    M = to(make(), device, dtype)
    if isinstance(M, KroneckerSum):  # has no eigenvalues of its own
        check_equal(M.trace(), M.dense().trace())
        check_equal(M.diagonal(), M.dense().diagonal())
        assert not hasattr(M, "eigenvalues")
    else:
        check_spectrum(M)


def test_kronecker_is_b_kron_a(device):
    M = to(kronecker(), device)
    check_equal(M.dense(), torch.kron(M.B, M.A))
    V = torch.randn(D_OUT, D_IN, device=device)
    check_equal((M @ V).flatten(), torch.kron(M.B, M.A) @ V.flatten())


@pytest.mark.parametrize("transposed", ["QA", "QB"])
def test_bases_may_be_stored_by_rows_or_by_columns(transposed, device):
    M = to(MATRICES["kronecker-eigen"](), device)
    stored = {
        name: t.mT.contiguous().mT if name == transposed else t.contiguous()
        for name, t in vars(M).items()
    }
    check_equal(KroneckerEigen(**stored).dense(), M.dense())


def test_determinant_of_a_kronecker_product(device):
    M = to(kronecker(), device)
    check_equal(M.logdet(), D_IN * torch.logdet(M.B) + D_OUT * torch.logdet(M.A))


def test_inverse_without_damping_is_the_product_of_inverses(device):
    M, V = to(kronecker(), device), torch.randn(D_OUT, D_IN, device=device)
    check_equal(M.inverse(0.0) @ V, torch.linalg.inv(M.B) @ V @ torch.linalg.inv(M.A))


def test_damping_both_factors_is_another_matrix(device):
    """`(B + r I) ⊗ (A + r I)` with `r = sqrt(damping)` has cross terms: not `B ⊗ A + damping I`."""
    M, eye = to(kronecker(), device), torch.eye(D_OUT * D_IN, device=device)
    root = 0.1**0.5
    A, B = M.A + root * torch.eye(D_IN, device=device), M.B + root * torch.eye(D_OUT, device=device)
    check_differs(Kronecker(A, B).dense(), M.dense() + 0.1 * eye)


@pytest.mark.parametrize("make", MATRICES.values(), ids=MATRICES)
def test_damping_is_never_stored(make):
    M = make()
    before = M.dense().clone()
    V = torch.ones(1, 1) if make is MATRICES["one-by-one"] else torch.ones(D_OUT, D_IN)
    first = M.inverse(0.1) @ V
    check_equal(M.inverse(0.1) @ V, first)
    check_equal(M.dense(), before)


@pytest.mark.parametrize("damping", [-0.1, float("nan")])
@pytest.mark.parametrize("make", MATRICES.values(), ids=MATRICES)
def test_negative_damping_is_refused(make, damping):
    with pytest.raises(ValueError, match="damping must be at least 0"):
        make().inverse(damping)


@pytest.mark.parametrize(
    "M",
    [
        Kronecker(torch.zeros(2, 2, dtype=torch.float64), torch.eye(3, dtype=torch.float64)),
        Diagonal(torch.zeros(3, 2, dtype=torch.float64)),
        Dense(torch.zeros(6, 6, dtype=torch.float64)),
    ],
    ids=["kronecker", "diagonal", "dense"],
)
def test_a_singular_matrix_needs_damping(M):
    with pytest.raises(ValueError, match="damping"):
        M.inverse(0.0)
    check_equal(M.inverse(0.5) @ torch.ones(3, 2), torch.full((3, 2), 2.0))


@pytest.mark.parametrize("seed", range(20))
def test_a_singular_factor_is_seen_whatever_the_sign_of_its_round_off(seed, device):
    torch.manual_seed(seed)
    root = torch.randn(3, 5, device=device)
    M = Kronecker(root.T @ root, torch.eye(2, device=device))
    with pytest.raises(ValueError, match="singular"):
        M.inverse(0.0)


def test_samples_have_the_inverse_as_covariance(device):
    """5 standard errors of `samples` draws, entry by entry, under a fixed seed."""
    M, samples = to(kronecker(), device), 20_000
    noise = torch.randn(samples, D_OUT, D_IN, device=device)
    draws = (M.inverse_sqrt(0.3) @ noise).flatten(1)
    target = M.inverse(0.3).dense()
    spread = target.diagonal()
    standard_error = ((target.square() + torch.outer(spread, spread)) / samples).sqrt()
    assert ((draws.T @ draws / samples - target).abs() <= 5 * standard_error).all()
