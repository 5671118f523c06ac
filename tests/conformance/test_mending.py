"""Expressions of a function are replaced in memory, and nothing else, and not for longer."""

import sys

import pytest

from kfac_scratch.conformance.audit.mending import mended

FACTOR = 2


def doubled(x):
    return FACTOR * x


class Counter:
    step = 1

    def __hidden(self, x):
        return x + self.step

    @classmethod
    def of(cls, x):
        return cls.step + x

    def shown(self, x):
        return self.__hidden(x)


def here():
    return sys.modules[__name__]


def test_an_expression_is_replaced_within_the_context_only():
    before = doubled
    with mended(here(), "doubled", ("FACTOR * x", "FACTOR * x + 1")):
        assert here().doubled(3) == 7
    assert here().doubled is before
    assert doubled(3) == 6


def test_globals_of_the_module_are_seen(monkeypatch):
    with mended(here(), "doubled", ("* x", "* x * x")):
        monkeypatch.setattr(here(), "FACTOR", 5)
        assert here().doubled(2) == 20


def test_methods_of_a_class_and_their_decorators_stay_what_they_are():
    with mended(Counter, "of", ("cls.step + x", "cls.step - x")):
        assert Counter.of(3) == -2
    assert Counter.of(3) == 4


def test_a_private_method_is_found_by_its_mangled_name():
    with mended(Counter, "_Counter__hidden", ("x + self.step", "x * 10")):
        assert Counter().shown(3) == 30
    assert Counter().shown(3) == 4


def test_it_is_undone_after_an_error():
    before = Counter.__dict__["shown"]
    with pytest.raises(ZeroDivisionError), mended(Counter, "shown", ("(x)", "(x // 0)")):
        Counter().shown(1)
    assert Counter.__dict__["shown"] is before


@pytest.mark.parametrize("old", ["FACTOR + x", "x"], ids=["absent", "ambiguous"])
def test_another_version_of_the_code_is_an_error(old):
    with pytest.raises(ValueError, match="doubled"), mended(here(), "doubled", (old, "0")):
        pass


def test_patches_of_different_expressions_nest():
    with (
        mended(here(), "doubled", ("FACTOR *", "3 *")),
        mended(here(), "doubled", ("* x", "* x * x")),
    ):
        assert here().doubled(2) == 12
    assert here().doubled(2) == 4
