"""Shows what would be trained, token by token: on the terminal, as a page and as a picture of all lengths."""

from qlora.reporting.preview_html import to_html
from qlora.reporting.preview_parts import Preview, PreviewRow, PreviewToken
from qlora.reporting.preview_plot import plot_lengths
from qlora.reporting.preview_text import to_text

__all__ = ["Preview", "PreviewRow", "PreviewToken", "plot_lengths", "to_html", "to_text"]
