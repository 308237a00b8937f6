// Norms, rotary and store, and block copies against doubles.

#include <algorithm>
#include <cmath>
#include <limits>

#include "harness.h"
#include "pyllmlite/ops.h"

using harness::check;
using harness::Random;

namespace {

void test_norm(const std::string& isa) {
  Random random(1);
  for (int width : {1, 2, 15, 16, 17, 63, 64, 65, 96, 576, 1000}) {
    for (int kind = 0; kind < 3; ++kind) {
      for (int options = 0; options < 8; ++options) {
        const int tokens = 5;
        std::vector<float> x = random.values(tokens * width, 3);
        std::vector<float> out = random.values(tokens * width);
        for (int i = 0; i < width; ++i) x[width + i] += 1000;  // a mean far from 0
        const std::vector<float> weight = random.values(width), bias = random.values(width);
        pyllmlite::NormOpSpec spec;
        spec.norm.kind = static_cast<pyllmlite::Norm>(kind);
        spec.norm.weight = options & 1 ? weight.data() : nullptr;
        spec.norm.bias = options & 2 ? bias.data() : nullptr;
        spec.width = width;
        spec.residual = options & 4;
        std::vector<double> wanted(out.begin(), out.end());
        for (int t = 0; t < tokens; ++t) {
          const float* row = x.data() + t * width;
          double mean = 0, squares = 0, factor = 1;
          for (int i = 0; i < width && kind == 2; ++i) mean += row[i] / double(width);
          for (int i = 0; i < width; ++i) squares += (row[i] - mean) * (row[i] - mean) / width;
          if (kind > 0) factor = 1 / std::sqrt(squares + spec.norm.eps);
          for (int i = 0; i < width; ++i) {
            const double y = (row[i] - mean) * factor * (options & 1 ? weight[i] : 1) +
                             (options & 2 ? bias[i] : 0);
            wanted[t * width + i] = y + (spec.residual ? wanted[t * width + i] : 0);
          }
        }
        pll_batch batch{};
        batch.num_tokens = tokens;
        std::vector<float> alone = out, place = x;
        harness::run_op(pyllmlite::make_norm(spec), batch,
                        {harness::tensor(x, width), harness::tensor(out, width)}, 3);
        double worst = 0;
        for (size_t i = 0; i < out.size(); ++i) {
          worst = std::max(worst, std::fabs(out[i] - wanted[i]) / (1 + std::fabs(wanted[i])));
        }
        check(worst < 3e-4, "%s: norm %d, width %d, options %d: %g", isa.c_str(), kind, width,
              options, worst);
        // The fourth row alone; and in place.
        std::vector<float> one(x.begin() + 3 * width, x.begin() + 4 * width);
        std::vector<float> to(alone.begin() + 3 * width, alone.begin() + 4 * width);
        batch.num_tokens = 1;
        harness::run_op(pyllmlite::make_norm(spec), batch,
                        {harness::tensor(one, width), harness::tensor(to, width)});
        check(harness::same_bits(to.data(), out.data() + 3 * width, width),
              "%s: norm: a row alone has other bits", isa.c_str());
        if (!spec.residual) {
          batch.num_tokens = tokens;
          harness::run_op(pyllmlite::make_norm(spec), batch,
                          {harness::tensor(place, width), harness::tensor(place, width)});
          check(harness::same_bits(place.data(), out.data(), out.size()), "%s: norm in place",
                isa.c_str());
        }
      }
    }
  }
}

float from_bf16(uint16_t bits) {
  const uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float value;
  std::memcpy(&value, &wide, 4);
  return value;
}

struct StoreCase {
  int heads, kv_heads, head_dim, rotary_dim, block_size;
  bool bf16, qk_norm;
};

void test_store(const std::string& isa, const StoreCase& c) {
  Random random(2);
  const int tokens = 37, num_blocks = 5, num_positions = 64;
  const int width = (c.heads + 2 * c.kv_heads) * c.head_dim, half = c.rotary_dim / 2;
  std::vector<float> qkv = random.values(tokens * width), before = qkv;
  std::vector<float> cos(num_positions * std::max(half, 1)), sin(cos.size());
  for (int p = 0; p < num_positions; ++p) {
    for (int i = 0; i < half; ++i) {
      const double angle = p * std::pow(10000.0, -2.0 * i / c.rotary_dim);
      cos[p * half + i] = static_cast<float>(std::cos(angle));
      sin[p * half + i] = static_cast<float>(std::sin(angle));
    }
  }
  const std::vector<float> q_norm = random.values(c.head_dim), k_norm = random.values(c.head_dim);
  std::vector<int32_t> positions, slots;
  for (int t = 0; t < tokens; ++t) {
    positions.push_back(t + 5);
    slots.push_back(t % 11 == 3 ? -1 : (t * 7 + 2) % (num_blocks * c.block_size));
  }
  pyllmlite::RotaryStoreSpec spec;
  spec.num_heads = c.heads;
  spec.kv.dtype = c.bf16 ? PLL_BF16 : PLL_F32;
  spec.kv.num_blocks = num_blocks;
  spec.kv.num_kv_heads = c.kv_heads;
  spec.kv.head_dim = c.head_dim;
  spec.kv.block_size = c.block_size;
  spec.rotary_dim = c.rotary_dim;
  spec.cos = cos.data();
  spec.sin = sin.data();
  spec.num_positions = num_positions;
  spec.q_norm = c.qk_norm ? q_norm.data() : nullptr;
  spec.k_norm = c.qk_norm ? k_norm.data() : nullptr;
  pll_kv_group group{};
  group.block_size = c.block_size;
  group.slot_mapping = slots.data();
  const int32_t seq_len = tokens + 5;
  pll_batch batch{};
  batch.num_tokens = tokens;
  batch.num_seqs = 1;
  batch.seq_lens = &seq_len;
  batch.positions = positions.data();
  batch.num_kv_groups = 1;
  batch.kv_groups = &group;
  const int64_t row = int64_t(c.kv_heads) * c.head_dim * c.block_size;
  std::vector<float> k32(num_blocks * row, 99), v32(k32);
  std::vector<uint16_t> k16(num_blocks * row, 0x42c6), v16(k16);  // 99
  auto buffers = [&](std::vector<float>& x) {
    return std::vector<pll_tensor>{
        harness::tensor(x, width),
        harness::tensor(c.bf16 ? (void*)k16.data() : k32.data(), spec.kv.dtype, num_blocks, row),
        harness::tensor(c.bf16 ? (void*)v16.data() : v32.data(), spec.kv.dtype, num_blocks, row)};
  };
  std::string error = harness::run_op(pyllmlite::make_rotary_store(spec), batch, buffers(qkv), 3);
  check(error.empty(), "%s", error.c_str());
  std::vector<float> one_thread = before;
  harness::run_op(pyllmlite::make_rotary_store(spec), batch, buffers(one_thread), 1);
  check(harness::same_bits(one_thread.data(), qkv.data(), qkv.size()), "%s: threads change bits",
        isa.c_str());
  double worst = 0, stored = 0;
  std::vector<bool> written(k32.size());
  for (int t = 0; t < tokens; ++t) {
    for (int h = 0; h < c.heads + 2 * c.kv_heads; ++h) {
      const int at = t * width + h * c.head_dim;
      std::vector<double> x(before.begin() + at, before.begin() + at + c.head_dim);
      const bool query = h < c.heads, value = h >= c.heads + c.kv_heads;
      if (c.qk_norm && !value) {
        double squares = 0;
        for (double v : x) squares += v * v / c.head_dim;
        for (int i = 0; i < c.head_dim; ++i) {
          x[i] *= (query ? q_norm : k_norm)[i] / std::sqrt(squares + spec.qk_norm_eps);
        }
      }
      for (int i = 0; i < half && !value; ++i) {
        const double a = x[i], b = x[i + half];
        const double cs = cos[positions[t] * half + i], sn = sin[positions[t] * half + i];
        x[i] = a * cs - b * sn;
        x[i + half] = b * cs + a * sn;
      }
      for (int i = 0; i < c.head_dim; ++i) worst = std::max(worst, std::fabs(x[i] - qkv[at + i]));
      if (query || slots[t] < 0) continue;
      const int kv_head = (h - c.heads) % c.kv_heads, offset = slots[t] % c.block_size;
      const int64_t base = slots[t] / c.block_size * row + kv_head * c.head_dim * c.block_size;
      for (int i = 0; i < c.head_dim; ++i) {
        const int64_t key_at = base + i * c.block_size + offset;
        const int64_t value_at = base + offset * c.head_dim + i;
        const int64_t where = value ? value_at : key_at;
        const double got = c.bf16 ? from_bf16((value ? v16 : k16)[where])
                                  : (value ? v32 : k32)[where];
        const double rounding = c.bf16 ? 0.004 * std::fabs(got) : 0;
        stored = std::max(stored, std::fabs(got - qkv[at + i]) - rounding);
        if (!value) written[where] = true;
      }
    }
  }
  check(worst < 3e-6, "%s: rotary head_dim %d: %g", isa.c_str(), c.head_dim, worst);
  check(stored <= 0, "%s: stored head_dim %d: %g", isa.c_str(), c.head_dim, stored);
  int64_t touched = 0;
  for (size_t i = 0; i < written.size(); ++i) {
    touched += !written[i] && (c.bf16 ? k16[i] != 0x42c6 : k32[i] != 99);
  }
  check(touched == 0, "%s: %lld other keys were written", isa.c_str(), (long long)touched);
  // Positions past the tables, and slots past the cache.
  if (half > 0) {
    spec.num_positions = seq_len - 1;
    error = harness::run_op(pyllmlite::make_rotary_store(spec), batch, buffers(qkv));
    check(error.find("position 41") != std::string::npos, "%s: '%s'", isa.c_str(), error.c_str());
    spec.num_positions = num_positions;
  }
  slots[4] = num_blocks * c.block_size;
  error = harness::run_op(pyllmlite::make_rotary_store(spec), batch, buffers(qkv));
  check(error.find("slot") != std::string::npos, "%s: '%s'", isa.c_str(), error.c_str());
}

void test_copy() {
  Random random(3);
  for (int width : {1, 16, 63, 1000}) {
    std::vector<float> a = random.values(6 * width), b = random.values(6 * width);
    std::vector<uint8_t> bytes(6 * 5);
    for (uint8_t& x : bytes) x = uint8_t(random.bits());
    const std::vector<float> a0 = a;
    const std::vector<uint8_t> bytes0 = bytes;
    const int32_t copies[] = {0, 3, 3, 5, 2, 2, 4, 0};  // one after the other
    pll_kv_group groups[2] = {};
    groups[1].num_copies = 4;
    groups[1].copies = copies;
    pll_batch batch{};
    batch.num_kv_groups = 2;
    batch.kv_groups = groups;
    const std::string error = harness::run_op(
        pyllmlite::make_copy_blocks(1), batch,
        {harness::tensor(a, width), harness::tensor(b, width),
         harness::tensor(bytes.data(), PLL_U8, 6, 5)},
        3);
    check(error.empty(), "%s", error.c_str());
    const int source[] = {4, 1, 2, 0, 4, 0};
    for (int i = 0; i < 6; ++i) {
      check(harness::same_bits(&a[i * width], &a0[source[i] * width], width), "copied block %d", i);
      check(std::equal(&bytes[i * 5], &bytes[i * 5] + 5, &bytes0[source[i] * 5]), "bytes %d", i);
    }
    const int32_t outside[] = {0, 6};
    groups[1].num_copies = 1;
    groups[1].copies = outside;
    check(!harness::run_op(pyllmlite::make_copy_blocks(1), batch, {harness::tensor(a, width)})
               .empty(),
          "a block outside of the cache");
    check(!harness::run_op(pyllmlite::make_copy_blocks(2), batch, {harness::tensor(a, width)})
               .empty(),
          "a group that the batch lacks");
    // With a swap space of two blocks: 6 and 7.
    std::vector<float> swap(2 * width, -1);
    const std::vector<float> before = a;
    const int32_t there_and_back[] = {1, 7, 2, 1, 7, 0, 7, 6};
    groups[1].num_copies = 4;
    groups[1].copies = there_and_back;
    const auto swapping = [&](std::vector<pll_tensor> buffers) {
      return harness::run_op(pyllmlite::make_copy_blocks(1, true), batch, buffers, 3);
    };
    const std::vector<pll_tensor> both{harness::tensor(a, width), harness::tensor(swap, width)};
    check(swapping(both).empty(), "swapping");
    check(harness::same_bits(&a[0], &before[width], width), "back from the swap space");
    check(harness::same_bits(&a[width], &before[2 * width], width), "taken by another");
    check(harness::same_bits(&swap[0], &before[width], width), "within the swap space");
    const int32_t beyond[] = {0, 8};
    groups[1].num_copies = 1;
    groups[1].copies = beyond;
    check(!swapping(both).empty(), "a block behind the swap space");
    const auto refused = [](std::vector<pll_tensor> buffers) {
      const pll_op op = pyllmlite::make_copy_blocks(1, true);
      char text[256];
      const int code = op.check(op.state, buffers.data(), int(buffers.size()), 1, 1, text, 256);
      op.destroy(op.state);
      return code != 0;
    };
    std::vector<float> narrow(2 * width + 2);
    check(!refused(both), "a pool and its swap space");
    check(refused({harness::tensor(a, width)}), "a buffer without swap space");
    check(refused({harness::tensor(a, width), harness::tensor(narrow, width + 1)}),
          "blocks of another size");
  }
}

}  // namespace

int main() {
  harness::for_each_isa([](const std::string& isa) {
    test_norm(isa);
    for (const StoreCase& c :
         {StoreCase{9, 3, 64, 64, 16, false, false}, StoreCase{4, 4, 8, 8, 32, true, false},
          StoreCase{2, 1, 20, 10, 16, false, true}, StoreCase{4, 2, 80, 32, 16, true, true},
          StoreCase{3, 3, 96, 96, 64, false, true}, StoreCase{2, 2, 2, 2, 16, false, false},
          StoreCase{4, 1, 128, 0, 16, true, false}}) {
      test_store(isa, c);
    }
  });
  test_copy();
  return harness::finish();
}
