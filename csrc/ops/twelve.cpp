#include "twelve.hpp"

#include <algorithm>
#include <cstring>

#include "../threads.hpp"

namespace gptoss {

namespace {

constexpr i64 ROWS = 256;  // a thread takes at a time
constexpr i64 WORTH = 8;   // one block in so many may lie aside; with more there is nothing to gain

int exponent(std::uint16_t x) { return x >> 7 & 255; }

// The row's sixteen commonest exponents; `place`: of each exponent among them, 255 of the others.
void choose(const std::uint16_t* x, i64 n, Twelve& row, std::uint8_t place[256]) {
    int counts[4][256] = {}, by[256];  // four, because neighbours often have the same
    for (i64 i = 0; i < n; i += 4)
        for (int j = 0; j < 4; j++) counts[j][exponent(x[i + j])]++;
    for (int e = 0; e < 256; e++) counts[0][e] += counts[1][e] + counts[2][e] + counts[3][e], by[e] = e;
    const int* count = counts[0];
    std::partial_sort(by, by + 16, by + 256, [&](int a, int b) { return count[a] != count[b] ? count[a] > count[b] : a < b; });
    std::memset(place, 255, 256);
    for (int i = 0; i < 16; i++) {
        place[by[i]] = std::uint8_t(i);
        row.high[i] = std::uint8_t(by[i] >> 1), row.low[i] = std::uint8_t((by[i] & 1) << 7);
    }
}

// 32 numbers as bytes of sign and fraction, and the places of their exponents; whether all have one.
bool split(const std::uint16_t* x, const std::uint8_t place[256], std::uint8_t rest[32], std::uint8_t which[32]) {
    std::uint8_t worst = 0;
    for (int c = 0; c < 32; c++) which[c] = place[exponent(x[c])], worst |= which[c];
    for (int c = 0; c < 32; c++) rest[c] = std::uint8_t((x[c] >> 8 & 0x80) | (x[c] & 0x7f));
    return worst < 16;
}

// One row into its place; what does not fit behind `aside`.
void pack_row(const std::uint16_t* x, i64 columns, std::uint8_t* to, std::vector<std::uint16_t>& aside) {
    Twelve row{};
    std::uint8_t place[256];
    choose(x, columns, row, place);
    row.first = i64(aside.size()) / 32;
    std::uint8_t* group = to + sizeof row;
    for (i64 first = 0; first < columns / 32; first += 4, group += Twelve::GROUP) {
        std::uint8_t rest[128] = {}, which[128] = {};  // two blocks share 64 bytes, eight and eight
        for (i64 b = first; b < std::min(first + 4, columns / 32); b++, x += 32) {
            std::uint8_t some_rest[32], some_which[32];
            if (!split(x, place, some_rest, some_which)) {
                row.is_aside[b / 8] |= std::uint8_t(1 << b % 8);
                aside.insert(aside.end(), x, x + 32);
                continue;
            }
            for (int i = 0; i < 4; i++) {
                const i64 at = b % 4 / 2 * 64 + i * 16 + b % 2 * 8;
                std::memcpy(rest + at, some_rest + 8 * i, 8), std::memcpy(which + at, some_which + 8 * i, 8);
            }
        }
        std::memcpy(group, rest, 128);
        for (int i = 0; i < 64; i++) group[128 + i] = std::uint8_t(which[i] | which[64 + i] << 4);
    }
    std::memcpy(to, &row, sizeof row);
}

}  // namespace

bool TwelveBits::pack(const Matrix& w) {
    if (w.format != Format::bf16 || w.columns % 32 || w.columns > Twelve::MOST_COLUMNS) return false;
    const auto* x = static_cast<const std::uint16_t*>(w.data);
    const i64 size = Twelve::bytes(w.columns), items = (w.rows + ROWS - 1) / ROWS;
    rows = Block<std::uint8_t>(std::size_t(w.rows * size));
    std::vector<std::vector<std::uint16_t>> parts(static_cast<std::size_t>(items));
    auto each_row = [&](i64 item, auto&& work) {
        for (i64 r = item * ROWS; r < std::min(w.rows, (item + 1) * ROWS); r++) work(r, rows.data() + r * size);
    };
    pool().run(items, [&](i64 item, int) {
        auto& part = parts[std::size_t(item)];
        each_row(item, [&](i64 r, std::uint8_t* to) { pack_row(x + r * w.columns, w.columns, to, part); });
    });
    for (i64 item = 0; item < items; item++) {  // the blocks aside of all, one behind another
        const i64 before = i64(aside.size()) / 32;
        each_row(item, [&](i64, std::uint8_t* to) { reinterpret_cast<Twelve*>(to)->first += before; });
        auto& part = parts[std::size_t(item)];
        aside.insert(aside.end(), part.begin(), part.end());
    }
    if (i64(aside.size()) * WORTH <= w.rows * w.columns) return true;
    rows = {}, aside = {};
    return false;
}

}  // namespace gptoss
