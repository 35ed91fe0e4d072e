"""The record of a run: its columns and schema, how it is written, checked and read.

``columns.py`` declares every column once. ``record.py`` and ``header.py`` hold what one step and one run are recorded
as, ``schema.py`` checks lines, ``encoding.py`` says how they are encoded in files.

Writing (the monitor uses it)::

    writing/   recorder -> ring (on the device) -> writer (a thread) -> alerts -> sink_queue -> a sink
    sinks/     JSON lines, Parquet, TensorBoard, functions

Reading (:func:`fastfs.load`, the report and ``fastfs watch`` use it)::

    reading/   jsonl_reader or parquet_reader -> store -> table; follow -> latest, for a record that still grows

``writing``, ``sinks`` and ``reading`` do not import one another, except that ``writing`` imports the protocol of sinks.
"""
