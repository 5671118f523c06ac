"""Adapters that misbehave, each in its own way; the oracle must say how and go on."""

import ctypes
import json
import os
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import torch

from kfac_scratch.conformance import KroneckerAnswer, LayerBlock, NotSupported
from kfac_scratch.conformance.adapters.ours import Adapter as Ours
from kfac_scratch.conformance.cases import expectations
from kfac_scratch.conformance.cases.families import CASES
from kfac_scratch.conformance.judging import harness, judge, sending, truth
from kfac_scratch.conformance.judging.judge import Result
from kfac_scratch.conformance.vocabulary import FLAVOURS


class Scaled(Ours):
    """Right up to a scale, which the documentation states, denies or does not mention."""

    documented = 1.0

    def factor(self, request, name):
        return 2.0

    def scale(self, request, layer, part):
        return self.documented

    def blocks(self, request):
        return {
            name: LayerBlock(KroneckerAnswer(b.joint.A, self.factor(request, name) * b.joint.B))
            for name, b in super().blocks(request).items()
        }


class Separate(Ours):
    """Weight and bias by themselves, scaled differently."""

    scales = (1.0, 1.0)

    def blocks(self, request):
        found = {}
        for name, b in super().blocks(request).items():
            A, B = b.joint.A, b.joint.B
            weight = KroneckerAnswer(A[:, :-1, :-1], self.scales[0] * B)
            found[name] = LayerBlock(
                weight=weight, bias=KroneckerAnswer(A[:, -1:, -1:], self.scales[1] * B)
            )
        return found


class Changed(Ours):
    """One change to every block."""

    def change(self, request, block):
        raise NotImplementedError

    def blocks(self, request):
        return {n: self.change(request, b) for n, b in super().blocks(request).items()}


class NotFinite(Changed):
    def change(self, request, block):
        return replace(block, joint=KroneckerAnswer(block.joint.A * float("nan"), block.joint.B))


class WrongShape(Changed):
    def change(self, request, block):
        return replace(block, joint=KroneckerAnswer(block.joint.A[:, 1:, 1:], block.joint.B))


class WrongType(Changed):
    def change(self, request, block):
        return block.joint.dense() if hasattr(block.joint, "dense") else block.joint


class WrongParts(Changed):
    def change(self, request, block):
        return LayerBlock(weight=block.joint)


class WrongAxes(Changed):
    def change(self, request, block):
        return replace(block, axes="o i q")


class SinglePrecision(Changed):
    def change(self, request, block):
        return replace(block, joint=KroneckerAnswer(block.joint.A.float(), block.joint.B.float()))


class Random(Changed):
    def change(self, request, block):
        noise = 1 + 1e-6 * torch.rand_like(block.joint.B)
        return replace(block, joint=KroneckerAnswer(block.joint.A, block.joint.B * noise))


class Forgetful(Ours):
    def blocks(self, request):
        found = dict(super().blocks(request))
        found.popitem()
        return found


class NoMapping(Ours):
    def blocks(self, request):
        return list(super().blocks(request).values())


class Raising(Ours):
    def blocks(self, request):
        raise RuntimeError("out of ideas")


class Refusing(Ours):
    def blocks(self, request):
        raise NotSupported("only on Sundays")


class Crashing(Ours):
    def blocks(self, request):
        if request.loss.reduction == "sum":
            ctypes.string_at(0)  # a segmentation fault
        return super().blocks(request)


class Hanging(Ours):
    def blocks(self, request):
        if request.loss.reduction == "sum":
            time.sleep(1000)
        return super().blocks(request)


class Talking(Ours):
    def blocks(self, request):
        print('{"case": "nonsense"}')
        return super().blocks(request)


class Accumulating(Ours):
    """Damping is added to something that is kept: it grows with every request."""

    kept = 0.0

    def blocks(self, request):
        self.kept += 0.1
        return {
            n: LayerBlock(
                KroneckerAnswer(b.joint.A, b.joint.B + self.kept * torch.eye(b.joint.B.shape[-1]))
            )
            for n, b in super().blocks(request).items()
        }


class NoCapabilities(Ours):
    def capabilities(self):
        return {"name": "nothing"}


class Spawning(Ours):
    """It starts a process, notes both numbers in a file, and hangs."""

    def blocks(self, request):
        child = subprocess.Popen(["sleep", "1000"])
        Path(os.environ["FAULTY_PIDS"]).write_text(f"{os.getpid()} {child.pid}")
        time.sleep(1000)


class Babbling(Ours):
    """Its reason holds half of a surrogate pair, controls, and 50 MB."""

    def blocks(self, request):
        raise RuntimeError("\udc80 \x00 \x1b[31m" + 50_000_000 * "x")


# ---- adapters that work against the oracle -------------------------------------------------------


class Wrong(Changed):
    """No scale mends it."""

    def change(self, request, block):
        B = block.joint.B.clone()
        B[:, 0, 0] += 1
        return replace(block, joint=KroneckerAnswer(block.joint.A, B))


def acquitted(*arguments, **options):
    """What a judge returns who has been replaced."""
    case = next(a for a in arguments if hasattr(a, "theorem"))
    return Result(case.id, next(a for a in arguments if a in FLAVOURS), "exact")


class ReplacesComparison(Wrong):
    def blocks(self, request):
        harness.compared = harness.judged = acquitted
        return super().blocks(request)


class ReplacesVerdict(Wrong):
    def blocks(self, request):
        sys.modules["__main__"].verdict = harness.verdict = harness.concluded = acquitted
        return super().blocks(request)


class ReplacesFit(Wrong):
    def blocks(self, request):
        judge.fit = lambda got, expected: judge.Fit(1.0, 0.0, 0.0)
        return super().blocks(request)


class ReplacesTolerance(Wrong):
    def blocks(self, request):
        expectations.TOLERANCES["float64"] = 1e9
        return super().blocks(request)


class ReplacesTruth(Wrong):
    """The truth becomes what it says itself."""

    def blocks(self, request):
        found = super().blocks(request)
        truth.Columns.right = lambda columns, data: torch.einsum(
            "gop,gij->goipj", found[columns.op.name].joint.B, found[columns.op.name].joint.A
        ).reshape(columns.F.shape)
        return found


class ReplacesEqual(Ours):
    """Other numbers every time, within the tolerance of the truth."""

    def blocks(self, request):
        torch.equal = lambda x, y: True
        noise = 1 + 1e-13 * torch.rand((), dtype=torch.float64)
        return {
            n: LayerBlock(KroneckerAnswer(b.joint.A, b.joint.B * noise))
            for n, b in super().blocks(request).items()
        }


def to_every_stream(content):
    """Write to whatever this process has open, but for what people read."""
    for number in range(3, 64):
        with suppress(OSError):
            os.write(number, content)


class WritesVerdicts(Wrong):
    def blocks(self, request):
        verdict = {"case": request.case, "flavour": request.flavour, "verdict": "exact"}
        to_every_stream(json.dumps(verdict).encode() + b"\n")
        return super().blocks(request)


class WritesFiles(Wrong):
    """Before its own answer it sends one that is right; but it does not know the question."""

    def blocks(self, request):
        if request.case.endswith("sum-bias"):
            answer = harness.answered(Ours(), CASES[request.case], request.flavour)
            content = sending.answer_file(answer, "no token")
            to_every_stream(sending.MARK + len(content).to_bytes(8, "little") + content)
        return super().blocks(request)


class ClosesStreams(Ours):
    def blocks(self, request):
        os.closerange(3, 64)
        time.sleep(1000)


class Reads(Ours):
    def blocks(self, request):
        return input()


class Prints(Ours):
    def blocks(self, request):
        for _ in range(50):
            print(100_000 * "x")
            os.write(1, 100_000 * b"y")
        return super().blocks(request)


class Ends(Ours):
    def blocks(self, request):
        os._exit(0)


class FailsTheSecondTime(Ours):
    """It can be imported once."""

    def __init__(self):
        Path(os.environ["FAULTY_PIDS"]).open("x").close()

    def blocks(self, request):
        os._exit(3)


class Unspeakable(Ours):
    def blocks(self, request):
        class SilentError(Exception):
            def __str__(self):
                raise RuntimeError("no")

        raise SilentError


class Spread(Ours):
    """Labels drawn at random; every draw is multiplied by a number of its seed's."""

    def factor(self, seed):
        raise NotImplementedError

    def blocks(self, request):
        return {
            n: LayerBlock(KroneckerAnswer(b.joint.A, b.joint.B * self.factor(request.seed)))
            for n, b in super().blocks(request).items()
        }
