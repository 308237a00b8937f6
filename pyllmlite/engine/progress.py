"""The progress bar of ``LLM.generate``."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any


class Progress:
    """Counts finished prompts and generated tokens.

    Args:
        use_tqdm: True, False, or what makes a bar as ``tqdm(total=, desc=)`` does (vLLM's word).
    """

    def __init__(self, total: int, use_tqdm: bool | Callable[..., Any]) -> None:
        self._bar: Any = None
        self._tokens = self._prompt_tokens = 0
        self._start = time.monotonic()
        make: Callable[..., Any] | None = None
        if callable(use_tqdm):
            make = use_tqdm
        elif use_tqdm:
            try:
                from tqdm.auto import tqdm as make  # type: ignore[no-redef]
            except ImportError:  # the bar is a comfort, not a need
                make = None
        if make is not None:
            self._bar = make(total=total, desc="Processed prompts", dynamic_ncols=True)

    def finished(self, num_prompt_tokens: int, num_output_tokens: int) -> None:
        if self._bar is None:
            return
        self._prompt_tokens += num_prompt_tokens
        self._tokens += num_output_tokens
        seconds = max(time.monotonic() - self._start, 1e-9)
        self._bar.set_postfix_str(
            f"prompt {self._prompt_tokens / seconds:.1f} tok/s, "
            f"output {self._tokens / seconds:.1f} tok/s",
            refresh=False,
        )
        self._bar.update(1)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
