# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 37. The audit: what the oracle says of others
#
# **Part IX: Scale and trust.** Where do public implementations of KFAC agree with its definition, and what is the reason
# where they do not?
#
# This page runs the **oracle** of [Chapter 35](35_conformance.py) on code that others wrote. The oracle is a set of cases
# for which a theorem or the definition says what KFAC must give; each answer gets a verdict ([Figure 37.1]). Each library
# runs in an environment of its own, through an adapter that follows the library's documentation. Some libraries
# are run in an earlier release, too. Tables and texts of this page are made from stored result files and from
# *findings*, which are programs that reproduce a mistake and correct it.

# %% tags=["hide-input"] fold="The stored runs, with versions and dates"
from collections import Counter

import matplotlib.pyplot as plt

from kfac_scratch.conformance.audit import explain, page, proofs
from kfac_scratch.conformance.audit.mending import mended
from kfac_scratch.conformance.audit.prove import finding, finding_names
from kfac_scratch.conformance.audit.prove import prove as prove_finding
from kfac_scratch.conformance.cases.families import FAMILIES
from kfac_scratch.show import code

runs = explain.runs()
for run in runs.values():
    about, libraries = run.about, page.libraries(run)
    print(f"{page.name_and_version(run):22} {about['date']}, torch {about['torch']}", libraries)

# %% tags=["hide-input"] alt="A heat map with one row per implementation and release and one column per family of cases; most cells are full." caption="Share of the verdicts that pass, by release of an implementation and family. Empty: not offered. Dense layers are right nearly everywhere; shared weights and the geometry of convolutions are where implementations differ."
rows = [page.name_and_version(run) for run in runs.values()]
share = [
    [
        sum(r.passes for r in judged) / len(judged)
        if (judged := page.judged_results(run, f))
        else float("nan")
        for f in FAMILIES
    ]
    for run in runs.values()
]
fig, ax = plt.subplots(figsize=(7.5, 0.6 + 0.42 * len(rows)), layout="constrained")
image = ax.imshow(share, vmin=0, vmax=1, cmap="YlGnBu", aspect="auto")
ax.set(xticks=range(len(FAMILIES)), yticks=range(len(rows)))
ax.set_xticklabels(FAMILIES, rotation=30, ha="right")
ax.set_yticklabels(rows)
ax.spines[:].set_visible(False)
fig.colorbar(image, ax=ax, shrink=0.8, label="share that passes")
plt.show()

# %% [markdown]
# Most of these verdicts pass, within a tolerance of rounding errors, and this project learned its mathematics partly from
# these libraries. A verdict other than `exact` and `definition` is of one of three kinds: a documented **convention**,
# which is no mistake and passes; a **refusal** of what a library does not offer; and a **mismatch**, which is traced to
# source lines and proven by correcting them in memory. After this chapter you will be able to
#
# - read the table of a library, and tell a convention from a mismatch;
# - prove the cause of a mismatch by a patch of few expressions;
# - name three habits for your own tests that find such mismatches.
#
# When cases are added, stored results stay as they are until somebody runs the library again. Every result file
# keeps a digest of the cases at the time of its run. This page compares the digests, and lists the results that are
# older than the cases:

# %% tags=["remove-input"]
page.notices()

# %% [markdown]
# ## What passes
#
# The table has the verdicts that pass and those that were judged, by family of cases. Bold: some do not pass. Empty:
# the library does not offer what the family needs. Every flavour of a case counts, so a single missing feature, such as
# the padding mode of a convolution, can change a dozen verdicts. Dense layers are right in all libraries but one.

# %% tags=["remove-input"]
page.overview(runs)

# %% [markdown]
# The same by verdict. `scaled` passes: the numbers differ from the canonical ones by a number that the
# documentation states.

# %% tags=["remove-input"]
page.verdicts(runs)

# %% tags=["hide-input"] fold="Counted: verdicts that pass, over all libraries and by family"
ours = runs["ours"]
assert all(r.verdict in ("exact", "definition") for r in ours.results)
others = {stem: run for stem, run in runs.items() if stem != "ours"}
present = page.newest(others)  # of every implementation the newest release
asked = sum(len(page.judged_results(run)) for run in present.values())
passing = sum(r.passes for run in present.values() for r in page.judged_results(run))
print(
    f"{len(others)} results of {len(present)} implementations by others. In the newest release of each, "
    f"{passing} of {asked} verdicts pass ({passing / asked:.0%})"
)
assert len(others) > len(present)
assert passing / asked > 0.5


def share_of(family: str) -> float:
    verdicts = [r for run in present.values() for r in page.judged_results(run, family)]
    return sum(r.passes for r in verdicts) / len(verdicts)


print(
    ", ".join(f"{family} {share_of(family):.0%}" for family in ("dense", "sharing", "convolutions"))
)
assert share_of("dense") > 0.95 > 0.8 > max(share_of("sharing"), share_of("convolutions"))
dense = [page.judged_results(run, "dense") for run in present.values()]
assert sum(not all(r.passes for r in results) for results in dense) == 1

# %% [markdown]
# ## One release and the next
#
# A later release of a library may correct a finding or add one. So several libraries run
# in more than one release, with the same cases and the same adapter. The table counts verdicts by what they were
# in the earlier release and what they are in the later one. Where only the last two columns have numbers, every
# question passes or fails as before.

# %% tags=["remove-input"]
page.changes(others)

# %% tags=["hide-input"] fold="Printed: findings that an earlier release did not have"
for name in finding_names():
    where = page.occurrence(name, others)
    if where.passing:
        print(f"{finding(name).LIBRARY}, {finding(name).TITLE}: {where}")
assert any(page.occurrence(name, others).passing for name in finding_names())

# %% [markdown]
# Both printed findings come from one change. The earlier release of nngeometry takes a root of the softmax's curvature
# that has one column more than it needs. The later one takes a smaller root, which saves a backward pass. On paper both
# are roots of the same matrix, but the code of the smaller one divides by probabilities that can be zero, and makes a
# matrix in PyTorch's default precision. No other verdict of that library changed.
#
# Some earlier releases need other packages in earlier releases, too. BackPACK 1.6.0 imports `pkg_resources`, which the
# present `setuptools` no longer has; laplace-torch 0.2.2.2 imports a module that curvlinops dropped in release 3, so that
# it is asked with curvlinops 2. Which other libraries a result depends on is written in its file.
#
# ## Conventions
#
# A loss may be a sum or a mean, over data or over output entries. The squared error may be halved. The factor
# of the vectors may be a sum over positions or a mean. All these conventions are in use, and all pass if they
# are documented. For the verdicts in the next table, the judge applies the documented number, and the block is right. $N$
# counts data, $C$ classes or outputs, $S$ and $T$ positions; "or" stands where two formulas have one value.

# %% tags=["remove-input"]
page.documented_scales(others)

# %% [markdown]
# ## How a mismatch is proven
#
# A wrong number does not prove its cause. The adapter may be wrong, or the reading of the
# documentation. So a finding names lines of the library's source, and comes with a patch: functions are
# compiled again with *few expressions* replaced.

# %% tags=["beside", "remove-input"]
code(mended)

# %% [markdown]
# If the case fails without the patch and passes with it, and nothing else was changed, the replaced expressions are
# the cause. A finding can list others as `BESIDE`, whose patches apply in both runs. This is the whole proof:

# %% tags=["beside", "remove-input"]
code(prove_finding)

# %% tags=["hide-input"] fold="Checked: all stored proofs hold"
count = 0
for name in proofs.proven():
    stored = proofs.stored_proofs(name)
    assert stored["proofs"], name
    assert all(proof["holds"] for proof in stored["proofs"]), name
    count += len(stored["proofs"])
libraries = Counter(finding(name).LIBRARY for name in proofs.proven())
print(
    f"{len(proofs.proven())} findings in {len(libraries)} libraries, {count} proofs, all of which hold:"
)
for library, n in libraries.items():
    print(f"  {library:14} {n}")
assert len(proofs.proven()) >= 10

# %% [markdown]
# The other direction asks whether the findings explain everything. Every question whose verdict does not pass is asked
# again with the patch of each finding, and with all patches together, from which those that are not needed are then
# removed. A verdict that no patch corrects would be listed below as unexplained. It may be a mistake of this project.

# %% tags=["hide-input"] fold="Counted: verdicts that a finding explains"
failures = page.failures(others)
for stem, reasons in failures.items():
    explained = sum(bool(found) for found in reasons.values())
    print(f"{stem:18} {explained} of {len(reasons)} verdicts that do not pass are explained")
unexplained = page.unexplained(others)
for stem, key in unexplained:
    print(f"  unexplained: {stem}, {key}")

# %% [markdown]
# ## The findings
#
# Each finding has its cause, what the documentation says, the releases in which it is seen, and a text for the
# maintainer with a reproduction that needs nothing of this project. A release in which it is *seen* is one in
# which the same patch mends a verdict that fails without it.

# %% tags=["remove-input"]
page.all_cards(others)

# %% [markdown]
# ## What recurs
#
# A convolution's factor of inputs is made of patches, and patches are made of a *padded* input. PyTorch's
# `unfold` pads with zeros, so that code which calls it is right until somebody sets `padding_mode`. The
# same mistake occurs in several libraries:

# %% tags=["hide-input"] fold="Counted: libraries with this mistake"
padding = [name for name in finding_names() if finding(name).TITLE.startswith("padding_mode")]
print(", ".join(finding(name).LIBRARY for name in padding))
assert len(padding) >= 3

# %% [markdown]
# Three habits find mismatches of the kinds above, and none of them needs an oracle:
#
# 1. *Test with sizes that are pairwise coprime.* With batch size, positions and classes all equal to 4, a
#    factor that is too large by the number of positions looks like one that is too large by the number of data.
# 2. *Test where KFAC is exact.* A comparison with another approximation shows that two codes agree, not
#    that they are right.
# 3. *Refuse what is not covered.* If a padding mode, a class weight or a second call is ignored without an
#    error, a user may not notice that the result is wrong.
#
# ## Your turn
#
# To have an implementation judged, write an adapter ([Chapter 35](35_conformance.py)) and run
# `python -m kfac_scratch.conformance run --adapter pkg.mod:Adapter`. If you think that a verdict on your code is wrong,
# check the oracle: the case's theorem is in its file, and the truth is plain autodiff.
#
# ## In one minute
#
# - Dense layers are right nearly everywhere. Shared weights and the geometry of convolutions are where libraries
#   differ.
# - A documented convention passes. So does a refusal.
# - The cause of a mismatch is proven if the replaced expressions alone make the failing case pass.
# - Findings belong to releases: the page names those in which each is seen.
#
# ## Exercises
#
# **Exercise 37.1.** In a library, both factors, that of the inputs and that of the vectors, are means over data and
# positions. In which cases does this show, and as which verdict? Find a library in the stored results
# for which this is so.
#
# <details class="solution" markdown="1">
# <summary>Solution</summary>
#
# A block needs one sum over positions, see the definition in [Chapter 6](06_weight_sharing.py). With two means it is too
# small by $S$, the number of positions of *that layer*. So all cases with positions show it, in the families `sharing`
# and `convolutions` above all: as an `undocumented-scale` of $1/S$ if all layers have the same positions, as an
# `inconsistent-scale` in a network with convolutions and a classifier. The next cell prints libraries.
#
# </details>
#
# **Exercise 37.2.** Why does the page count `not-supported` neither for nor against a library?
#
# <details class="solution" markdown="1">
# <summary>Solution</summary>
#
# Because an error with a reason is the right answer to a question outside of what a library offers. The
# alternative, an answer that is wrong, is what the page is about.
#
# </details>

# %% tags=["hide-input"] fold="Checked: the exercises"
small = [
    (stem, r.case)
    for stem, run in others.items()
    for r in run.results
    if r.verdict == "undocumented-scale" and any(text in r.words for text in ("1/S", "small by S"))
]
print(f"Exercise 37.1: {sorted({stem for stem, _ in small})}, e.g. {small[0][1]}")
refused = sum(r.verdict == "not-supported" for run in others.values() for r in run.results)
assert all(
    r not in page.judged_results(run)
    for run in others.values()
    for r in run.results
    if r.verdict == "not-supported"
)
print(f"Exercise 37.2: {refused} questions were answered with a reason instead of a number")

# %% [markdown]
# ## Further reading
#
# The protocol and the verdicts are in [Chapter 35](35_conformance.py), mistakes that were discussed in
# public threads in [Chapter 36](36_museum.py). Result files and findings are in
# `kfac_scratch/conformance/audit`, with the commands that made them.
