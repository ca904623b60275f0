"""Checkpoints and their statistics as pages to look at."""

from reporting.page import profile_page, report_page

__all__ = ["profile_page", "report_page"]
