"""Shows saved records: pictures, the report page and the table of ``fastfs watch``.

It reads typed tables of :mod:`fastfs._record.reading` only. Pictures need the extra ``plot``, the page ``report``.
"""
