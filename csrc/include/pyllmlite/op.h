/* The op ABI: what a kernel looks like to the Program.
 *
 * Plain C, no Python, no torch, so that a compiled plugin outlives every release of
 * either.  An op is a function pointer, its state and the buffers it was added with.
 * `plan` runs once a step on one thread, before any op of the step; `run` is called by
 * EVERY thread of the pool (single program, multiple data) and returns when that
 * thread's share is done.  The Program puts a barrier after each op; inside an op,
 * `ctx->barrier` separates phases.
 *
 * Ownership: buffers belong to the Program, the batch to the engine, `state` to the op
 * (freed by `destroy`).  Nothing may be kept past the call that handed it over.
 *
 * Rule of arithmetic (CPU): what is written for a row depends on no other row, on no
 * thread count and on no chunking.  Reduce over K in a fixed order.
 */
#ifndef PYLLMLITE_OP_H
#define PYLLMLITE_OP_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* Version 0 is free to change.  A Program refuses an op whose abi_version differs. */
#define PLL_ABI_VERSION 0u
/* Name of the PyCapsule that carries a `pll_op*` from Python to the Program.  The Program
 * copies the struct, takes over `state` and renames the capsule: a capsule's destructor frees
 * the struct, and `state` only where the capsule still has its first name. */
#define PLL_OP_CAPSULE "pyllmlite.op.v0"
#define PLL_OP_CAPSULE_TAKEN "pyllmlite.op.v0.taken"

typedef enum pll_dtype {
  PLL_F32 = 0,
  PLL_BF16 = 1,
  PLL_F16 = 2,
  PLL_I8 = 3,
  PLL_U8 = 4,
  PLL_I32 = 5,
  PLL_I64 = 6,
  PLL_U32 = 7
} pll_dtype;

/* A strided view.  Strides in elements, row-major unless said otherwise.  A Program's buffers may
   have room behind each row: step by stride[0], not by the width. */
typedef struct pll_tensor {
  void* data;
  int32_t dtype; /* pll_dtype */
  int32_t ndim;  /* 0..4 */
  int64_t shape[4];
  int64_t stride[4];
} pll_tensor;

/* Layers that keep the same tokens share a block table: one group per distinct window. */
typedef struct pll_kv_group {
  int32_t block_size;          /* tokens per block */
  int32_t max_blocks;          /* columns of block_table */
  const int32_t* block_table;  /* [rows, max_blocks], indexed by pll_batch.rows; -1: not held */
  const int32_t* slot_mapping; /* [num_tokens] block * block_size + offset; -1: do not write */
  int32_t num_copies;          /* copy-on-write: whole blocks copied before the first op */
  const int32_t* copies;       /* [num_copies, 2] source block, destination block */
} pll_kv_group;

/* One ragged step.  Sequence i owns tokens query_start_loc[i] .. query_start_loc[i+1]-1,
 * the last of which stands at position seq_lens[i]-1. */
typedef struct pll_batch {
  uint32_t struct_size;
  int32_t num_tokens;
  int32_t num_seqs;
  int32_t num_logit_rows;
  const int32_t* token_ids;       /* [num_tokens] */
  const int32_t* positions;       /* [num_tokens] */
  const int32_t* seq_ids;         /* [num_tokens] index i of the owning sequence */
  const int32_t* query_start_loc; /* [num_seqs + 1] */
  const int32_t* seq_lens;        /* [num_seqs] context length, this step's tokens included */
  const int32_t* rows;            /* [num_seqs] persistent row of each sequence */
  const int32_t* logit_rows;      /* [num_logit_rows] token index whose logits are wanted */
  int32_t num_kv_groups;
  const pll_kv_group* kv_groups;  /* [num_kv_groups] */
  /* The engine's persistent per-row state, read by the sampler (see sampler.h). */
  const struct pll_sampler_inputs* sampler;
} pll_batch;

/* What one thread sees while an op runs.  `impl` is the runtime's own. */
typedef struct pll_context {
  uint32_t struct_size;
  int32_t thread;      /* 0 .. num_threads-1 */
  int32_t num_threads;
  int32_t reserved;
  void* scratch;       /* this thread's, 64-byte aligned, contents undefined */
  size_t scratch_bytes;
  void* impl;
  /* All threads of the pool must reach it. */
  void (*barrier)(const struct pll_context* ctx);
  /* Shared counter `slot` (0..3) of this op, zero at its start: returns the old value and
   * adds `amount`.  For dynamic sharing of tiles; a slot must not be reused after a
   * barrier inside the same op. */
  int64_t (*fetch_add)(const struct pll_context* ctx, int32_t slot, int64_t amount);
  /* Reports a failure: the step ends after this op with `message` (copied). */
  void (*fail)(const struct pll_context* ctx, const char* message);
} pll_context;

typedef struct pll_op {
  uint32_t abi_version; /* PLL_ABI_VERSION */
  uint32_t struct_size; /* sizeof(pll_op) */
  const char* name;     /* static or owned by state */
  void* state;
  /* Bytes of scratch each thread needs, for a Program of this many tokens.  May be NULL. */
  size_t (*scratch_bytes)(void* state, int32_t max_num_tokens, int32_t num_threads);
  /* Once a step, one thread, before any `run`.  Returns 0, or fills `error` (NUL-terminated,
   * at most error_size bytes) and returns nonzero.  May be NULL. */
  int (*plan)(void* state, const pll_batch* batch, char* error, size_t error_size);
  /* Every thread.  buffers[i] is the i-th buffer the op was added with, at full capacity;
   * the rows that count are the batch's. */
  void (*run)(void* state, const pll_batch* batch, const pll_tensor* buffers, int32_t num_buffers,
              const pll_context* ctx);
  /* May be NULL. */
  void (*destroy)(void* state);
  /* When the op is added to a Program: whether these buffers fit, by number, dtype and shape at
   * full capacity (data may still be NULL).  Returns 0, or fills `error` as `plan` does.  May be
   * NULL: nothing is checked. */
  int (*check)(void* state, const pll_tensor* buffers, int32_t num_buffers,
               int32_t max_num_tokens, int32_t max_logit_rows, char* error, size_t error_size);
} pll_op;

#ifdef __cplusplus
}
#endif
#endif
