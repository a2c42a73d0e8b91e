// bfloat16 in twelve bits: see Twelve in kernels.hpp.
#pragma once

#include <vector>

#include "../kernels.hpp"
#include "../memory.hpp"

namespace gptoss {

struct TwelveBits {
    Block<std::uint8_t> rows;
    std::vector<std::uint16_t> aside;

    // False, and nothing kept: it is no bfloat16, or would not become smaller.
    bool pack(const Matrix& w);
};

}  // namespace gptoss
