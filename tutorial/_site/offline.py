"""MkDocs hook: MathJax from an installed wheel, so that no page needs a network.

The wheel `sphinx-mathjax-offline` holds the unmodified files of MathJax 3.2.2. The combined
component and its fonts are published with the site; nothing is kept in the repository.
"""

import hashlib
from importlib import metadata
from pathlib import Path

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File

COMPONENT = "tex-chtml-full.js"
SHA256 = "91b005503c5d1f0958bf4d73ada1a3be33596b2c4ab5da22277f1b0d3149b5a4"  # npm mathjax@3.2.2


def on_files(files, config):
    """Add MathJax below assets/mathjax."""
    try:
        wheel = metadata.distribution("sphinx-mathjax-offline")
    except metadata.PackageNotFoundError:
        raise PluginError('MathJax is missing: pip install -e ".[docs]"') from None
    folder = Path(str(wheel.locate_file("sphinx-mathjax-offline/static/mathjax")))
    if hashlib.sha256((folder / COMPONENT).read_bytes()).hexdigest() != SHA256:
        raise PluginError(f"{COMPONENT} is not MathJax 3.2.2.")
    for file in [folder / COMPONENT, *sorted(folder.glob("output/chtml/fonts/woff-v2/*.woff"))]:
        uri = f"assets/mathjax/{file.relative_to(folder).as_posix()}"
        files.append(File.generated(config, uri, abs_src_path=str(file)))
    return files
