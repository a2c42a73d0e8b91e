// What this processor can do, asked at run time.
#pragma once

#include <string>
#include <vector>

namespace gptoss {

// Names of the instruction sets that kernels may be chosen by, as the vendor writes them in lower
// case ("avx2", "avx512_vnni", "neon", ...); empty where nothing is known.
std::vector<std::string> cpu_features();

}  // namespace gptoss
