// Which spellings of the kernels this processor, and the system on it, run.
#pragma once

#include <string>

#include "kernels.hpp"

namespace lamp {

// Whether the kernels of this name (portable, avx2, avx512, avx512_vnni) run here; false for other names.
bool supports(const std::string& isa);

// The kernels of this name. std::invalid_argument where they don't run.
const Kernels& kernels(const std::string& isa);

}  // namespace lamp
