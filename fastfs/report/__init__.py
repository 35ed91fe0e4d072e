"""Reading records and drawing them. Works on saved records only; needs the extras pandas and matplotlib."""

from fastfs.report.read import read_header, read_record

__all__ = ["read_header", "read_record"]
