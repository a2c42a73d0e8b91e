// The only folder that includes Python: it checks arguments, then calls.
#include "bindings.hpp"

#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include "cpu.hpp"

namespace nb = nanobind;

NB_MODULE(_core, m) {
    m.doc() = "The compiled part of gptoss.";
    m.def("cpu_features", &gptoss::cpu_features,
          "Instruction sets of this processor that kernels may be chosen by, such as 'avx2'.");
    gptoss::bind_ops(m);
    gptoss::bind_attention(m);
    gptoss::bind_roofline(m);
    nb::set_leak_warnings(false);  // a thread that still runs when Python ends keeps its model
    nb::module_::import_("atexit").attr("register")(nb::cpp_function(&gptoss::last_turn));
}
