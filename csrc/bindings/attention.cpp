// Attention over the pages of src/gptoss/backends/native/cache.py.
#include "../ops/attention.hpp"

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <mutex>
#include <string>
#include <vector>

#include "../threads.hpp"
#include "bindings.hpp"

namespace nb = nanobind;
using namespace nb::literals;

namespace gptoss {

namespace {

using Heads = nb::ndarray<const float, nb::ndim<3>, nb::device::cpu>;  // [T, heads, d]; T may be strided
using Mixed = nb::ndarray<float, nb::ndim<3>, nb::c_contig, nb::device::cpu>;
template <class T>
using Line = nb::ndarray<const T, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

[[noreturn]] void refuse(const std::string& what) { throw nb::value_error(what.c_str()); }

Kept kept_as(const std::string& name) {
    if (name == "bfloat16") return Kept::bf16;
    if (name == "float32") return Kept::f32;
    if (name == "int8") return Kept::int8;
    refuse("keys and values are kept as bfloat16, float32 or int8, not " + name);
}

std::string shape(std::size_t a, std::size_t b, std::size_t c) {
    return "[" + std::to_string(a) + ", " + std::to_string(b) + ", " + std::to_string(c) + "]";
}

// Refuses x unless it is [T, heads, d] with whole tokens; the step from one token to the next.
template <class Array>
i64 step_of(const char* name, const Array& x, std::size_t T, std::size_t heads, std::size_t d) {
    if (x.shape(0) != T || x.shape(1) != heads || x.shape(2) != d)
        refuse(std::string(name) + " must be " + shape(T, heads, d) + ", not " + shape(x.shape(0), x.shape(1), x.shape(2)));
    if (x.stride(2) != 1 || (heads > 1 && x.stride(1) != i64(d)))
        refuse(std::string(name) + ": the heads of a token must lie one behind another");
    return x.stride(0);
}

void attend_rows(Heads q, Heads k, Heads v, Line<float> sinks, Mixed out, Line<std::int32_t> starts,
                 Line<std::int32_t> past, const std::vector<Line<std::uint64_t>>& tables, int window,
                 const std::string& kept) {
    const std::size_t T = q.shape(0), H = q.shape(1), K = k.shape(1), d = q.shape(2), R = tables.size();
    if (!H || !K || !d || H % K)
        refuse(std::to_string(H) + " query heads of " + std::to_string(d) + " do not share " + std::to_string(K) + " key heads");
    Attention a;
    a.kept = kept_as(kept), a.H = int(H), a.K = int(K), a.d = int(d), a.window = window;
    a.q = q.data(), a.k = k.data(), a.v = v.data(), a.sinks = sinks.data(), a.out = out.data();
    a.q_step = step_of("q", q, T, H, d), a.k_step = step_of("k", k, T, K, d), a.v_step = step_of("v", v, T, K, d);
    step_of("out", out, T, H, d);
    if (sinks.shape(0) != H) refuse("sinks must be as many as query heads, " + std::to_string(H));
    if (window < 0) refuse("window must be 0 (none) or more, not " + std::to_string(window));
    if (starts.shape(0) != R + 1 || past.shape(0) != R || starts(0) != 0 || std::size_t(starts(R)) != T)
        refuse("starts, past and tables must describe the same rows and all tokens");

    std::vector<Row> rows(R);
    for (std::size_t r = 0; r < R; r++) {
        const i64 count = i64(starts(r + 1)) - starts(r), before = past(r);
        if (count < 1 || before < 0) refuse("row " + std::to_string(r) + " has no new token, or a negative past");
        const i64 first = window ? std::max<i64>(0, before + 1 - window) : 0;
        for (i64 page = first / PAGE; page <= (before + count - 1) / PAGE; page++)
            if (page >= i64(tables[r].shape(0)) || !tables[r](page))
                refuse("row " + std::to_string(r) + " lacks page " + std::to_string(page));
        rows[r] = {tables[r].data(), starts(r), count, before};
    }
    Turn turn;
    attend(a, rows.data(), i64(R), pool());
}

}  // namespace

void bind_attention(nb::module_& m) {
    m.attr("PAGE") = PAGE;
    m.def("page_bytes", [](const std::string& kept, int K, int d) { return page_bytes(kept_as(kept), K, d); },
          "kept"_a, "K"_a, "d"_a, "Bytes of a page: keys and values of 128 tokens of one layer.");
    m.def("attend", &attend_rows, "q"_a.noconvert(), "k"_a.noconvert(), "v"_a.noconvert(), "sinks"_a.noconvert(),
          "out"_a.noconvert(), "starts"_a.noconvert(), "past"_a.noconvert(), "tables"_a, "window"_a, "kept"_a,
          "Append k, v [T, K, d] of all rows to their pages and attend q [T, H, d] to them, into out.\n\n"
          "tables: of each row, the addresses of its pages. window 0: none.");
}

}  // namespace gptoss
