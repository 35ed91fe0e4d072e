"""The ``fastfs`` command and ``fastfs doctor``."""
