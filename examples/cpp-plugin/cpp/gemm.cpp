// pyllmlite's linear op from C++: no Python, no torch.  y = relu(x W^T + b) with bf16 weights,
// on two threads, checked against a loop.
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <memory>
#include <vector>

#include "pyllmlite/isa.h"
#include "pyllmlite/ops.h"
#include "pyllmlite/pack.h"
#include "pyllmlite/program.h"

namespace {

// Multiples of 1/8 in [-1, 1): exact in bf16, and so are products and sums of this size in f32.
float value(int64_t i) { return static_cast<float>((i * 37 + 11) % 16 - 8) / 8; }

}  // namespace

int main() {
  const int64_t tokens = 5, k = 96, n = 40;
  std::vector<float> w(n * k), bias(n);
  for (int64_t i = 0; i < n * k; ++i) w[i] = value(i);
  for (int64_t i = 0; i < n; ++i) bias[i] = value(3 * i);

  using pyllmlite::WeightFormat;
  const pyllmlite::PackedSize size = pyllmlite::packed_size(WeightFormat::BF16, n, k, 0);
  std::vector<uint8_t> packed(size.data_bytes);
  pyllmlite::pack_linear(WeightFormat::BF16, n, k, 0, false, w.data(), nullptr, nullptr,
                         packed.data(), nullptr, nullptr);
  pyllmlite::LinearSpec spec;
  spec.weight.format = WeightFormat::BF16;
  spec.weight.n = n;
  spec.weight.k = k;
  spec.weight.data = packed.data();
  spec.bias = bias.data();
  spec.activation = pyllmlite::Activation::RELU;

  pyllmlite::Program program(tokens, 1, std::make_shared<pyllmlite::ThreadPool>(2));
  const int x = program.add_buffer("x", pyllmlite::Program::kTokenRows, k);
  const int y = program.add_buffer("y", pyllmlite::Program::kTokenRows, n);
  program.add_op(pyllmlite::own_op(pyllmlite::make_linear(spec)), {x, y}, "linear");
  program.finish();
  float* in = static_cast<float*>(program.buffer(x).data);
  for (int64_t i = 0; i < tokens * k; ++i) in[i] = value(5 * i + 2);

  pll_batch batch{};
  batch.struct_size = sizeof(batch);
  batch.num_tokens = tokens;
  program.run(batch);

  const float* out = static_cast<const float*>(program.buffer(y).data);
  for (int64_t t = 0; t < tokens; ++t) {
    for (int64_t i = 0; i < n; ++i) {
      float expected = bias[i];
      for (int64_t j = 0; j < k; ++j) expected += in[t * k + j] * w[i * k + j];
      expected = std::fmax(expected, 0.0f);
      if (std::fabs(out[t * n + i] - expected) > 1e-5f) {
        std::printf("y[%d][%d] is %g, expected %g\n", static_cast<int>(t), static_cast<int>(i),
                    out[t * n + i], expected);
        return 1;
      }
    }
  }
  std::printf("%d x %d x %d on %s: as expected\n", static_cast<int>(tokens), static_cast<int>(n),
              static_cast<int>(k), pyllmlite::isa().c_str());
  return 0;
}
