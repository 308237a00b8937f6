// The kernels' factories, once per instruction set.
//
// Every csrc/cpu/*.cpp is compiled once per set with PLL_NS (a namespace: scalar, avx2, avx_vnni,
// avx512, avx512_bf16) and PLL_ISA (0..4) defined; runtime/dispatch.cpp picks one set.
// Those files use no std containers or other inline library code: the linker keeps one copy
// of a shared inline function, and it may be the one built for a newer machine.
#ifndef PYLLMLITE_CPU_FACTORIES_H
#define PYLLMLITE_CPU_FACTORIES_H

#include "pyllmlite/ops.h"
#include "pyllmlite/peaks.h"

#define PLL_ISA_SCALAR 0
#define PLL_ISA_AVX2 1         // AVX2, FMA, F16C
#define PLL_ISA_AVX_VNNI 2     // and AVX-VNNI, in the same vectors of 256 bits
#define PLL_ISA_AVX512 3       // F, BW, DQ, VL, VNNI
#define PLL_ISA_AVX512_BF16 4  // and BF16

// Sets whose vectors are of 256 bits.
#define PLL_ISA_IS_256 (PLL_ISA >= PLL_ISA_AVX2 && PLL_ISA < PLL_ISA_AVX512)

#ifndef PLL_DECLARE_NS
#define PLL_DECLARE_NS(ns)                           \
  namespace pyllmlite::ns {                          \
  pll_op make_linear(const LinearSpec& spec);        \
  pll_op make_norm(const NormOpSpec& spec);          \
  pll_op make_embed(const EmbedSpec& spec);          \
  pll_op make_rotary_store(const RotaryStoreSpec& spec); \
  pll_op make_attention(const AttentionSpec& spec);  \
  pll_op make_sample(int64_t vocab_size);            \
  uint64_t peak_read(const uint64_t* words, int64_t count); \
  double peak_multiply(PeakKind kind, int64_t rounds); \
  }
#endif

PLL_DECLARE_NS(scalar)
PLL_DECLARE_NS(avx2)
PLL_DECLARE_NS(avx_vnni)
PLL_DECLARE_NS(avx_vnni_evex)  // for tests: avx_vnni on machines with AVX-512 VNNI alone
PLL_DECLARE_NS(avx512)
PLL_DECLARE_NS(avx512_bf16)

#endif
