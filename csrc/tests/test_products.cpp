// Linear layers and experts over the pool: against double loops, and the same bits from every
// instruction set and number of threads.
#include "ops/linear.hpp"

#include <algorithm>
#include <memory>
#include <vector>

#include "check.hpp"
#include "threads.hpp"

using namespace gptoss;

namespace {

const Format FORMATS[] = {Format::f32, Format::bf16, Format::mxfp4};

// fn(out) for every table and several numbers of threads: all must give the first one's bits.
template <class Fn>
Walled<float> everywhere(i64 size, const char* what, Fn fn) {
    std::unique_ptr<Walled<float>> first;
    for (const std::string& name : kernel_names())
        for (int threads : {1, 2, 3}) {
            use_kernels(name);
            set_threads(threads);
            Walled<float> out(size, NAN);
            fn(out.data());
            if (!first) first = std::make_unique<Walled<float>>(out);
            CHECK(same(out, *first), "%s: %s, %d threads", what, name.c_str(), threads);
        }
    return *first;
}

// allowed: of what a sum of its parts' size is likely to be
void compare(const Walled<float>& ours, const std::vector<double>& truth, double allowed, const char* what) {
    for (i64 i = 0; i < ours.size(); i++)
        CHECK(std::abs(ours[i] - truth[std::size_t(i)]) <= allowed, "%s: [%d] is %g, not %g", what, int(i), double(ours[i]), truth[std::size_t(i)]);
}

void test_linear(Format format, int planes, i64 rows, i64 columns, i64 T) {
    const Stored stored(format, rows, columns);
    const auto x = numbers(T * columns), bias = numbers(rows);
    const float* with = T % 2 ? bias.data() : nullptr;
    std::vector<double> truth(std::size_t(T * rows));
    double size = 0;  // the largest root of a sum of squares
    for (i64 t = 0; t < T; t++)
        for (i64 r = 0; r < rows; r++) {
            double sum = with ? with[r] : 0, squares = sum * sum;
            for (i64 c = 0; c < columns; c++) {
                const double part = stored.at(r, c) * double(x[t * columns + c]);
                sum += part, squares += part * part;
            }
            size = std::max(size, std::sqrt(squares));
            truth[std::size_t(t * rows + r)] = sum;
        }
    const auto ours = everywhere(T * rows, name_of(format), [&](float* out) {
        Weight w;
        w.stored = stored.matrix();
        if (planes) use_bytes(w, planes);
        linear(x.data(), T, w, with, out);
    });
    compare(ours, truth, size * (!planes ? 2e-6 : planes == 2 && format == Format::mxfp4 ? 2e-4 : 3e-2), planes ? "linear of bytes" : "linear");
}

// In twelve bits: the bits of bfloat16, where blocks fit and where they lie aside.
void test_twelve(i64 rows, i64 columns, i64 T, bool wild) {
    Stored stored(Format::bf16, rows, columns);
    auto* data = reinterpret_cast<std::uint16_t*>(stored.data.data());
    for (i64 i = 0; wild && i < rows * columns; i += 200 + below(800)) data[i] = std::uint16_t(below(1 << 16));
    for (i64 i = 0; wild && i < columns * 2; i++) data[i] = std::uint16_t(i % 3 ? 0 : 0x8000);
    for (i64 c = 0; wild && c < 32; c++) data[columns * 2 + c] = std::uint16_t((40 + 4 * c) << 7);
    const auto x = numbers(T * columns), bias = numbers(rows);
    const auto truth = everywhere(T * rows, "bfloat16", [&](float* out) {
        Weight w;
        w.stored = stored.matrix();
        linear(x.data(), T, w, bias.data(), out);
    });
    const auto ours = everywhere(T * rows, "twelve bits", [&](float* out) {
        Weight w;
        w.stored = stored.matrix();
        CHECK(use_twelve(w), "[%d, %d] in twelve bits", int(rows), int(columns));
        CHECK(!wild || !w.twelve.aside.empty(), "blocks aside");
        linear(x.data(), T, w, bias.data(), out);
    });
    CHECK(same(ours, truth), "twelve bits, [%d, %d] x %d", int(rows), int(columns), int(T));
}

void test_experts(Format format, int planes, i64 T) {
    const i64 E = 5, D = 96, F = 64, k = 3;
    const Stored one(format, E * 2 * F, D), two(format, E * D, F);
    const auto x = numbers(T * D, .2f), bias1 = numbers(E * 2 * F, .1f), bias2 = numbers(E * D), share = numbers(T * k);
    Walled<std::int32_t> chosen(T * k);
    for (i64 i = 0; i < T * k; i++) chosen[i] = std::int32_t(below(E - 1));  // nobody asks the last one
    std::vector<double> truth(std::size_t(T * D));
    for (i64 t = 0; t < T; t++)
        for (i64 i = 0; i < k; i++) {
            const i64 e = chosen[t * k + i];
            auto half = [&](i64 row) {
                double sum = bias1[row];
                for (i64 c = 0; c < D; c++) sum += one.at(row, c) * double(x[t * D + c]);
                return sum;
            };
            std::vector<double> act;
            for (i64 f = 0; f < F; f++) {
                const double gate = std::min(half(e * 2 * F + 2 * f), 7.), up = std::clamp(half(e * 2 * F + 2 * f + 1), -7., 7.);
                act.push_back(gate / (1 + std::exp(-1.702 * gate)) * (up + 1));
            }
            for (i64 d = 0; d < D; d++) {
                double sum = bias2[e * D + d];
                for (i64 f = 0; f < F; f++) sum += two.at(e * D + d, f) * act[std::size_t(f)];
                truth[std::size_t(t * D + d)] += double(share[t * k + i]) * sum;
            }
        }
    double size = 0;
    for (double each : truth) size = std::max(size, std::abs(each));
    const auto ours = everywhere(T * D, name_of(format), [&](float* out) {
        Weight w1, w2;
        w1.stored = one.matrix(), w2.stored = two.matrix();
        if (planes) use_bytes(w1, planes), use_bytes(w2, planes);
        experts(x.data(), T, {w1, w2, bias1.data(), bias2.data(), E, D, F, 7}, chosen.data(), share.data(), k, out);
    });
    compare(ours, truth, size * (!planes ? 2e-5 : planes == 2 && format == Format::mxfp4 ? 2e-4 : 5e-2), planes ? "experts of bytes" : "experts");
}

}  // namespace

int main() {
    for (Format format : FORMATS)
        for (int planes : {0, 1, 2}) {
            for (i64 T = 1; T <= 9; T++) test_linear(format, planes, 33 + T, 160, T), test_experts(format, planes, T);
            for (i64 rows : {1, 2, 15, 64, 130}) test_linear(format, planes, rows, 96, rows % 6 + 1);
            test_linear(format, planes, 70, 2880, 5), test_linear(format, planes, 19, 4096, 1);
            if (format != Format::mxfp4)
                for (i64 columns : {1, 31, 33, 127}) test_linear(format, planes, 20, columns, 6);
            test_experts(format, planes, 40);
            release_scratch();
        }
    for (i64 T = 1; T <= 6; T++)
        for (bool wild : {false, true}) test_twelve(20 + T, 160, T, wild), test_twelve(60, 32 * T, 9, wild), test_twelve(3, 2880, T, wild);
    return report("products");
}
