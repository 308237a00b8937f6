// Attention against a double-precision softmax, and its promise that a row's bits depend on
// nothing but the row.

#include <cmath>
#include <limits>

#include "harness.h"
#include "pyllmlite/ops.h"

using harness::check;
using harness::Random;

namespace {

float from_bf16(uint16_t bits) {
  const uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float value;
  std::memcpy(&value, &wide, 4);
  return value;
}
uint16_t to_bf16(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

enum Kept { F32, BF16, INT8 };

struct Case {
  const char* name;
  int heads, kv_heads, head_dim, block_size;
  int window;
  float softcap;
  bool alibi;
  Kept kept;
  int sinks = 0, rotary_dim = 0;
};

// Symmetric int8 codes of a vector in place of it; returns the scale.
float to_codes(float* x, int n) {
  float largest = 0;
  for (int i = 0; i < n; ++i) {
    if (!std::isfinite(x[i])) largest = NAN;
    largest = largest != largest ? largest : std::max(largest, std::fabs(x[i]));
  }
  for (int i = 0; i < n; ++i) {
    x[i] = largest != largest ? 0 : std::nearbyint(x[i] * (127.0f / largest));
  }
  return largest / 127.0f;
}

// Sequences with whole K and V, a paged cache that holds them in shuffled blocks, and everything
// else in that cache NaN.
struct World {
  Case c;
  std::vector<int> lengths;
  std::vector<std::vector<float>> q, k, v;  // [length, heads or kv_heads, head_dim]
  std::vector<float> slopes;
  std::vector<float> cos, sin;  // with a factor, as YaRN has it
  std::vector<float> k32, v32;
  std::vector<uint16_t> k16, v16;
  std::vector<int8_t> k8, v8;
  std::vector<float> scales;
  std::vector<int32_t> table;
  int max_blocks = 0, num_blocks = 0;

  World(const Case& spec, std::vector<int> lens, uint64_t seed) : c(spec), lengths(lens) {
    Random random(seed);
    for (int n : lengths) {
      q.push_back(random.values(size_t(n) * c.heads * c.head_dim, 2));
      k.push_back(random.values(size_t(n) * c.kv_heads * c.head_dim, 2));
      v.push_back(random.values(size_t(n) * c.kv_heads * c.head_dim, 2));
      max_blocks = std::max(max_blocks, (n + c.block_size - 1) / c.block_size);
    }
    for (int h = 0; h < c.heads; ++h) slopes.push_back(std::pow(2.0f, -8.0f * (h + 1) / c.heads));
    for (int i = 0; c.rotary_dim > 0 && i < 600 * c.rotary_dim / 2; ++i) {
      const int at = i / (c.rotary_dim / 2), pair = i % (c.rotary_dim / 2);
      const double angle = at * std::pow(0.01, 2.0 * pair / c.rotary_dim);
      cos.push_back(float(1.25 * std::cos(angle)));
      sin.push_back(float(1.25 * std::sin(angle)));
    }
    num_blocks = max_blocks * int(lengths.size()) + 3;
    std::vector<int32_t> order(num_blocks);
    for (int i = 0; i < num_blocks; ++i) order[i] = i;
    for (int i = num_blocks - 1; i > 0; --i) std::swap(order[i], order[random.below(i + 1)]);
    const size_t size = size_t(num_blocks) * c.kv_heads * c.head_dim * c.block_size;
    const float nan = std::numeric_limits<float>::quiet_NaN();
    if (c.kept == F32) {
      k32.assign(size, nan);
      v32.assign(size, nan);
    } else if (c.kept == BF16) {
      k16.assign(size, 0x7fc0);
      v16.assign(size, 0xffc1);
    } else {
      k8.assign(size / c.head_dim * ((c.head_dim + 3) / 4 * 4), -128);
      v8.assign(size, 127);
      scales.assign(size / c.head_dim * 2, nan);
    }
    table.assign(lengths.size() * max_blocks, -1);
    for (size_t s = 0, next = 0; s < lengths.size(); ++s) {
      for (int b = 0; b * c.block_size < lengths[s]; ++b) {
        table[s * max_blocks + b] = order[next++];
      }
      for (int t = 0; t < lengths[s]; ++t) store(int(s), t);
    }
  }

  // One token's k and v into the cache; they become what is kept of them.
  void store(int s, int t) {
    const int64_t block = table[s * max_blocks + t / c.block_size], offset = t % c.block_size;
    for (int h = 0; h < c.kv_heads; ++h) {
      const int64_t at = block * c.kv_heads + h, base = at * c.head_dim * c.block_size;
      float* key = &k[s][(size_t(t) * c.kv_heads + h) * c.head_dim];
      float* value = &v[s][(size_t(t) * c.kv_heads + h) * c.head_dim];
      const int quads = (c.head_dim + 3) / 4;
      float scale[2] = {1, 1};
      if (c.kept == INT8) {
        for (int i = 0; i < 2; ++i) {
          scale[i] = to_codes(i == 0 ? key : value, c.head_dim);
          scales[(at * 2 + i) * c.block_size + offset] = scale[i];
        }
      }
      for (int d = 0; d < c.head_dim; ++d) {
        if (c.kept == F32) {
          k32[base + int64_t(d) * c.block_size + offset] = key[d];
          v32[base + offset * c.head_dim + d] = value[d];
        } else if (c.kept == BF16) {
          k16[base + int64_t(d) * c.block_size + offset] = to_bf16(key[d]);
          v16[base + offset * c.head_dim + d] = to_bf16(value[d]);
          key[d] = from_bf16(to_bf16(key[d]));
          value[d] = from_bf16(to_bf16(value[d]));
        } else {
          k8[((at * quads + d / 4) * c.block_size + offset) * 4 + d % 4] = int8_t(key[d]);
          v8[base + (offset / 4 * c.head_dim + d) * 4 + offset % 4] = int8_t(value[d]);
          key[d] *= scale[0];
          value[d] *= scale[1];
        }
      }
    }
  }

  pll_dtype dtype() const {
    return c.kept == F32 ? PLL_F32 : c.kept == BF16 ? PLL_BF16 : PLL_I8;
  }

  pyllmlite::AttentionSpec spec() const {
    pyllmlite::AttentionSpec result;
    result.num_heads = c.heads;
    result.kv.dtype = dtype();
    result.kv.num_blocks = num_blocks;
    result.kv.num_kv_heads = c.kv_heads;
    result.kv.head_dim = c.head_dim;
    result.kv.block_size = c.block_size;
    result.scale = 1.0f / std::sqrt(float(c.head_dim));
    result.window = c.window;
    result.softcap = c.softcap;
    result.alibi_slopes = c.alibi ? slopes.data() : nullptr;
    result.sinks = c.sinks;
    result.rotary_dim = c.rotary_dim;
    result.cos = cos.data();
    result.sin = sin.data();
    result.num_positions = 600;
    return result;
  }

  // Runs tokens [begin, end) of each listed sequence in one step; returns out, rows packed.
  struct Span {
    int seq, begin, end;
  };
  std::vector<float> run(const std::vector<Span>& spans, int threads,
                         std::string* error = nullptr) {
    std::vector<int32_t> positions, seq_ids, starts{0}, seq_lens, rows;
    std::vector<float> qkv;
    const int width = (c.heads + 2 * c.kv_heads) * c.head_dim, out_width = c.heads * c.head_dim;
    for (const Span& span : spans) {
      for (int t = span.begin; t < span.end; ++t) {
        positions.push_back(t);
        seq_ids.push_back(int(rows.size()));
        const float* row = q[span.seq].data() + size_t(t) * out_width;
        qkv.insert(qkv.end(), row, row + out_width);
        qkv.resize(qkv.size() + width - out_width, 0);
      }
      starts.push_back(int(positions.size()));
      seq_lens.push_back(span.end);
      rows.push_back(span.seq);
    }
    pll_kv_group group{};
    group.block_size = c.block_size;
    group.max_blocks = max_blocks;
    group.block_table = table.data();
    pll_batch batch{};
    batch.struct_size = sizeof(batch);
    batch.num_tokens = int(positions.size());
    batch.num_seqs = int(rows.size());
    batch.positions = positions.data();
    batch.seq_ids = seq_ids.data();
    batch.query_start_loc = starts.data();
    batch.seq_lens = seq_lens.data();
    batch.rows = rows.data();
    batch.num_kv_groups = 1;
    batch.kv_groups = &group;
    std::vector<float> out(size_t(batch.num_tokens) * out_width, -77);
    const auto part = [&](auto& data, pll_dtype type) {
      return harness::tensor(data.data(), type, num_blocks, int64_t(data.size()) / num_blocks);
    };
    std::vector<pll_tensor> buffers{harness::tensor(qkv, width), harness::tensor(out, out_width)};
    if (c.kept == F32) {
      buffers.insert(buffers.end(), {part(k32, PLL_F32), part(v32, PLL_F32)});
    } else if (c.kept == BF16) {
      buffers.insert(buffers.end(), {part(k16, PLL_BF16), part(v16, PLL_BF16)});
    } else {
      buffers.insert(buffers.end(),
                     {part(k8, PLL_I8), part(v8, PLL_I8), part(scales, PLL_F32)});
    }
    const std::string text =
        harness::run_op(pyllmlite::make_attention(spec()), batch, buffers, threads);
    if (error) {
      *error = text;
    } else {
      check(text.empty(), "%s: %s", c.name, text.c_str());
    }
    return out;
  }

  // A rotated query as it is `by` positions earlier.
  std::vector<double> turned_back(const float* from, int by) const {
    std::vector<double> x(from, from + c.head_dim);
    const int half = c.rotary_dim / 2;
    for (int i = 0; i < half; ++i) {
      const double angle = by * std::pow(0.01, double(i) / half), a = x[i], b = x[half + i];
      x[i] = a * std::cos(angle) + b * std::sin(angle);
      x[half + i] = b * std::cos(angle) - a * std::sin(angle);
    }
    return x;
  }

  // Largest difference of out from the double-precision reference, for one sequence's rows: all
  // of a short one's, else every thirteenth and the last.
  double difference(int s, int begin, int end, const float* out) const {
    double worst = 0;
    const auto sp = spec();
    for (int t = begin; t < end; ++t, out += c.heads * c.head_dim) {
      if (end - begin > 40 && t % 13 != 0 && t + 1 != end) continue;
      for (int h = 0; h < c.heads; ++h) {
        const float* row = out + h * c.head_dim;
        const int kvh = h / (c.heads / c.kv_heads);
        const int first = c.window > 0 ? std::max(0, t - c.window + 1) : 0;
        const int sinks = std::min(c.sinks, first), left_out = first - sinks;
        const float* query = &q[s][(size_t(t) * c.heads + h) * c.head_dim];
        const std::vector<double> turned = turned_back(query, left_out);
        std::vector<double> p, y(c.head_dim);
        double max = -1e300, sum = 0;
        std::vector<int> seen;
        for (int j = 0; j <= t; ++j) {
          if (j < sinks || j >= first) seen.push_back(j);
        }
        for (int j : seen) {
          double x = 0;
          for (int d = 0; d < c.head_dim; ++d) {
            x += (j < sinks ? turned[d] : query[d]) *
                 k[s][(size_t(j) * c.kv_heads + kvh) * c.head_dim + d];
          }
          x *= sp.scale;
          if (c.softcap > 0) x = c.softcap * std::tanh(x / c.softcap);
          if (c.alibi) x += double(slopes[h]) * (j - t + (j < sinks ? left_out : 0));
          p.push_back(x);
          max = std::max(max, x);
        }
        for (double& x : p) sum += x = std::exp(x - max);
        for (size_t i = 0; i < seen.size(); ++i) {
          const float* value = &v[s][(size_t(seen[i]) * c.kv_heads + kvh) * c.head_dim];
          for (int d = 0; d < c.head_dim; ++d) y[d] += p[i] / sum * value[d];
        }
        for (int d = 0; d < c.head_dim; ++d) {
          const double e = std::fabs(y[d] - row[d]);
          worst = e > worst || e != e ? (e != e ? 1e9 : e) : worst;
        }
      }
    }
    return worst;
  }
};

const Case kCases[] = {
    {"plain", 4, 4, 64, 16, 0, 0, false, F32},
    {"gqa3", 9, 3, 64, 16, 0, 0, false, F32},
    {"gqa3 bf16", 9, 3, 64, 16, 0, 0, false, BF16},
    {"mqa", 10, 1, 32, 32, 0, 0, false, F32},
    {"mqa wide", 40, 1, 16, 16, 0, 0, false, BF16},
    {"window", 4, 2, 64, 16, 37, 0, false, F32},
    {"window softcap", 4, 2, 96, 48, 300, 20, false, BF16},
    {"window 1", 2, 1, 20, 16, 1, 0, false, F32},
    {"softcap", 4, 1, 80, 16, 0, 5, false, F32},
    {"alibi", 6, 6, 20, 16, 0, 0, true, F32},
    {"alibi bf16", 8, 4, 8, 64, 0, 0, true, BF16},
    {"head 128", 8, 2, 128, 16, 0, 0, false, BF16},
    {"head 2", 3, 3, 2, 16, 0, 0, false, BF16},
    {"one big block", 4, 2, 64, 1024, 0, 0, false, F32},
    {"int8 gqa3", 9, 3, 64, 16, 0, 0, false, INT8},
    {"int8", 4, 4, 64, 32, 0, 0, false, INT8},
    {"int8 gqa4", 8, 2, 64, 1024, 0, 0, false, INT8},
    {"int8 window", 4, 2, 96, 48, 300, 20, false, INT8},
    {"int8 window 1", 2, 1, 20, 16, 1, 0, false, INT8},
    {"int8 alibi", 40, 1, 18, 16, 0, 5, true, INT8},
    {"int8 head 1", 2, 2, 1, 16, 0, 0, false, INT8},
    {"int8 head 300", 2, 1, 300, 16, 0, 0, false, INT8},
    {"sinks", 9, 3, 64, 16, 37, 0, false, F32, 4, 64},
    {"sinks bf16", 4, 2, 64, 16, 100, 0, false, BF16, 4, 32},
    {"sinks int8", 9, 3, 64, 32, 50, 0, false, INT8, 20, 64},
    {"sinks alibi softcap", 4, 1, 20, 16, 40, 5, true, F32, 17, 0},
    {"one sink, window 1", 2, 2, 20, 16, 1, 0, false, BF16, 1, 12},
    {"256 sinks", 2, 1, 32, 16, 30, 0, false, F32, 256, 32},
    {"sinks and a long window", 4, 2, 32, 48, 300, 0, false, BF16, 5, 32},
};

void test_case(const Case& c, const std::string& isa) {
  World world(c, {530, 1, 17, 256, 257, 33}, 7);
  const int width = c.heads * c.head_dim;
  // Every sequence as a whole, in one step.
  std::vector<World::Span> spans;
  for (size_t s = 0; s < world.lengths.size(); ++s) spans.push_back({int(s), 0, world.lengths[s]});
  const std::vector<float> whole = world.run(spans, 1);
  const float* at = whole.data();
  // bf16 dot products round queries and probabilities, each by up to 2^-9 of itself; int8's have
  // 16 bits of the largest of a row.
  const double limit = c.kept == INT8                           ? 4e-4
                       : c.kept == BF16 && isa == "avx512_bf16" ? 1e-2
                                                                : 3e-5;
  std::vector<const float*> base;
  for (size_t s = 0; s < world.lengths.size(); ++s) {
    const double e = world.difference(int(s), 0, world.lengths[s], at);
    check(e < limit, "%s %s: sequence %zu differs by %g", isa.c_str(), c.name, s, e);
    base.push_back(at);
    at += size_t(world.lengths[s]) * width;
  }
  auto same = [&](const std::vector<World::Span>& some, int threads, const char* how) {
    const std::vector<float> out = world.run(some, threads);
    const float* row = out.data();
    for (const auto& span : some) {
      const size_t n = size_t(span.end - span.begin) * width;
      check(harness::same_bits(row, base[span.seq] + size_t(span.begin) * width, n),
            "%s %s: sequence %d [%d, %d) has other bits: %s", isa.c_str(), c.name, span.seq,
            span.begin, span.end, how);
      row += n;
    }
  };
  same(spans, 3, "threads");
  for (size_t s = 0; s < world.lengths.size(); ++s) {
    const int n = world.lengths[s];
    same({{int(s), 0, n}}, 1, "alone");
    for (int threads : {1, 2, 5}) same({{int(s), n - 1, n}}, threads, "decode alone");
  }
  // Chunked in odd pieces beside others' decode, with several threads.
  for (int chunk : {1, 5, 100, 255}) {
    for (int begin = 0; begin < 530; begin += chunk < 16 ? 47 : chunk) {
      const int end = std::min(530, begin + chunk);
      same({{3, 255, 256}, {0, begin, end}, {4, 250, 257}, {5, 32, 33}}, 1 + begin % 3, "chunked");
    }
  }
  same({{0, 529, 530}, {1, 0, 1}, {2, 16, 17}, {3, 255, 256}, {4, 256, 257}}, 4, "decode batch");
}

// NaN in one sequence stays there; one that comes later in a sequence does not reach earlier rows.
void test_nan(const std::string& isa, Kept kept) {
  World world({"nan", 6, 2, 64, 16, 0, 0, false, kept}, {300, 40, 290}, 3);
  const int width = 6 * 64;
  const std::vector<World::Span> spans{{0, 0, 300}, {1, 0, 40}, {2, 0, 290}};
  const auto clean = world.run(spans, 2);
  for (float& x : world.k[1]) x = NAN;
  for (float& x : world.v[1]) x = NAN;
  for (int t = 0; t < 40; ++t) world.store(1, t);
  for (int d = 0; d < 128; ++d) world.v[0][250 * 128 + d] = INFINITY;
  for (int d = 0; d < 128; d += 2) world.k[0][250 * 128 + d] = INFINITY;
  world.store(0, 250);
  const auto dirty = world.run(spans, 2);
  check(harness::same_bits(clean.data(), dirty.data(), 250 * width),
        "%s: earlier rows feel a later one", isa.c_str());
  check(std::isnan(dirty[260 * width]), "%s: NaN got lost", isa.c_str());
  check(std::isnan(dirty[300 * width]), "%s: NaN keys got lost", isa.c_str());
  check(harness::same_bits(clean.data() + 340 * width, dirty.data() + 340 * width, 290 * width),
        "%s: a neighbour feels NaN", isa.c_str());
}

// Blocks behind the window may be gone; a missing one in sight is an error, not a crash.
void test_missing_blocks(const std::string& isa) {
  World world({"evicted", 4, 2, 32, 16, 64, 0, false, F32}, {400}, 5);
  const auto whole = world.run({{0, 300, 400}}, 1);
  for (int b = 0; b < (300 - 63) / 16; ++b) world.table[b] = -1;
  for (int threads : {1, 3}) {
    const auto evicted = world.run({{0, 300, 400}}, threads);
    check(harness::same_bits(whole.data(), evicted.data(), whole.size()),
          "%s: evicted blocks matter", isa.c_str());
  }
  std::string error;
  world.table[(300 - 63) / 16] = -1;
  world.run({{0, 300, 400}}, 2, &error);
  check(error.find("block") != std::string::npos, "%s: a missing block went unseen", isa.c_str());
  World with_sinks({"evicted, sinks", 4, 2, 32, 16, 64, 0, false, BF16, 20, 32}, {400}, 5);
  const auto kept = with_sinks.run({{0, 300, 400}}, 1);
  for (int b = 2; b < (300 - 63) / 16; ++b) with_sinks.table[b] = -1;
  const auto sunk = with_sinks.run({{0, 300, 400}}, 3);
  check(harness::same_bits(kept.data(), sunk.data(), kept.size()),
        "%s: blocks between sinks and window matter", isa.c_str());
  with_sinks.table[1] = -1;
  with_sinks.run({{0, 300, 400}}, 2, &error);
  check(error.find("block") != std::string::npos, "%s: missing sinks went unseen", isa.c_str());
  world.max_blocks = 3;
  world.run({{0, 300, 400}}, 2, &error);
  check(error.find("block table") != std::string::npos, "%s: a short block table", isa.c_str());
}

// Scores that are large, and equal.
void test_extremes(const std::string& isa, Kept kept) {
  World world({"extremes", 2, 1, 16, 16, 0, 0, false, kept}, {530}, 9);
  for (float& x : world.q[0]) x *= 300;
  const auto out = world.run({{0, 0, 530}}, 1);
  const double e = world.difference(0, 0, 530, out.data());
  check(e < 2e-2, "%s: large scores differ by %g", isa.c_str(), e);
  for (float& x : world.q[0]) x = 0;
  const auto mean = world.run({{0, 0, 530}}, 1);
  check(world.difference(0, 0, 530, mean.data()) < 1e-5, "%s: equal scores", isa.c_str());
}

}  // namespace

int main() {
  harness::for_each_isa([](const std::string& isa) {
    for (const Case& c : kCases) test_case(c, isa);
    for (Kept kept : {F32, BF16, INT8}) test_nan(isa, kept);
    test_missing_blocks(isa);
    for (Kept kept : {F32, INT8}) test_extremes(isa, kept);
  });
  return harness::finish();
}
