"""Adapters that misbehave, each in its own way; the oracle must say how and go on."""

import ctypes
import os
import subprocess
import time
from dataclasses import replace
from pathlib import Path

import torch

from kfac_scratch.conformance import KroneckerAnswer, LayerBlock, NotSupported
from kfac_scratch.conformance.adapters.ours import Adapter as Ours


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
