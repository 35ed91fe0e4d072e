"""The version, in this one place: the build reads it from here and stamps it into the native core."""

__version__ = "0.1.0"
