#define GPTOSS_VNNI
#include "vec_avx512.hpp"

#include "isa.inl"
