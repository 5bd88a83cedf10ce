"""The HTML report of a run, and its figures."""

from gibbsian.report.content import ChainSummary, LikelihoodSummary, LogZSummary, QualityTable, ReportContent
from gibbsian.report.page import write_report

__all__ = [
    "ChainSummary",
    "LikelihoodSummary",
    "LogZSummary",
    "QualityTable",
    "ReportContent",
    "write_report",
]
