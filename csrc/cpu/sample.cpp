// The sampler: logits to tokens and log-probabilities, row by row (see sampler.h for the
// order of its steps).
//
// The vocabulary is never sorted.  Every pass works on chunks of 64 logits and keeps their
// maxima, so that later passes skip chunks below a threshold: the k-th best chunk maximum
// bounds the k-th best logit from below, and few logits are left to select from.

#include <math.h>
#include <stdio.h>
#include <string.h>

#include "cpu/buffers.h"
#include "cpu/factories.h"
#include "cpu/select.h"
#include "cpu/simd.h"
#include "pyllmlite/sampler.h"

namespace pyllmlite::PLL_NS {
namespace {

constexpr int64_t kChunk = 64;
constexpr float kGreedyBelow = 1e-5f;

struct SampleState {
  int64_t vocab;
};

// One thread's scratch, cut up.  `counts` and `keys` are never in use at the same time.
struct Scratch {
  float* work;       // [vocab] logits after masks, biases and penalties
  uint64_t* keys;    // [vocab] candidates of a selection
  int32_t* counts;   // [vocab] occurrences of a token
  float* raw_max;    // [chunks] chunk maxima of the raw logits
  float* work_max;   // [chunks] and of `work`
  double* mass;      // [chunks]
};

inline size_t round_up(size_t bytes) { return (bytes + 63) / 64 * 64; }
inline int64_t num_chunks(int64_t vocab) { return (vocab + kChunk - 1) / kChunk; }

size_t cut_scratch(int64_t vocab, void* base, Scratch* scratch) {
  const size_t logits = round_up(vocab * sizeof(float));
  const size_t keys = round_up(vocab * sizeof(uint64_t));
  const size_t maxima = round_up(num_chunks(vocab) * sizeof(float));
  const size_t mass = round_up(num_chunks(vocab) * sizeof(double));
  if (scratch) {
    char* at = static_cast<char*>(base);
    scratch->work = reinterpret_cast<float*>(at);
    scratch->keys = reinterpret_cast<uint64_t*>(at + logits);
    scratch->counts = reinterpret_cast<int32_t*>(at + logits);
    scratch->raw_max = reinterpret_cast<float*>(at + logits + keys);
    scratch->work_max = reinterpret_cast<float*>(at + logits + keys + maxima);
    scratch->mass = reinterpret_cast<double*>(at + logits + keys + 2 * maxima);
  }
  return logits + keys + 2 * maxima + mass;
}

// Logits of one row, their chunks' maxima and their maximum.
struct Logits {
  const float* values;
  int64_t count;
  const float* chunk_max;
  float max;
};

// The last, short vector of a row, filled up with -inf.
vf load_last(const float* x, int64_t n) {
  float lanes[16];
  for (int i = 0; i < 16; ++i) lanes[i] = i < n ? x[i] : -INFINITY;
  return vload(lanes);
}

// Fills chunk_max; false if a logit is NaN or +inf.
bool scan(const float* x, int64_t n, float* chunk_max, Logits* out) {
  const vf infinite = vset1(INFINITY), lowest = vset1(-INFINITY);
  vf all = lowest, bad = vzero();
  for (int64_t c = 0, begin = 0; begin < n; ++c, begin += kChunk) {
    vf best = lowest;
    for (int64_t i = begin; i < begin + kChunk && i < n; i += 16) {
      const vf v = i + 16 <= n ? vload(x + i) : load_last(x + i, n - i);
      bad = vmax(bad, vselect_gt(infinite, v, vzero(), vset1(1)));
      best = vmax(best, v);
    }
    chunk_max[c] = vreduce_max(best);
    all = vmax(all, best);
  }
  *out = Logits{x, n, chunk_max, vreduce_max(all)};
  return vreduce_max(bad) == 0;
}

// The lowest id among the maxima.
int32_t argmax(const Logits& logits) {
  for (int64_t c = 0;; ++c) {
    if (logits.chunk_max[c] != logits.max) continue;
    for (int64_t i = c * kChunk;; ++i) {
      if (logits.values[i] == logits.max) return static_cast<int32_t>(i);
    }
  }
}

// What is left to draw from: logits of at least `floor` whose weight's key is at most `last`.
struct Support {
  float floor;
  uint64_t last;
};
constexpr uint64_t kNoLast = ~uint64_t(0);

// exp((x - max) / temperature) of a chunk's tokens, 0 for those outside of the support; returns
// their sum.
float chunk_weights(const Logits& logits, int64_t chunk, float inverse, const Support& support,
                    float* weights) {
  const int64_t begin = chunk * kChunk;
  const vf max = vset1(logits.max), factor = vset1(inverse), floor = vset1(support.floor);
  vf sum = vzero();
  for (int64_t j = 0; j < kChunk; j += 16) {
    const int64_t left = logits.count - begin - j;
    const float* x = logits.values + begin + j;
    const vf v = left >= 16 ? vload(x) : load_last(x, left);
    vf w = vexp(vmul(vsub(v, max), factor));
    w = vselect_gt(floor, v, vzero(), w);
    vstore(weights + j, w);
    sum = vadd(sum, w);
  }
  if (support.last == kNoLast) return vreduce_add(sum);
  float total = 0;
  for (int64_t i = 0; i < kChunk; ++i) {
    if (falling_key(weights[i], begin + i) > support.last) weights[i] = 0;
    total += weights[i];
  }
  return total;
}

// Candidates: logits of at least `floor`, as keys whose order is falling logit, rising id.
int64_t collect(const Logits& logits, float floor, uint64_t* keys) {
  int64_t count = 0;
  for (int64_t c = 0, begin = 0; begin < logits.count; ++c, begin += kChunk) {
    if (logits.chunk_max[c] < floor) continue;
    const int64_t end = begin + kChunk < logits.count ? begin + kChunk : logits.count;
    for (int64_t i = begin; i < end; ++i) {
      if (logits.values[i] >= floor) keys[count++] = falling_key(logits.values[i], i);
    }
  }
  return count;
}

// The k best as the first k keys, in no order.
void best_keys(const Logits& logits, int64_t k, uint64_t* keys) {
  const int64_t chunks = num_chunks(logits.count);
  float floor = -INFINITY;
  if (k <= chunks) {
    for (int64_t c = 0; c < chunks; ++c) keys[c] = falling_key(logits.chunk_max[c], c);
    select_smallest(keys, chunks, k);
    uint64_t last = 0;
    for (int64_t i = 0; i < k; ++i) last = keys[i] > last ? keys[i] : last;
    floor = key_value(last);
  }
  select_smallest(keys, collect(logits, floor, keys), k);
}

float kth_best(const Logits& logits, int64_t k, uint64_t* keys) {
  best_keys(logits, k, keys);
  uint64_t last = 0;
  for (int64_t i = 0; i < k; ++i) last = keys[i] > last ? keys[i] : last;
  return key_value(last);
}

double support_mass(const Logits& logits, const Support& support, float inverse) {
  double total = 0;
  float weights[kChunk];
  for (int64_t c = 0; c < num_chunks(logits.count); ++c) {
    if (logits.chunk_max[c] < support.floor) continue;
    total += chunk_weights(logits, c, inverse, support, weights);
  }
  return total;
}

// Top-p (Holtzman et al. 2020): the smallest set of best tokens whose mass reaches `top_p`
// of the support's.  Looks at the tokens near the maximum first, since they mostly suffice.
void keep_nucleus(const Logits& logits, float inverse, float top_p, uint64_t* keys,
                  Support* support) {
  const double wanted = support_mass(logits, *support, inverse) * double(top_p);
  float weights[kChunk];
  for (float reach = 4;; reach *= 2) {
    Support near{logits.max - reach / inverse, kNoLast};
    const bool all = !(near.floor > support->floor) || reach > 200;
    if (all) near.floor = support->floor;
    int64_t count = 0;
    double mass = 0;
    for (int64_t c = 0; c < num_chunks(logits.count); ++c) {
      if (logits.chunk_max[c] < near.floor) continue;
      mass += chunk_weights(logits, c, inverse, near, weights);
      for (int64_t i = 0; i < kChunk; ++i) {
        if (weights[i] > 0) keys[count++] = falling_key(weights[i], c * kChunk + i);
      }
    }
    if (mass < wanted && !all) continue;
    support->floor = near.floor;
    support->last = select_mass(keys, count, wanted);
    return;
  }
}

// Inverse CDF over the support in the order of token ids.  u in [0, 1).
int32_t draw(const Logits& logits, float inverse, const Support& support, double u,
             double* mass) {
  const int64_t chunks = num_chunks(logits.count);
  float weights[kChunk];
  double total = 0;
  for (int64_t c = 0; c < chunks; ++c) {
    mass[c] = 0;
    if (logits.chunk_max[c] < support.floor) continue;
    mass[c] = chunk_weights(logits, c, inverse, support, weights);
    total += mass[c];
  }
  const double point = u * total;
  // The chunk that the point lies in, or the last one with mass if rounding carries it past.
  int64_t chunk = 0;
  double before = 0, sum = 0;
  for (int64_t c = 0; c < chunks && sum <= point; ++c) {
    if (mass[c] == 0) continue;
    chunk = c;
    before = sum;
    sum += mass[c];
  }
  chunk_weights(logits, chunk, inverse, support, weights);
  int32_t token = 0;
  for (int64_t i = 0; i < kChunk; ++i) {
    if (weights[i] == 0) continue;
    token = static_cast<int32_t>(chunk * kChunk + i);
    before += weights[i];
    if (before > point) break;
  }
  return token;
}

int32_t choose(const Logits& logits, const pll_sampling_params& params, int32_t position,
               const Scratch& scratch) {
  if (params.temperature < kGreedyBelow) return argmax(logits);
  const float inverse = 1.0f / params.temperature;
  Support support{-INFINITY, kNoLast};
  if (params.min_p > 0) support.floor = logits.max + params.temperature * logf(params.min_p);
  if (params.top_k > 0 && params.top_k < logits.count) {
    const float kth = kth_best(logits, params.top_k, scratch.keys);
    support.floor = kth > support.floor ? kth : support.floor;
  }
  if (params.top_p < 1) {
    keep_nucleus(logits, inverse, params.top_p, scratch.keys, &support);
  }
  return draw(logits, inverse, support, philox_uniform(params.seed, position), scratch.mass);
}

void apply_mask(const uint32_t* mask, int64_t n, float* work) {
  for (int64_t begin = 0; begin < n; begin += 32) {
    const uint32_t allowed = mask[begin >> 5];
    if (allowed == 0xffffffffu) continue;
    float* x = work + begin;
    if (begin + 32 > n) {
      for (int64_t i = 0; i < n - begin; ++i) {
        if (!(allowed >> i & 1)) x[i] = -INFINITY;
      }
    } else if (allowed == 0) {  // nearly all words of a mask that forces a token or a few
      vstore(x, vset1(-INFINITY));
      vstore(x + 16, vset1(-INFINITY));
    } else {  // no branches, so that it is done in vectors
      for (int i = 0; i < 32; ++i) x[i] = allowed >> i & 1 ? x[i] : -INFINITY;
    }
  }
}

void add_biases(int32_t count, const int32_t* ids, const float* values, int64_t n, float* work) {
  for (int32_t i = 0; i < count; ++i) {
    if (ids[i] >= 0 && ids[i] < n) work[ids[i]] += values[i];
  }
}

// Penalties of every token in tokens[0..count), the first prompt_len of which are the prompt.
void penalize(const pll_sampling_params& params, const int32_t* tokens, int32_t count, int64_t n,
              int32_t* counts, float* work) {
  for (int32_t i = 0; i < count; ++i) {
    if (tokens[i] >= 0 && tokens[i] < n) counts[tokens[i]] = 0;
  }
  for (int32_t i = params.prompt_len > 0 ? params.prompt_len : 0; i < count; ++i) {
    if (tokens[i] >= 0 && tokens[i] < n) ++counts[tokens[i]];
  }
  for (int32_t i = 0; i < count; ++i) {
    const int32_t token = tokens[i];
    if (token < 0 || token >= n || counts[token] < 0) continue;
    float x = work[token];
    x = x > 0 ? x / params.repetition_penalty : x * params.repetition_penalty;
    if (counts[token] > 0) {
      x -= params.frequency_penalty * counts[token];
      x -= params.presence_penalty;
    }
    work[token] = x;
    counts[token] = -1;
  }
}

struct RowRef {
  const pll_sampler_inputs* in;
  int32_t index;     // logit row
  int32_t row;       // persistent row
  int32_t position;  // of the new token
};

// Masks, biases, bans and penalties; returns whether there were any.
bool process(const RowRef& ref, const float* raw, int64_t n, const Scratch& scratch) {
  const pll_sampler_inputs& in = *ref.in;
  const pll_sampling_params& params = in.params[ref.row];
  const uint32_t* mask = in.masks ? in.masks[ref.index] : nullptr;
  const pll_step_bias* bias = in.step_biases ? &in.step_biases[ref.row] : nullptr;
  const bool banned = params.num_banned > 0 && ref.position < params.min_len;
  const bool penalties = params.repetition_penalty != 1 || params.frequency_penalty != 0 ||
                         params.presence_penalty != 0;
  if (!mask && !(bias && bias->count > 0) && params.num_bias <= 0 && !banned && !penalties) {
    return false;
  }
  memcpy(scratch.work, raw, n * sizeof(float));
  if (mask) apply_mask(mask, n, scratch.work);
  add_biases(params.num_bias, params.bias_ids, params.bias_values, n, scratch.work);
  if (bias) add_biases(bias->count, bias->ids, bias->values, n, scratch.work);
  for (int32_t i = 0; banned && i < params.num_banned; ++i) {
    const int32_t id = params.banned_ids[i];
    if (id >= 0 && id < n) scratch.work[id] = -INFINITY;
  }
  if (penalties) {
    const int32_t known = ref.position < in.max_model_len ? ref.position : in.max_model_len;
    penalize(params, in.token_table + int64_t(ref.row) * in.max_model_len, known, n,
             scratch.counts, scratch.work);
  }
  return true;
}

// Log-probability and rank of the chosen token of the raw distribution, and the best ones of
// `best`, less its normalizer.
void write_logprobs(const RowRef& ref, const Logits& raw, const Logits& best, int32_t token,
                    const Scratch& scratch) {
  const pll_sampler_inputs& in = *ref.in;
  const double lse = double(raw.max) + log(support_mass(raw, {-INFINITY, kNoLast}, 1.0f));
  const float value = raw.values[token];
  in.logprobs[ref.index] = static_cast<float>(double(value) - lse);
  int32_t rank = 1;
  for (int64_t c = 0, begin = 0; begin < raw.count; ++c, begin += kChunk) {
    if (raw.chunk_max[c] < value) continue;
    const int64_t end = begin + kChunk < raw.count ? begin + kChunk : raw.count;
    const int64_t split = token < begin ? begin : (token < end ? token : end);
    for (int64_t i = begin; i < split; ++i) rank += raw.values[i] >= value;
    for (int64_t i = split; i < end; ++i) rank += raw.values[i] > value;
  }
  in.ranks[ref.index] = rank;
  int64_t n = in.params[ref.row].num_logprobs;
  if (n > in.max_logprobs) n = in.max_logprobs;
  if (n > raw.count) n = raw.count;
  if (n <= 0) return;
  best_keys(best, n, scratch.keys);
  sort_keys(scratch.keys, n);
  int32_t* ids = in.top_ids + int64_t(ref.index) * in.max_logprobs;
  float* logprobs = in.top_logprobs + int64_t(ref.index) * in.max_logprobs;
  for (int64_t i = 0; i < n; ++i) {
    ids[i] = static_cast<int32_t>(key_id(scratch.keys[i]));
    logprobs[i] = static_cast<float>(double(best.values[ids[i]]) - lse);
  }
}

void sample_row(const RowRef& ref, const float* values, int64_t n, const Scratch& scratch) {
  const pll_sampler_inputs& in = *ref.in;
  const pll_sampling_params& params = in.params[ref.row];
  const int32_t target = in.targets ? in.targets[ref.index] : -1;
  in.tokens[ref.index] = target >= 0 ? target : 0;
  in.logprobs[ref.index] = NAN;
  in.ranks[ref.index] = 0;
  in.status[ref.index] = 1;
  if (in.logits && in.logits[ref.index]) {
    memcpy(in.logits[ref.index], values, n * sizeof(float));
  }
  Logits raw;
  if (!scan(values, n, scratch.raw_max, &raw)) return;
  int32_t token = target;
  Logits logits = raw;
  if (target < 0) {
    if (process(ref, values, n, scratch)) {
      if (!scan(scratch.work, n, scratch.work_max, &logits)) return;
    }
    in.status[ref.index] = 2;
    if (logits.max == -INFINITY) return;
    token = choose(logits, params, ref.position, scratch);
  }
  in.status[ref.index] = 0;
  in.tokens[ref.index] = token;
  if ((params.num_logprobs >= 0 || target >= 0) && token < n) {
    write_logprobs(ref, raw, params.top_of_processed ? logits : raw, token, scratch);
  }
}

size_t sample_scratch(void* state, int32_t, int32_t) {
  return cut_scratch(static_cast<SampleState*>(state)->vocab, nullptr, nullptr);
}

int check_sample(void* state, const pll_tensor* buffers, int32_t num_buffers, int32_t,
                 int32_t max_logit_rows, char* error, size_t error_size) {
  const BufferNeed need{"logits", PLL_F32, max_logit_rows,
                        static_cast<SampleState*>(state)->vocab};
  return check_buffers(&need, 1, buffers, num_buffers, error, error_size);
}

int plan_sample(void* state, const pll_batch* batch, char* error, size_t error_size) {
  if (batch->num_logit_rows > 0 && !batch->sampler) {
    snprintf(error, error_size, "sample: the batch carries no sampler inputs");
    return 1;
  }
  const int64_t vocab = static_cast<SampleState*>(state)->vocab;
  if (batch->num_logit_rows > 0 && batch->sampler->vocab_size != vocab) {
    snprintf(error, error_size, "sample: made for %lld tokens, but the batch has a vocabulary of %d",
             static_cast<long long>(vocab), batch->sampler->vocab_size);
    return 1;
  }
  return 0;
}

void run_sample(void* state, const pll_batch* batch, const pll_tensor* buffers, int32_t,
                const pll_context* ctx) {
  const int64_t vocab = static_cast<SampleState*>(state)->vocab;
  Scratch scratch;
  cut_scratch(vocab, ctx->scratch, &scratch);
  const pll_sampler_inputs* in = batch->sampler;
  for (;;) {
    const int64_t i = ctx->fetch_add(ctx, 0, 1);
    if (i >= batch->num_logit_rows) return;
    const RowRef ref{in, static_cast<int32_t>(i), in->logit_row_of[i],
                     batch->positions[batch->logit_rows[i]] + 1};
    sample_row(ref, static_cast<const float*>(buffers[0].data) + i * buffers[0].stride[0], vocab,
               scratch);
  }
}

void destroy_sample(void* state) { delete static_cast<SampleState*>(state); }

}  // namespace

pll_op make_sample(int64_t vocab_size) {
  pll_op op{};
  op.abi_version = PLL_ABI_VERSION;
  op.struct_size = sizeof(pll_op);
  op.name = "sample";
  op.state = new SampleState{vocab_size};
  op.scratch_bytes = sample_scratch;
  op.plan = plan_sample;
  op.run = run_sample;
  op.check = check_sample;
  op.destroy = destroy_sample;
  return op;
}

}  // namespace pyllmlite::PLL_NS
