"""The Python face of the native library: the Program being built, and what its ops cost."""
