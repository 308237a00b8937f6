#include "pyllmlite/batch.h"

#include <algorithm>
#include <climits>
#include <cmath>
#include <cstring>
#include <stdexcept>
#include <string>

namespace pyllmlite {
namespace {

[[noreturn]] void refuse(const std::string& message) { throw std::invalid_argument(message); }

std::string range(const char* what, int64_t value, int64_t limit) {
  return std::string(what) + " " + std::to_string(value) + " is not in [0, " +
         std::to_string(limit) + ")";
}

}  // namespace

struct Batch::Impl {
  struct Row {
    std::vector<int32_t> bias_ids;
    std::vector<float> bias_values;
    std::vector<int32_t> banned_ids;
  };
  struct Group {
    BlockTable table;
    std::vector<int32_t> slots;
    std::vector<int32_t> copies;
  };
  struct StepBias {
    std::vector<int32_t> ids;
    std::vector<float> values;
  };

  int32_t max_rows, max_model_len, max_num_tokens, max_logit_rows, vocab_size, max_logprobs;
  std::vector<int32_t> token_table;
  std::vector<pll_sampling_params> params;
  std::vector<Row> row_data;
  std::vector<Group> groups;
  std::vector<pll_kv_group> kv_groups;

  std::vector<int32_t> token_ids, positions, seq_ids, query_start_loc, seq_lens, rows;
  std::vector<int32_t> logit_rows, logit_row_of, targets, first_logit_row;
  std::vector<uint8_t> row_used;
  std::vector<const uint32_t*> masks;
  std::vector<float*> wanted;
  std::vector<std::unique_ptr<float[]>> logit_copies;
  size_t num_logit_copies = 0;
  std::vector<StepBias> step_bias;          // [max_rows]
  std::vector<pll_step_bias> step_biases;   // [max_rows], what the sampler sees of it
  std::vector<int32_t> biased_rows;

  std::vector<int32_t> tokens, ranks, top_ids, status;
  std::vector<float> logprobs, top_logprobs;

  pll_sampler_inputs sampler{};
  pll_batch batch{};

  void check_row(int32_t row) const {
    if (row < 0 || row >= max_rows) refuse(range("row", row, max_rows));
  }
  void check_logit_row(int32_t row) const {
    if (row < 0 || row >= batch.num_logit_rows) {
      refuse(range("logit row", row, batch.num_logit_rows));
    }
  }
  void check_token(int32_t token) const {
    if (token < 0 || token >= vocab_size) refuse(range("token id", token, vocab_size));
  }
  void check_ids(Ints ids) const {
    for (size_t i = 0; i < ids.size; ++i) check_token(ids.data[i]);
  }
  static void check_biases(const std::vector<float>& values) {
    for (float value : values) {
      // Negated, so that NaN is refused too.
      if (!(value < INFINITY)) refuse("a bias must be finite, or -inf to forbid a token");
    }
  }

  void point_at_row(int32_t row) {
    pll_sampling_params& p = params[row];
    const Row& data = row_data[row];
    p.num_bias = static_cast<int32_t>(data.bias_ids.size());
    p.bias_ids = data.bias_ids.data();
    p.bias_values = data.bias_values.data();
    p.num_banned = static_cast<int32_t>(data.banned_ids.size());
    p.banned_ids = data.banned_ids.data();
  }

  void drop_step_bias() {
    for (int32_t row : biased_rows) {
      step_bias[row].ids.clear();
      step_bias[row].values.clear();
      step_biases[row] = pll_step_bias{};
    }
    biased_rows.clear();
    sampler.step_biases = nullptr;
  }

  void clear() {
    drop_step_bias();
    batch.num_tokens = batch.num_seqs = batch.num_logit_rows = 0;
    query_start_loc[0] = 0;
    sampler.masks = nullptr;
    sampler.logits = nullptr;
    num_logit_copies = 0;
  }

  int32_t* table_row(int32_t row) {
    return token_table.data() + static_cast<size_t>(row) * max_model_len;
  }

  void add_slots(Group& group, int32_t row, int32_t start, int32_t count, int32_t* out) const {
    const BlockTable& table = group.table;
    const int32_t* blocks = table.data + static_cast<size_t>(row) * table.max_blocks;
    for (int32_t position = start, end = start + count; position < end;) {
      const int32_t column = position / table.block_size;
      const int32_t stop = static_cast<int32_t>(
          std::min<int64_t>(end, (static_cast<int64_t>(column) + 1) * table.block_size));
      const int32_t block = column < table.max_blocks ? blocks[column] : -1;
      const int64_t base = static_cast<int64_t>(block) * table.block_size;
      if (block < 0 || base + table.block_size > INT32_MAX) {
        refuse("row " + std::to_string(row) + " holds no cache block for position " +
               std::to_string(position) + " (KV group " +
               std::to_string(&group - groups.data()) + ")");
      }
      int32_t slot = static_cast<int32_t>(base) + position % table.block_size;
      for (; position < stop; ++position) *out++ = slot++;
    }
  }
};

Batch::Batch(int32_t max_rows, int32_t max_model_len, int32_t max_num_tokens,
             int32_t max_logit_rows, int32_t vocab_size, int32_t max_logprobs,
             std::vector<BlockTable> groups)
    : impl_(new Impl) {
  const std::pair<const char*, int32_t> sizes[] = {
      {"max_rows", max_rows},           {"max_model_len", max_model_len},
      {"max_num_tokens", max_num_tokens}, {"max_logit_rows", max_logit_rows},
      {"vocab_size", vocab_size},
  };
  for (const auto& [name, size] : sizes) {
    if (size < 1) refuse(std::string(name) + " must be at least 1, got " + std::to_string(size));
  }
  if (max_logprobs < 0 || max_logprobs > vocab_size) {
    refuse("max_logprobs must be in [0, vocab_size], got " + std::to_string(max_logprobs));
  }
  Impl& b = *impl_;
  b.max_rows = max_rows;
  b.max_model_len = max_model_len;
  b.max_num_tokens = max_num_tokens;
  b.max_logit_rows = max_logit_rows;
  b.vocab_size = vocab_size;
  b.max_logprobs = max_logprobs;
  b.token_table.assign(static_cast<size_t>(max_rows) * max_model_len, 0);
  b.params.resize(max_rows);
  b.row_data.resize(max_rows);
  b.token_ids.resize(max_num_tokens);
  b.positions.resize(max_num_tokens);
  b.seq_ids.resize(max_num_tokens);
  b.query_start_loc.resize(max_rows + 1);
  b.seq_lens.resize(max_rows);
  b.rows.resize(max_rows);
  b.first_logit_row.resize(max_rows + 1);
  b.row_used.resize(max_rows);
  b.logit_rows.resize(max_logit_rows);
  b.logit_row_of.resize(max_logit_rows);
  b.targets.resize(max_logit_rows);
  b.masks.resize(max_logit_rows);
  b.wanted.resize(max_logit_rows);
  b.tokens.resize(max_logit_rows);
  b.logprobs.resize(max_logit_rows);
  b.ranks.resize(max_logit_rows);
  b.status.resize(max_logit_rows);
  b.top_ids.resize(static_cast<size_t>(max_logit_rows) * max_logprobs);
  b.top_logprobs.resize(static_cast<size_t>(max_logit_rows) * max_logprobs);
  for (const BlockTable& table : groups) {
    if (table.block_size < 1 || table.max_blocks < 1 || table.data == nullptr) {
      refuse("a KV group needs a block size and a block table");
    }
    Impl::Group group;
    group.table = table;
    group.slots.resize(max_num_tokens);
    b.groups.push_back(std::move(group));
  }
  for (Impl::Group& group : b.groups) {
    b.kv_groups.push_back({group.table.block_size, group.table.max_blocks, group.table.data,
                           group.slots.data(), 0, nullptr});
  }
  pll_sampling_params defaults{};
  defaults.temperature = 1;
  defaults.top_p = 1;
  defaults.repetition_penalty = 1;
  defaults.num_logprobs = -1;
  for (int32_t row = 0; row < max_rows; ++row) {
    b.params[row] = defaults;
    b.point_at_row(row);
  }

  pll_sampler_inputs& s = b.sampler;
  s.struct_size = sizeof(s);
  s.max_model_len = max_model_len;
  s.vocab_size = vocab_size;
  s.token_table = b.token_table.data();
  s.params = b.params.data();
  s.logit_row_of = b.logit_row_of.data();
  s.targets = b.targets.data();
  s.max_logprobs = max_logprobs;
  s.tokens = b.tokens.data();
  s.logprobs = b.logprobs.data();
  s.ranks = b.ranks.data();
  s.top_ids = b.top_ids.data();
  s.top_logprobs = b.top_logprobs.data();
  s.status = b.status.data();

  pll_batch& batch = b.batch;
  batch.struct_size = sizeof(batch);
  batch.token_ids = b.token_ids.data();
  batch.positions = b.positions.data();
  batch.seq_ids = b.seq_ids.data();
  batch.query_start_loc = b.query_start_loc.data();
  batch.seq_lens = b.seq_lens.data();
  batch.rows = b.rows.data();
  batch.logit_rows = b.logit_rows.data();
  batch.num_kv_groups = static_cast<int32_t>(b.kv_groups.size());
  batch.kv_groups = b.kv_groups.data();
  batch.sampler = &b.sampler;
  b.clear();
}

Batch::~Batch() = default;

int32_t Batch::max_rows() const { return impl_->max_rows; }
int32_t Batch::max_model_len() const { return impl_->max_model_len; }
int32_t Batch::vocab_size() const { return impl_->vocab_size; }
int32_t Batch::max_logprobs() const { return impl_->max_logprobs; }
int32_t* Batch::token_table() { return impl_->token_table.data(); }
const pll_batch& Batch::view() const { return impl_->batch; }

void Batch::set_sampling(int32_t row, pll_sampling_params params, Ints bias_ids,
                         const std::vector<float>& bias_values, Ints banned_ids) {
  Impl& b = *impl_;
  b.check_row(row);
  // Negated, so that NaN is refused too.
  if (!(params.temperature >= 0) || std::isinf(params.temperature)) {
    refuse("temperature must be at least 0 and finite");
  }
  if (!(params.top_p > 0 && params.top_p <= 1)) refuse("top_p must be in (0, 1]");
  if (!(params.min_p >= 0 && params.min_p <= 1)) refuse("min_p must be in [0, 1]");
  if (params.top_k < 0) refuse("top_k must be at least 0");
  if (!(params.repetition_penalty > 0) || std::isinf(params.repetition_penalty)) {
    refuse("repetition_penalty must be greater than 0 and finite");
  }
  if (!std::isfinite(params.presence_penalty) || !std::isfinite(params.frequency_penalty)) {
    refuse("presence_penalty and frequency_penalty must be finite");
  }
  if (params.num_logprobs < -1 || params.num_logprobs > b.max_logprobs) {
    refuse("num_logprobs " + std::to_string(params.num_logprobs) + " is not in [-1, " +
           std::to_string(b.max_logprobs) + "]: raise max_logprobs");
  }
  if (params.prompt_len < 0 || params.min_len < 0) {
    refuse("prompt_len and min_len must be at least 0");
  }
  if (bias_ids.size != bias_values.size()) refuse("bias_ids and bias_values differ in length");
  b.check_ids(bias_ids);
  b.check_ids(banned_ids);
  b.check_biases(bias_values);
  Impl::Row& data = b.row_data[row];
  data.bias_ids.assign(bias_ids.data, bias_ids.data + bias_ids.size);
  data.bias_values = bias_values;
  data.banned_ids.assign(banned_ids.data, banned_ids.data + banned_ids.size);
  b.params[row] = params;
  b.point_at_row(row);
}

void Batch::copy_row(int32_t source, int32_t target, int32_t length) {
  Impl& b = *impl_;
  b.check_row(source);
  b.check_row(target);
  if (length < 0 || length > b.max_model_len) {
    refuse(range("length", length, static_cast<int64_t>(b.max_model_len) + 1));
  }
  if (source == target) return;
  std::memcpy(b.table_row(target), b.table_row(source), sizeof(int32_t) * length);
  b.row_data[target] = b.row_data[source];
  b.params[target] = b.params[source];
  b.point_at_row(target);
}

void Batch::append(Ints rows, Ints tokens, Ints positions) {
  Impl& b = *impl_;
  if (rows.size != tokens.size || rows.size != positions.size) {
    refuse("rows, tokens and positions differ in length");
  }
  for (size_t i = 0; i < rows.size; ++i) {
    b.check_row(rows.data[i]);
    b.check_token(tokens.data[i]);
    if (positions.data[i] < 0 || positions.data[i] >= b.max_model_len) {
      refuse(range("position", positions.data[i], b.max_model_len));
    }
  }
  for (size_t i = 0; i < rows.size; ++i) {
    b.table_row(rows.data[i])[positions.data[i]] = tokens.data[i];
  }
}

void Batch::append_sampled() {
  Impl& b = *impl_;
  for (int32_t i = 0; i < b.batch.num_seqs; ++i) {
    const int32_t last = b.first_logit_row[i + 1] - 1;
    // No logits were wanted, or a known token was scored, or there is no column left.
    if (last < b.first_logit_row[i] || b.targets[last] >= 0) continue;
    if (b.seq_lens[i] < b.max_model_len) b.table_row(b.rows[i])[b.seq_lens[i]] = b.tokens[last];
  }
}

void Batch::set_step(Ints rows, Ints starts, Ints counts, Ints logits, Ints targets) {
  Impl& b = *impl_;
  b.clear();
  if (rows.size != starts.size || rows.size != counts.size || rows.size != logits.size) {
    refuse("rows, starts, counts and logits differ in length");
  }
  if (rows.size > static_cast<size_t>(b.max_rows)) {
    refuse("the step has " + std::to_string(rows.size) + " sequences, max_rows is " +
           std::to_string(b.max_rows));
  }
  const int32_t num_seqs = static_cast<int32_t>(rows.size);
  std::fill(b.row_used.begin(), b.row_used.end(), 0);
  int32_t num_tokens = 0, num_logit_rows = 0;
  for (int32_t i = 0; i < num_seqs; ++i) {
    const int32_t row = rows.data[i], start = starts.data[i], count = counts.data[i];
    const int32_t wanted = logits.data[i];
    b.check_row(row);
    if (b.row_used[row]) refuse("row " + std::to_string(row) + " is twice in the step");
    b.row_used[row] = 1;
    if (start < 0 || count < 1 || start > b.max_model_len || count > b.max_model_len - start) {
      refuse("row " + std::to_string(row) + ": " + std::to_string(count) +
             " tokens from position " + std::to_string(start) +
             " do not lie in [0, max_model_len = " + std::to_string(b.max_model_len) + ")");
    }
    if (wanted < 0 || wanted > count) {
      refuse("row " + std::to_string(row) + ": logits wanted for " + std::to_string(wanted) +
             " of " + std::to_string(count) + " tokens");
    }
    if (count > b.max_num_tokens - num_tokens) {
      refuse("the step has more than max_num_tokens = " + std::to_string(b.max_num_tokens) +
             " tokens");
    }
    if (wanted > b.max_logit_rows - num_logit_rows) {
      refuse("the step has more than max_logit_rows = " + std::to_string(b.max_logit_rows) +
             " logit rows");
    }
    const int32_t* source = b.table_row(row) + start;
    for (int32_t j = 0; j < count; ++j) {
      const int32_t token = source[j];
      if (static_cast<uint32_t>(token) >= static_cast<uint32_t>(b.vocab_size)) {
        refuse("row " + std::to_string(row) + ", position " + std::to_string(start + j) + ": " +
               range("token id", token, b.vocab_size));
      }
      b.token_ids[num_tokens + j] = token;
      b.positions[num_tokens + j] = start + j;
      b.seq_ids[num_tokens + j] = i;
    }
    for (Impl::Group& group : b.groups) {
      b.add_slots(group, row, start, count, group.slots.data() + num_tokens);
    }
    b.rows[i] = row;
    b.seq_lens[i] = start + count;
    b.query_start_loc[i] = num_tokens;
    b.first_logit_row[i] = num_logit_rows;
    num_tokens += count;
    for (int32_t j = 0; j < wanted; ++j) {
      b.logit_rows[num_logit_rows] = num_tokens - wanted + j;
      b.logit_row_of[num_logit_rows++] = row;
    }
  }
  b.query_start_loc[num_seqs] = num_tokens;
  b.first_logit_row[num_seqs] = num_logit_rows;
  if (targets.size != 0 && targets.size != static_cast<size_t>(num_logit_rows)) {
    b.query_start_loc[0] = 0;
    refuse("there are " + std::to_string(targets.size) + " targets for " +
           std::to_string(num_logit_rows) + " logit rows");
  }
  for (int32_t i = 0; i < num_logit_rows; ++i) {
    const int32_t target = targets.size != 0 ? targets.data[i] : -1;
    if (target != -1) b.check_token(target);
    b.targets[i] = target;
    b.tokens[i] = 0;
    b.status[i] = 0;
  }
  b.batch.num_seqs = num_seqs;
  b.batch.num_tokens = num_tokens;
  b.batch.num_logit_rows = num_logit_rows;
}

void Batch::score_prompt(int32_t index) {
  Impl& b = *impl_;
  if (index < 0 || index >= b.batch.num_seqs) refuse(range("sequence", index, b.batch.num_seqs));
  const int32_t row = b.rows[index];
  const int32_t prompt_len = b.params[row].prompt_len;
  for (int32_t i = b.first_logit_row[index]; i < b.first_logit_row[index + 1]; ++i) {
    const int32_t next = b.positions[b.logit_rows[i]] + 1;
    // In a chunk before the prompt's end the last token is followed by a known one too.
    if (next >= b.seq_lens[index] && next >= std::min(prompt_len, b.max_model_len)) continue;
    const int32_t target = b.table_row(row)[next];
    b.check_token(target);
    b.targets[i] = target;
  }
}

void Batch::set_mask(int32_t logit_row, const uint32_t* mask, size_t words) {
  Impl& b = *impl_;
  b.check_logit_row(logit_row);
  const size_t needed = (static_cast<size_t>(b.vocab_size) + 31) / 32;
  if (mask != nullptr && words < needed) {
    refuse("a mask needs " + std::to_string(needed) + " words for " +
           std::to_string(b.vocab_size) + " tokens, got " + std::to_string(words));
  }
  if (b.sampler.masks == nullptr) {
    if (mask == nullptr) return;
    std::fill_n(b.masks.begin(), b.batch.num_logit_rows, nullptr);
    b.sampler.masks = b.masks.data();
  }
  b.masks[logit_row] = mask;
}

void Batch::set_step_bias(int32_t row, Ints ids, const std::vector<float>& values) {
  Impl& b = *impl_;
  b.check_row(row);
  if (ids.size != values.size()) refuse("ids and values differ in length");
  b.check_ids(ids);
  b.check_biases(values);
  if (b.step_bias.empty()) {
    b.step_bias.resize(b.max_rows);
    b.step_biases.resize(b.max_rows);
  }
  Impl::StepBias& bias = b.step_bias[row];
  if (bias.ids.empty()) b.biased_rows.push_back(row);
  bias.ids.insert(bias.ids.end(), ids.data, ids.data + ids.size);
  bias.values.insert(bias.values.end(), values.begin(), values.end());
  b.step_biases[row] = {static_cast<int32_t>(bias.ids.size()), bias.ids.data(),
                        bias.values.data()};
  b.sampler.step_biases = b.step_biases.data();
}

void Batch::want_logits(int32_t logit_row) {
  Impl& b = *impl_;
  b.check_logit_row(logit_row);
  if (b.sampler.logits == nullptr) {
    std::fill_n(b.wanted.begin(), b.batch.num_logit_rows, nullptr);
    b.sampler.logits = b.wanted.data();
  }
  if (b.wanted[logit_row] != nullptr) return;
  if (b.num_logit_copies == b.logit_copies.size()) {
    b.logit_copies.emplace_back(new float[b.vocab_size]());
  }
  b.wanted[logit_row] = b.logit_copies[b.num_logit_copies++].get();
}

void Batch::set_copies(int32_t group, Ints pairs) {
  Impl& b = *impl_;
  if (group < 0 || group >= b.batch.num_kv_groups) {
    refuse(range("KV group", group, b.batch.num_kv_groups));
  }
  for (size_t i = 0; i < pairs.size; ++i) {
    if (pairs.data[i] < 0) refuse("a block number is negative: " + std::to_string(pairs.data[i]));
  }
  Impl::Group& g = b.groups[group];
  g.copies.assign(pairs.data, pairs.data + pairs.size);
  b.kv_groups[group].num_copies = static_cast<int32_t>(pairs.size / 2);
  b.kv_groups[group].copies = g.copies.data();
}

void Batch::clear_copies() {
  for (pll_kv_group& group : impl_->kv_groups) group.num_copies = 0;
}

const int32_t* Batch::tokens() const { return impl_->tokens.data(); }
const float* Batch::logprobs() const { return impl_->logprobs.data(); }
const int32_t* Batch::ranks() const { return impl_->ranks.data(); }
const int32_t* Batch::top_ids() const { return impl_->top_ids.data(); }
const float* Batch::top_logprobs() const { return impl_->top_logprobs.data(); }
const int32_t* Batch::status() const { return impl_->status.data(); }

bool Batch::any_failed() const {
  const Impl& b = *impl_;
  return std::any_of(b.status.begin(), b.status.begin() + b.batch.num_logit_rows,
                     [](int32_t status) { return status != 0; });
}

const float* Batch::logits(int32_t logit_row) const {
  const Impl& b = *impl_;
  b.check_logit_row(logit_row);
  if (b.sampler.logits == nullptr || b.wanted[logit_row] == nullptr) {
    refuse("logits of row " + std::to_string(logit_row) +
           " were not asked for: call want_logits before the run");
  }
  return b.wanted[logit_row];
}

}  // namespace pyllmlite
