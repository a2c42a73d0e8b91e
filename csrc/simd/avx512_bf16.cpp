#define GPTOSS_VNNI
#define GPTOSS_BF16
#include "vec_avx512.hpp"
#include "isa.inl"
