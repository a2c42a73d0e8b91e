// What the files of this folder share.
#pragma once

#include <nanobind/nanobind.h>

#include <mutex>

namespace gptoss {

// Held while an operation runs without Python's lock: the pool serves one at a time.
std::mutex& one_operation();

void bind_ops(nanobind::module_& m);
void bind_attention(nanobind::module_& m);
void bind_roofline(nanobind::module_& m);

}  // namespace gptoss
