// Picks one instruction set's factories; see cpu/factories.h.
#include <atomic>
#include <cstdlib>
#include <stdexcept>

#if defined(PLL_HAVE_AVX_VNNI)
#include <cpuid.h>
#endif

#include "cpu/factories.h"
#include "pyllmlite/isa.h"
#include "pyllmlite/peaks.h"

namespace pyllmlite {
namespace {

struct Factories {
  const char* name;
  bool (*runs_here)();
  pll_op (*linear)(const LinearSpec&);
  pll_op (*norm)(const NormOpSpec&);
  pll_op (*embed)(const EmbedSpec&);
  pll_op (*rotary_store)(const RotaryStoreSpec&);
  pll_op (*attention)(const AttentionSpec&);
  pll_op (*sample)(int64_t);
  uint64_t (*peak_read)(const uint64_t*, int64_t);
  double (*peak_multiply)(PeakKind, int64_t);
};

#define PLL_FACTORIES(ns, runs_here)                                                        \
  {                                                                                         \
    #ns, runs_here, ns::make_linear, ns::make_norm, ns::make_embed, ns::make_rotary_store, \
        ns::make_attention, ns::make_sample, ns::peak_read, ns::peak_multiply               \
  }

#if defined(PLL_HAVE_X86)
// __builtin_cpu_supports asks the operating system too whether it keeps the registers.
bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
         __builtin_cpu_supports("f16c");
}
bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512vnni");
}
#endif
#if defined(PLL_HAVE_AVX_VNNI)
// CPUID leaf 7, subleaf 1, EAX bit 4: not every compiler that has -mavxvnni knows the name here.
bool has_avx_vnni() {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  if (!__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) || eax < 1) return false;
  return __get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) && (eax >> 4 & 1) != 0;
}
#endif

// Poorest first: the last that runs here is taken.
const Factories kFactories[] = {
    PLL_FACTORIES(scalar, [] { return true; }),
#if defined(PLL_HAVE_X86)
    PLL_FACTORIES(avx2, has_avx2),
#if defined(PLL_HAVE_AVX_VNNI)
    PLL_FACTORIES(avx_vnni, [] { return has_avx2() && has_avx_vnni(); }),
#endif
#if defined(PLL_HAVE_AVX_VNNI_EVEX)
    PLL_FACTORIES(avx_vnni_evex, has_avx512),
#endif
    PLL_FACTORIES(avx512, has_avx512),
    PLL_FACTORIES(avx512_bf16,
                  [] { return has_avx512() && __builtin_cpu_supports("avx512bf16"); }),
#endif
};

std::string join(const std::vector<std::string>& names) {
  std::string text;
  for (const std::string& name : names) text += (text.empty() ? "" : ", ") + name;
  return text;
}

const Factories* find(const std::string& name) {
  for (const Factories& f : kFactories) {
    if (name != f.name) continue;
    if (f.runs_here()) return &f;
    throw std::invalid_argument("this machine cannot run instruction set '" + name +
                                "'; it can run: " + join(available_isas()));
  }
  throw std::invalid_argument("unknown instruction set '" + name +
                              "'; compiled in: " + join(compiled_isas()));
}

std::atomic<const Factories*> chosen{nullptr};

const Factories& current() {
  const Factories* f = chosen.load(std::memory_order_acquire);
  if (f != nullptr) return *f;
  const char* forced = std::getenv("PYLLMLITE_ISA");
  if (forced != nullptr && *forced != '\0') {
    try {
      f = find(forced);
    } catch (const std::invalid_argument& error) {
      throw std::invalid_argument(std::string("PYLLMLITE_ISA: ") + error.what());
    }
  } else {
    for (const Factories& each : kFactories) {
      if (each.runs_here()) f = &each;
    }
  }
  chosen.store(f, std::memory_order_release);
  return *f;
}

}  // namespace

std::vector<std::string> compiled_isas() {
  std::vector<std::string> names;
  for (const Factories& f : kFactories) names.emplace_back(f.name);
  return names;
}

std::vector<std::string> available_isas() {
  std::vector<std::string> names;
  for (const Factories& f : kFactories) {
    if (f.runs_here()) names.emplace_back(f.name);
  }
  return names;
}

std::string isa() { return current().name; }
void set_isa(const std::string& name) { chosen.store(find(name), std::memory_order_release); }

pll_op make_linear(const LinearSpec& spec) { return current().linear(spec); }
pll_op make_norm(const NormOpSpec& spec) { return current().norm(spec); }
pll_op make_embed(const EmbedSpec& spec) { return current().embed(spec); }
pll_op make_rotary_store(const RotaryStoreSpec& spec) { return current().rotary_store(spec); }
pll_op make_attention(const AttentionSpec& spec) { return current().attention(spec); }
pll_op make_sample(int64_t vocab_size) { return current().sample(vocab_size); }

uint64_t peak_read(const uint64_t* words, int64_t count) {
  return current().peak_read(words, count);
}
double peak_multiply(PeakKind kind, int64_t rounds) {
  return current().peak_multiply(kind, rounds);
}

}  // namespace pyllmlite
