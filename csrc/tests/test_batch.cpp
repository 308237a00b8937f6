// The batch against a plain restatement of what it computes, and everything it refuses.
#include <limits>
#include <stdexcept>

#include "harness.h"
#include "pyllmlite/batch.h"

using harness::check;
using pyllmlite::Batch;
using pyllmlite::Ints;

namespace {

constexpr int kRows = 6, kLength = 100, kTokens = 64, kLogits = 32, kVocab = 50, kLogprobs = 5;

using List = std::vector<int32_t>;
Ints ints(const List& list) { return {list.data(), list.size()}; }

struct World {
  // Two groups of different block sizes; the second's tables are short.
  List wide, narrow;
  Batch batch;

  static List table(int blocks, int stride) {
    List t(kRows * blocks);
    for (int r = 0; r < kRows; ++r) {
      for (int b = 0; b < blocks; ++b) t[r * blocks + b] = (r * 7 + b * stride) % 90;
    }
    return t;
  }
  World()
      : wide(table(7, 3)),
        narrow(table(20, 5)),
        batch(kRows, kLength, kTokens, kLogits, kVocab, kLogprobs,
              {{16, 7, wide.data()}, {5, 20, narrow.data()}}) {
    for (int r = 0; r < kRows; ++r) {
      for (int p = 0; p < kLength; ++p) batch.token_table()[r * kLength + p] = (r * 11 + p) % kVocab;
    }
  }
  std::string step(const List& rows, const List& starts, const List& counts, const List& logits,
                   const List& targets = {}) {
    try {
      batch.set_step(ints(rows), ints(starts), ints(counts), ints(logits), ints(targets));
    } catch (const std::invalid_argument& error) {
      return error.what();
    }
    return "";
  }
};

template <class F>
std::string refused(F&& f) {
  try {
    f();
  } catch (const std::invalid_argument& error) {
    return error.what();
  }
  return "";
}

bool contains(const std::string& text, const char* part) {
  return text.find(part) != std::string::npos;
}

void test_steps() {
  harness::Random random(1);
  World w;
  for (int round = 0; round < 300; ++round) {
    List rows, starts, counts, logits;
    int total = 0, wanted = 0;
    List order(kRows);
    for (int i = 0; i < kRows; ++i) order[i] = i;
    for (int i = kRows - 1; i > 0; --i) std::swap(order[i], order[random.below(i + 1)]);
    for (int r : order) {
      const int count = 1 + random.below(20);
      const int start = random.below(kLength - count + 1);
      const int logit = random.below(count + 1);
      if (random.below(4) == 0 || total + count > kTokens || wanted + logit > kLogits) continue;
      total += count;
      wanted += logit;
      rows.push_back(r);
      starts.push_back(start);
      counts.push_back(count);
      logits.push_back(logit);
    }
    const std::string error = w.step(rows, starts, counts, logits);
    check(error.empty(), "step: %s", error.c_str());
    const pll_batch& b = w.batch.view();
    check(b.num_tokens == total && b.num_seqs == static_cast<int>(rows.size()) &&
              b.num_logit_rows == wanted && b.num_kv_groups == 2, "sizes");
    int t = 0, l = 0;
    for (int i = 0; i < b.num_seqs; ++i) {
      check(b.rows[i] == rows[i] && b.query_start_loc[i] == t &&
                b.seq_lens[i] == starts[i] + counts[i], "sequence %d", i);
      for (int j = 0; j < counts[i]; ++j, ++t) {
        const int p = starts[i] + j;
        check(b.token_ids[t] == (rows[i] * 11 + p) % kVocab && b.positions[t] == p &&
                  b.seq_ids[t] == i, "token %d", t);
        check(b.kv_groups[0].slot_mapping[t] == w.wide[rows[i] * 7 + p / 16] * 16 + p % 16,
              "slot of token %d", t);
        check(b.kv_groups[1].slot_mapping[t] == w.narrow[rows[i] * 20 + p / 5] * 5 + p % 5,
              "second slot of token %d", t);
        if (j < counts[i] - logits[i]) continue;
        check(b.logit_rows[l] == t && b.sampler->logit_row_of[l] == rows[i] &&
                  b.sampler->targets[l] == -1, "logit row %d", l);
        ++l;
      }
    }
    check(b.query_start_loc[b.num_seqs] == total && l == wanted, "ends");
  }
}

void test_refusals() {
  World w;
  const pll_batch& b = w.batch.view();
  const struct {
    const char* what;
    List rows, starts, counts, logits, targets;
  } cases[] = {
      {"differ in length", {1, 2}, {0}, {1}, {1}, {}},
      {"row 6 is not in", {6}, {0}, {1}, {1}, {}},
      {"row -1 is not in", {-1}, {0}, {1}, {1}, {}},
      {"twice", {2, 2}, {0, 5}, {1, 1}, {1, 1}, {}},
      {"0 tokens from", {0}, {0}, {0}, {0}, {}},
      {"max_model_len", {0}, {99}, {2}, {1}, {}},
      {"max_model_len", {0}, {INT32_MAX}, {1}, {1}, {}},
      {"max_model_len", {0}, {1}, {INT32_MAX}, {1}, {}},
      {"max_model_len", {0}, {-1}, {1}, {1}, {}},
      {"logits wanted", {0}, {0}, {2}, {3}, {}},
      {"logits wanted", {0}, {0}, {2}, {-1}, {}},
      {"max_num_tokens", {0, 1}, {0, 0}, {60, 5}, {0, 0}, {}},
      {"max_logit_rows", {0}, {0}, {40}, {33}, {}},
      {"2 targets for 1", {0}, {0}, {1}, {1}, {1, 1}},
      {"token id 50", {0}, {0}, {1}, {1}, {50}},
      {"token id -2", {0}, {0}, {1}, {1}, {-2}},
      {"7 sequences", {0, 1, 2, 3, 4, 5, 0}, List(7, 0), List(7, 1), List(7, 0), {}},
  };
  for (const auto& c : cases) {
    check(w.step({0}, {0}, {4}, {1}).empty(), "a good step");
    const std::string error = w.step(c.rows, c.starts, c.counts, c.logits, c.targets);
    check(contains(error, c.what), "expected '%s', got '%s'", c.what, error.c_str());
    check(b.num_tokens == 0 && b.num_seqs == 0 && b.num_logit_rows == 0, "empty after an error");
  }
  for (int32_t bad : {-1, kVocab, INT32_MIN}) {
    w.batch.token_table()[3 * kLength + 2] = bad;
    check(contains(w.step({3}, {0}, {4}, {1}), "position 2: token id"), "token %d", bad);
  }
  w.batch.token_table()[3 * kLength + 2] = 0;
  w.narrow[3 * 20 + 1] = -1;
  check(contains(w.step({3}, {0}, {6}, {1}), "no cache block for position 5 (KV group 1)"), "held");
  check(w.step({3}, {0}, {5}, {1}).empty(), "a block that is not touched may be missing");
  w.narrow[3 * 20 + 1] = INT32_MAX / 2;
  check(contains(w.step({3}, {5}, {1}, {1}), "no cache block"), "slot overflow");
  check(w.step({}, {}, {}, {}).empty() && b.num_tokens == 0, "an empty step");

  for (const auto& make : std::vector<std::function<void()>>{
           [] { Batch(0, 1, 1, 1, 1, 0, {}); }, [] { Batch(1, 0, 1, 1, 1, 0, {}); },
           [] { Batch(1, 1, 0, 1, 1, 0, {}); }, [] { Batch(1, 1, 1, -5, 1, 0, {}); },
           [] { Batch(1, 1, 1, 1, 0, 0, {}); }, [] { Batch(1, 1, 1, 1, 1, 2, {}); },
           [] { Batch(1, 1, 1, 1, 1, 0, {{16, 1, nullptr}}); }}) {
    check(!refused(make).empty(), "a batch of no size");
  }
}

void test_rows() {
  World w;
  pll_sampling_params p{};
  p.temperature = 0.5f;
  p.top_p = 1;
  p.repetition_penalty = 1;
  p.num_logprobs = 2;
  p.prompt_len = 20;
  const List bias = {1, 2}, banned = {7}, other = {3};
  w.batch.set_sampling(2, p, ints(bias), {0.5f, -1}, ints(banned));
  w.batch.copy_row(2, 4, 30);
  const pll_sampling_params* rows = w.batch.view().sampler->params;
  for (int r : {2, 4}) {
    check(rows[r].temperature == 0.5f && rows[r].num_bias == 2 && rows[r].bias_ids[1] == 2 &&
              rows[r].bias_values[1] == -1 && rows[r].num_banned == 1 &&
              rows[r].banned_ids[0] == 7, "row %d", r);
  }
  check(rows[2].bias_ids != rows[4].bias_ids, "a copy of its own");
  check(std::memcmp(w.batch.token_table() + 2 * kLength, w.batch.token_table() + 4 * kLength,
                    30 * sizeof(int32_t)) == 0, "tokens copied");
  check(w.batch.token_table()[4 * kLength + 30] == (4 * 11 + 30) % kVocab, "and no more");
  w.batch.copy_row(2, 2, 30);

  const auto set = [&](auto change) {
    pll_sampling_params q = p;
    change(q);
    return refused([&] { w.batch.set_sampling(1, q, {}, {}, {}); });
  };
  const float nan = std::numeric_limits<float>::quiet_NaN();
  check(contains(set([&](auto& q) { q.temperature = nan; }), "temperature"), "NaN temperature");
  check(contains(set([&](auto& q) { q.temperature = -1; }), "temperature"), "temperature");
  check(contains(set([&](auto& q) { q.top_p = 0; }), "top_p"), "top_p");
  check(contains(set([&](auto& q) { q.top_p = nan; }), "top_p"), "NaN top_p");
  check(contains(set([&](auto& q) { q.min_p = 2; }), "min_p"), "min_p");
  check(contains(set([&](auto& q) { q.top_k = -1; }), "top_k"), "top_k");
  check(contains(set([&](auto& q) { q.repetition_penalty = 0; }), "repetition"), "repetition");
  check(contains(set([&](auto& q) { q.presence_penalty = nan; }), "presence"), "presence");
  check(contains(set([&](auto& q) { q.num_logprobs = 6; }), "max_logprobs"), "num_logprobs");
  check(contains(set([&](auto& q) { q.prompt_len = -1; }), "prompt_len"), "prompt_len");
  check(set([](auto&) {}).empty(), "a good one");
  const List out = {kVocab};
  check(contains(refused([&] { w.batch.set_sampling(1, p, ints(out), {1}, {}); }), "token id"), "id");
  check(contains(refused([&] { w.batch.set_sampling(1, p, {}, {1}, {}); }), "length"), "lengths");
  check(contains(refused([&] { w.batch.set_sampling(1, p, ints(other), {nan}, {}); }), "finite"), "NaN");
  check(!refused([&] { w.batch.copy_row(0, kRows, 1); }).empty(), "no such row");
  check(!refused([&] { w.batch.copy_row(0, 1, kLength + 1); }).empty(), "too long");

  const List r = {0, 5}, t = {9, 8}, at = {99, 0}, far = {0, 100};
  w.batch.append(ints(r), ints(t), ints(at));
  check(w.batch.token_table()[99] == 9 && w.batch.token_table()[5 * kLength] == 8, "appended");
  check(!refused([&] { w.batch.append(ints(r), ints(t), ints(far)); }).empty(), "past the end");
  check(!refused([&] { w.batch.append(ints(r), ints(out), ints(far)); }).empty(), "lengths");
}

void test_step_state() {
  World w;
  const pll_sampler_inputs& s = *w.batch.view().sampler;
  pll_sampling_params p{};
  p.temperature = 1;
  p.top_p = 1;
  p.repetition_penalty = 1;
  p.num_logprobs = -1;
  p.prompt_len = 12;
  w.batch.set_sampling(1, p, {}, {}, {});

  // A chunk before the prompt's end: its last row is followed by a known token too.
  check(w.step({1}, {4}, {4}, {4}).empty(), "chunk");
  w.batch.score_prompt(0);
  for (int i = 0; i < 4; ++i) check(s.targets[i] == (11 + 5 + i) % kVocab, "target %d", i);
  check(w.step({0, 1}, {0, 8}, {1, 4}, {1, 4}).empty(), "last chunk");
  w.batch.score_prompt(1);
  check(s.targets[0] == -1 && s.targets[1] == (11 + 9) % kVocab && s.targets[4] == -1, "samples");
  check(!refused([&] { w.batch.score_prompt(2); }).empty(), "no such sequence");

  std::vector<uint32_t> mask(2, ~0u);
  check(s.masks == nullptr && s.logits == nullptr && s.step_biases == nullptr, "nothing set");
  w.batch.set_mask(3, mask.data(), 2);
  check(s.masks[3] == mask.data() && s.masks[0] == nullptr, "mask");
  check(contains(refused([&] { w.batch.set_mask(3, mask.data(), 1); }), "2 words"), "short mask");
  check(!refused([&] { w.batch.set_mask(5, mask.data(), 2); }).empty(), "no such logit row");
  const List ids = {4, 5};
  w.batch.set_step_bias(1, ints(ids), {1, 2});
  w.batch.set_step_bias(1, ints(ids), {3, 4});
  check(s.step_biases[1].count == 4 && s.step_biases[1].values[2] == 3 &&
            s.step_biases[0].count == 0, "step bias");
  w.batch.want_logits(2);
  w.batch.want_logits(2);
  check(s.logits[2] != nullptr && s.logits[1] == nullptr, "wanted");
  s.logits[2][kVocab - 1] = 5;
  check(w.batch.logits(2)[kVocab - 1] == 5, "logits");
  check(contains(refused([&] { w.batch.logits(1); }), "want_logits"), "not wanted");
  s.status[1] = 1;
  check(w.batch.any_failed(), "failed");

  const List pairs = {1, 2, 3, 4}, negative = {1, -2};
  w.batch.set_copies(1, ints(pairs));
  check(w.step({1}, {4}, {4}, {4}).empty(), "next step");
  check(s.masks == nullptr && s.logits == nullptr && s.step_biases == nullptr, "state is a step's");
  check(!w.batch.any_failed(), "statuses too");
  const pll_kv_group* groups = w.batch.view().kv_groups;
  check(groups[1].num_copies == 2 && groups[1].copies[3] == 4 && groups[0].num_copies == 0, "copies");
  w.batch.clear_copies();
  check(groups[1].num_copies == 0, "copies are a run's");
  check(!refused([&] { w.batch.set_copies(2, ints(pairs)); }).empty(), "no such group");
  check(!refused([&] { w.batch.set_copies(0, ints(negative)); }).empty(), "no such block");
}

}  // namespace

int main() {
  test_steps();
  test_refusals();
  test_rows();
  test_step_state();
  return harness::finish();
}
