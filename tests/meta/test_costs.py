"""Costs that docstrings state, against the multiplications of matrices that are counted."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from kfac_scratch import (
    Kronecker,
    KroneckerColumns,
    KroneckerEigen,
    LayerIO,
    LowRankKronecker,
    cg_fac,
    factored_inverse,
    kfac,
    kpsvd,
    mini_block_rows,
    mini_block_shared,
    skfac,
    tkfac,
)
from kfac_scratch.approximations.brand import product_of_rows
from kfac_scratch.approximations.cg_fac import gradient_kernel
from kfac_scratch.approximations.ekfac import second_moments
from kfac_scratch.linalg import gram
from kfac_scratch.matrices.kronecker_columns import FactoredWoodburyInverse
from kfac_scratch.matrices.low_rank import FourBlocks
from kfac_scratch.matrices.rearranged import Rearranged, power_svd
from kfac_scratch.optimizer.two_level import joint_curvature

V, N, D_IN, D_OUT = 3, 7, 11, 5
ONE, SEVERAL = (1,), (4,)
BOTH = ONE + SEVERAL


def multiplications(function):
    """Those in products of matrices; what is elementwise is not counted."""
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops() // 2


def layer(S, device):
    return LayerIO(
        torch.randn(N, S, D_IN, device=device), torch.randn(V, N, S, D_OUT, device=device)
    )


def orthonormal(d, r, device):
    return torch.linalg.qr(torch.randn(d, r, device=device)).Q


def low_rank(device):
    one = torch.ones((), device=device)
    return LowRankKronecker(
        *(orthonormal(D_IN, 3, device), 2 * one.expand(3), one),
        *(orthonormal(D_OUT, 2, device), 2 * one.expand(2), one),
    )


def product(make):
    """The product of a matrix with a gradient."""

    def of(io):
        M, X = make(io), torch.randn(D_OUT, D_IN, device=io.a.device)
        return lambda: M @ X

    return of


def eye(io):
    return torch.eye(D_IN, device=io.a.device)


def moments(io):
    QA, QB = (orthonormal(d, d, io.a.device) for d in (D_IN, D_OUT))
    return lambda: second_moments(io, QA, QB)


def factored_rows(io):
    M, a, g = low_rank(io.a.device), io.a.flatten(0, 1), io.g[0].flatten(0, 1)
    return lambda: product_of_rows(M, g, a)


def one_iteration(io):
    R, eye = Rearranged(io), torch.eye(D_OUT, device=io.a.device)
    return lambda: power_svd(R, eye, tolerance=1e300, iterations=1)  # and one product to start


FEW, MANY = "N * d_in**2 + V * N * d_out**2", "V * N * d_in * d_out * (S + d_in + d_out)"
STATED = {  # where, its formula as it stands there, for which S, how often, and what is counted
    "kfac": (kfac, "N * S * (d_in**2 + V * d_out**2)", BOTH, 1, lambda io: lambda: kfac(io)),
    "gram": (gram, "K * S * d**2", SEVERAL, 1, lambda io: lambda: gram(io.a)),
    "tkfac": (tkfac, MANY, SEVERAL, 1, lambda io: lambda: tkfac(io)),
    "rearranged-1": (
        Rearranged,
        FEW,
        ONE,
        1,
        lambda io: lambda: Rearranged(io).to_outputs(eye(io)),
    ),
    "rearranged": (
        *(Rearranged, MANY, SEVERAL, 1),
        lambda io: lambda: Rearranged(io).to_outputs(eye(io)),
    ),
    "kpsvd": (kpsvd, f"2 * {MANY}", SEVERAL, 1.5, one_iteration),
    "shared": (
        *(mini_block_shared, "V * N * d_out * d_in * (S + d_in)", SEVERAL, 1),
        lambda io: lambda: mini_block_shared(io),
    ),
    "rows": (
        mini_block_rows,
        "2 * N * S * d_out * (d_in + V)",
        SEVERAL,
        1,
        product(mini_block_rows),
    ),
    "cg": (cg_fac, "2 * N * S * d_out * (d_in + V)", BOTH, 1, product(cg_fac)),
    "kernel": (
        *(gradient_kernel, "K**2 * d_out + N**2 * d_in", ONE, 1),
        lambda io: lambda: gradient_kernel(io),
    ),
    "gradients": (
        *(LayerIO.gradients, "V * N * S * d_out * d_in", SEVERAL, 1),
        lambda io: io.gradients,
    ),
    "columns": (
        *(KroneckerColumns, "d_in * d_out * (KA + KB) + KA * KB * (d_in + d_out)", BOTH, 1),
        product(skfac),
    ),
    "woodbury": (
        *(FactoredWoodburyInverse, "2 * d_in * d_out * (KA + KB)", BOTH, 1),
        product(lambda io: factored_inverse(skfac(io), 0.1)),
    ),
    "kronecker": (Kronecker, "d_in * d_out * (d_in + d_out)", BOTH, 1, product(kfac)),
    "eigen": (
        *(KroneckerEigen, "2 * d_in * d_out * (d_in + d_out)", BOTH, 1),
        product(lambda io: kfac(io).eigen()),
    ),
    "low-rank": (
        *(LowRankKronecker, "2 * d_in * d_out * (rA + rB)", BOTH, 1),
        product(lambda io: low_rank(io.a.device)),
    ),
    "four-blocks": (
        *(FourBlocks, "2 * d_in * d_out * (rA + rB) + 2 * d_in * rA * rB", BOTH, 1),
        product(lambda io: low_rank(io.a.device).inverse(0.1)),
    ),
    "rows-in-factors": (
        *(product_of_rows, "2 * K * (d_out * rB + d_in * rA)", ONE, 1),
        factored_rows,
    ),
    "joint": (
        *(joint_curvature, "2 * N * S * d_out * (d_in + V)", BOTH, 1),
        lambda io: lambda: joint_curvature({"0": io})({"0": torch.ones(D_OUT, D_IN).to(io.a)}),
    ),
}
CASES = [(name, S) for name, (_, _, positions, *_) in STATED.items() for S in positions]


def sizes(name, S):
    K = {"gram": N, "kernel": V * N, "rows-in-factors": N * S}.get(name, 0)
    KA, KB = min(N * S, D_IN), min(V * N * S, D_OUT)
    named = {"V": V, "N": N, "S": S, "d_in": D_IN, "d_out": D_OUT, "d": D_IN}
    return named | {"K": K, "KA": KA, "KB": KB, "rA": 3, "rB": 2}


@pytest.mark.parametrize(("name", "S"), CASES)
def test_the_stated_number_of_multiplications_is_the_counted_one(name, S, device):
    where, formula, _, times, prepared = STATED[name]
    assert f"`{formula}`" in " ".join((where.__doc__ or "").split())
    counted = multiplications(prepared(layer(S, device)))
    assert counted == times * eval(formula, {}, sizes(name, S))


@pytest.mark.parametrize("S", BOTH)
def test_second_moments_cost_the_rotation_and_the_squares(S, device):
    stated = " ".join(second_moments.__doc__.split())
    rest = "N * d_in * d_out" if S == 1 else "V * N * S * d_in * d_out"
    rotation = "N * S * (d_in**2 + V * d_out**2)"
    assert f"`{rotation}`" in stated
    assert f"`{rest}`" in stated
    expected = eval(f"{rotation} + {rest}", {}, sizes("moments", S))
    assert multiplications(moments(layer(S, device))) == expected


@pytest.mark.parametrize("as_columns", [True, False])
@pytest.mark.parametrize(
    ("S", "d", "share"), [(1030, 1024, 36 / 64), (401, 400, 10 / 16), (200, 192, 1)]
)
def test_gram_of_wide_rows_takes_half_the_multiplications_of_a_plain_product(
    S, d, share, as_columns, device
):
    rows = torch.ones(1, S, d, device=device)
    rows = rows.mT.contiguous().mT if as_columns else rows
    assert multiplications(lambda: gram(rows)) == share * S * d**2


def test_another_formula_would_be_noticed(device):
    counted = multiplications(lambda: kfac(layer(4, device)))
    assert counted != eval("N * S * (V * d_in**2 + d_out**2)", {}, sizes("kfac", 4))
