"""The version, in this one place: the package metadata and the native library read it here."""

__version__ = "0.1.0"
