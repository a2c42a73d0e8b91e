// The operations of src/gptoss/backends/native, and the weights they read.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <atomic>
#include <mutex>
#include <optional>
#include <thread>

#include "../ops/linear.hpp"
#include "../threads.hpp"
#include "bindings.hpp"

namespace nb = nanobind;
using namespace nb::literals;

namespace gptoss {

namespace {
std::mutex turns;
std::atomic<std::thread::id> last;
}  // namespace

Turn::Turn() : thread_(PyEval_SaveThread()), alone_(last.load() != std::this_thread::get_id()) {
    if (alone_) turns.lock();
}

Turn::~Turn() {
    PyEval_RestoreThread(thread_);
    if (alone_) turns.unlock();
}

void last_turn() {
    PyThreadState* thread = PyEval_SaveThread();
    turns.lock();
    PyEval_RestoreThread(thread);
    last = std::this_thread::get_id();
}

namespace {

template <class T, int dims>
using In = nb::ndarray<const T, nb::ndim<dims>, nb::c_contig, nb::device::cpu>;
template <class T, int dims>
using Out = nb::ndarray<T, nb::ndim<dims>, nb::c_contig, nb::device::cpu>;
using Any = nb::ndarray<nb::ro, nb::c_contig, nb::device::cpu>;

void require(bool right, const char* what) {
    if (!right) throw nb::value_error(what);
}

// work(t) for each token; over all threads, where that is worth waking them.
template <class Work>
void for_tokens(i64 T, i64 cost, Work&& work) {
    std::optional<Turn> turn;
    if (cost >= Pool::WORTH) turn.emplace();
    pool().run(T, [&](i64 t, int) { work(t); }, cost);
}

// A matrix and the Python arrays whose memory it reads.
struct OwnedWeight : Weight {
    nb::object data, scales;
};

}  // namespace

void bind_ops(nb::module_& m) {
    nb::class_<OwnedWeight>(m, "Weight", "A weight matrix [rows, columns] that shares the memory it was made from.")
        .def("__init__",
             [](OwnedWeight* self, Any data, nb::object scales, i64 rows, i64 columns, const std::string& format) {
                 const i64 n = i64(data.nbytes());
                 Matrix w{Format::f32, data.data(), nullptr, rows, columns};
                 require(rows > 0 && columns > 0, "a weight has rows and columns");
                 if (format == "float32") {
                     require(n == rows * columns * 4, "float32 weights have four bytes a number");
                 } else if (format == "bfloat16") {
                     w.format = Format::bf16;
                     require(n == rows * columns * 2, "bfloat16 weights have two bytes a number");
                 } else {
                     require(format == "mxfp4", "weights are float32, bfloat16 or mxfp4");
                     w.format = Format::mxfp4;
                     require(columns % 32 == 0 && n == rows * columns / 2, "mxfp4 weights have 16 bytes for 32 numbers");
                     auto bytes = nb::cast<Any>(scales);
                     require(i64(bytes.nbytes()) == rows * columns / 32, "mxfp4 weights have a scale byte for 32 numbers");
                     w.scales = static_cast<const std::uint8_t*>(bytes.data());
                 }
                 new (self) OwnedWeight();
                 self->stored = w;
                 self->data = nb::cast(data), self->scales = scales;
             },
             "data"_a, "scales"_a.none(), "rows"_a, "columns"_a, "format"_a)
        .def("use_bytes",
             [](OwnedWeight& self, int planes) {
                 require(planes == 1 || planes == 2, "activations have one byte or two");
                 require(!self.tiles.codes, "this weight has been rounded to bytes already");
                 require(self.stored.format != Format::twelve, "this weight is kept in twelve bits");
                 {
                     Turn turn;
                     use_bytes(self, planes);
                 }
                 if (self.tiles.codes) self.stored.data = nullptr, self.data = nb::none();
             },
             "planes"_a = 1,
             "Multiply in integers from now on, with activations rounded to one byte or two. MXFP4 stays as it is; "
             "numbers are rounded to bytes, a scale to each 32 of a row, and the array they came from is let go.")
        .def("use_twelve",
             [](OwnedWeight& self) {
                 require(!self.planes, "this weight is multiplied in integers");
                 bool done;
                 {
                     Turn turn;
                     done = use_twelve(self);
                 }
                 if (done) self.data = nb::none();
                 return done;
             },
             "Keep bfloat16 in twelve bits from now on, without loss, unless that would not be smaller. Whether it is\n"
             "done; then the array that the numbers came from is let go.")
        .def_prop_ro("rows", [](const OwnedWeight& w) { return w.stored.rows; })
        .def_prop_ro("columns", [](const OwnedWeight& w) { return w.stored.columns; });

    m.def("gather",
          [](Any table, In<std::int32_t, 1> rows, Out<float, 2> out) {
              const i64 T = i64(rows.shape(0)), D = i64(out.shape(1)), N = table.ndim() == 2 ? i64(table.shape(0)) : 0;
              const bool half = table.dtype() == nb::dtype<std::uint16_t>();
              require(half || table.dtype() == nb::dtype<float>(), "gather: a table is float32 or, as uint16, bfloat16");
              require(N && i64(table.shape(1)) == D && i64(out.shape(0)) == T, "gather: table [N, D], rows [T], out [T, D]");
              require(std::all_of(rows.data(), rows.data() + T, [&](auto r) { return r >= 0 && r < N; }),
                      "gather: a row that is not there");
              const Matrix all{half ? Format::bf16 : Format::f32, table.data(), nullptr, N, D};
              Turn turn;
              gather(all, rows.data(), T, out.data());
          },
          "table"_a, "rows"_a, "out"_a, "out [T, D] = table[rows]");

    m.def("linear",
          [](In<float, 2> x, const OwnedWeight& w, std::optional<In<float, 1>> bias, Out<float, 2> out) {
              const i64 T = i64(x.shape(0)), O = w.stored.rows;
              require(i64(x.shape(1)) == w.stored.columns, "linear: x and weight differ in columns");
              require(i64(out.shape(0)) == T && i64(out.shape(1)) == O, "linear: out must be [T, rows]");
              require(!bias || i64(bias->shape(0)) == O, "linear: a bias has as many numbers as weight has rows");
              Turn turn;
              linear(x.data(), T, w, bias ? bias->data() : nullptr, out.data());
          },
          "x"_a, "weight"_a, "bias"_a.none(), "out"_a, "out [T, O] = x [T, i] @ weight.T + bias");

    m.def("experts",
          [](In<float, 2> x, const OwnedWeight& mlp1, In<float, 2> bias1, const OwnedWeight& mlp2, In<float, 2> bias2,
             In<std::int32_t, 2> chosen, In<float, 2> share, float limit, Out<float, 2> out) {
              const i64 T = i64(x.shape(0)), D = i64(x.shape(1)), E = i64(bias1.shape(0)), k = i64(chosen.shape(1));
              const i64 F = i64(bias1.shape(1)) / 2;
              require(mlp1.stored.rows == E * 2 * F && mlp1.stored.columns == D, "experts: mlp1 must be [E, 2F, D]");
              require(mlp2.stored.rows == E * D && mlp2.stored.columns == F, "experts: mlp2 must be [E, D, F]");
              require(i64(bias2.shape(0)) == E && i64(bias2.shape(1)) == D, "experts: bias2 must be [E, D]");
              require((!mlp1.tiles.codes || 2 * F % 16 == 0) && (!mlp2.tiles.codes || D % 16 == 0),
                      "experts: of dense experts in bytes, 2F and D must be multiples of 16");
              require(i64(chosen.shape(0)) == T && i64(share.shape(0)) == T && i64(share.shape(1)) == k,
                      "experts: chosen and share must be [T, k]");
              require(i64(out.shape(0)) == T && i64(out.shape(1)) == D, "experts: out must be [T, D]");
              require(std::all_of(chosen.data(), chosen.data() + T * k, [&](auto e) { return e >= 0 && e < E; }),
                      "experts: chosen names an expert that is not there");
              Turn turn;
              ExpertWeights w{mlp1, mlp2, bias1.data(), bias2.data(), E, D, F, limit};
              experts(x.data(), T, w, chosen.data(), share.data(), k, out.data());
          },
          "x"_a, "mlp1"_a, "bias1"_a, "mlp2"_a, "bias2"_a, "chosen"_a, "share"_a, "limit"_a, "out"_a,
          "out [T, D] = the chosen experts' answers to x [T, D], weighted and summed");

    m.def("route",
          [](In<float, 2> scores, Out<std::int32_t, 2> chosen, Out<float, 2> share) {
              const i64 T = i64(scores.shape(0)), E = i64(scores.shape(1)), k = i64(chosen.shape(1));
              require(k <= E && i64(chosen.shape(0)) == T && i64(share.shape(0)) == T && i64(share.shape(1)) == k,
                      "route: chosen and share must be [T, k], k at most E");
              for_tokens(T, T * E * k * 8, [&](i64 t) {
                  route(scores.data() + t * E, E, k, chosen.data() + t * k, share.data() + t * k);
              });
          },
          "scores"_a, "chosen"_a, "share"_a, "the k best of each row of scores [T, E], and the softmax over those");

    m.def("rms_norm",
          [](In<float, 2> x, In<float, 1> scale, float eps, Out<float, 2> out) {
              const i64 T = i64(x.shape(0)), D = i64(x.shape(1));
              require(i64(scale.shape(0)) == D && out.size() == x.size(), "rms_norm: x, scale and out must agree");
              for_tokens(T, T * D * 4, [&](i64 t) {
                  kernels().rms_norm(x.data() + t * D, scale.data(), D, eps, out.data() + t * D);
              });
          },
          "x"_a, "scale"_a, "eps"_a, "out"_a);

    m.def("rope",
          [](nb::ndarray<const float, nb::ndim<3>, nb::device::cpu> x, In<float, 2> cos, In<float, 2> sin,
             Out<float, 3> out) {
              const i64 T = i64(x.shape(0)), H = i64(x.shape(1)), d = i64(x.shape(2)), half = d / 2;
              require(d % 2 == 0 && x.stride(2) == 1 && (H == 1 || x.stride(1) == d), "rope: heads must lie together");
              require(out.size() == x.size() && i64(cos.size()) == T * half && i64(sin.size()) == T * half,
                      "rope: x, cos, sin and out must agree");
              for_tokens(T, T * H * d * 4, [&](i64 t) {
                  kernels().rope(x.data() + t * x.stride(0), cos.data() + t * half, sin.data() + t * half, H, half,
                                 out.data() + t * H * d);
              });
          },
          "x"_a, "cos"_a, "sin"_a, "out"_a);

    m.def("begin_step", [] { pool().begin(); }, "Threads stay awake between operations.");
    m.def("end_step", [] { pool().end(); }, "Threads sleep until the next operation.");
    m.def("set_threads", [](int n) {
        require(n >= 1 && n <= 1024, "threads must be 1 to 1024");
        Turn turn;
        set_threads(n);
    }, "n"_a);
    m.def("threads", [] { return pool().size(); }, "Threads that share an operation.");
    m.def("usable_cores", &usable_cores, "Cores this process may use, by its affinity and control group.");
    m.def("isas", &kernel_names, "Instruction sets whose kernels this processor can run, best first.");
    m.def("isa", [] { return std::string(kernels().name); }, "The instruction set in use.");
    m.def("use_isa", [](const std::string& name) { require(use_kernels(name), "not an instruction set of this processor"); },
          "name"_a, "Use the kernels of another instruction set.");
}

}  // namespace gptoss
