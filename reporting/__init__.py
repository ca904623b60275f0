"""A refactored checkpoint as one page to look at."""

from reporting.page import report_page

__all__ = ["report_page"]
