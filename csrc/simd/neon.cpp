#include "vec_neon.hpp"

#include "isa.inl"
