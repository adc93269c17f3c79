"""Reports: one HTML file with tables and pictures, without references to other files."""

from encnet_triton.report.page import Html, facts, page, picture, section, table, text

__all__ = ["Html", "facts", "page", "picture", "section", "table", "text"]
