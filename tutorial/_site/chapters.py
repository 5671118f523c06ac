"""MkDocs hook: hands the book (see book.py) to MkDocs, page by page."""

import book
from markup import Markup
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, InclusionLevel


def on_config(config):
    """Put every chapter into the navigation, under its part, and every module."""
    config.markdown_extensions.append(Markup())
    try:
        config.nav = book.nav(config.nav, book.Stated.in_config(config))
    except book.BookError as error:
        raise PluginError(str(error)) from None
    return config


def on_files(files, config):
    """Execute the chapters; add their pages, figures and notebooks, and all other pages."""
    try:
        written = book.files(book.Stated.in_config(config))
    except book.BookError as error:
        raise PluginError(str(error)) from None
    for uri, content in written.items():
        if old := files.get_file_from_path(uri):
            files.remove(old)
        included = InclusionLevel.INCLUDED  # although *.ipynb in the folder are ignored
        files.append(File.generated(config, uri, content=content, inclusion=included))
    return files


def on_page_context(context, page, config, nav):
    """Let the edit link lead to what a person wrote: a chapter's script, or the page."""
    found = [book.TUTORIAL / f"{page.file.name}.py", book.TUTORIAL / page.file.src_uri]
    for source in filter(lambda path: path.exists(), found):
        place = source.relative_to(book.ROOT).as_posix()
        page.edit_url = book.Stated.in_config(config).address(place, "edit")
        break
    return context
