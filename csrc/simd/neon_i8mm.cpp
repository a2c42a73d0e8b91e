#define GPTOSS_I8MM
#include "vec_neon.hpp"

#include "isa.inl"
