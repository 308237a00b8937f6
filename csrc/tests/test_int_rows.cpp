// Integer weights with int8 rows: the largest sums that codes can make, and the bits of every
// instruction set that has fused multiply-adds.
//
// Rows hold whole numbers up to 127, so that they are their own codes and the expected output is a
// chain of exact integers and of multiply-adds whose order linear_impl.h promises.

#include <algorithm>
#include <cmath>

#include "harness.h"
#include "pyllmlite/ops.h"
#include "pyllmlite/pack.h"

namespace {

using namespace pyllmlite;
using harness::check;
using harness::Random;

enum class Fill { RANDOM, HIGHEST, LOWEST, OPPOSED };

struct Layer {
  WeightFormat format;
  int64_t n, k, group;
  std::vector<uint8_t> codes, data;
  std::vector<float> scales, mins, packed_scales, packed_mins;
  LinearSpec spec;

  Layer(Random& random, WeightFormat format, int64_t n, int64_t k, int64_t group, bool with_mins,
        Fill fill)
      : format(format), n(n), k(k), group(std::min(group, k)), codes(n * k) {
    const bool int4 = format == WeightFormat::INT4;
    for (int64_t i = 0; i < n * k; ++i) {
      const int high = int4 ? 15 : 127, low = int4 ? 0 : -128;
      const int any = low + random.below(high - low + 1);
      const int code = fill == Fill::HIGHEST  ? high
                       : fill == Fill::LOWEST ? low
                       : fill == Fill::OPPOSED ? (i % 2 ? low : high)
                                               : any;
      codes[i] = static_cast<uint8_t>(code);
    }
    const int64_t tables = n * groups();
    for (int64_t i = 0; i < tables; ++i) scales.push_back(0.01f + 0.02f * std::fabs(random.value()));
    for (int64_t i = 0; with_mins && i < tables; ++i) mins.push_back(random.value());
    const PackedSize size = packed_size(format, n, k, group);
    data.resize(size.data_bytes);
    packed_scales.resize(size.num_scales);
    packed_mins.resize(with_mins ? size.num_scales : 0);
    pack_rows(format, n, k, group, false, 0, n, codes.data(), scales.data(),
              with_mins ? mins.data() : nullptr, data.data(), packed_scales.data(),
              with_mins ? packed_mins.data() : nullptr, true);
    spec.weight.format = format;
    spec.weight.n = n;
    spec.weight.k = k;
    spec.weight.group_size = group;
    spec.weight.data = data.data();
    spec.weight.scales = packed_scales.data();
    spec.weight.mins = with_mins ? packed_mins.data() : nullptr;
    spec.weight.wide_scales = true;
    spec.int8_activations = true;
    spec.activation_group = group;
  }
  int64_t groups() const { return (k + group - 1) / group; }

  // Output j of a row, whose groups all hold a 127 or -127: its scale is 1.
  // size: of what is added up.
  float expected(const float* x, int64_t j, float* size) const {
    const bool int4 = format == WeightFormat::INT4;
    float sum = *size = 0;
    for (int64_t g = 0; g < groups(); ++g) {
      int64_t dot = 0, row = 0;
      for (int64_t i = g * group; i < std::min((g + 1) * group, k); ++i) {
        const uint8_t code = codes[j * k + i];
        const int64_t value = int4 ? code - (mins.empty() ? 8 : 0) : static_cast<int8_t>(code);
        dot += value * static_cast<int64_t>(x[i]);
        row += static_cast<int64_t>(x[i]);
      }
      const int64_t at = j * groups() + g;
      sum = std::fma(static_cast<float>(dot), scales[at], sum);
      if (!mins.empty()) sum = std::fma(mins[at], static_cast<float>(row), sum);
      *size += std::fabs(static_cast<float>(dot) * scales[at]);
      if (!mins.empty()) *size += std::fabs(static_cast<float>(row) * mins[at]);
    }
    return sum;
  }
};

std::vector<float> whole_rows(Random& random, int64_t rows, int64_t k, int64_t group, Fill fill) {
  std::vector<float> x(rows * k);
  for (int64_t i = 0; i < rows * k; ++i) {
    const int64_t column = i % k;
    const int any = random.below(255) - 127;
    const int top = random.below(2) ? 127 : -127;
    x[i] = static_cast<float>(fill == Fill::HIGHEST   ? 127
                              : fill == Fill::LOWEST  ? -127
                              : fill == Fill::OPPOSED ? (column % 2 ? -127 : 127)
                              : column % group == 0   ? top
                                                      : any);
  }
  return x;
}

void test_bits(const std::string& isa) {
  const int64_t shapes[][2] = {{16, 32}, {17, 8}, {40, 64}, {33, 200}, {16, 1000}, {80, 576}};
  const int64_t groups[] = {8, 16, 24, 32, 40, 64, 96, 128, 1024};
  const Fill fills[] = {Fill::RANDOM, Fill::HIGHEST, Fill::LOWEST, Fill::OPPOSED};
  Random random(11);
  int round = 0;
  for (const WeightFormat format : {WeightFormat::INT4, WeightFormat::INT8}) {
    for (const bool with_mins : {false, true}) {
      for (const auto& shape : shapes) {
        for (const int64_t group : groups) {
          const Fill of_weights = fills[round % 4], of_rows = fills[round / 4 % 4];
          const int64_t n = shape[0], k = shape[1], rows = 1 + round++ % 14;
          Layer layer(random, format, n, k, group, with_mins, of_weights);
          std::vector<float> x = whole_rows(random, rows, k, layer.group, of_rows), out(rows * n);
          pll_batch batch{};
          batch.struct_size = sizeof(batch);
          batch.num_tokens = static_cast<int32_t>(rows);
          const std::string error = harness::run_op(
              make_linear(layer.spec), batch,
              {harness::tensor(x, k), harness::tensor(out, n)}, 1 + round % 2);
          check(error.empty(), "%s: %s", isa.c_str(), error.c_str());
          int64_t wrong = 0;
          for (int64_t r = 0; r < rows; ++r) {
            for (int64_t j = 0; j < n; ++j) {
              float size;
              const float want = layer.expected(&x[r * k], j, &size), got = out[r * n + j];
              // The scalar set may round a product before it is added.
              const float slack = isa == "scalar" ? 1e-6f * size : 0;
              wrong += !(std::fabs(got - want) <= slack);
            }
          }
          check(wrong == 0,
                "%s: format %d n %d k %d group %d mins %d rows %d fills %d %d: %d outputs differ",
                isa.c_str(), int(format), int(n), int(k), int(group), with_mins, int(rows),
                int(of_weights), int(of_rows), int(wrong));
        }
      }
    }
  }
}

}  // namespace

int main() {
  harness::for_each_isa(test_bits);
  return harness::finish();
}
