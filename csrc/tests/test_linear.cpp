// The linear and embedding ops of every instruction set against double precision, and the promise
// that a row's bits depend on neither its neighbours nor the threads.

#include <algorithm>
#include <cmath>
#include <stdexcept>

#include "harness.h"
#include "pyllmlite/ops.h"
#include "pyllmlite/pack.h"

namespace {

using namespace pyllmlite;
using harness::check;
using harness::Random;

float half_to_float(uint16_t h) {
  const int exponent = (h >> 10) & 31, mantissa = h & 1023;
  const float sign = h & 0x8000 ? -1.0f : 1.0f;
  if (exponent == 0) return sign * std::ldexp(static_cast<float>(mantissa), -24);
  return sign * std::ldexp(static_cast<float>(1024 + mantissa), exponent - 25);
}

// Positive normal halves of about 1/64 .. 1/16; negative ones too for mins.
uint16_t random_half(Random& random, bool negative) {
  const uint16_t bits = static_cast<uint16_t>((9 + random.below(2)) << 10 | random.below(1024));
  return static_cast<uint16_t>(negative && random.below(2) ? bits | 0x8000 : bits);
}

// A zero point from 1 to 15, as a half: what packed zero points are stored in.
uint16_t random_point(Random& random) {
  static const uint16_t points[] = {0x3c00, 0x4000, 0x4200, 0x4400, 0x4700, 0x4880, 0x4b80};
  return points[random.below(7)];
}

// Scales or minimums, as halves or, with a little more to them, as floats.
struct Table {
  bool wide;
  std::vector<uint16_t> halves;
  std::vector<float> floats;

  Table(int64_t size, bool wide) : wide(wide), halves(size), floats(size) {}
  template <class Draw>
  void fill(Draw draw) {
    for (size_t i = 0; i < halves.size(); ++i) {
      halves[i] = draw();
      floats[i] = half_to_float(halves[i]) * 1.0001f;
    }
  }
  double value(int64_t i) const { return wide ? floats[i] : half_to_float(halves[i]); }
  const void* at(int64_t i) const {
    return wide ? static_cast<const void*>(floats.data() + i) : halves.data() + i;
  }
};

float to_bf16(float x) {
  uint32_t u;
  std::memcpy(&u, &x, 4);
  u = (u + 0x7fff + ((u >> 16) & 1)) & 0xffff0000u;
  std::memcpy(&x, &u, 4);
  return x;
}

// What a format may have besides: scales as floats, zero points in the place of minimums.
struct Extras {
  bool wide = false, points = false;
};

// A random matrix: packed, and its exact values row-major [n, k] before gating.
struct Matrix {
  std::vector<uint8_t> data;
  std::vector<uint8_t> scales, mins;
  std::vector<double> values;
  PackedLinear packed;

  Matrix(Random& random, WeightFormat format, int64_t n, int64_t k, int64_t group, bool with_mins,
         bool gated, Extras extras = {}) {
    const bool quantized = has_groups(format), with_points = quantized && extras.points;
    with_mins = with_mins || with_points;
    for (float& value : packed.codebook) value = random.value();
    const int64_t size = group == 0 || group >= k ? k : group;
    const int64_t groups = quantized ? (k + size - 1) / size : 0;
    const PackedSize bytes = packed_size(format, n, k, group, gated);
    data.resize(bytes.data_bytes);
    values.resize(n * k);
    if (!quantized) {
      std::vector<float> plain = random.values(n * k);
      for (int64_t i = 0; i < n * k; ++i) {
        values[i] = format == WeightFormat::BF16 ? to_bf16(plain[i]) : plain[i];
      }
      pack_linear(format, n, k, group, gated, plain.data(), nullptr, nullptr, data.data(), nullptr,
                  nullptr);
    } else {
      std::vector<uint8_t> codes(n * k);
      Table s(n * groups, extras.wide), m(with_mins ? n * groups : 0, extras.wide);
      s.fill([&] { return random_half(random, false); });
      m.fill([&] { return with_points ? random_point(random) : random_half(random, true); });
      for (int64_t r = 0; r < n; ++r) {
        for (int64_t i = 0; i < k; ++i) {
          const bool int4 = format == WeightFormat::INT4;
          const bool int8 = format == WeightFormat::INT8;
          const int code = int8 ? random.below(256) - 128 : random.below(16);
          codes[r * k + i] = static_cast<uint8_t>(code);
          const int64_t at = r * groups + i / size;
          const double scale = s.value(at);
          double min = int4 ? -8 * scale : 0;
          if (with_mins) min = with_points ? -scale * m.value(at) : m.value(at);
          values[r * k + i] = int4 || int8 ? scale * code + min : scale * packed.codebook[code];
        }
      }
      const size_t item = extras.wide ? 4 : 2;
      scales.resize(bytes.num_scales * item);
      mins.resize(with_mins ? bytes.num_scales * item : 0);
      // In two parts, as a loader packs.
      const int64_t first = n / 3;
      pack_rows(format, n, k, group, gated, 0, first, codes.data(), s.at(0),
                with_mins ? m.at(0) : nullptr, data.data(), scales.data(),
                with_mins ? mins.data() : nullptr, extras.wide);
      pack_rows(format, n, k, group, gated, first, n - first, codes.data() + first * k,
                s.at(first * groups), with_mins ? m.at(first * groups) : nullptr, data.data(),
                scales.data(), with_mins ? mins.data() : nullptr, extras.wide);
    }
    packed.format = format;
    packed.n = n;
    packed.k = k;
    packed.group_size = group;
    packed.data = data.data();
    packed.scales = quantized ? scales.data() : nullptr;
    packed.mins = with_mins ? mins.data() : nullptr;
    packed.wide_scales = extras.wide;
    packed.zero_points = with_points;
    std::vector<float> back(k);
    bool equal = true;
    for (int64_t r = 0; r < n; ++r) {
      unpack_row(packed, r, back.data(), gated);
      for (int64_t i = 0; i < k; ++i) {
        equal = equal && std::fabs(back[i] - values[r * k + i]) <= 1e-6 * std::fabs(back[i]) + 2e-6;
      }
    }
    check(equal, "unpack_row format %d n %d k %d group %d gated %d", int(format), int(n), int(k),
          int(group), gated);
  }
};

double activation(double x, Activation kind) {
  switch (kind) {
    case Activation::NONE: return x;
    case Activation::SILU: return x / (1 + std::exp(-x));
    case Activation::GELU: return 0.5 * x * std::erfc(-x / std::sqrt(2.0));
    case Activation::GELU_TANH:
      return 0.5 * x * (1 + std::tanh(std::sqrt(2 / M_PI) * (x + 0.044715 * x * x * x)));
    case Activation::RELU: return x > 0 ? x : 0;
  }
  return x;
}

// The op in double precision, with the error that rounding may make.
struct Reference {
  std::vector<double> out, bound;

  Reference(const LinearSpec& spec, const Matrix& matrix, const float* x_row, const float* before) {
    const int64_t n = spec.weight.n, k = spec.weight.k;
    std::vector<double> y(k), step(k, 0.0);
    double mean = 0, squares = 0;
    const NormSpec& norm = spec.norm;
    if (norm.kind == Norm::LAYER) {
      for (int64_t i = 0; i < k; ++i) mean += x_row[i];
      mean /= k;
    }
    for (int64_t i = 0; i < k; ++i) squares += (x_row[i] - mean) * (x_row[i] - mean);
    const double factor = norm.kind == Norm::NONE ? 1 : 1 / std::sqrt(squares / k + norm.eps);
    std::vector<double> normed(k);
    for (int64_t i = 0; i < k; ++i) {
      normed[i] = (x_row[i] - mean) * factor;
      if (norm.kind != Norm::NONE && norm.weight) normed[i] *= norm.weight[i];
      if (norm.kind != Norm::NONE && norm.bias) normed[i] += norm.bias[i];
      if (spec.input_scale) normed[i] = static_cast<float>(normed[i] * spec.input_scale[i]);
    }
    for (int64_t i = 0; i < k; ++i) {
      y[i] = normed[spec.input_permutation ? spec.input_permutation[i] : i];
    }
    const bool exact_input = norm.kind == Norm::NONE;
    if (spec.weight.format == WeightFormat::BF16 || spec.bf16_activations) {
      for (int64_t i = 0; i < k; ++i) {
        step[i] = exact_input ? 0 : std::fabs(y[i]) / 128;
        y[i] = to_bf16(static_cast<float>(y[i]));
      }
    }
    if (spec.int8_activations) {
      const int64_t group = spec.weight.group_size;
      const bool whole = group == 0 || group >= k;
      int64_t size = spec.activation_group ? spec.activation_group : whole || group % 32 == 0 ? 32 : group;
      size = std::min(size, k);
      for (int64_t begin = 0; begin < k; begin += size) {
        const int64_t end = std::min(begin + size, k);
        const auto outlier = [&](int64_t i) {
          return spec.outlier_threshold > 0 && std::fabs(y[i]) > spec.outlier_threshold;
        };
        float amax = 0;
        for (int64_t i = begin; i < end; ++i) {
          if (!outlier(i)) amax = std::max(amax, std::fabs(static_cast<float>(y[i])));
        }
        const float inverse = amax > 1e-35f ? 127.0f / amax : 0.0f;
        for (int64_t i = begin; i < end; ++i) {
          step[i] = exact_input ? 0 : amax / 127;
          if (outlier(i)) continue;
          y[i] = std::nearbyint(static_cast<float>(y[i]) * inverse) * (amax / 127.0f);
        }
      }
    }
    const int64_t columns = spec.gated ? n / 2 : n;
    auto dot = [&](int64_t row, double* error) {
      double sum = 0, size = 0, flip = 0;
      for (int64_t i = 0; i < k; ++i) {
        const double product = y[i] * matrix.values[row * k + i];
        sum += product;
        // The minimum is added apart, so that code and minimum may cancel.
        size += std::fabs(y[i]) * (std::fabs(matrix.values[row * k + i]) + 0.5);
        flip = std::max(flip, step[i] * std::fabs(matrix.values[row * k + i]));
      }
      sum = sum * spec.output_scale + (spec.bias ? spec.bias[row] : 0);
      *error = std::fabs(spec.output_scale) * (2e-6 * size + 3 * flip) + 2e-6;
      if (spec.softcap > 0) sum = spec.softcap * std::tanh(sum / spec.softcap);
      return sum;
    };
    for (int64_t j = 0; j < columns; ++j) {
      double error, other_error;
      const double gate = dot(j, &error);
      double value = activation(gate, spec.activation);
      error = error * 1.2 + 1e-6 * std::fabs(value);
      if (spec.gated) {
        const double up = dot(columns + j, &other_error);
        error = error * std::fabs(up) + other_error * (std::fabs(value) + error);
        value *= up;
      }
      out.push_back(value + (spec.residual ? before[j] : 0));
      bound.push_back(error + 1e-6 * std::fabs(out.back()));
    }
  }
};

// Everything a spec points to.
struct Case {
  Matrix matrix;
  std::vector<float> norm_weight, norm_bias, input_scale, bias;
  std::vector<int32_t> permutation;
  LinearSpec spec;

  Case(Random& random, WeightFormat format, int64_t n, int64_t k, int64_t group, bool mins,
       bool gated, Extras extras = {})
      : matrix(random, format, n, k, group, mins, gated, extras) {
    spec.weight = matrix.packed;
    spec.gated = gated;
  }
  void add_flags(Random& random) {
    const int64_t n = spec.weight.n, k = spec.weight.k;
    spec.norm.kind = static_cast<Norm>(random.below(3));
    if (random.below(2)) spec.norm.weight = (norm_weight = random.values(k)).data();
    if (random.below(3) == 0) spec.norm.bias = (norm_bias = random.values(k)).data();
    if (random.below(3) == 0) spec.input_scale = (input_scale = random.values(k)).data();
    if (random.below(2)) spec.bias = (bias = random.values(n)).data();
    if (random.below(3) == 0) {
      for (int64_t i = 0; i < k; ++i) permutation.push_back(static_cast<int32_t>(i));
      for (int64_t i = k - 1; i > 0; --i) {
        std::swap(permutation[i], permutation[random.below(static_cast<int>(i) + 1)]);
      }
      spec.input_permutation = permutation.data();
    }
    spec.activation = static_cast<Activation>(random.below(5));
    spec.residual = random.below(2);
    spec.softcap = random.below(4) == 0 ? 3.0f : 0.0f;
    spec.output_scale = random.below(4) == 0 ? 0.37f : 1.0f;
    spec.logit_rows = random.below(4) == 0;
  }
  // Rows to bf16, and a codebook with them: what the matrix stands for changes.
  void round_to_bf16(bool on) {
    spec.bf16_activations = on;
    const PackedLinear& w = spec.weight;
    if (!on || w.format != WeightFormat::CODEBOOK4) return;
    PackedLinear rounded = w;
    for (float& value : rounded.codebook) value = to_bf16(value);
    std::vector<float> row(w.k);
    for (int64_t r = 0; r < w.n; ++r) {
      unpack_row(rounded, r, row.data(), spec.gated);
      for (int64_t i = 0; i < w.k; ++i) matrix.values[r * w.k + i] = row[i];
    }
  }
  int64_t columns() const { return spec.gated ? spec.weight.n / 2 : spec.weight.n; }
};

pll_batch tokens(int64_t count) {
  pll_batch batch{};
  batch.struct_size = sizeof(batch);
  batch.num_tokens = static_cast<int32_t>(count);
  return batch;
}

std::vector<float> run(const Case& c, const std::vector<float>& x, int64_t rows, int threads,
                       const std::vector<float>& before) {
  std::vector<float> out = before;
  const int64_t k = c.spec.weight.k;
  const std::string error =
      harness::run_op(make_linear(c.spec), tokens(rows),
                      {harness::tensor(const_cast<float*>(x.data()), PLL_F32, rows, k),
                       harness::tensor(out.data(), PLL_F32, rows, c.columns())},
                      threads);
  check(error.empty(), "run: %s", error.c_str());
  return out;
}

void compare(const std::string& isa, const Case& c, int64_t rows, int threads, Random& random) {
  const LinearSpec& spec = c.spec;
  const int64_t k = spec.weight.k, columns = c.columns();
  std::vector<float> x = random.values(rows * k, 2);
  std::vector<int32_t> logit_rows;
  pll_batch batch = tokens(rows);
  int64_t out_rows = rows;
  if (spec.logit_rows) {
    for (int64_t r = 0; r < rows; r += 2) logit_rows.push_back(static_cast<int32_t>(rows - 1 - r));
    out_rows = batch.num_logit_rows = static_cast<int32_t>(logit_rows.size());
    batch.logit_rows = logit_rows.data();
  }
  std::vector<float> before = random.values((out_rows + 1) * columns), out = before;
  const std::string error =
      harness::run_op(make_linear(spec), batch,
                      {harness::tensor(x.data(), PLL_F32, rows, k),
                       harness::tensor(out.data(), PLL_F32, out_rows, columns)},
                      threads);
  check(error.empty(), "%s: %s", isa.c_str(), error.c_str());
  double worst = 0;
  for (int64_t r = 0; r < out_rows; ++r) {
    const int64_t from = spec.logit_rows ? logit_rows[r] : r;
    const Reference reference(spec, c.matrix, x.data() + from * k, before.data() + r * columns);
    for (int64_t j = 0; j < columns; ++j) {
      const double difference = std::fabs(out[r * columns + j] - reference.out[j]);
      worst = std::max(worst, difference <= reference.bound[j] ? difference / reference.bound[j]
                                                               : 1e9);
    }
  }
  check(worst <= 1,
        "%s: format %d n %d k %d group %d mins %d int8 %d (%d) rows %d gated %d norm %d act %d",
        isa.c_str(), int(spec.weight.format), int(spec.weight.n), int(k),
        int(spec.weight.group_size),
        spec.weight.mins != nullptr, spec.int8_activations, int(spec.activation_group), int(rows),
        spec.gated, int(spec.norm.kind), int(spec.activation));
  check(harness::same_bits(out.data() + out_rows * columns, before.data() + out_rows * columns,
                           columns),
        "%s: wrote past the last row", isa.c_str());
}

struct Variant {
  WeightFormat format;
  int64_t group;
  bool mins, int8;
  int64_t activation_group;
  Extras extras = {};
  float threshold = 0;
  bool bf16 = false;
};
const Variant VARIANTS[] = {
    {WeightFormat::F32, 0, false, false, 0},    {WeightFormat::BF16, 0, false, false, 0},
    {WeightFormat::INT8, 0, false, false, 0},   {WeightFormat::INT8, 0, false, true, 0},
    {WeightFormat::INT8, 32, true, false, 0},   {WeightFormat::INT8, 32, true, true, 0},
    {WeightFormat::INT8, 0, false, true, 9999}, {WeightFormat::INT8, 12, false, true, 0},
    {WeightFormat::INT4, 32, false, false, 0},  {WeightFormat::INT4, 32, false, true, 0},
    {WeightFormat::INT4, 64, true, false, 0},   {WeightFormat::INT4, 64, true, true, 32},
    {WeightFormat::INT4, 128, false, true, 0},  {WeightFormat::INT4, 128, true, true, 64},
    {WeightFormat::INT4, 0, false, false, 0},   {WeightFormat::INT4, 0, true, true, 9999},
    {WeightFormat::INT4, 32, false, true, 128}, {WeightFormat::INT4, 8, true, true, 8},
    {WeightFormat::INT4, 32, false, false, 0, {false, true}},
    {WeightFormat::INT4, 64, false, true, 0, {true, true}},
    {WeightFormat::INT8, 32, true, true, 0, {true, false}},
    {WeightFormat::CODEBOOK4, 64, false, false, 0},
    {WeightFormat::CODEBOOK4, 8, false, false, 0, {true, false}},
    {WeightFormat::CODEBOOK4, 0, false, false, 0, {true, false}},
    {WeightFormat::INT8, 0, false, true, 9999, {}, 1.9f},  // few outliers
    {WeightFormat::INT8, 0, false, true, 9999, {true, false}, 0.3f},  // most are
    {WeightFormat::INT8, 0, false, false, 0, {}, 0, true},
    {WeightFormat::INT8, 12, true, false, 0, {}, 0, true},
    {WeightFormat::INT4, 32, false, false, 0, {}, 0, true},
    {WeightFormat::INT4, 8, true, false, 0, {true, false}, 0, true},
    {WeightFormat::INT4, 64, false, false, 0, {false, true}, 0, true},
    {WeightFormat::INT4, 0, true, false, 0, {}, 0, true},
    {WeightFormat::CODEBOOK4, 64, false, false, 0, {}, 0, true},
    {WeightFormat::CODEBOOK4, 0, false, false, 0, {true, false}, 0, true},
};

void test_values(const std::string& isa) {
  const int64_t shapes[][2] = {{1, 1},   {2, 3},   {5, 8},     {16, 16},  {18, 7}, {34, 64},
                               {48, 33}, {64, 96}, {100, 129}, {66, 160}, {34, 300}};
  Random random(1);
  int count = 0;
  for (const Variant& v : VARIANTS) {
    for (const auto& shape : shapes) {
      for (int round = 0; round < 3; ++round) {
        const bool gated = round == 2 && shape[0] % 2 == 0;
        Case c(random, v.format, shape[0], shape[1], v.group, v.mins, gated, v.extras);
        c.spec.int8_activations = v.int8;
        c.round_to_bf16(v.bf16);
        c.spec.activation_group = v.activation_group;
        c.spec.outlier_threshold = v.threshold;
        if (round > 0) c.add_flags(random);
        const int64_t rows[] = {1, 2, 5, 13, 27, 3};
        ++count;
        compare(isa, c, rows[count % 6], 1 + count % 2, random);
      }
    }
    // Many rows, many columns: blocks over rows and over columns.
    Case c(random, v.format, 70, 1090, v.group, v.mins, true, v.extras);
    c.spec.int8_activations = v.int8;
    c.round_to_bf16(v.bf16);
    c.spec.activation_group = v.activation_group;
    c.spec.outlier_threshold = v.threshold;
    c.add_flags(random);
    compare(isa, c, isa == "scalar" ? 40 : 210, 2, random);
  }
}

void test_rows_alone(const std::string& isa) {
  Random random(2);
  for (const Variant& v : VARIANTS) {
    Case c(random, v.format, 86, 330, v.group, v.mins, true, v.extras);
    c.spec.int8_activations = v.int8;
    c.round_to_bf16(v.bf16);
    c.spec.activation_group = v.activation_group;
    c.spec.outlier_threshold = v.threshold;
    c.spec.norm.kind = Norm::RMS;
    c.spec.activation = Activation::SILU;
    const int64_t most = 33, k = 330, columns = 43;
    const std::vector<float> x = random.values(most * k, 2), zeros(most * columns, 0.0f);
    const std::vector<float> all = run(c, x, most, 1, zeros);
    for (int64_t rows = 1; rows <= most; ++rows) {
      for (int threads = 1; threads <= 2; ++threads) {
        // The last `rows` rows, so that a row's place in the batch changes too.
        const std::vector<float> part(x.end() - rows * k, x.end());
        const std::vector<float> out = run(c, part, rows, threads, zeros);
        check(harness::same_bits(out.data(), all.data() + (most - rows) * columns, rows * columns),
              "%s: format %d group %d int8 %d: bits of %d rows on %d threads", isa.c_str(),
              int(v.format), int(v.group), v.int8, int(rows), threads);
      }
    }
    const int64_t many = 230;
    std::vector<float> tall;
    for (int64_t r = 0; r < many; ++r) {
      tall.insert(tall.end(), x.begin() + r % most * k, x.begin() + (r % most + 1) * k);
    }
    const std::vector<float> space(many * columns, 0.0f);
    for (int threads = 1; threads <= 3; threads += 2) {
      const std::vector<float> out = run(c, tall, many, threads, space);
      bool same = true;
      for (int64_t r = 0; r < many; ++r) {
        same = same && harness::same_bits(out.data() + r * columns,
                                          all.data() + r % most * columns, columns);
      }
      check(same, "%s: format %d group %d int8 %d: bits of 230 rows on %d threads", isa.c_str(),
            int(v.format), int(v.group), v.int8, threads);
    }
  }
}

void test_bad_rows(const std::string& isa) {
  Random random(3);
  const float spoilers[] = {NAN, INFINITY, -INFINITY};
  for (const Variant& v : VARIANTS) {
    Case c(random, v.format, 40, 200, v.group, v.mins, false, v.extras);
    c.spec.int8_activations = v.int8;
    c.round_to_bf16(v.bf16);
    c.spec.activation_group = v.activation_group;
    c.spec.outlier_threshold = v.threshold;
    const int64_t rows = 14, k = 200, n = 40;
    std::vector<float> x = random.values(rows * k);
    const std::vector<float> zeros(rows * n, 0.0f);
    const std::vector<float> clean = run(c, x, rows, 1, zeros);
    for (int i = 0; i < 3; ++i) x[(3 + 4 * i) * k + 7 + 60 * i] = spoilers[i];
    const std::vector<float> out = run(c, x, rows, 1, zeros);
    for (int64_t r = 0; r < rows; ++r) {
      if (r == 3 || r == 7 || r == 11) {
        bool finite = false;
        for (int64_t j = 0; j < n; ++j) finite = finite || std::isfinite(out[r * n + j]);
        // A code of 0 times infinity is NaN too, in every format.
        check(!finite, "%s: format %d int8 %d: a spoilt row looks fine", isa.c_str(), int(v.format),
              v.int8);
      } else {
        check(harness::same_bits(&out[r * n], &clean[r * n], n),
              "%s: format %d int8 %d: a neighbour of a spoilt row", isa.c_str(), int(v.format),
              v.int8);
      }
    }
    // All zeros, tiny and huge values are no reason for NaN.
    for (int64_t i = 0; i < k; ++i) {
      x[i] = 0;
      x[k + i] = (i & 1) ? 1e-40f : -3e-42f;
      x[2 * k + i] = 1e33f * random.value();
    }
    const std::vector<float> edge = run(c, x, 3, 1, zeros);
    bool finite = true;
    for (int64_t i = 0; i < 3 * n; ++i) finite = finite && std::isfinite(edge[i]);
    check(finite, "%s: format %d int8 %d: zeros, tiny and huge", isa.c_str(), int(v.format),
          v.int8);
  }
}

// out += W norm(out): the prepared rows are read before any output is written.
void test_in_place(const std::string& isa) {
  Random random(4);
  Case c(random, WeightFormat::BF16, 96, 96, 0, false, false);
  c.spec.residual = true;
  c.spec.norm.kind = Norm::RMS;
  for (const int64_t rows : {1, 3, 40}) {
    const std::vector<float> x = random.values(rows * 96);
    const std::vector<float> apart = run(c, x, rows, 1, x);
    for (int threads = 1; threads <= 2; ++threads) {
      std::vector<float> both = x;
      const pll_tensor buffer = harness::tensor(both, 96);
      harness::run_op(make_linear(c.spec), tokens(rows), {buffer, buffer}, threads);
      check(both == apart, "%s: in place, %d rows, %d threads", isa.c_str(), int(rows), threads);
    }
  }
  Case empty(random, WeightFormat::F32, 16, 16, 0, false, false);
  std::vector<float> untouched(16, 5.0f);
  run(empty, untouched, 0, 2, untouched);
  check(untouched[0] == 5.0f, "%s: no rows", isa.c_str());
}

void test_refusals(const std::string& isa) {
  Random random(5);
  auto refused = [](const LinearSpec& spec) {
    try {
      const pll_op op = make_linear(spec);
      op.destroy(op.state);
    } catch (const std::invalid_argument&) {
      return true;
    }
    return false;
  };
  Case c(random, WeightFormat::INT4, 16, 96, 32, false, false);
  c.spec.int8_activations = true;
  check(!refused(c.spec), "%s: fits", isa.c_str());
  c.spec.activation_group = 48;
  check(refused(c.spec), "%s: groups that do not divide", isa.c_str());
  c.spec.activation_group = 4;
  check(refused(c.spec), "%s: activation group 4", isa.c_str());
  c.spec.activation_group = 0;
  c.spec.weight.scales = nullptr;
  check(refused(c.spec), "%s: no scales", isa.c_str());
  Case f(random, WeightFormat::F32, 15, 8, 0, false, false);
  f.spec.gated = true;
  check(refused(f.spec), "%s: odd gated", isa.c_str());
  f.spec.gated = false;
  f.spec.int8_activations = true;
  check(refused(f.spec), "%s: int8 activations of f32 weights", isa.c_str());
  f.spec.int8_activations = false;
  f.spec.bf16_activations = true;
  check(refused(f.spec), "%s: bf16 activations of f32 weights", isa.c_str());
  c.spec.weight.scales = c.matrix.packed.scales;
  c.spec.bf16_activations = true;
  check(refused(c.spec), "%s: bf16 and int8 activations", isa.c_str());
  c.spec.int8_activations = false;
  c.spec.activation_group = 0;
  check(!refused(c.spec), "%s: bf16 activations fit", isa.c_str());
  Case b(random, WeightFormat::CODEBOOK4, 16, 96, 32, false, false);
  b.spec.int8_activations = true;
  check(refused(b.spec), "%s: int8 activations of codebook weights", isa.c_str());
  Case o(random, WeightFormat::INT8, 16, 96, 32, false, false);
  o.spec.int8_activations = true;
  o.spec.outlier_threshold = 6;
  check(refused(o.spec), "%s: outliers of a grouped weight", isa.c_str());
  check(pack_error(WeightFormat::INT4, 4, 64, 12, false) != nullptr, "int4 group 12");
  check(pack_error(WeightFormat::INT4, 4, 64, 100, false) == nullptr, "int4 group past k");
  check(pack_error(WeightFormat::BF16, 3, 64, 0, true) != nullptr, "odd gated");
}

void test_embed(const std::string& isa) {
  Random random(6);
  for (const Variant& v : VARIANTS) {
    const int64_t vocab = 37, width = 101;
    Matrix table(random, v.format, vocab, width, v.group, v.mins, false, v.extras);
    std::vector<float> positions = random.values(12 * width);
    std::vector<int32_t> ids = {0, 36, 5, 5, 17}, places = {0, 3, 9, 1, 2};
    pll_batch batch = tokens(5);
    batch.token_ids = ids.data();
    batch.positions = places.data();
    EmbedSpec spec;
    spec.table = table.packed;
    spec.scale = 2.5f;
    spec.position_table = positions.data();
    spec.num_positions = 12;
    spec.position_offset = 2;
    std::vector<float> out(5 * width);
    harness::run_op(make_embed(spec), batch, {harness::tensor(out, width)}, 2);
    double worst = 0;
    for (int64_t t = 0; t < 5; ++t) {
      for (int64_t i = 0; i < width; ++i) {
        const double want =
            2.5 * table.values[ids[t] * width + i] + positions[(places[t] + 2) * width + i];
        worst = std::max(worst, std::fabs(out[t * width + i] - want));
      }
    }
    check(worst < 1e-5, "%s: embed format %d: %g", isa.c_str(), int(v.format), worst);
    ids[2] = 37;
    check(!harness::run_op(make_embed(spec), batch, {harness::tensor(out, width)}).empty(),
          "%s: a token past the vocabulary", isa.c_str());
    ids[2] = 5;
    places[1] = 10;
    check(!harness::run_op(make_embed(spec), batch, {harness::tensor(out, width)}).empty(),
          "%s: a position past the table", isa.c_str());
  }
}

}  // namespace

int main() {
  harness::for_each_isa([](const std::string& isa) {
    test_values(isa);
    test_rows_alone(isa);
    test_bad_rows(isa);
    test_in_place(isa);
    test_refusals(isa);
    test_embed(isa);
  });
  return harness::finish();
}
