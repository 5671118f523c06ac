"""What an adapter does in its process decides nothing: verdicts are made in this one."""

import io
import json
import re
import threading

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kfac_scratch.conformance import (
    DenseAnswer,
    EigenAnswer,
    KroneckerAnswer,
    LayerBlock,
    VectorAnswer,
)
from kfac_scratch.conformance.adapters.ours import Adapter as Ours
from kfac_scratch.conformance.cases.families import CASES
from kfac_scratch.conformance.judging import isolation, receiving, sending
from kfac_scratch.conformance.judging.harness import answered, concluded, verdict
from kfac_scratch.conformance.judging.isolation import AdapterFailed, Isolated, Place
from kfac_scratch.conformance.judging.receiving import Garbled, answer_of, capabilities_of
from tests import faulty
from tests.conformance.test_isolation import TESTS

CASE, OTHER = "deep-linear-mse-sum-bias", "deep-linear-mse-mean-bias"
TOKEN = "0123"
A_FAULT = re.compile(
    r"\w*(Error|Exception): "
)  # how the words begin if an exception was not foreseen
MC = next(case for case in CASES.values() if case.fisher == "mc" and "expand" in case.flavours)


@pytest.fixture(autouse=True)
def _here(monkeypatch):
    monkeypatch.chdir(TESTS)


def verdicts(adapter, *cases, timeout=60.0):
    place = Place(f"faulty:{adapter}", timeout=timeout)
    return list(Isolated(place).run([(case, "expand") for case in cases or (CASE,)]))


# ---- in a process of its own ---------------------------------------------------------------------


def test_an_adapter_that_replaces_the_comparison_is_judged_all_the_same():
    assert [r.verdict for r in verdicts("ReplacesComparison", CASE, OTHER)] == ["wrong"] * 2


@pytest.mark.slow
@pytest.mark.parametrize(
    ("adapter", "expected", "words"),
    [
        ("ReplacesVerdict", "wrong", "off by"),
        ("ReplacesFit", "wrong", "off by"),
        ("ReplacesTolerance", "wrong", "off by"),
        ("ReplacesTruth", "wrong", "off by"),
        ("ReplacesEqual", "error", "not deterministic"),
        ("WritesVerdicts", "error", "write into the channel of its answers?"),
        ("Reads", "error", "EOFError"),
        ("Ends", "error", "the process ended: exit status 0"),
        ("Unspeakable", "error", "SilentError: its text cannot be made"),
        ("Prints", "exact", ""),
    ],
)
def test_what_an_adapter_does_decides_nothing(adapter, expected, words):
    first, second = verdicts(adapter, CASE, OTHER, timeout=20.0)
    assert (first.verdict, second.verdict) == (expected, expected)
    assert words in first.words


@pytest.mark.slow
def test_an_answer_that_was_sent_before_the_question_is_an_error_of_its_case_alone():
    first, second = verdicts("WritesFiles", CASE, OTHER)
    assert (first.verdict, second.verdict) == ("error", "wrong")
    assert "an answer to another question" in first.words


@pytest.mark.slow
def test_a_worker_that_closes_its_streams_is_not_waited_for(monkeypatch):
    monkeypatch.setattr(isolation, "ENDING", 0.1)
    (found,) = verdicts("ClosesStreams")
    assert found.verdict == "error"
    assert "it closed the channel of its answers and went on" in found.words


@pytest.mark.slow
def test_a_worker_that_cannot_be_started_again_is_an_error_of_each_case(tmp_path, monkeypatch):
    monkeypatch.setenv("FAULTY_PIDS", str(tmp_path / "once"))
    first, second = verdicts("FailsTheSecondTime", CASE, OTHER)
    assert "exit status 3" in first.words
    assert (second.verdict, second.case) == ("error", OTHER)
    assert "FileExistsError" in second.words


# ---- what is sent --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def right():
    """A right answer to `CASE`, as names, tensors and metadata."""
    answer = answered(Ours(), CASES[CASE], "expand")
    return receiving._opened(sending.answer_file(answer, TOKEN))


def judged(content, case=CASE):
    return concluded(CASES[case], "expand", lambda: answer_of(content, CASES[case], TOKEN))


def test_what_is_sent_is_what_is_received(right):
    found, here = judged(sending.file(*right)), verdict(Ours(), CASES[CASE], "expand")
    assert found.verdict == here.verdict == "exact"
    assert found.scales == here.scales


@pytest.mark.parametrize("case", [CASE, MC.id, "bias-mse-mean", "inverse-exact-conv-pooled"])
def test_a_verdict_is_the_same_by_either_way(case):
    adapter = faulty.Wrong() if case == CASE else Ours()
    flavour = next(iter(CASES[case].flavours))
    here = verdict(adapter, CASES[case], flavour)
    content = sending.answer_file(answered(adapter, CASES[case], flavour), TOKEN)
    there = concluded(CASES[case], flavour, lambda: answer_of(content, CASES[case], TOKEN))
    assert here.verdict == there.verdict
    assert here.words == there.words
    assert here.scales == there.scales


def test_an_answer_to_another_case_is_an_error(right):
    found = judged(sending.file(*right), "deeper-linear-mse-sum")
    assert found.verdict == "error"
    assert "no block for the layers ['fc3']" in found.words


FIRST = "0/joint/fc1"


def _tensors(change):
    return lambda tensors, about: (change(tensors), about)


def _about(**changes):
    return lambda tensors, about: (tensors, about | changes)


def _scales(change):
    def changed(tensors, about):
        return tensors, about | {"scales": json.dumps(change(json.loads(about["scales"])))}

    return changed


def _without(tensors, *words):
    return {name: M for name, M in tensors.items() if not any(w in name for w in words)}


def _each(tensors, change):
    return {name: change(M) for name, M in tensors.items()}


CHANGES = {
    "no layer": (_tensors(lambda t: {}), "0 answers to 2 requests"),
    "one answer": (_tensors(lambda t: _without(t, "1/")), "1 answers to 2 requests"),
    "a gap": (_tensors(lambda t: {n.replace("1/", "2/", 1): M for n, M in t.items()}), "[0, 2]"),
    "a missing layer": (_tensors(lambda t: _without(t, "fc2")), "no block for the layers ['fc2']"),
    "a further layer": (_tensors(lambda t: t | {"0/joint/x": t[FIRST]}), "['x'], which nobody"),
    "the bias alone": (
        _tensors(lambda t: {n.replace("joint", "bias"): M[:, :1, :1] for n, M in t.items()}),
        "got the parts ['bias'], expected",
    ),
    "a part at one time": (
        _tensors(lambda t: _without(t, "1/joint/fc2")),
        "other parts at one time than at another",
    ),
    "a part that there is not": (_tensors(lambda t: t | {"0/all/fc1": t[FIRST]}), "'all/fc1'"),
    "no number": (_tensors(lambda t: t | {"x/joint/fc1": t[FIRST]}), "says no request"),
    "a number of another script": (_tensors(lambda t: t | {"٠/joint/fc1": t[FIRST]}), "no request"),
    "a name alone": (_tensors(lambda t: t | {"": t[FIRST]}), "says no request"),
    "one number": (
        _tensors(lambda t: _each(t, lambda M: M[:1, :1, :1])),
        "shape is [1, 1, 1]",
    ),
    "no numbers": (_tensors(lambda t: _each(t, lambda M: M[:0])), "shape is [0, "),
    "no axes": (_tensors(lambda t: _each(t, lambda M: M.sum())), "the shape is []"),
    "another shape later": (_tensors(lambda t: t | {"1/joint/fc1": t[FIRST][:, 1:]}), "expected"),
    "single precision": (_tensors(lambda t: _each(t, torch.Tensor.float)), "torch.float32 where"),
    "integers": (_tensors(lambda t: _each(t, torch.Tensor.long)), "torch.int64 where"),
    "truths": (_tensors(lambda t: _each(t, torch.Tensor.bool)), "torch.bool where"),
    "NaN": (_tensors(lambda t: _each(t, lambda M: M * float("nan"))), "are not finite"),
    "infinite": (_tensors(lambda t: _each(t, lambda M: M / 0)), "are not finite"),
    "NaN later": (
        _tensors(lambda t: t | {"1/joint/fc1": t[FIRST] * float("nan")}),
        "differs by up to nan",
    ),
    "no token": (lambda t, about: (t, {**about, "token": ""}), "another question"),
    "no outcome": (_about(outcome=""), "the outcome is ''"),
    "a verdict": (_about(outcome="exact"), "the outcome is 'exact'"),
    "scales that are none": (_about(scales="["), "scales: no JSON"),
    "deep scales": (_about(scales=100_000 * "["), "scales: no JSON"),
    "scales as a list": (_about(scales="[]"), "expected an object, got a list"),
    "missing scales": (_about(scales="{}"), "scales of other parts"),
    "a further scale": (_scales(lambda s: s | {"joint/x": 1.0}), "scales of other parts"),
    "a scale of nothing": (_scales(lambda s: s | {"x": 1.0}), "begins with no part"),
    "zero": (_scales(lambda s: dict.fromkeys(s, 0)), "which is no positive number"),
    "a NaN": (_scales(lambda s: dict.fromkeys(s, float("nan"))), "which is no positive number"),
    "a text": (_scales(lambda s: dict.fromkeys(s, "1")), "which is no positive number"),
    "a list": (_scales(lambda s: {key: [1] for key in s}), "which is no positive number"),
    "no float": (_scales(lambda s: dict.fromkeys(s, 10**400)), "which is no positive number"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_an_answer_with_anything_wrong_is_an_error(name, right):
    change, words = CHANGES[name]
    tensors, about = change(*right)
    found = judged(sending.file({n: M.contiguous() for n, M in tensors.items()}, about))
    assert found.verdict == "error", found
    assert words in found.words


@settings(max_examples=200, derandomize=True, deadline=None)
@given(data=st.data())
def test_a_damaged_file_is_never_a_fault_of_the_oracle(data, right):
    content = sending.file(*right)
    at = data.draw(st.integers(0, 1200) | st.integers(0, len(content)))
    put, drop = (
        data.draw(st.binary(max_size=9)),
        data.draw(st.integers(0, 9) | st.just(len(content))),
    )
    found = judged(content[:at] + put + content[at + drop :])
    if len(put) != min(drop, len(content) - at):
        assert found.verdict == "error"
    assert not A_FAULT.match(found.words)


NAMES = st.sampled_from(["0", "1", "2", "joint", "weight", "bias", "fc1", "fc2", "", "x"])
SHAPES = st.lists(st.sampled_from([0, 1, 2, 3, 8, 18]), max_size=4)
SENT = st.dictionaries(
    st.lists(NAMES, max_size=4).map("/".join),
    st.tuples(SHAPES, st.sampled_from(list(sending.DTYPES))),
    max_size=6,
)
JSON = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=3),
)


@settings(max_examples=200, derandomize=True, deadline=None)
@given(sent=SENT, scales=JSON)
def test_a_file_of_any_tensors_is_an_error(sent, scales):
    tensors = {name: torch.ones(shape, dtype=dtype) for name, (shape, dtype) in sent.items()}
    about = {"token": TOKEN, "outcome": "answer", "scales": json.dumps(scales)}
    found = judged(sending.file(tensors, about))
    assert found.verdict == "error"
    assert not A_FAULT.match(found.words)


NUMBERS = st.sampled_from([0.0, 1.0, -1.0, float("nan"), float("inf"), 1e308, 1e-308])
TENSORS = st.one_of(
    st.tuples(SHAPES, st.sampled_from(list(sending.DTYPES)), NUMBERS).map(
        lambda drawn: (
            torch.full(drawn[0], 1).to(drawn[1]) * (drawn[2] if drawn[1].is_floating_point else 1)
        )
    ),
    st.integers(0, 3).map(lambda n: torch.eye(6).repeat(n, 1, 1)),
    st.just(torch.eye(3).to_sparse()),
    st.just(torch.zeros(1, 18, 18, dtype=torch.complex128)),
)
THINGS = st.none() | st.integers() | st.text(max_size=3) | TENSORS | st.just([1]) | st.just(object)
MATRICES = st.one_of(
    st.builds(KroneckerAnswer, TENSORS | THINGS, TENSORS | THINGS),
    st.builds(DenseAnswer, TENSORS | THINGS),
    st.builds(VectorAnswer, TENSORS | THINGS),
    st.builds(EigenAnswer, TENSORS | THINGS, TENSORS | THINGS, TENSORS | THINGS),
    THINGS,
)
BLOCKS = st.one_of(
    st.builds(
        LayerBlock,
        MATRICES,
        weight=MATRICES,
        bias=MATRICES,
        bias_at=st.sampled_from(["last", "first", "behind", "middle", "", None]),
        axes=st.sampled_from(["", "o i", "i o", "o", "o i h w", "x y", 5]),
    ),
    THINGS,
)
RETURNED = st.dictionaries(st.sampled_from(["fc1", "fc2", "x", ""]), BLOCKS) | THINGS


class Returning(Ours):
    """Whatever it is given, in the place of blocks and of scales."""

    returned, documented = None, None

    def blocks(self, request):
        right = super().blocks(request)
        return {**right, **self.returned} if isinstance(self.returned, dict) else self.returned

    def scale(self, request, layer, part):
        return self.documented


@settings(
    max_examples=300,
    derandomize=True,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(returned=RETURNED, documented=THINGS | NUMBERS)
def test_an_adapter_that_returns_anything_has_a_verdict(returned, documented, as_users_run_it):
    """Never an exception, never a pass: no generated block of a layer is right."""
    adapter = Returning()
    adapter.returned, adapter.documented = returned, documented
    found = verdict(adapter, CASES[CASE], "expand")
    replaced = not isinstance(returned, dict) or {"fc1", "fc2"} & returned.keys()
    is_one = documented is None or (type(documented) in (int, float) and documented == 1)
    assert found.verdict == "exact" if is_one and not replaced else not found.passes


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ([], "expected an object"),
        ({"name": 5}, "'name' is 5, expected a str"),
        ({"name": "n", "version": None}, "'version' is None"),
        ({"name": "n", "version": "1", "fishers": "all"}, "'fishers' is 'all', expected a list"),
    ],
)
def test_capabilities_are_checked(value, words):
    with pytest.raises(Garbled) as caught:
        capabilities_of(sending.file({}, {"outcome": "capabilities", "json": json.dumps(value)}))
    assert words in str(caught.value)
    with pytest.raises(Garbled, match="no capabilities, but 'error'"):
        capabilities_of(sending.complaint_file("error", "", TOKEN))


# ---- the pipe ------------------------------------------------------------------------------------


def piped(*contents):
    stream = io.BytesIO()
    for content in contents:
        sending.send(stream, content)
    stream.seek(0)
    return stream


def test_files_come_out_of_the_pipe_as_they_went_in():
    stream = piped(b"one", b"", b"three")
    assert [receiving.next_file(stream, 5) for _ in range(4)] == [b"one", b"", b"three", b""]


@pytest.mark.parametrize("keep", range(1, 19))
def test_a_file_that_is_cut_is_the_end(keep):
    assert receiving.next_file(io.BytesIO(piped(b"one").read()[:keep]), 5) == b""


@pytest.mark.parametrize(
    "noise", [b"x", b"\n", b"\0", b"{}\n", 1000 * b"\0", b"answer", b"answer\r"]
)
def test_noise_before_a_file_is_no_file(noise):
    with pytest.raises(Garbled, match="write into the channel"):
        receiving.next_file(io.BytesIO(noise + piped(b"one").read()), 5)


def test_a_file_longer_than_an_answer_can_be_is_not_read():
    stream = piped(100 * b"x")
    with pytest.raises(Garbled, match="an answer of 100 bytes, where it has 99 at most"):
        receiving.next_file(stream, 99)
    assert stream.read() == 100 * b"x"


def test_every_right_answer_fits():
    for case in [MC, CASES[CASE]]:
        content = sending.answer_file(answered(Ours(), case, "expand"), TOKEN)
        assert len(content) <= receiving.most_bytes(case) < 2**25


def test_what_nobody_wants_is_not_read():
    wanted, files, stream = isolation.Queue(), isolation.Queue(), piped(*100 * [b"x"])
    reader = threading.Thread(target=isolation._read, args=(stream, wanted, files), daemon=True)
    reader.start()
    wanted.put(5)
    assert files.get(timeout=10) == b"x"
    wanted.put(0)
    reader.join(10)
    assert not reader.is_alive()
    assert files.empty()
    assert stream.tell() == 17


def test_an_adapter_that_sends_something_else_at_the_start_cannot_be_loaded(monkeypatch):
    monkeypatch.setattr(isolation.Process, "ask", lambda *_: sending.file({}, {}))
    with pytest.raises(AdapterFailed, match="no capabilities, but None"):
        isolation.start(Place("faulty:Scaled"))


# ---- random labels -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("factor", "words"),
    [
        (lambda seed: float("nan") if seed else 1.0, "are not finite"),
        (lambda seed: float("inf") if seed else 1.0, "are not finite"),
        (lambda seed: 1e200 if seed else 1.0, "draws spread so much"),
        (lambda seed: 1 + 50 * (-1) ** seed, "draws spread so much"),  # right in the mean
    ],
)
def test_draws_whose_mean_says_nothing_do_not_pass(factor, words):
    adapter = faulty.Spread()
    adapter.factor = factor
    found = verdict(adapter, MC, "expand")
    assert found.verdict == "error"
    assert words in found.words
