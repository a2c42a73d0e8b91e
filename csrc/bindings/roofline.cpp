#include "roofline.hpp"

#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <stdexcept>
#include <tuple>

#include "bindings.hpp"

namespace nb = nanobind;
using namespace nb::literals;

namespace gptoss {

namespace {

void check_passes(int passes) {
    if (passes < 1) throw std::invalid_argument("passes must be at least 1");
}

double measured_bandwidth(std::int64_t bytes, int passes) {
    check_passes(passes);
    if (bytes < 1) throw std::invalid_argument("bytes must be at least 1");
    Turn turn;
    return read_bandwidth(bytes, passes);
}

std::vector<std::tuple<std::string, double, double>> measured_peaks(int passes) {
    check_passes(passes);
    Turn turn;
    std::vector<std::tuple<std::string, double, double>> rows;
    for (const auto& p : peaks(passes)) rows.emplace_back(p.isa, p.float32, p.int8);
    return rows;
}

}  // namespace

void bind_roofline(nb::module_& m) {
    m.def("read_bandwidth", &measured_bandwidth, "bytes"_a, "passes"_a,
          "Bytes in a second that all threads read of a buffer of that size; the best pass.");
    m.def("peaks", &measured_peaks, "passes"_a,
          "(instruction set, float32, int8): most operations in a second; 0: no kernel for it.");
}

}  // namespace gptoss
