// What this machine can do at most: memory read and multiply-accumulates done, per second.
//
// The roofline (Williams, Waterman & Patterson 2009) is drawn from these figures; they belong to
// the instruction set in use (isa.h) and to a pool's threads.
#ifndef PYLLMLITE_PEAKS_H
#define PYLLMLITE_PEAKS_H

#include <cstdint>

#include "pyllmlite/export.h"

namespace pyllmlite {

class ThreadPool;

enum class PeakKind : int32_t {
  READ = 0,  // bytes, by plain loads of full vectors, in order
  INT8 = 1,  // products of 8-bit integers, summed into 32 bits; AVX2, for which that is twice as
             // slow: of 4-bit by 8-bit ones
  BF16 = 2,  // products of bf16, summed into f32; f32's where the set has no such instruction
  F32 = 3,   // fused multiply-adds
};

// The best rate of all threads together over about `seconds`, in rounds of 10 ms or more: bytes
// or multiply-accumulates per second.  READ goes over `bytes` of memory again and again, each
// thread over its part: choose them larger than the last-level cache to measure DRAM, and to fit
// a cache to measure that.  The others keep their sums in registers, and `bytes` must be 0.
// std::invalid_argument, std::bad_alloc.
PLL_API double measure_peak(PeakKind kind, ThreadPool& pool, double seconds, int64_t bytes = 0);

// What one thread does in it.  The sum of the words, modulo 2^64:
PLL_API uint64_t peak_read(const uint64_t* words, int64_t count);
// `rounds` (at most 2^16) times over a tile of products that are all 1: returns their sum, which
// is how many multiply-accumulates there were.  INT8, BF16 or F32.
PLL_API double peak_multiply(PeakKind kind, int64_t rounds);

}  // namespace pyllmlite

#endif
