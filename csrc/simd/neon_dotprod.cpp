#define GPTOSS_DOTPROD
#include "vec_neon.hpp"

#include "isa.inl"
