"""The checks of chapters accept rounding and nothing else."""

import math

import pytest
import torch

from kfac_scratch.checks import assert_exact, largest_error, relative_error, set_up

EXPECTED = torch.tensor([[1.0, -4.0], [2.0, 0.0]])


@pytest.fixture
def restored():
    """PyTorch's defaults as they were."""
    dtype, device = torch.get_default_dtype(), torch.get_default_device()
    yield
    torch.set_default_dtype(dtype)
    torch.set_default_device(None if device.type == "cpu" else device)


def off_by(share: float, dtype=torch.float64):
    """The expected matrix with an error in one entry, as a share of the largest entry."""
    actual = EXPECTED.to(dtype).clone()
    actual[1, 1] += 4 * share
    return actual, EXPECTED.to(dtype)


def test_errors_are_relative_to_what_is_expected(device):
    actual, expected = (x.to(device) for x in off_by(0.25))
    assert largest_error(actual, expected) == 0.25
    assert math.isclose(relative_error(actual, expected), 1 / 21**0.5)
    assert largest_error(expected, expected) == relative_error(expected, expected) == 0.0
    assert relative_error(0 * expected, expected) == 1.0


@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
def test_errors_do_not_depend_on_the_scale(scale):
    actual, expected = off_by(0.25)
    for error in (largest_error, relative_error):
        assert math.isclose(error(scale * actual, scale * expected), error(actual, expected))


def test_exact_is_ten_digits_of_the_largest_entry():
    assert_exact(*off_by(0.9e-10))
    with pytest.raises(AssertionError, match=r"off by 1\.1e-10 .* at most 1\.0e-10"):
        assert_exact(*off_by(1.1e-10))


def test_the_tolerance_can_be_stricter():
    assert_exact(*off_by(0.9e-12), tolerance=1e-12)
    with pytest.raises(AssertionError):
        assert_exact(*off_by(1.1e-12), tolerance=1e-12)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_a_number_is_never_exact(bad):
    broken = EXPECTED.clone()
    broken[0, 0] = bad
    for pair in ((broken, EXPECTED), (EXPECTED, broken), (broken, broken)):
        with pytest.raises(AssertionError):
            assert_exact(*pair)


@pytest.mark.parametrize("check", [assert_exact, largest_error, relative_error])
@pytest.mark.parametrize("other", [EXPECTED[0], EXPECTED[None], EXPECTED.flatten(), EXPECTED[:1]])
def test_nothing_is_broadcast(check, other):
    with pytest.raises(AssertionError, match="shapes differ"):
        check(other, EXPECTED)


@pytest.mark.parametrize("check", [assert_exact, largest_error, relative_error])
@pytest.mark.parametrize("nothing", [torch.zeros(2, 3), torch.zeros(0, 3), torch.tensor(0.0)])
def test_agreeing_with_zero_proves_nothing(check, nothing):
    with pytest.raises(AssertionError, match="prove nothing"):
        check(nothing, nothing)


def test_numbers_and_what_autograd_tracks_can_be_compared():
    number = torch.tensor(2.0, requires_grad=True)
    assert_exact(number, torch.tensor(2.0))
    assert largest_error(number + 1, number) == relative_error(number + 1, number) == 0.5


def test_set_up_repeats(restored):
    set_up()
    first = torch.randn(3)
    set_up(1)
    other = torch.randn(3)
    set_up()
    assert torch.equal(first, torch.randn(3))
    assert not torch.equal(first, other)
    assert first.dtype == torch.float64
    assert first.is_cuda == torch.cuda.is_available()


def test_set_up_takes_another_dtype_and_device(restored):
    set_up(dtype=torch.float32, device="cpu")
    assert torch.zeros(1).dtype == torch.float32
    assert torch.zeros(1).device.type == "cpu"
