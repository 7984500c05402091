"""Readers for training logs in text, JSONL, JSON, CSV and TensorBoard format, including logs that are still growing."""

from tune_ssim.records.readers.parse_issues import ParseIssues
from tune_ssim.records.readers.parser import LineParser
from tune_ssim.records.readers.printed import PRINTED
from tune_ssim.records.readers.reader import Source
from tune_ssim.records.readers.record_lines import RecordLines
from tune_ssim.records.readers.source import FORMATS, open_source, read_all

__all__ = ["FORMATS", "PRINTED", "LineParser", "ParseIssues", "RecordLines", "Source", "open_source", "read_all"]
