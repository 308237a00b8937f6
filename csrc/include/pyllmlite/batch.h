// The ragged step, and the state of the running sequences that lasts from step to step.
#ifndef PYLLMLITE_BATCH_H
#define PYLLMLITE_BATCH_H

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "pyllmlite/export.h"
#include "pyllmlite/op.h"
#include "pyllmlite/sampler.h"

namespace pyllmlite {

// A cache's block table: [rows, max_blocks], -1 where no block is held.  The cache writes it,
// the batch reads it.
struct BlockTable {
  int32_t block_size = 0;
  int32_t max_blocks = 0;
  const int32_t* data = nullptr;
};

struct Ints {
  const int32_t* data = nullptr;
  size_t size = 0;
};

// Every method checks what it is given and throws std::invalid_argument with one line.  Arrays
// are allocated once, so that their addresses hold for the batch's life.
class PLL_API Batch {
 public:
  Batch(int32_t max_rows, int32_t max_model_len, int32_t max_num_tokens, int32_t max_logit_rows,
        int32_t vocab_size, int32_t max_logprobs, std::vector<BlockTable> groups);
  ~Batch();
  Batch(const Batch&) = delete;
  Batch& operator=(const Batch&) = delete;

  int32_t max_rows() const;
  int32_t max_model_len() const;
  int32_t vocab_size() const;
  int32_t max_logprobs() const;
  int32_t* token_table();  // [max_rows, max_model_len]

  // The pointers in `params` are read from the given arrays, which are copied.
  void set_sampling(int32_t row, pll_sampling_params params, Ints bias_ids,
                    const std::vector<float>& bias_values, Ints banned_ids);
  void copy_row(int32_t source, int32_t target, int32_t length);
  // token_table[rows[i], positions[i]] = tokens[i].
  void append(Ints rows, Ints tokens, Ints positions);
  // After a run: the token sampled last for each sequence of the step, behind its tokens.
  void append_sampled();

  // After an error the batch is an empty step.  targets: empty, or one per logit row, -1: sample.
  void set_step(Ints rows, Ints starts, Ints counts, Ints logits, Ints targets = {});
  void score_prompt(int32_t index);
  void set_mask(int32_t logit_row, const uint32_t* mask, size_t words);  // null: all allowed
  void set_step_bias(int32_t row, Ints ids, const std::vector<float>& values);
  void want_logits(int32_t logit_row);
  // pairs: source, destination, source, ...  Kept until the next run (clear_copies).
  void set_copies(int32_t group, Ints pairs);
  void clear_copies();

  const pll_batch& view() const;

  // Results, [num_logit_rows] each.
  const int32_t* tokens() const;
  const float* logprobs() const;
  const int32_t* ranks() const;
  const int32_t* top_ids() const;
  const float* top_logprobs() const;
  const int32_t* status() const;
  bool any_failed() const;
  const float* logits(int32_t logit_row) const;  // [vocab_size], only where wanted

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace pyllmlite

#endif
