// Attention: against a double loop, the same bits from every instruction set, number of threads and
// way of cutting a row into steps. Pages, room and parts end at walls; pages begin full of NaN.
#include "ops/attention.hpp"

#include <algorithm>
#include <memory>
#include <vector>

#include "check.hpp"
#include "threads.hpp"

using namespace gptoss;

namespace {

struct Sizes { int H, K, d, window; Kept kept; };

// One row's tokens, and its pages.
struct Story {
    Sizes s;
    i64 T;
    Walled<float> q, k, v, sinks;
    std::vector<Walled<std::uint8_t>> pages;
    std::vector<std::uint64_t> addresses;

    Story(const Sizes& s, i64 T)
        : s(s), T(T), q(numbers(T * s.H * s.d)), k(numbers(T * s.K * s.d)), v(numbers(T * s.K * s.d)), sinks(numbers(s.H)) {
        forget();
    }
    void forget() {
        pages.clear(), addresses.clear();
        pages.reserve(std::size_t(T / PAGE + 1));
        for (i64 p = 0; p * PAGE < T; p++) {
            pages.emplace_back(page_bytes(s.kept, s.K, s.d), std::uint8_t(0xff));
            addresses.push_back(reinterpret_cast<std::uint64_t>(pages.back().data()));
        }
    }
    Attention step(i64 past, float* out) const {
        return {.kept = s.kept, .H = s.H, .K = s.K, .d = s.d, .window = s.window, .q = q.data() + past * s.H * s.d,
                .k = k.data() + past * s.K * s.d, .v = v.data() + past * s.K * s.d, .q_step = s.H * s.d,
                .k_step = s.K * s.d, .v_step = s.K * s.d, .sinks = sinks.data(), .out = out};
    }
    Row row(i64 past, i64 count) const { return {addresses.data(), 0, count, past}; }

    static double rounded(float x) {  // to bfloat16
        std::uint32_t b;
        std::memcpy(&b, &x, 4);
        return std::abs(x) < 0x1p-50f ? 0 : double(from_bf16(std::uint16_t((b + 0x7fff + (b >> 16 & 1)) >> 16)));
    }
    // number c of a query, as keys are multiplied with it
    double asked(const float* x, i64 c) const {
        const float scale = 1.44269504f / std::sqrt(float(s.d));
        return s.kept == Kept::bf16 ? rounded(x[c] * scale) / double(scale) : double(x[c]);
    }
    // number c of a key or a value, as it is kept
    double kept(const float* x, i64 c) const {
        if (s.kept == Kept::f32) return double(x[c]);
        if (s.kept == Kept::bf16) return rounded(x[c]);
        float top = 0;
        for (int i = 0; i < s.d; i++) top = std::max(top, std::abs(x[i]));
        const float scale = top / 127;
        return double(std::nearbyint(x[c] * (1 / scale))) * double(scale);
    }
    // head h of token t, by the definition; size: of the sum that each number is
    std::vector<double> truth(i64 t, i64 h, std::vector<double>& size) const {
        const i64 g = h / (s.H / s.K), from = s.window ? std::max<i64>(0, t + 1 - s.window) : 0;
        std::vector<double> score, out(std::size_t(s.d), 0.);
        double most = sinks[h];
        for (i64 p = from; p <= t; p++) {
            double dot = 0;
            for (i64 c = 0; c < s.d; c++) dot += asked(q.data() + (t * s.H + h) * s.d, c) * kept(k.data() + (p * s.K + g) * s.d, c);
            score.push_back(dot / std::sqrt(double(s.d))), most = std::max(most, score.back());
        }
        double sum = std::exp(double(sinks[h]) - most);
        for (double& x : score) sum += x = std::exp(x - most);
        for (i64 p = from; p <= t; p++)
            for (i64 c = 0; c < s.d; c++) {
                const double part = score[std::size_t(p - from)] / sum * kept(v.data() + (p * s.K + g) * s.d, c);
                out[std::size_t(c)] += part, size[std::size_t(c)] += std::abs(part);
            }
        return out;
    }
};

// The row in steps of so many tokens, through the door of the operation, after some that are kept
// only.
Walled<float> in_steps(Story& story, const std::vector<i64>& counts, Pool& pool, i64 past = 0) {
    const i64 size = story.s.H * story.s.d;
    Walled<float> out(story.T * size, 7);
    story.forget();
    for (int head = 0; head < story.s.K; head++)
        kernels().attention.append(story.step(0, nullptr), story.row(0, past), head, 0, past);
    for (i64 count : counts) {
        const Row row = story.row(past, count);
        attend(story.step(past, out.data() + past * size), &row, 1, pool);
        past += count;
    }
    return out;
}

// One step by the kernels alone, in room and parts of exactly the size they ask for.
void by_hand(Story& story, i64 past, i64 count, const Walled<float>& expected) {
    const auto& kernel = kernels().attention;
    const i64 size = story.s.H * story.s.d;
    for (bool apart : {false, true}) {
        Walled<float> out(count * size, 7);
        const Attention a = story.step(past, out.data());
        const Row row = story.row(past, count);
        const Walled<float> room(kernel.room_size(a, count));
        const i64 oldest = story.s.window ? std::max<i64>(0, past + 1 - story.s.window) : 0;
        const i64 first = oldest / CHUNK, last = (past + count - 1) / CHUNK, part = kernel.part_size(a, count);
        for (int head = 0; head < story.s.K; head++) {
            kernel.append(a, row, head, 0, count);
            const Walled<float> parts(apart ? part * (last - first + 1) : 0);
            for (i64 chunk = first; apart && chunk <= last; chunk++)
                kernel.attend(a, row, {0, 0, count, head, int(chunk), (chunk - first) * part}, parts.data(), room.data());
            const Tile whole{0, 0, count, head, -1, 0};
            if (apart) kernel.gather(a, row, whole, parts.data(), room.data());
            else kernel.attend(a, row, whole, nullptr, room.data());
        }
        CHECK(same(out.data(), expected.data() + past * size, count * size), "%s by hand, %d after %d", kernels().name, int(count), int(past));
    }
}

std::vector<i64> cut(i64 T, i64 count) {
    std::vector<i64> counts;
    for (; T > 0; T -= count) counts.push_back(std::min(T, count));
    return counts;
}

void test(const Sizes& s, i64 T, i64 past = 0) {
    const i64 n = T - past;
    Story story(s, T);
    Pool one(1), three(3);
    std::unique_ptr<Walled<float>> first;
    for (const std::string& name : kernel_names()) {
        use_kernels(name);
        const std::vector<i64> whole{n}, sevens = cut(n, n / 7 + 1), decode{n - 1, 1}, pair{n - 3, 2, 1};
        for (const auto* counts : {&whole, &sevens, &decode, &pair})
            for (Pool* pool : {&one, &three}) {
                if (counts->front() < 1) continue;
                auto out = in_steps(story, *counts, *pool, past);
                if (!first) first = std::make_unique<Walled<float>>(out);
                CHECK(same(out, *first), "%s: H %d K %d d %d window %d, %d tokens in %d steps, %d threads", name.c_str(), s.H,
                      s.K, s.d, s.window, int(T), int(counts->size()), pool->size());
            }
        for (i64 count : {1, 2, 3, 16})
            if (count <= n) by_hand(story, T - count, count, *first);
    }
    for (i64 t = past; t < T; t += t - past < 70 || t + 9 > T ? 1 : 61)
        for (i64 h = 0; h < s.H; h++) {
            std::vector<double> size(std::size_t(s.d), 0.);
            const auto is = story.truth(t, h, size);
            for (i64 c = 0; c < s.d; c++)  // bfloat16 rounds every share
                CHECK(std::abs((*first)[(t * s.H + h) * s.d + c] - is[std::size_t(c)]) < 1e-5 + (s.kept == Kept::bf16 ? size[std::size_t(c)] / 256 : 0), "H %d K %d d %d window %d: token %d, head %d, %d: %g, not %g",
                      s.H, s.K, s.d, s.window, int(t), int(h), int(c), double((*first)[(t * s.H + h) * s.d + c]), is[std::size_t(c)]);
        }
}

// Numbers so small that products of them vanish, or that some processors take them for zero: the
// same bits from every instruction set.
void test_faint() {
    for (Kept kept : {Kept::bf16, Kept::f32, Kept::int8}) {
        Story story({4, 1, 32, 0, kept}, 40);
        for (auto* x : {&story.q, &story.k, &story.v})
            for (i64 i = 0; i < x->size(); i++) (*x)[i] = std::ldexp((*x)[i], -int(below(i % 3 ? 140 : 60)));
        Pool pool(1);
        std::unique_ptr<Walled<float>> first;
        for (const std::string& name : kernel_names()) {
            use_kernels(name);
            const auto out = in_steps(story, {17, 23}, pool);
            if (!first) first = std::make_unique<Walled<float>>(out);
            CHECK(same(out, *first), "%s: faint numbers", name.c_str());
        }
    }
}

// Several rows in one step get what each gets alone.
void test_company() {
    const Sizes s{8, 2, 64, 20, Kept::bf16};
    const i64 T = 40, size = s.H * s.d;
    Story story(s, T);
    Pool pool(3);
    const auto alone = in_steps(story, {T}, pool);
    const std::vector<i64> pasts{5, 33, 0};
    std::vector<Story> rows;
    rows.reserve(pasts.size());
    for (std::size_t r = 0; r < pasts.size(); r++) {
        rows.push_back(story), rows.back().forget();
        Walled<float> out(T * size);
        const Row row = rows[r].row(0, pasts[r]);
        if (pasts[r]) attend(story.step(0, out.data()), &row, 1, pool);
    }
    Walled<float> q(4 * size), k(4 * s.K * s.d), v(k), out(4 * size);  // 1, 1 and 2 new tokens
    const i64 tokens[] = {5, 33, 0, 1};
    for (i64 i = 0; i < 4; i++) {
        std::copy_n(story.q.data() + tokens[i] * size, size, q.data() + i * size);
        std::copy_n(story.k.data() + tokens[i] * s.K * s.d, s.K * s.d, k.data() + i * s.K * s.d);
        std::copy_n(story.v.data() + tokens[i] * s.K * s.d, s.K * s.d, v.data() + i * s.K * s.d);
    }
    Attention a = story.step(0, out.data());
    a.q = q.data(), a.k = k.data(), a.v = v.data();
    const Row all[] = {{rows[0].addresses.data(), 0, 1, 5}, {rows[1].addresses.data(), 1, 1, 33}, {rows[2].addresses.data(), 2, 2, 0}};
    attend(a, all, 3, pool);
    for (i64 i = 0; i < 4; i++) CHECK(same(out.data() + i * size, alone.data() + tokens[i] * size, size), "token %d in company", int(tokens[i]));
}

}  // namespace

int main() {
    for (Kept kept : {Kept::bf16, Kept::f32, Kept::int8}) {
        for (i64 T : {1, 2, 17, 64, 130}) test({8, 1, 64, 0, kept}, T), test({8, 2, 64, 128, kept}, T);
        test({3, 1, 20, 5, kept}, 150);    // no whole vectors; a window smaller than a block
        test({40, 2, 16, 0, kept}, 33);    // more than sixteen heads to a key head
        test({2, 2, 8, 300, kept}, 700);   // a window over several pages
        test({2, 1, 16, 0, kept}, CHUNK + 10, CHUNK - 12);     // from one chunk into the next
        test({2, 1, 16, 4100, kept}, CHUNK + 10, CHUNK - 12);  // of which a window sees a part
    }
    test_faint();
    test_company();
    return report("attention");
}
