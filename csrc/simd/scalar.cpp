#include "vec_scalar.hpp"

#include "isa.inl"
