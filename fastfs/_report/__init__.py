"""Reading records and drawing them. Works on saved records only; needs the extras pandas and matplotlib."""

from fastfs._report.read import load, read_header, read_record

__all__ = ["load", "read_header", "read_record"]
