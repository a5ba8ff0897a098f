"""What MkDocs does with each page: links to files outside docs/, and equations."""

import html
import re

from latex2mathml.converter import convert


def on_page_markdown(markdown, *, page, config, **_):
    """Returns the page with `../FILE` of docs/PAGE.md as an address in the repository."""
    if "/" in page.file.src_uri:
        return markdown
    return re.sub(r"\]\(\.\./", f"]({config.repo_url}/blob/main/", markdown)


def on_page_content(content, **_):
    r"""Returns the page with \(...\) and \[...\] as MathML, which browsers draw without a script."""

    def mathml(found):
        return convert(html.unescape(found["tex"]), display="inline" if found["open"] == "(" else "block")

    element = r'<(?P<tag>span|div) class="arithmatex">\\(?P<open>[(\[])(?P<tex>.*?)\\[)\]]</(?P=tag)>'
    return re.sub(element, mathml, content, flags=re.DOTALL)
