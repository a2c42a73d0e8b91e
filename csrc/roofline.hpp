// What this machine can do at most: bytes read and operations done in a second by all threads of
// the pool together. An operation is a multiplication or an addition, so that one fused
// multiply-add of a vector of n counts 2n.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace gptoss {

// Bytes in a second, the best of `passes` readings of a buffer of `bytes`, which must be much
// larger than the last cache. Throws std::bad_alloc.
double read_bandwidth(std::int64_t bytes, int passes);

// Operations in a second with operands in registers, the best of `passes`.
struct Peak {
    std::string isa;  // "portable", "avx2", "avx512", "avx512_vnni"
    double float32;   // fused multiply-add
    double int8;      // bytes times bytes, summed in 32 bits; 0: no kernel for it
};

// For each instruction set that this processor has and a kernel was written for; the last is the
// richest.
std::vector<Peak> peaks(int passes);

}  // namespace gptoss
