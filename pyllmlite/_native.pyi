"""The compiled extension: thin bindings over ``csrc/include/pyllmlite``.

Arrays are numpy; bf16 and f16 travel as ``uint16`` bits.  Everything that computes
releases the GIL.  Errors raise ``ValueError`` (a bad argument) or ``RuntimeError`` (a
failed step) with one line.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

ABI_VERSION: int

def info() -> dict[str, Any]:
    """``{"isa": str, "available": [str], "compiled": [str], "num_cpus": int, "version": str}``."""

def set_isa(name: str) -> None:
    """Take another instruction set for ops made from now on (also ``PYLLMLITE_ISA``)."""

def cuda_info() -> dict[str, Any]:
    """``{"built": bool, "devices": [{"name", "compute_capability": (major, minor), "num_sms",
    "total_bytes"}], "reason": str | None}``; ``reason`` says in one line why there is no device:
    the CUDA part was not built, no driver, no GPU."""

def measure_peak(kind: str, pool: ThreadPool, seconds: float = 0.2, bytes: int = 0) -> float:
    """What the pool's threads do at most with the instruction set in use, per second.

    ``kind``: ``read`` (bytes read, over ``bytes`` of memory: larger than the last-level cache for
    DRAM's bandwidth), or the multiply-accumulates of ``int8``, ``bf16`` or ``f32``."""

class ThreadPool:
    """``num_threads`` workers that run a Program; the calling thread is one of them.

    ``affinity``: CPU of each worker, reused in a circle; the calling thread is never moved.
    In a forked child the first run starts new threads.
    """

    def __init__(self, num_threads: int, affinity: Sequence[int] | None = None) -> None: ...
    @property
    def num_threads(self) -> int: ...

class Op:
    """One op, ready to be added to a Program; keeps the arrays it reads alive."""

    @property
    def name(self) -> str: ...
    @staticmethod
    def from_capsule(capsule: object) -> Op:
        """Take over a ``pll_op`` from a capsule named ``pyllmlite.op.v0`` (renamed, so that it
        is taken once); a version that does not fit raises ``ValueError``."""

class Program:
    """Ops over buffers, allocated once for ``max_num_tokens`` tokens and ``max_logit_rows``."""

    def __init__(self, max_num_tokens: int, max_logit_rows: int, pool: ThreadPool) -> None: ...
    def add_buffer(self, name: str, rows: str | int, width: int, dtype: str = "f32") -> int:
        """``rows``: ``"tokens"``, ``"logits"`` or a count.  Returns the buffer's id."""
    def add_tensor(self, name: str, array: np.ndarray, dtype: str | None = None) -> int:
        """An external tensor (weights, KV), kept alive; ``dtype`` says what uint16 bits mean."""
    def share_buffer(self, name: str, other: int, width: int) -> int:
        """A second name for the memory of buffer ``other`` (lifetimes do not overlap)."""
    def column_view(self, name: str, other: int, first: int, width: int) -> int:
        """Columns ``first`` to ``first + width - 1`` of buffer ``other``, for ops that write parts
        of its rows."""
    def add_op(self, op: Op, buffers: Sequence[int], name: str) -> int: ...
    def add_python_op(
        self, function: Callable[..., None], buffers: Sequence[int], name: str
    ) -> int:
        """``function(batch: BatchView, *arrays)`` on the engine's thread, with the GIL; arrays are
        numpy views of the rows in use.  An exception ends the step and is raised by ``run``."""
    def finish(self) -> None:
        """Allocate buffers and scratch; no op can be added afterwards."""
    def run(self, batch: Batch) -> None: ...
    def buffer(self, id: int) -> np.ndarray:
        """The whole buffer as a view (bf16 as uint16)."""
    def set_profiling(self, on: bool) -> None: ...
    def profile(self) -> list[tuple[str, int, float]]:
        """Per op: name, calls, seconds in all."""
    @property
    def buffer_bytes(self) -> int: ...
    @property
    def op_names(self) -> list[str]: ...

class BatchView:
    """What a Python op sees of the step: read-only numpy views, names as in ``pll_batch``."""

    token_ids: np.ndarray
    positions: np.ndarray
    seq_ids: np.ndarray
    query_start_loc: np.ndarray
    seq_lens: np.ndarray
    rows: np.ndarray
    logit_rows: np.ndarray
    def block_table(self, group: int) -> np.ndarray:
        """``[num_seqs, max_blocks]`` int32, gathered in the order of the step's sequences."""
    def slot_mapping(self, group: int) -> np.ndarray: ...

class Batch:
    """The ragged step, and the per-row state that lasts from step to step.

    ``kv_groups``: ``(block_size, block_table)`` pairs, block_table an int32 array
    ``[max_rows, max_blocks]`` that the cache writes and this object keeps alive.
    """

    def __init__(
        self,
        max_rows: int,
        max_model_len: int,
        max_num_tokens: int,
        max_logit_rows: int,
        vocab_size: int,
        max_logprobs: int,
        kv_groups: Sequence[tuple[int, np.ndarray]],
    ) -> None: ...
    @property
    def token_table(self) -> np.ndarray:
        """int32 ``[max_rows, max_model_len]``, writable view."""
    def set_sampling(
        self,
        row: int,
        *,
        temperature: float = 1.0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        top_k: int = 0,
        repetition_penalty: float = 1.0,
        presence_penalty: float = 0.0,
        frequency_penalty: float = 0.0,
        num_logprobs: int = -1,
        seed: int = 0,
        prompt_len: int = 0,
        min_len: int = 0,
        bias_ids: Sequence[int] = (),
        bias_values: Sequence[float] = (),
        banned_ids: Sequence[int] = (),
        top_of_processed: bool = False,
    ) -> None: ...
    def copy_row(self, source: int, target: int, length: int) -> None:
        """Tokens ``[:length]`` and sampling parameters of one row to another (a fork)."""
    def append(
        self, rows: Sequence[int], tokens: Sequence[int], positions: Sequence[int]
    ) -> None:
        """``token_table[rows[i], positions[i]] = tokens[i]``: one call for all of a step."""
    def append_sampled(self) -> None:
        """After a run: the token sampled after each sequence's last row, behind its tokens."""
    def set_step(
        self,
        rows: Sequence[int],
        starts: Sequence[int],
        counts: Sequence[int],
        logits: Sequence[int],
        targets: Sequence[int] = (),
    ) -> None:
        """The step: per sequence its row, first position, number of tokens, and for how many of
        its last tokens logits are wanted.  Token ids are read from ``token_table``; a token at or
        past a row's length is the caller's mistake.  ``targets``: empty, or per logit row a token
        to score, -1 to sample.  Positions, slots and starts are computed natively.
        ``ValueError`` for what does not fit (every position must have a cache block in every KV
        group); the step is then empty."""
    def score_prompt(self, index: int) -> None:
        """In the step just set, sequence ``index``'s logit rows that are followed by a known token
        (all but the last; the last too where ``prompt_len`` says that the prompt goes on) score
        that token instead of sampling: prompt_logprobs."""
    def set_mask(self, logit_row: int, mask: np.ndarray | None) -> None:
        """uint32 bitmask for a logit row of the step just set; kept alive until the next step."""
    def set_step_bias(self, row: int, ids: Sequence[int], values: Sequence[float]) -> None:
        """Added to the row's logits besides its logit_bias, for the step just set only; ``-inf``
        forbids a token."""
    def want_logits(self, logit_row: int) -> None:
        """Keep the row's raw logits for :meth:`logits` after the run (one copy of the row)."""
    def set_copies(self, group: int, pairs: Sequence[tuple[int, int]]) -> None:
        """Blocks to copy before the first op of the next run, before or after :meth:`set_step`;
        a run clears them."""
    @property
    def num_tokens(self) -> int: ...
    @property
    def num_logit_rows(self) -> int: ...
    # Results of the last run; views, valid until the next set_step.
    @property
    def tokens(self) -> np.ndarray: ...
    @property
    def token_list(self) -> list[int]:
        """``tokens`` as Python ints (one call, cheaper than ``tokens.tolist()``)."""
    @property
    def logprobs(self) -> np.ndarray: ...
    @property
    def ranks(self) -> np.ndarray: ...
    @property
    def top_ids(self) -> np.ndarray: ...
    @property
    def top_logprobs(self) -> np.ndarray: ...
    @property
    def status(self) -> np.ndarray: ...
    @property
    def any_failed(self) -> bool: ...
    def logits(self, logit_row: int) -> np.ndarray: ...

class PackedLinear:
    """A weight matrix in the kernels' order (csrc/include/pyllmlite/pack.h)."""

    def __init__(
        self,
        format: str,
        values: np.ndarray,
        scales: np.ndarray | None = None,
        mins: np.ndarray | None = None,
        group_size: int = 0,
        gated: bool = False,
        zero_points: np.ndarray | None = None,
        codebook: np.ndarray | None = None,
    ) -> None:
        """``format``: f32, bf16 (values float32, or uint16 bf16 bits), int8 (int8), int4 (uint8
        0..15), codebook4 (uint8 0..15, with ``codebook`` float32 ``[16]``).  ``scales``: float16 or
        float32 ``[n, groups]``; ``mins`` or ``zero_points`` likewise, in the scales' type."""
    @staticmethod
    def empty(
        format: str,
        n: int,
        k: int,
        group_size: int = 0,
        mins: bool = False,
        gated: bool = False,
        wide_scales: bool = False,
        zero_points: bool = False,
        codebook: np.ndarray | None = None,
    ) -> PackedLinear:
        """Zeros, to be filled by ``set_rows``; ``wide_scales``: float32."""
    def set_rows(
        self,
        first: int,
        values: np.ndarray,
        scales: np.ndarray | None = None,
        mins: np.ndarray | None = None,
    ) -> None:
        """Pack some rows (before gating), so that a big matrix is never held twice.  ``mins``:
        zero points, where the matrix has those."""
    @property
    def format(self) -> str: ...
    @property
    def shape(self) -> tuple[int, int]: ...
    @property
    def nbytes(self) -> int: ...
    def unpack(self, first: int = 0, count: int | None = None) -> np.ndarray:
        """Rows back as float32, in their order before gating."""

class NormArgs:
    def __init__(
        self,
        kind: str = "none",
        eps: float = 1e-5,
        weight: np.ndarray | None = None,
        bias: np.ndarray | None = None,
    ) -> None:
        """``kind``: none, rms, layer; float32 arrays, kept alive."""

class KVLayout:
    def __init__(
        self, dtype: str, num_blocks: int, num_kv_heads: int, head_dim: int, block_size: int
    ) -> None:
        """``dtype``: f32, bf16, int8 (then ops take the scales behind K and V)."""

# Factories: keyword for keyword the specs of csrc/include/pyllmlite/ops.h.
def linear(
    weight: PackedLinear,
    norm: NormArgs | None = None,
    input_permutation: np.ndarray | None = None,
    input_scale: np.ndarray | None = None,
    int8_activations: bool = False,
    activation_group: int = 0,
    bias: np.ndarray | None = None,
    activation: str = "none",
    gated: bool = False,
    residual: bool = False,
    logit_rows: bool = False,
    softcap: float = 0.0,
    output_scale: float = 1.0,
    multiply: bool = False,
    outlier_threshold: float = 0.0,
    bf16_activations: bool = False,
) -> Op:
    """``csrc/include/pyllmlite/ops.h`` has what is computed."""

def norm(norm: NormArgs, width: int, residual: bool = False) -> Op: ...
def embed(
    table: PackedLinear,
    scale: float = 1.0,
    position_table: np.ndarray | None = None,
    position_offset: int = 0,
) -> Op: ...
def rotary_store(
    num_heads: int,
    kv: KVLayout,
    kv_group: int = 0,
    rotary_dim: int = 0,
    cos: np.ndarray | None = None,
    sin: np.ndarray | None = None,
    q_norm: np.ndarray | None = None,
    k_norm: np.ndarray | None = None,
    qk_norm_eps: float = 1e-6,
) -> Op: ...
def attention(
    num_heads: int,
    kv: KVLayout,
    kv_group: int = 0,
    scale: float = 1.0,
    window: int = 0,
    softcap: float = 0.0,
    alibi_slopes: np.ndarray | None = None,
    sinks: int = 0,
    rotary_dim: int = 0,
    cos: np.ndarray | None = None,
    sin: np.ndarray | None = None,
) -> Op: ...
def sample(vocab_size: int) -> Op: ...
def copy_blocks(kv_group: int, swaps: bool = False) -> Op: ...

def run_op(
    op: Op, arrays: Sequence[np.ndarray], batch: Batch | None, num_threads: int = 1
) -> None:
    """One op on plain arrays, for tests and micro-benchmarks: runs it as a Program would.

    ``batch`` None: one sequence of as many tokens as the first array has rows, all of whose
    logits are wanted; for ops that look at nothing else of the step."""

def hash_block(parent: int, token_ids: Sequence[int] | np.ndarray, salt: int = 0) -> int:
    """64-bit chained content hash of a block's tokens (not cryptographic)."""
