"""What there is once in a process.

Serve hands the router's class to processes by value, so that attributes of the class, or of its
module, are not those that others see; this module is imported by name.
"""

from __future__ import annotations

from typing import Any

# The router that calls of this process go through, once it is there.
router: Any = None
