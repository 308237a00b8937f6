// The sampler against a plain one: doubles, a full sort, one step after another.

#include <algorithm>
#include <cmath>
#include <limits>
#include <map>

#include "harness.h"
#include "pyllmlite/ops.h"
#include "pyllmlite/sampler.h"

using harness::check;
using harness::Random;

namespace {

// Philox4x32-10, from the paper's description.
void philox(const uint32_t counter[4], const uint32_t key[2], uint32_t out[4]) {
  uint32_t c[4] = {counter[0], counter[1], counter[2], counter[3]}, k[2] = {key[0], key[1]};
  for (int i = 0; i < 10; ++i) {
    const uint64_t a = uint64_t(0xD2511F53u) * c[0], b = uint64_t(0xCD9E8D57u) * c[2];
    const uint32_t next[4] = {uint32_t(b >> 32) ^ c[1] ^ k[0], uint32_t(b),
                              uint32_t(a >> 32) ^ c[3] ^ k[1], uint32_t(a)};
    std::memcpy(c, next, sizeof(c));
    k[0] += 0x9E3779B9u;
    k[1] += 0xBB67AE85u;
  }
  std::memcpy(out, c, sizeof(c));
}

double uniform(uint64_t seed, uint32_t position) {
  const uint32_t counter[4] = {position, 0, 0, 0};
  const uint32_t key[2] = {uint32_t(seed), uint32_t(seed >> 32)};
  uint32_t out[4];
  philox(counter, key, out);
  const uint64_t bits = (uint64_t(out[0]) << 32 | out[1]) >> 11;
  return double(bits) / 9007199254740992.0;
}

// Known answers of the authors' Random123 library.
void test_philox() {
  const uint32_t zero[4] = {}, ones[4] = {~0u, ~0u, ~0u, ~0u};
  uint32_t out[4];
  philox(zero, zero, out);
  check(out[0] == 0x6627e8d5 && out[3] == 0x9b00dbd8, "philox of zeros");
  philox(ones, ones, out);
  check(out[0] == 0x408f276d && out[3] == 0x6d5451fd, "philox of ones");
}

struct Row {
  std::vector<float> logits;
  std::vector<int32_t> tokens;  // the known ones
  pll_sampling_params params{};
  std::vector<int32_t> bias_ids, banned, step_ids;
  std::vector<float> bias_values, step_values;
  std::vector<uint32_t> mask;  // empty: none
  int32_t target = -1;

  explicit Row(std::vector<float> x) : logits(std::move(x)), tokens{0} {
    params.temperature = 1;
    params.top_p = 1;
    params.repetition_penalty = 1;
    params.num_logprobs = -1;
  }
};

struct Result {
  int32_t token = 0, rank = 0, status = 0;
  float logprob = 0;
  std::vector<int32_t> top;
  std::vector<float> top_logprobs;
};

constexpr int kColumns = 20;  // max_logprobs

std::vector<Result> sample(std::vector<Row>& rows, int threads = 1,
                           std::vector<std::vector<float>>* raw = nullptr) {
  const int n = int(rows.size()), vocab = int(rows[0].logits.size());
  size_t longest = 1;
  for (Row& row : rows) longest = std::max(longest, row.tokens.size() + 1);
  // Persistent rows in the reverse order, and a token between two logit rows.
  std::vector<int32_t> table(longest * n, -1), positions(2 * n), logit_rows(n), row_of(n);
  std::vector<int32_t> targets(n), tokens(n), ranks(n), status(n), top(n * kColumns, -5);
  std::vector<float> logprobs(n), top_logprobs(n * kColumns), logits(size_t(n) * vocab);
  std::vector<pll_sampling_params> params(n);
  std::vector<pll_step_bias> step(n);
  std::vector<const uint32_t*> masks(n);
  std::vector<float*> copies(n);
  for (int i = 0; i < n; ++i) {
    Row& row = rows[i];
    const int at = n - 1 - i;
    row_of[i] = at;
    logit_rows[i] = 2 * i + 1;
    positions[2 * i + 1] = int(row.tokens.size()) - 1;
    std::copy(row.tokens.begin(), row.tokens.end(), table.begin() + at * longest);
    std::copy(row.logits.begin(), row.logits.end(), logits.begin() + size_t(i) * vocab);
    params[at] = row.params;
    params[at].num_bias = int(row.bias_ids.size());
    params[at].bias_ids = row.bias_ids.data();
    params[at].bias_values = row.bias_values.data();
    params[at].num_banned = int(row.banned.size());
    params[at].banned_ids = row.banned.data();
    step[at] = {int(row.step_ids.size()), row.step_ids.data(), row.step_values.data()};
    masks[i] = row.mask.empty() ? nullptr : row.mask.data();
    targets[i] = row.target;
    if (raw && i % 2 == 0) {
      (*raw)[i].assign(vocab, -1);
      copies[i] = (*raw)[i].data();
    }
  }
  pll_sampler_inputs in{};
  in.struct_size = sizeof(in);
  in.max_model_len = int(longest);
  in.vocab_size = int32_t(vocab);
  in.token_table = table.data();
  in.params = params.data();
  in.logit_row_of = row_of.data();
  in.masks = masks.data();
  in.step_biases = step.data();
  in.targets = targets.data();
  in.max_logprobs = kColumns;
  in.tokens = tokens.data();
  in.logprobs = logprobs.data();
  in.ranks = ranks.data();
  in.top_ids = top.data();
  in.top_logprobs = top_logprobs.data();
  in.status = status.data();
  in.logits = raw ? copies.data() : nullptr;
  pll_batch batch{};
  batch.num_tokens = 2 * n;
  batch.num_logit_rows = n;
  batch.positions = positions.data();
  batch.logit_rows = logit_rows.data();
  batch.sampler = &in;
  const std::vector<float> before = logits;
  const std::string error = harness::run_op(pyllmlite::make_sample(vocab), batch,
                                            {harness::tensor(logits, vocab)}, threads);
  check(error.empty(), "sample: %s", error.c_str());
  check(harness::same_bits(before.data(), logits.data(), logits.size()), "logits were changed");
  std::vector<Result> results(n);
  for (int i = 0; i < n; ++i) {
    results[i] = {tokens[i], ranks[i], status[i], logprobs[i], {}, {}};
    for (int j = 0; j < kColumns && top[i * kColumns + j] != -5; ++j) {
      results[i].top.push_back(top[i * kColumns + j]);
      results[i].top_logprobs.push_back(top_logprobs[i * kColumns + j]);
    }
  }
  return results;
}

// The plain sampler.  `margin`: how far the draw was from choosing another token; `tight`: an
// edge of top_p or min_p passes within rounding of a token, so that another set is right too.
struct Expected {
  int32_t token = 0, status = 0;
  double margin = 1;
  bool tight = false;
};

Expected expected(const Row& row) {
  const auto& p = row.params;
  const int vocab = int(row.logits.size()), position = int(row.tokens.size());
  Expected result;
  for (float x : row.logits) {
    if (std::isnan(x) || x == INFINITY) {
      result.status = 1;
      return result;
    }
  }
  std::vector<double> x(row.logits.begin(), row.logits.end());
  for (int i = 0; i < vocab && !row.mask.empty(); ++i) {
    if (!(row.mask[i / 32] >> (i % 32) & 1)) x[i] = -INFINITY;
  }
  for (size_t i = 0; i < row.bias_ids.size(); ++i) x[row.bias_ids[i]] += row.bias_values[i];
  for (size_t i = 0; i < row.step_ids.size(); ++i) x[row.step_ids[i]] += row.step_values[i];
  for (int32_t id : row.banned) {
    if (position < p.min_len) x[id] = -INFINITY;
  }
  std::map<int32_t, int> counts;
  for (int i = 0; i < position; ++i) counts[row.tokens[i]] += i >= p.prompt_len;
  for (auto& [id, count] : counts) {
    x[id] = x[id] > 0 ? x[id] / p.repetition_penalty : x[id] * p.repetition_penalty;
    x[id] -= p.frequency_penalty * count + (count > 0 ? p.presence_penalty : 0);
  }
  std::vector<int> order(vocab);
  for (int i = 0; i < vocab; ++i) order[i] = i;
  std::stable_sort(order.begin(), order.end(), [&](int a, int b) { return x[a] > x[b]; });
  const double max = x[order[0]];
  if (max == -INFINITY) {
    result.status = 2;
    return result;
  }
  if (p.temperature < 1e-5) {
    result.token = order[0];
    for (int i = 1; i < vocab && i < 3; ++i) {
      const double gap = max - x[order[i]];
      if (gap > 0) result.margin = std::min(result.margin, gap);
    }
    return result;
  }
  std::vector<double> w(vocab);
  for (int i = 0; i < vocab; ++i) w[i] = std::exp((x[i] - max) / p.temperature);
  auto close = [](double a, double b) { return a != b && std::fabs(a - b) < 1e-5 * (a + b); };
  for (int i = 0; i < vocab && p.min_p > 0; ++i) {
    result.tight |= w[i] > 0 && std::fabs(w[i] - p.min_p) < 1e-5 * p.min_p;
    if (w[i] < p.min_p && i != order[0]) w[i] = 0;
  }
  if (p.top_k > 0 && p.top_k < vocab) {
    const double kth = x[order[p.top_k - 1]];
    for (int i = 0; i < vocab; ++i) {
      result.tight |= close(std::fabs(x[i]), std::fabs(kth)) && (x[i] > 0) == (kth > 0);
      if (x[i] < kth) w[i] = 0;
    }
  }
  if (p.top_p < 1) {
    double total = 0, sum = 0;
    for (double v : w) total += v;
    for (int i : order) {
      if (sum >= p.top_p * total) w[i] = 0;
      sum += w[i];
      result.tight |= std::fabs(sum - p.top_p * total) < 3e-6 * total;
    }
  }
  double total = 0, sum = 0;
  for (double v : w) total += v;
  const double point = uniform(p.seed, uint32_t(position)) * total;
  bool found = false;
  for (int i = 0; i < vocab; ++i) {
    if (w[i] == 0) continue;
    sum += w[i];
    result.margin = std::min(result.margin, std::fabs(sum - point) / total);
    if (!found && sum > point) {
      found = true;
      result.token = i;
    }
  }
  return result;
}

void check_logprobs(const Row& row, const Result& result, const char* isa) {
  const int vocab = int(row.logits.size());
  const bool asked = row.params.num_logprobs >= 0 || row.target >= 0;
  check(asked == !std::isnan(result.logprob), "%s: logprob %g", isa, result.logprob);
  if (!asked) {
    check(result.rank == 0 && result.top.empty(), "%s: logprobs that nobody asked for", isa);
    return;
  }
  std::vector<int> order(vocab);
  for (int i = 0; i < vocab; ++i) order[i] = i;
  std::stable_sort(order.begin(), order.end(),
                   [&](int a, int b) { return row.logits[a] > row.logits[b]; });
  double sum = 0;
  for (float x : row.logits) sum += std::exp(double(x) - row.logits[order[0]]);
  const double lse = row.logits[order[0]] + std::log(sum);
  const double wanted = row.logits[result.token] - lse;
  check(std::fabs(result.logprob - wanted) < 1e-5 * (1 + std::fabs(wanted)),
        "%s: logprob %g, not %g", isa, result.logprob, wanted);
  check(order[result.rank - 1] == result.token, "%s: rank %d", isa, result.rank);
  const int n = std::max(0, std::min({row.params.num_logprobs, kColumns, vocab}));
  check(int(result.top.size()) == n, "%s: %zu of %d best", isa, result.top.size(), n);
  for (int i = 0; i < n && i < int(result.top.size()); ++i) {
    check(result.top[i] == order[i], "%s: best %d is %d, not %d", isa, i, result.top[i], order[i]);
    const double best = row.logits[order[i]] - lse;
    check(result.top_logprobs[i] == best ||  // -inf
              std::fabs(result.top_logprobs[i] - best) < 1e-5 * (1 + std::fabs(best)),
          "%s: best %d has %g, not %g", isa, i, result.top_logprobs[i], best);
  }
}

Row random_row(int vocab, Random& random) {
  const float spread[] = {0, 1, 4, 12};
  Row row(random.values(vocab, spread[random.below(4)]));
  if (random.below(3) == 0) {  // ties
    for (float& x : row.logits) x = std::round(x * 2) / 2;
  }
  if (random.below(5) == 0) {
    for (float& x : row.logits) {
      if (random.below(4) == 0) x = -INFINITY;
    }
    row.logits[random.below(vocab)] = 1;
  }
  auto& p = row.params;
  const float temperatures[] = {0, 0.3f, 1, 1, 2.5f}, top_ps[] = {1, 1, 0.9f, 0.5f, 0.01f};
  p.temperature = temperatures[random.below(5)];
  p.top_p = top_ps[random.below(5)];
  if (random.below(3) == 0) p.min_p = random.below(2) ? 0.05f : 0.5f;
  if (random.below(3) == 0) p.top_k = 1 + random.below(random.below(2) ? vocab + 2 : 50);
  p.seed = random.bits();
  if (random.below(2)) p.num_logprobs = random.below(kColumns + 1);
  const int known = 1 + random.below(60);
  row.tokens.clear();
  for (int i = 0; i < known; ++i) row.tokens.push_back(random.below(std::min(vocab, 25)));
  p.prompt_len = random.below(known + 1);
  if (random.below(3) == 0) p.repetition_penalty = 1.3f;
  if (random.below(3) == 0) p.frequency_penalty = 0.7f;
  if (random.below(3) == 0) p.presence_penalty = -0.4f;
  if (random.below(3) == 0) {
    row.mask.assign((vocab + 31) / 32, 0);
    for (uint32_t& word : row.mask) {
      word = random.below(3) == 0 ? ~0u : (random.below(2) ? 0 : uint32_t(random.bits()));
    }
  }
  if (random.below(3) == 0) {
    for (int i = 0; i < 5; ++i) {
      row.bias_ids.push_back(random.below(vocab));
      row.bias_values.push_back(random.value(5));
    }
  }
  if (random.below(4) == 0) {
    row.step_ids = {random.below(vocab)};
    row.step_values = {random.value(9)};
  }
  if (random.below(3) == 0) {
    row.banned = {random.below(vocab), random.below(vocab)};
    p.min_len = random.below(80);
  }
  return row;
}

void test_random(const std::string& isa) {
  Random random(11);
  int compared = 0, skipped = 0;
  for (int vocab : {1, 2, 7, 63, 64, 65, 1000, 5003}) {
    std::vector<Row> rows;
    for (int i = 0; i < (vocab > 1000 ? 60 : 150); ++i) rows.push_back(random_row(vocab, random));
    std::vector<std::vector<float>> raw(rows.size());
    const auto results = sample(rows, 1, &raw);
    const auto again = sample(rows, 3);
    for (size_t i = 0; i < rows.size(); ++i) {
      const Expected e = expected(rows[i]);
      const Result& r = results[i];
      check(r.token == again[i].token && r.rank == again[i].rank && r.top == again[i].top &&
                harness::same_bits(&r.logprob, &again[i].logprob, 1),
            "%s: threads change row %zu", isa.c_str(), i);
      check(r.status == e.status, "%s: status %d, not %d", isa.c_str(), r.status, e.status);
      if (i % 2 == 0) check(raw[i] == rows[i].logits, "%s: raw logits", isa.c_str());
      if (r.status) continue;
      check_logprobs(rows[i], r, isa.c_str());
      if (e.tight || e.margin < 1e-5) {
        ++skipped;
        continue;
      }
      ++compared;
      check(r.token == e.token, "%s: vocabulary %d, row %zu: token %d, not %d", isa.c_str(), vocab,
            i, r.token, e.token);
    }
  }
  check(compared > 5 * skipped, "%s: only %d rows of %d could be compared", isa.c_str(), compared,
        compared + skipped);
}

void test_edges(const std::string& isa) {
  const char* name = isa.c_str();
  Random random(5);
  std::vector<Row> rows(8, Row(random.values(130)));
  rows[0].logits[129] = NAN;
  rows[1].logits[64] = INFINITY;
  for (float& x : rows[2].logits) x = -INFINITY;
  rows[3].mask.assign(5, 0);
  for (int i = 0; i < 130; ++i) rows[4].banned.push_back(i);
  rows[4].params.min_len = 2;  // the new token's position is 1
  for (float& x : rows[5].logits) x = 3;
  rows[5].params.temperature = 0;
  rows[6].logits[0] = NAN;
  rows[6].target = 5;
  rows[7].target = 77;
  rows[7].params.num_logprobs = 3;
  const auto results = sample(rows, 2);
  const int status[] = {1, 1, 2, 2, 2, 0, 1, 0};
  for (int i = 0; i < 8; ++i) {
    check(results[i].status == status[i], "%s: row %d has status %d", name, i, results[i].status);
  }
  for (int i = 0; i < 6; ++i) check(results[i].token == 0, "%s: row %d", name, i);
  check(results[6].token == 5 && results[7].token == 77, "%s: targets", name);
  check(std::isnan(results[6].logprob) && results[6].rank == 0, "%s: logprob of NaN", name);
  check_logprobs(rows[7], results[7], name);
  // A banned id is free again at min_len; tokens outside of the vocabulary do no harm.
  std::vector<Row> free(2, Row(std::vector<float>(70, 0)));
  for (Row& row : free) {
    row.logits[66] = 5;
    row.params.temperature = 0;
    row.banned = {66, -3, 1000};
    row.bias_ids = {-1, 70};
    row.bias_values = {100, 100};
    row.tokens = {900, -7, 3};
    row.params.repetition_penalty = 2;
  }
  free[0].params.min_len = 3;
  free[1].params.min_len = 4;
  const auto freed = sample(free);
  check(freed[0].token == 66 && freed[1].token == 0, "%s: min_len", name);
  // A huge temperature is uniform; a tiny one is greedy; a big gap underflows quietly.
  std::vector<Row> hot(1, Row({0, -3e38f, 1}));
  hot[0].params.temperature = 1e-4f;
  check(sample(hot)[0].token == 2, "%s: cold", name);
}

// Many draws have the frequencies of the softmax (chi-square, 9 degrees of freedom: 33.7 is
// exceeded with probability 1e-4; the draws are fixed, so that the test is, too).
void test_frequencies(const std::string& isa) {
  Random random(21);
  std::vector<float> logits = random.values(10, 2);
  const int draws = 20000;
  for (float temperature : {0.7f, 1.5f}) {
    std::vector<double> count(10), p(10);
    double total = 0;
    for (int i = 0; i < 10; ++i) total += p[i] = std::exp(double(logits[i]) / temperature);
    std::vector<Row> rows(draws, Row(logits));
    for (int i = 0; i < draws; ++i) {
      rows[i].params.temperature = temperature;
      rows[i].params.seed = 1000 + i % 500;
      rows[i].tokens.assign(1 + i / 500, 1);
    }
    for (const Result& r : sample(rows)) ++count[r.token];
    double chi = 0;
    for (int i = 0; i < 10; ++i) {
      const double want = draws * p[i] / total;
      chi += (count[i] - want) * (count[i] - want) / want;
    }
    check(chi < 33.7, "%s: chi-square %g", isa.c_str(), chi);
  }
}

}  // namespace

int main() {
  test_philox();
  harness::for_each_isa([](const std::string& isa) {
    test_random(isa);
    test_edges(isa);
    test_frequencies(isa);
  });
  return harness::finish();
}
