// Every kernel for one instruction set; a vec_*.hpp has been included before.
#include <cstddef>
#include <new>

#include "../kernels.hpp"

namespace gptoss::GPTOSS_ISA {

// Numbers are rounded in blocks, by a scale each. A block whose largest is no more than this becomes
// zeros: one over its scale might be infinite.
inline constexpr float FAINT = 0x1p-100f;

#include "../ops/attention.inl"
#include "../ops/linear.inl"
#include "../ops/small.inl"

#define GPTOSS_TEXT(x) GPTOSS_TEXT_(x)
#define GPTOSS_TEXT_(x) #x

extern const Kernels table;
const Kernels table = {
    .name = GPTOSS_TEXT(GPTOSS_ISA),
    .dot = dot,
    .unpack = unpack,
    .dot_tiles = dot_tiles,
    .dot_packed = dot_packed,
    .unpack_tile = unpack_tile,
    .round_tile = round_tile,
    .round_row = round_row,
    .widen = widen,
    .rms_norm = rms_norm,
    .swiglu = swiglu_row,
    .blend = blend,
    .rope = rope,
    .attention = GPTOSS_ATTENTION_KERNELS,
};

}  // namespace gptoss::GPTOSS_ISA
