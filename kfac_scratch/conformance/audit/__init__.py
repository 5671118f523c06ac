r"""The audit of other people's implementations: what the oracle says of them, and why.

- `results/<library>.json`: what `python -m kfac_scratch.conformance run` wrote, with versions,
  date, the adapter, and a digest of every case that there was. Never edited by hand. An earlier
  release, asked by the same adapter in an environment of its own, is `<library>-<version>.json`.
- `explained/<library>.json`, `proofs/<finding>.json`: what `explain` and `prove --store` wrote,
  with the digests of the cases that were asked. The first has the names of result files.
- `findings/<library>_<slug>.py`: one real mismatch each, traced to its cause. A finding is a module
  with a docstring that an upstream maintainer can act on (what is expected, what is got, a minimal
  reproduction that needs nothing of this package), and:

  | name | what it is |
  |---|---|
  | `LIBRARY`, `VERSION` | what was audited; the patch fits this version, and may fit others |
  | `ADAPTER` | `package.module:Class` |
  | `TITLE` | one line |
  | `CASES` | the verdicts that it explains: tuples (case, flavour) |
  | `CAUSE` | file and line upstream, and what is wrong with it, in words |
  | `DOCUMENTED` | what the library's documentation says about it, or "silent" |
  | `THREAD` | a public thread about it, or "" |
  | `patch()` | a context manager that mends the line in memory |
  | `UPSTREAM` | optional: what became of it, in releases or in that thread, with dates |
  | `WITH` | optional: other findings of whose patches this one is made, too |

A case is an identifier, or a `Case` of the finding's own where the catalogue has none.
`prove` runs the adapter on `CASES` without and within `patch()`: a finding is proven if the verdict
does not pass without, and passes within. A convention that is documented is no finding.
`python -m kfac_scratch.conformance skeleton finding NAME` writes one that runs as it stands.

In which versions a finding is seen, and in which its cases pass, is not typed: it is read from the
explanations and the results of all versions (`page.occurrence`).

What is older than the cases is shown as stale, on the page and by `stale`, with the command that
makes it again: whoever adds a case need not run everybody's library.

To do it again for a library, in an environment that has it (versions are in its result file) beside
torch, jaxtyping, tqdm and safetensors, from the root of the repository:

    R=kfac_scratch/conformance/audit/results
    python -m kfac_scratch.conformance run --json $R/curvlinops.json \
        --adapter kfac_scratch.conformance.adapters.curvlinops:Adapter
    python -m kfac_scratch.conformance prove --store curvlinops_reuse ...
    python -m kfac_scratch.conformance explain $R/curvlinops.json
"""
