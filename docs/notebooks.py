"""Links of pages that are notebooks: written as between files, they lead to the pages of the site.

mkdocs follows the links of Markdown pages alone; mkdocs.yml names this file as a hook.
"""

import posixpath
import re

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import Files
from mkdocs.structure.pages import Page
from mkdocs.utils import get_relative_url

LINK = re.compile(r'href="([^":#]+\.(?:md|ipynb))(#[^"]*)?"')


def on_page_content(html: str, page: Page, files: Files, **_: object) -> str:
    """mkdocs' event: a page as HTML, before it is put in the theme."""
    if not page.file.src_uri.endswith(".ipynb"):
        return html

    def link(match: re.Match[str]) -> str:
        folder = posixpath.dirname(page.file.src_uri)
        target = files.get_file_from_path(posixpath.normpath(posixpath.join(folder, match[1])))
        if target is None:
            raise PluginError(f"{page.file.src_uri} links to {match[1]!r}, which is no page")
        return f'href="{get_relative_url(target.url, page.file.url)}{match[2] or ""}"'

    return LINK.sub(link, html)
