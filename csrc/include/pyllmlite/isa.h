// Which instruction set the CPU ops are made for.
#ifndef PYLLMLITE_ISA_H
#define PYLLMLITE_ISA_H

#include <string>
#include <vector>

#include "pyllmlite/export.h"

namespace pyllmlite {

// Names, poorest first: scalar, avx2, avx_vnni, avx512, avx512_bf16.
PLL_API std::vector<std::string> compiled_isas();   // in this library
PLL_API std::vector<std::string> available_isas();  // and on this machine

// In use for ops made from now on: the environment's PYLLMLITE_ISA, else the best available.
// std::invalid_argument for a name that is unknown or that this machine cannot run.
PLL_API std::string isa();
PLL_API void set_isa(const std::string& name);

}  // namespace pyllmlite

#endif
