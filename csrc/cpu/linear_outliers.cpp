// See linear_outliers.h.

#include "linear_outliers.h"

#include "simd_int.h"

namespace pyllmlite::PLL_NS {
namespace {

constexpr int64_t HEAD = 64;  // bytes before the values; the count stands in the first four

struct Outlier {
  int32_t column;
  float value;
};

// part += value * the codes of one column, of 16 weight rows.
inline vf add_one(vf part, const uint8_t* panel, int64_t column, float value) {
  const vi four = vi_load(panel + column / 4 * 64);
  const vf x = vset1(value);
  switch (column & 3) {
    case 0: return vfma(x, i8_decode<0>(four), part);
    case 1: return vfma(x, i8_decode<1>(four), part);
    case 2: return vfma(x, i8_decode<2>(four), part);
    default: return vfma(x, i8_decode<3>(four), part);
  }
}

vf listed(const uint8_t* panel, const Outlier* list, int64_t count) {
  vf part = vzero();
  for (int64_t i = 0; i < count; ++i) part = add_one(part, panel, list[i].column, list[i].value);
  return part;
}

vf dense(const uint8_t* panel, const float* values, int64_t k) {
  vf part = vzero();
  for (int64_t i = 0; i < k; ++i) {
    if (values[i] != 0.0f) part = add_one(part, panel, i, values[i]);
  }
  return part;
}

}  // namespace

int64_t outlier_bytes(int64_t k) {
  return HEAD + (k * static_cast<int64_t>(sizeof(float)) + 63) / 64 * 64;
}

void take_outliers(const LinearState& state, float* y, uint8_t* record) {
  const int64_t k = state.row.k;
  const float threshold = state.spec.outlier_threshold;
  uint8_t* const at = record + state.row.outliers_at;
  Outlier* const list = reinterpret_cast<Outlier*>(at + HEAD);
  float* const values = reinterpret_cast<float*>(at + HEAD);
  const int64_t capacity = k / 2;
  int32_t count = 0;
  const auto is_outlier = [&](float x) {  // what is not finite stays, and spoils its row
    const float magnitude = x < 0 ? -x : x;
    return magnitude > threshold && magnitude < __builtin_inff();
  };
  for (int64_t i = 0; i < k; ++i) {
    if (!is_outlier(y[i])) continue;
    if (count < capacity) list[count] = {static_cast<int32_t>(i), y[i]};
    ++count;
  }
  memcpy(at, &count, sizeof(count));
  const bool is_dense = count > capacity;
  if (count == 0) return;
  for (int64_t i = 0; i < k; ++i) {
    const bool out = is_outlier(y[i]);
    if (is_dense) values[i] = out ? y[i] : 0.0f;
    if (out) y[i] = 0.0f;
  }
}

void add_outliers(const LinearState& state, const uint8_t* rows, int64_t num_rows, int64_t first,
                  int64_t panels, float* acc, int64_t acc_stride) {
  const RowLayout& row = state.row;
  const PackedLinear& w = state.spec.weight;
  for (int64_t r = 0; r < num_rows; ++r) {
    const uint8_t* const at = rows + r * row.bytes + row.outliers_at;
    int32_t count;
    memcpy(&count, at, sizeof(count));
    if (count == 0) continue;
    for (int64_t p = 0; p < panels; ++p) {
      const uint8_t* const panel =
          static_cast<const uint8_t*>(w.data) + (first + p) * state.panel_bytes;
      const vf part = count <= row.k / 2
                          ? listed(panel, reinterpret_cast<const Outlier*>(at + HEAD), count)
                          : dense(panel, reinterpret_cast<const float*>(at + HEAD), row.k);
      const vf scale = load_scales(w, w.scales, (first + p) * state.panel_scales);
      float* const to = acc + r * acc_stride + p * 16;
      vstore(to, vfma(part, scale, vload(to)));
    }
  }
}

}  // namespace pyllmlite::PLL_NS
