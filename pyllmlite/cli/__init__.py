"""One command, ``pyllmlite``: a module per command group, nothing heavy at module level."""
