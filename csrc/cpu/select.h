// Selection without sorting, and counter-based random numbers, for the sampler.
#ifndef PYLLMLITE_CPU_SELECT_H
#define PYLLMLITE_CPU_SELECT_H

#include <stdint.h>
#include <string.h>

namespace pyllmlite::PLL_NS {
namespace {

// A value and an id as one integer whose rising order is falling value, then rising id.
inline uint64_t falling_key(float value, int64_t id) {
  const float canonical = value + 0.0f;  // -0 and 0 are equal
  uint32_t bits;
  memcpy(&bits, &canonical, 4);
  const uint32_t rising = bits & 0x80000000u ? ~bits : bits | 0x80000000u;
  return static_cast<uint64_t>(~rising) << 32 | static_cast<uint32_t>(id);
}

inline float key_value(uint64_t key) {
  const uint32_t rising = ~static_cast<uint32_t>(key >> 32);
  const uint32_t bits = rising & 0x80000000u ? rising & 0x7fffffffu : ~rising;
  float value;
  memcpy(&value, &bits, 4);
  return value;
}

inline uint32_t key_id(uint64_t key) { return static_cast<uint32_t>(key); }

inline void swap_keys(uint64_t* a, uint64_t* b) {
  const uint64_t held = *a;
  *a = *b;
  *b = held;
}

// Hoare's partition of distinct keys around their median of three (count >= 2): returns m in
// [1, count - 1]; keys before m are smaller than all others.
inline int64_t partition(uint64_t* keys, int64_t count) {
  const uint64_t a = keys[0], b = keys[(count - 1) / 2], c = keys[count - 1];
  const uint64_t low = a < b ? a : b, high = a < b ? b : a;
  const uint64_t pivot = c < low ? low : (c > high ? high : c);
  int64_t i = -1, j = count;
  for (;;) {
    do ++i;
    while (keys[i] < pivot);
    do --j;
    while (keys[j] > pivot);
    if (i >= j) break;
    swap_keys(keys + i, keys + j);
  }
  // j is the last of the left side; the pivot may be the greatest of two keys.
  return j + 1 < count ? j + 1 : count - 1;
}

// Puts the k smallest of distinct keys first, in no order.
inline void select_smallest(uint64_t* keys, int64_t count, int64_t k) {
  while (k > 0 && k < count && count > 1) {
    const int64_t middle = partition(keys, count);
    if (k <= middle) {
      count = middle;
    } else {
      keys += middle;
      count -= middle;
      k -= middle;
    }
  }
}

// The greatest key of the smallest set of least keys whose values (those they were made from)
// sum to `wanted`; the greatest of all if they do not.  Reorders the keys.
inline uint64_t select_mass(uint64_t* keys, int64_t count, double wanted) {
  while (count > 1) {
    const int64_t middle = partition(keys, count);
    double left = 0;
    for (int64_t i = 0; i < middle; ++i) left += key_value(keys[i]);
    if (left >= wanted) {
      count = middle;
    } else {
      wanted -= left;
      keys += middle;
      count -= middle;
    }
  }
  return keys[0];
}

// Heap sort: no recursion and no worst case.
inline void sort_keys(uint64_t* keys, int64_t count) {
  for (int64_t start = count / 2 - 1, end = count; end > 1;) {
    if (start < 0) swap_keys(keys, keys + --end);
    for (int64_t root = start < 0 ? 0 : start; 2 * root + 1 < end;) {
      int64_t child = 2 * root + 1;
      if (child + 1 < end && keys[child] < keys[child + 1]) ++child;
      if (keys[root] >= keys[child]) break;
      swap_keys(keys + root, keys + child);
      root = child;
    }
    if (start >= 0) --start;
  }
}

// Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"): the
// counter is `position`, the key `seed`.  53 bits in [0, 1).
inline double philox_uniform(uint64_t seed, uint64_t position) {
  uint32_t c0 = static_cast<uint32_t>(position), c1 = static_cast<uint32_t>(position >> 32);
  uint32_t c2 = 0, c3 = 0;
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = static_cast<uint64_t>(0xD2511F53u) * c0;
    const uint64_t p1 = static_cast<uint64_t>(0xCD9E8D57u) * c2;
    const uint32_t n0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ k0;
    const uint32_t n2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ k1;
    c1 = static_cast<uint32_t>(p1);
    c3 = static_cast<uint32_t>(p0);
    c0 = n0;
    c2 = n2;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  const uint64_t bits = static_cast<uint64_t>(c0) << 21 ^ static_cast<uint64_t>(c1) >> 11;
  return static_cast<double>(bits & ((uint64_t(1) << 53) - 1)) * (1.0 / 9007199254740992.0);
}

}  // namespace
}  // namespace pyllmlite::PLL_NS

#endif
