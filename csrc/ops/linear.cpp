#include "linear.hpp"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <numeric>

#include "../threads.hpp"

namespace gptoss {

namespace {

constexpr i64 FEW = 4;         // tokens up to which weights are decoded for each of them again
constexpr i64 TILE_ROWS = 64;  // rows of bytes one thread takes at a time: they fit its own cache
constexpr i64 SPLIT_ROWS = 48; // rows of floats
constexpr i64 TOKENS = 12;     // at least, where tokens are cut
constexpr i64 LONG_ROWS = 384; // rows that are read once: what is asked for ahead of the last ones is in vain

// Memory that grows and is kept, without being filled.
template <class T>
class Scratch {
public:
    T* get(i64 n) {
        if (n > size_) data_ = {}, data_ = Block<T>(std::size_t(n)), size_ = n;
        return data_.data();
    }
    void release() { data_ = {}, size_ = 0; }

private:
    Block<T> data_;
    i64 size_ = 0;
};

// A thread's own memory for decoded weights and results on the way.
struct Bench {
    Scratch<float> floats, results;
    Scratch<std::uint8_t> codes;
    Scratch<std::uint16_t> scales;
};

thread_local Bench bench;

i64 round_up(i64 n, i64 to) { return (n + to - 1) / to * to; }

// Rows of activations as the kernels read them: split floats, or bytes.
class Prepared {
public:
    void from(const float* x, i64 rows, i64 columns, int planes) {
        const auto& k = kernels();
        const i64 groups = (columns + 127) / 128, step = round_up(columns, 32);
        if (planes) {
            bytes_ = {q_.get(rows * groups * planes * 128), scale_.get(rows * groups * 4),
                      sum_.get(rows * groups * 4), groups, planes};
        } else {
            split_.get(rows * step);
        }
        const Matrix all{Format::f32, x, nullptr, rows, columns};
        std::atomic<bool> plain{true};
        auto work = [&](i64 r, int) {
            if (!planes) k.unpack(all, r, 1, split_.get(0) + r * step);
            else if (!k.round_row(x + r * columns, columns, bytes_, r)) plain = false;
        };
        pool().run(rows, work, rows * columns * 16);
        bytes_.plain = plain;
    }
    const float* split() { return split_.get(0); }
    const Bytes& bytes() const { return bytes_; }

private:
    Scratch<float> split_, scale_;
    Scratch<std::int8_t> q_;
    Scratch<std::int32_t> sum_;
    Bytes bytes_;
};

// While these rows of w are multiplied, fetch what this thread will probably take next: threads take
// turns, so that is as many items on as there are threads.
void fetch(Tiles& tiles, const Weight& w, i64 row, i64 rows) {
    const i64 next = row + rows * pool().size(), more = std::min(rows, w.stored.rows - next);
    if (more <= 0) return;
    const i64 bytes = w.tiles.codes ? w.stored.blocks() * 32 : w.stored.columns / 2;  // of a row
    const auto* first = w.tiles.codes ? w.tiles.codes : static_cast<const std::uint8_t*>(w.stored.data);
    tiles.ahead = first + next * bytes, tiles.ahead_bytes = more * bytes;
}

// Whether the scales of some rows of MXFP4 are powers of two that Tiles can say.
bool powers(const Matrix& w, i64 row, i64 rows) {
    const std::uint8_t* e = w.scales + row * w.blocks();
    std::uint8_t least = 255, most = 0;
    for (i64 i = 0; i < rows * w.blocks(); i++) least = std::min(least, e[i]), most = std::max(most, e[i]);
    return least >= 127 - 60 && most <= 127 + 60;
}

// rows of w from `row` on, times the tokens `at` of x
void product(const Weight& w, i64 row, i64 rows, Prepared& x, const std::int32_t* at, i64 tokens,
             float* out, i64 stride, const float* bias) {
    const auto& k = kernels();
    const i64 blocks = w.stored.blocks();
    if (!w.planes) {
        if (tokens <= FEW) return k.dot(w.stored, row, rows, x.split(), at, tokens, out, stride, bias);
        float* decoded = bench.floats.get(rows * blocks * 32);
        k.unpack(w.stored, row, rows, decoded);
        const Matrix tile{Format::split, decoded, nullptr, rows, w.stored.columns};
        return k.dot(tile, 0, rows, x.split(), at, tokens, out, stride, bias);
    }
    const i64 tiles = (rows + 15) / 16;
    if (w.tiles.codes) {
        Tiles all = w.tiles;
        if (tokens > FEW) fetch(all, w, row, rows);
        return k.dot_tiles(all, row / 16, tiles, x.bytes(), at, tokens, out, stride, bias);
    }
    if (tokens <= FEW)
        return k.dot_packed(w.stored, row, rows, x.bytes(), at, tokens, out, stride, bias);
    Tiles decoded{bench.codes.get(tiles * blocks * 512), bench.scales.get(tiles * blocks * 16), 12, rows,
                  w.stored.columns, x.bytes().planes == 1 && powers(w.stored, row, rows)};
    for (i64 t = 0; t < tiles; t++)
        k.unpack_tile(w.stored, row + 16 * t, bench.codes.get(0) + t * blocks * 512,
                      bench.scales.get(0) + t * blocks * 16);
    fetch(decoded, w, row, rows);
    k.dot_tiles(decoded, 0, tiles, x.bytes(), at, tokens, out, stride, bias);
}

// How many rows a thread takes at a time, so that all have several turns.
i64 share_of(i64 rows, i64 most, i64 multiple) {
    const i64 turns = i64(pool().size()) * 4;
    return std::clamp(round_up((rows + turns - 1) / turns, multiple), multiple, most);
}

Prepared for_linear, for_first, for_second;
Scratch<float> hidden, each;
Scratch<std::int32_t> counting;

}  // namespace

void use_bytes(Weight& w, int planes) {
    const Matrix& m = w.stored;
    const i64 blocks = m.blocks(), tiles = (m.rows + 15) / 16;
    w.planes = planes;
    if (m.format == Format::mxfp4) return;
    w.codes = Block<std::uint8_t>(std::size_t(tiles * blocks * 512));
    w.scales = Block<std::uint16_t>(std::size_t(tiles * blocks * 16));
    w.tiles = {w.codes.data(), w.scales.data(), 128, m.rows, m.columns};
    const auto& k = kernels();
    pool().run(tiles, [&](i64 t, int) {
        k.round_tile(m, t * 16, w.codes.data() + t * blocks * 512, w.scales.data() + t * blocks * 16);
    });
}

bool use_twelve(Weight& w) {
    if (w.planes || !w.twelve.pack(w.stored)) return false;
    w.stored = {Format::twelve, w.twelve.rows.data(), nullptr, w.stored.rows, w.stored.columns, w.twelve.aside.data()};
    return true;
}

void gather(const Matrix& table, const std::int32_t* rows, i64 T, float* out) {
    const i64 D = table.columns, bytes = D * (table.format == Format::bf16 ? 2 : 4);
    const auto* data = static_cast<const char*>(table.data);
    for (i64 t = 0; t < T && T > 1; t++) will_need(data + rows[t] * bytes, std::size_t(bytes));
    pool().run(T, [&](i64 t, int) {
        const char* from = data + rows[t] * bytes;
        if (table.format == Format::f32) std::memcpy(out + t * D, from, std::size_t(bytes));
        else kernels().widen(reinterpret_cast<const std::uint16_t*>(from), D, out + t * D);
    }, T * D * 16);
}

void linear(const float* x, i64 T, const Weight& w, const float* bias, float* out) {
    const i64 O = w.stored.rows;
    if (!T) return;
    for_linear.from(x, T, w.stored.columns, w.planes);
    std::int32_t* at = counting.get(T);
    std::iota(at, at + T, 0);
    // A few rows (the router's) are not cut: the tokens are.
    const i64 rows = w.planes ? share_of(O, TILE_ROWS, 16) : O <= SPLIT_ROWS && T > FEW ? O : share_of(O, SPLIT_ROWS, 8);
    const i64 tokens = rows == O && T > TOKENS ? share_of(T, T, TOKENS) : T, cuts = (T + tokens - 1) / tokens;
    pool().run((O + rows - 1) / rows * cuts, [&](i64 item, int) {
        const i64 row = item / cuts * rows, t = item % cuts * tokens;
        product(w, row, std::min(rows, O - row), for_linear, at + t, std::min(tokens, T - t), out + t * O + row, O,
                bias ? bias + row : nullptr);
    }, T * O * w.stored.columns);
}

void experts(const float* x, i64 T, const ExpertWeights& w, const std::int32_t* chosen, const float* share,
             i64 k, float* out) {
    const auto& fn = kernels();
    const i64 visits = T * k, D = w.D, F = w.F;
    // visits in order of expert, then of token
    std::vector<i64> starts(std::size_t(w.E + 1));
    for (i64 v = 0; v < visits; v++) starts[std::size_t(chosen[v] + 1)]++;
    std::partial_sum(starts.begin(), starts.end(), starts.begin());
    std::vector<std::int32_t> token(static_cast<std::size_t>(visits)), place(static_cast<std::size_t>(visits)), same(static_cast<std::size_t>(visits));
    std::iota(same.begin(), same.end(), 0);
    {
        auto next = starts;
        for (i64 v = 0; v < visits; v++) {
            i64 here = next[std::size_t(chosen[v])]++;
            token[std::size_t(here)] = std::int32_t(v / k);
            place[std::size_t(v)] = std::int32_t(here);
        }
    }
    struct Item { i64 e, row, rows, first, tokens; };  // of an expert: rows, and visits from the first on
    auto items_of = [&](i64 rows_each, const Weight& m) {
        std::vector<Item> items;
        for (i64 e = 0; e < w.E; e++) {
            const i64 first = starts[std::size_t(e)], n = starts[std::size_t(e + 1)] - first;
            const i64 step = n <= FEW ? LONG_ROWS : m.planes ? TILE_ROWS : SPLIT_ROWS;  // even: a gate and its up stay together
            for (i64 row = 0; n && row < rows_each; row += step) items.push_back({e, row, std::min(step, rows_each - row), first, n});
        }
        return items;
    };

    for_first.from(x, T, D, w.mlp1.planes);
    float* act = hidden.get(visits * F);  // [visits, F]
    auto items = items_of(2 * F, w.mlp1);
    pool().run(i64(items.size()), [&](i64 i, int) {
        const auto [e, row, rows, first, n] = items[std::size_t(i)];
        float* both = bench.results.get(n * rows);  // [n, rows]
        product(w.mlp1, e * 2 * F + row, rows, for_first, token.data() + first, n, both, rows,
                w.bias1 + e * 2 * F + row);
        for (i64 j = 0; j < n; j++)
            fn.swiglu(both + j * rows, rows / 2, w.limit, act + (first + j) * F + row / 2);
    }, visits * 2 * F * D);

    for_second.from(act, visits, F, w.mlp2.planes);
    float* answers = each.get(visits * D);  // [visits, D]
    items = items_of(D, w.mlp2);
    pool().run(i64(items.size()), [&](i64 i, int) {
        const auto [e, row, rows, first, n] = items[std::size_t(i)];
        product(w.mlp2, e * D + row, rows, for_second, same.data() + first, n, answers + first * D + row, D,
                w.bias2 + e * D + row);
    }, visits * F * D);

    auto gather = [&](i64 t, int) {
        std::vector<const float*> rows(static_cast<std::size_t>(k));
        for (i64 i = 0; i < k; i++) rows[std::size_t(i)] = answers + place[std::size_t(t * k + i)] * D;
        fn.blend(rows.data(), share + t * k, k, D, out + t * D);
    };
    pool().run(T, gather, T * k * D * 4);
}

void route(const float* scores, i64 E, i64 k, std::int32_t* chosen, float* share) {
    bool doubt = false;
    for (i64 e = 0; e < E; e++) doubt |= scores[e] != scores[e];
    float total = 0;
    for (i64 i = 0; i < k; i++) {
        i64 best = -1;
        for (i64 e = 0; e < E; e++)
            if (std::find(chosen, chosen + i, e) == chosen + i && (best < 0 || scores[e] > scores[best])) best = e;
        chosen[i] = std::int32_t(best);
        total += share[i] = std::exp(scores[best] - scores[chosen[0]]);
    }
    for (i64 i = 0; i < k; i++) share[i] = doubt ? std::nanf("") : share[i] / total;
}

void release_scratch() {
    for_linear = {}, for_first = {}, for_second = {};
    hidden.release(), each.release(), counting.release();
}

}  // namespace gptoss
