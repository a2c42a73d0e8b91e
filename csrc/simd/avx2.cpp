#include "vec_avx2.hpp"

#include "isa.inl"
