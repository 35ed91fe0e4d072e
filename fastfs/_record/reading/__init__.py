"""From records on disk to typed tables, and to the latest rows of a record that still grows.

Tables need the extra ``pandas``, Parquet the extra ``parquet``.
"""
