"""The vectors: the same bytes everywhere, what they claim, and their judge."""

import json
import os
import re
import subprocess
import sys
from functools import cache
from pathlib import Path
from shutil import copytree

import jsonschema
import pytest
import torch
from safetensors.torch import load_file, save_file

import kfac_scratch.conformance.vectors
from kfac_scratch.conformance.__main__ import main
from kfac_scratch.conformance.audit import stale
from kfac_scratch.conformance.cases.case import Loss
from kfac_scratch.conformance.cases.families import CASES
from kfac_scratch.conformance.cases.ops import forward
from kfac_scratch.conformance.cases.questions import case_digest
from kfac_scratch.conformance.judging import truth
from kfac_scratch.conformance.vectors import export, grid
from kfac_scratch.conformance.vectors import files as vectors

VECTORS = Path(kfac_scratch.conformance.vectors.__file__).parent
CONSUMERS = VECTORS / "consumers"
SOME = [  # one of each kind of content
    "deep-linear-mse-mean-bias",
    "mlp-cross-entropy-sum",
    "bias-bce-mean",
    "used-twice-added-mse",
    "conv1d-groups-pooled-mse",
    "empirical-mlp-bce-mean",
    "inverse-factored-0.25-mlp",
    "inverse-exact-0.001-mlp",
    "operator-expand-1d-mean",
]


@pytest.fixture(scope="module", autouse=True)
def flags_once():
    """Flags are computed once for each case: no test here changes what they depend on."""
    with pytest.MonkeyPatch.context() as patch:
        by_id = cache(lambda name, compute=export.flags: compute(CASES[name]))
        patch.setattr(export, "flags", lambda case: by_id(case.id))
        yield


@pytest.fixture(scope="module")
def shipped():
    return vectors.read()


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A folder with three cases, to be broken."""
    folder = tmp_path_factory.mktemp("vectors")
    export.export(folder, [CASES[name] for name in SOME[:3]])
    return folder


@pytest.fixture
def results(small, tmp_path):
    """What a perfect port writes."""
    for case, reference in vectors.read(small).items():
        right = {flavour: reference.expected(flavour) for flavour in reference.flavours}
        tensors = {
            f"{flavour}/{layer}": M.clone()
            for flavour, pieces in right.items()
            for (layer, _), M in pieces.items()
        }
        save_file(tensors, tmp_path / f"{case}.safetensors")
    return tmp_path


def bytes_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def changed(folder, case, change):
    """Change a results file's tensors."""
    path = folder / f"{case}.safetensors"
    save_file(change(load_file(path)), path)


def by_case(results):
    found = {}
    for result in results:
        found.setdefault(result.case, []).append(result)
    return found


# ---- the grid ------------------------------------------------------------------------------------


def test_a_snapped_tensor_is_close_on_the_grid_and_stays():
    x = torch.randn(50, 3)
    y = grid.snapped(x, 38, {})
    assert 0 < float((x - y).abs().max()) <= 2.0**-38 * float(x.abs().max())
    assert (y / grid.cell(x, 38)).frac().count_nonzero() == 0
    assert torch.equal(grid.snapped(y, 38, {}), y)


def test_the_grid_does_not_depend_on_the_last_bits_of_a_power_of_two():
    for largest in (1.0, 1 - 2e-16, 1 + 2e-16):
        assert grid.cell(torch.tensor([largest]), 38) == 2.0**-38 * 2


def test_there_is_no_negative_zero():
    y = grid.snapped(torch.tensor([1.0, -0.0, -1e-17]), 38, {})
    assert not y[1:].signbit().any()
    assert torch.equal(grid.snapped(torch.zeros(3), 38, {}), torch.zeros(3))


def test_a_number_between_two_grid_points_is_listed_or_refused():
    x = torch.tensor([0.9, 5.5 * grid.cell(torch.tensor([0.9]), 38) + 1e-16])
    with pytest.raises(ValueError, match=r"\[1\] lie between two grid points"):
        grid.snapped(x, 38, {})
    listed = grid.ties(x, 38)
    assert listed == {"1": 6}
    for noise in (-3e-16, 3e-16):
        y = grid.snapped(x + torch.tensor([0.0, noise]), 38, listed)
        assert float(y[1]) == 6 * grid.cell(x, 38)


def test_ties_of_other_numbers_are_refused():
    with pytest.raises(ValueError, match="not those of these numbers"):
        grid.snapped(torch.tensor([0.9, 0.3]), 38, {"1": 6})


# ---- what is shipped -----------------------------------------------------------------------------


def test_the_manifest_obeys_its_schema():
    manifest = json.loads((vectors.SHIPPED / "manifest.json").read_text(encoding="utf-8"))
    schema = json.loads((VECTORS / "vectors.schema.json").read_text(encoding="utf-8"))
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.validate(manifest, schema)
    assert {case["theorem"] for case in manifest["cases"]} <= set(manifest["theorems"])
    assert {key for case in manifest["cases"] for key in case["flags"]} <= set(manifest["flags"])
    del manifest["cases"][0]["sha256"]
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(manifest, schema)


def test_every_deterministic_case_is_exported():
    names = {case.id.removesuffix("-float32") for case in CASES.values() if case.fisher != "mc"}
    assert {case.id for case in export.exported()} == names


def test_the_manifest_names_the_files_that_there_are(shipped):
    assert len(shipped) > 150
    assert {path.stem for path in vectors.SHIPPED.glob("*.safetensors")} == set(shipped)


def test_a_published_case_never_changes(shipped):
    """A case may be new, and the vectors older; what they hold stays what it is, and stays."""
    state = stale.stale_vectors()
    assert (state.changed, state.gone) == ((), ())
    assert list(shipped) == [case.id for case in export.exported() if case.id in shipped]


def test_a_reference_has_the_digest_of_its_case(shipped):
    for name in SOME:
        assert shipped[name].digest == case_digest(CASES[name])


def test_everything_that_is_read_is_packaged():
    config = (VECTORS.parents[2] / "pyproject.toml").read_text(encoding="utf-8")
    for pattern in ("consumers/*.py", "kfac-vectors-1/*", "ties.json", "vectors.schema.json"):
        assert f'"{pattern}"' in config
        assert list(VECTORS.glob(pattern))


def test_what_is_given_is_exact_in_single_precision(shipped):
    for reference in shipped.values():
        for name, x in reference.tensors.items():
            assert not (x.signbit() & (x == 0)).any()
            if name.startswith(("parameters/", "X", "coefficients")):
                assert torch.equal(x.float().double(), x.double())
                assert torch.equal((x * 2.0**10).round(), x * 2.0**10)


def test_losses_explain_the_hessians(shipped):
    for reference in shipped.values():
        entry, f, y = reference.entry, reference.tensors["outputs"], reference.tensors["y"]
        if entry["fisher"] != "type2" or f.numel() > 200:
            continue
        said = {k: tuple(v) if isinstance(v, list) else v for k, v in entry["loss"].items()}
        loss = Loss(**said).module(f)
        H = torch.func.hessian(lambda v, loss=loss, f=f, y=y: loss(v.reshape(f.shape), y))(
            f.flatten()
        )
        if entry["loss_hessian"] is None:
            found = torch.block_diag(*reference.tensors["loss_hessian"])
        else:
            assert "loss_hessian" not in reference.tensors
            found = entry["loss_hessian"] * torch.eye(len(H))
        torch.testing.assert_close(found, H, rtol=0, atol=rounding(f) * float(H.abs().max()))


def rounding(f):
    """By how much of its largest entry a Hessian may differ from that at rounded outputs.

    It is rounded by 4e-12 itself, and outputs by `d`, 4e-12 of their largest. A probability then
    changes by a share of at most 2 d, and a product of two by 4 d.
    """
    return 4e-12 * (1 + 4 * float(f.abs().max()))


def test_cotangents_and_hessians_explain_the_factors(shipped):
    explained = 0
    for reference in shipped.values():
        T = reference.tensors
        for key in T:
            kind, _, rest = key.partition("/")
            flavour, _, layer = rest.removesuffix("/B").partition("/")
            if kind != "factors" or not key.endswith("/B") or f"cotangents/{layer}" not in T:
                continue
            J = T[f"cotangents/{layer}"]
            if flavour == "reduce":
                J = J.sum(3, keepdim=True)
            number = reference.entry["loss_hessian"]
            H = T["loss_hessian"] if number is None else number * torch.eye(J.shape[1])
            H = H.expand(len(J), *H.shape[-2:])
            B = torch.einsum("nfgso,nfh,nhgsp->gop", J, H, J)
            assert float((B - T[key]).abs().max()) <= 3e-11 * float(B.abs().max())
            explained += 1
    assert explained > 100


@pytest.mark.parametrize("name", SOME)
def test_expectations_are_the_truth(name, shipped):
    case, reference = CASES[name], shipped[name]
    data = case.build()
    assert reference.flavours == dict(case.flavours)
    for flavour in case.flavours:
        right = truth.expected(case, data, flavour)
        got = reference.expected(flavour)
        assert [layer for layer, _ in got] == [layer for layer, _ in right]
        for M, wanted in zip(got.values(), right.values(), strict=True):
            assert float((M - wanted).abs().max()) <= 1e-11 * float(wanted.abs().max())


def test_outputs_are_those_of_the_network(shipped):
    for name in SOME[:-1]:
        T = shipped[name].tensors
        theta = {k.removeprefix("parameters/"): x for k, x in T.items() if k[:10] == "parameters"}
        f = forward(CASES[name].ops, theta, T["X"])
        torch.testing.assert_close(T["outputs"], f, rtol=0, atol=1e-11 * float(f.abs().max()))


# ---- the same bytes ------------------------------------------------------------------------------


def shipped_bytes(names):
    """What `export` must write for some cases."""
    found = {f"{name}.safetensors" for name in names}
    return {name: content for name, content in bytes_of(vectors.SHIPPED).items() if name in found}


def noisy(seed):
    """The truth as a machine with other last bits computes it."""
    generator = torch.Generator().manual_seed(seed)

    def compute(case):
        return {
            name: x + 4e-16 * x.abs().max() * (2 * torch.rand(x.shape, generator=generator) - 1)
            for name, x in export.computed(case).items()
        }

    return compute


@pytest.mark.parametrize("compute", [export.computed, noisy(0), noisy(1)])
def test_some_files_are_the_shipped_ones(compute, tmp_path):
    export.export(tmp_path, [CASES[name] for name in SOME], compute)
    written = bytes_of(tmp_path)
    manifest = json.loads(written.pop("manifest.json"))
    assert written == shipped_bytes(SOME)
    whole = json.loads((vectors.SHIPPED / "manifest.json").read_text(encoding="utf-8"))
    entries = {entry["id"]: entry for entry in whole["cases"]}
    assert manifest["cases"] == [entries[name] for name in SOME]


@pytest.mark.slow
@pytest.mark.parametrize("compute", [export.computed, noisy(0), noisy(1)])
def test_all_files_are_the_shipped_ones(compute, tmp_path):
    export.export(tmp_path, compute=compute)
    assert bytes_of(tmp_path) == bytes_of(vectors.SHIPPED)


@pytest.mark.slow
def test_some_files_are_the_same_with_two_threads(tmp_path):
    torch.set_num_threads(2)
    try:
        export.export(tmp_path, [CASES[name] for name in SOME])
    finally:
        torch.set_num_threads(1)
    written = bytes_of(tmp_path)
    del written["manifest.json"]
    assert written == shipped_bytes(SOME)


@pytest.mark.slow
def test_all_files_are_the_same_with_other_instructions(tmp_path):
    """Without vector instructions, about half of the tensors have other last bits."""
    old = {"ATEN_CPU_CAPABILITY": "default", "MKL_CBWR": "COMPATIBLE", "DNNL_MAX_CPU_ISA": "SSE41"}
    program = (
        "import pathlib, torch; from kfac_scratch.conformance.vectors import export;"
        "torch.set_num_threads(1);"
        f"export.export(pathlib.Path({str(tmp_path)!r}))"
    )
    run("-c", program, **old)
    assert bytes_of(tmp_path) == bytes_of(vectors.SHIPPED)


@pytest.mark.slow
def test_no_tie_is_missing():
    assert export.new_ties(export.exported()).keys() <= export.known_ties().keys()


def test_a_missing_tie_names_case_and_tensor(tmp_path, monkeypatch):
    monkeypatch.setattr(grid, "AMBIGUOUS", 2.0**-38)
    with pytest.raises(ValueError, match="mlp-cross-entropy-sum, outputs: the entries"):
        export.export(tmp_path, [CASES["mlp-cross-entropy-sum"]])


# ---- damaged vectors -----------------------------------------------------------------------------


def damaged(small, tmp_path, name, change):
    folder = copytree(small, tmp_path / "damaged")
    path = folder / name
    content = change(path.read_bytes())
    path.write_bytes(content) if content is not None else path.unlink()
    return folder


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("bias-bce-mean.safetensors", lambda b: b[:-1] + bytes([b[-1] ^ 1]), "SHA-256"),
        ("bias-bce-mean.safetensors", lambda b: b[:-8], "SHA-256"),
        ("bias-bce-mean.safetensors", lambda b: None, "No such file"),
        ("manifest.json", lambda b: b[:-9], "json: "),
        ("manifest.json", lambda b: b"[]", "expected an object"),
        ("manifest.json", lambda b: b.replace(b"vectors/1", b"vectors/2"), "expected 'kfac"),
    ],
)
def test_damaged_vectors_are_refused_by_name(small, tmp_path, name, change, words):
    folder = damaged(small, tmp_path, name, change)
    with pytest.raises(ValueError, match=words) as error:
        vectors.read(folder)
    assert name in str(error.value)


# ---- results -------------------------------------------------------------------------------------


def test_right_results_pass(small, results):
    found = vectors.judge_results(results, small)
    assert len(found) == 8
    assert {(r.case, r.verdict) for r in found} == {
        ("deep-linear-mse-mean-bias", "exact"),
        ("mlp-cross-entropy-sum", "definition"),
        ("bias-bce-mean", "exact"),
    }


MISTAKES = {
    "not-finite": (lambda T: T | {"expand/fc1": T["expand/fc1"] * float("nan")}, "not finite"),
    "shape": (lambda T: T | {"expand/fc1": T["expand/fc1"][0]}, r"fc1 has shape \[\d+, \d+\]"),
    "layer": (lambda T: {k: x for k, x in T.items() if k != "expand/fc1"}, "no tensor expand/fc1"),
    "float32": (lambda T: {k: x.float() for k, x in T.items()}, "float32 where"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_unusable_numbers_are_an_error_and_the_run_goes_on(mistake, small, results):
    change, words = MISTAKES[mistake]
    changed(results, "mlp-cross-entropy-sum", change)
    found = by_case(vectors.judge_results(results, small))
    (bad,) = [r for r in found["mlp-cross-entropy-sum"] if r.flavour == "expand"]
    assert bad.verdict == "error"
    assert re.search(words, bad.words)
    assert all(r.passes for r in found["bias-bce-mean"] + found["deep-linear-mse-mean-bias"])


@pytest.mark.parametrize("keep", [0, 5, 40, -8])
def test_a_truncated_file_is_an_error_and_the_run_goes_on(keep, small, results):
    path = results / "bias-bce-mean.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    found = by_case(vectors.judge_results(results, small))
    for result in found.pop("bias-bce-mean"):
        assert result.verdict == "error"
        assert "bias-bce-mean.safetensors is no safetensors file" in result.words
    assert all(r.passes for case in found.values() for r in case)


def about(results, **content):
    (results / "about.json").write_text(json.dumps({"name": "n", "version": "1"} | content))


def test_a_missing_case_is_an_error_unless_it_is_listed(small, results):
    (results / "bias-bce-mean.safetensors").unlink()
    found = by_case(vectors.judge_results(results, small))["bias-bce-mean"]
    assert {r.verdict for r in found} == {"error"}
    assert "about.json does not list it" in found[0].words
    about(results, not_supported={"bias-*": "no biases"})
    found = by_case(vectors.judge_results(results, small))["bias-bce-mean"]
    assert {(r.verdict, r.words) for r in found} == {("not-supported", "no biases")}


def test_a_flavour_can_be_not_supported(small, results):
    about(results, not_supported={"*/ekfac": "no EKFAC"})
    found = vectors.judge_results(results, small)
    assert {r.flavour for r in found if r.verdict == "not-supported"} == {"ekfac"}
    assert sum(r.verdict == "not-supported" for r in found) == 2


@pytest.mark.parametrize(
    ("scales", "verdict", "words"),
    [
        ({}, "undocumented-scale", "every block: too large by N = 7"),
        ({"*/fc1": None, "*": None}, "undocumented-scale", "the documentation is silent"),
        ({"mlp-*": 7.0}, "scaled", "documented: N = 7"),
        (
            {"mlp-*/fc1": 7.0},
            "inconsistent-scale",
            "fc1 joint: right; fc2 joint: too large by N = 7",
        ),
    ],
)
def test_scales_are_judged_by_what_is_documented(scales, verdict, words, small, results):
    changed(results, "mlp-cross-entropy-sum", lambda T: {k: 7 * x for k, x in T.items()})
    about(results, scales=scales)
    found = by_case(vectors.judge_results(results, small))
    for result in found["mlp-cross-entropy-sum"]:
        assert result.verdict == verdict
        assert words in result.words


def test_wrong_results_are_wrong(small, results):
    def reversed_entries(T):
        return {k: x.flip(1, 2).contiguous() for k, x in T.items()}

    changed(results, "mlp-cross-entropy-sum", reversed_entries)
    found = by_case(vectors.judge_results(results, small))["mlp-cross-entropy-sum"]
    assert {r.verdict for r in found} == {"wrong"}


@pytest.mark.parametrize("content", ["{", '{"nmae": "x"}'])
def test_an_unreadable_about_is_named(content, small, results):
    (results / "about.json").write_text(content)
    with pytest.raises(ValueError, match=r"about\.json"):
        vectors.judge_results(results, small)


@pytest.mark.slow
def test_the_judge_of_results_needs_nothing_but_the_files():
    program = (
        "import sys; import kfac_scratch.conformance.vectors.files as v; v.read();"
        "print(sorted(m for m in sys.modules if m.startswith('kfac_scratch.conformance.')))"
    )
    loaded = run("-c", program)
    for module in ("cases.families", "judging.truth", "cases.ops", "cases.case", "vectors.export"):
        assert f"'kfac_scratch.conformance.{module}'" not in loaded
    assert "'kfac_scratch.conformance.vectors.files'" in loaded


# ---- a port in another language ------------------------------------------------------------------


def run(*arguments, **variables):
    finished = subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | variables,
    )
    assert finished.returncode == 0, finished.stderr
    return finished.stdout


def test_a_port_in_numpy_is_right(tmp_path):
    program = (
        "import runpy, sys; sys.modules['torch'] = None;"
        f"sys.argv = ['numpy_kfac.py', {str(vectors.SHIPPED)!r}, {str(tmp_path)!r}];"
        f"runpy.run_path({str(CONSUMERS / 'numpy_kfac.py')!r}, run_name='__main__');"
        "assert sys.modules['torch'] is None;"
        "assert not any(m.startswith(('kfac_scratch', 'torch.')) for m in sys.modules)"
    )
    run("-c", program)
    found = vectors.judge_results(tmp_path)
    assert {r.verdict for r in found} == {"exact", "definition", "not-supported"}
    assert len({r.case for r in found if r.verdict != "not-supported"}) >= 120
    assert max(r.error for r in found if r.error is not None) < 1e-11


@pytest.mark.slow
def test_a_port_in_jax_is_right(tmp_path):
    pytest.importorskip("jax")
    run(str(CONSUMERS / "jax_kfac.py"), str(vectors.SHIPPED), str(tmp_path))
    found = vectors.judge_results(tmp_path)
    assert {r.verdict for r in found} == {"exact", "definition"}


@pytest.mark.slow
def test_the_command_line_exports_and_judges(tmp_path, monkeypatch, capsys):
    """What is exported is what is shipped; a port's results are judged against either."""
    monkeypatch.setattr("sys.argv", ["conformance", "export", str(tmp_path / "vectors")])
    assert main() == 0
    assert bytes_of(tmp_path / "vectors") == bytes_of(vectors.SHIPPED)
    port = [str(CONSUMERS / "numpy_kfac.py"), str(tmp_path / "vectors"), str(tmp_path / "results")]
    subprocess.run([sys.executable, *port], check=True, capture_output=True)
    arguments = ["judge", str(tmp_path / "results"), "--vectors", str(tmp_path / "vectors")]
    monkeypatch.setattr("sys.argv", ["conformance", *arguments])
    assert main() == 0
    assert "exact" in capsys.readouterr().out
    (tmp_path / "results" / "deep-linear-mse-mean-bias.safetensors").write_bytes(b"")
    assert main() == 1
    assert "FAILS deep-linear-mse-mean-bias" in capsys.readouterr().out
