// What the files of this folder share.
#pragma once

#include <nanobind/nanobind.h>

#include <mutex>

namespace gptoss {

// While it lives, an operation runs without Python's lock, alone in the pool. It has Python's lock
// again before the next one may begin, so that none is between the two when Python ends.
class Turn {
public:
    Turn();
    ~Turn();
    Turn(const Turn&) = delete;

private:
    PyThreadState* thread_;
    bool alone_;
};

// From now on threads other than this one wait for their turn for ever: asking a Python that ends
// for its lock would end them in the middle of C++, and the process with them.
void last_turn();

void bind_ops(nanobind::module_& m);
void bind_attention(nanobind::module_& m);
void bind_roofline(nanobind::module_& m);

}  // namespace gptoss
