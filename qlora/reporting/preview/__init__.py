"""Shows what would be trained, token by token: on the terminal, as a page and as a picture of all lengths."""

from qlora.reporting.preview.content import Preview, PreviewRow, PreviewToken
from qlora.reporting.preview.html import to_html
from qlora.reporting.preview.lengths import plot_lengths
from qlora.reporting.preview.terminal import to_text

__all__ = ["Preview", "PreviewRow", "PreviewToken", "plot_lengths", "to_html", "to_text"]
