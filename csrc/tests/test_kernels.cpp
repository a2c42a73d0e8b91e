// Every kernel of every instruction set: against plain double loops, and against the scalar table,
// bit for bit. Every array ends at a wall.
#include <algorithm>
#include <vector>

#include "check.hpp"

using namespace gptoss;

namespace {

const Format FORMATS[] = {Format::f32, Format::bf16, Format::mxfp4, Format::split};
const float SPECIAL[] = {0.f, -0.f, INFINITY, -INFINITY, NAN, 3e38f, -3e38f, 1e-40f, -1e-40f, 1.5f, 2.5f, -0.5f};

struct Shape { i64 rows, columns, tokens; };

std::vector<Shape> shapes(bool whole_blocks) {
    std::vector<Shape> all;
    for (i64 rows = 1; rows <= 70; rows++) all.push_back({rows, 96, 1 + rows % 9});
    for (i64 tokens = 1; tokens <= 9; tokens++)
        for (i64 columns : {32, 64, 128, 160, 288})
            for (i64 rows : {1, 5, 16, 19, 33}) all.push_back({rows, columns, tokens});
    for (i64 columns : {2880, 4096})
        for (i64 rows : {1, 13, 70})
            for (i64 tokens : {1, 4, 9}) all.push_back({rows, columns, tokens});
    if (!whole_blocks)
        for (i64 columns : {1, 2, 15, 31, 33, 72, 127, 129, 2879})
            for (i64 tokens : {1, 3, 6}) all.push_back({7, columns, tokens});
    return all;
}

// Some rows of x, in any order, more than once.
Walled<std::int32_t> choose(i64 tokens, i64 rows) {
    Walled<std::int32_t> at(tokens);
    for (i64 i = 0; i < tokens; i++) at[i] = std::int32_t(below(rows));
    return at;
}

void test_dot(const Kernels& scalar, const Kernels& table, Format format) {
    for (const auto& [rows, columns, tokens] : shapes(format == Format::mxfp4)) {
        const i64 first = rows % 3, stride = rows + rows % 2, step = (columns + 31) / 32 * 32;
        const Stored w(format, first + rows, columns);
        Walled<float> x(tokens * step);
        for (i64 t = 0; t < tokens; t++)
            for (i64 c = 0; c < columns; c++) x[t * step + Stored::split_at(c)] = number();
        const auto at = choose(tokens, tokens);
        const auto bias = numbers(rows);
        const float* with = rows % 2 ? bias.data() : nullptr;
        Walled<float> ours((tokens - 1) * stride + rows, 7), theirs(ours);
        table.dot(w.matrix(), first, rows, x.data(), at.data(), tokens, ours.data(), stride, with);
        scalar.dot(w.matrix(), first, rows, x.data(), at.data(), tokens, theirs.data(), stride, with);
        CHECK(same(ours, theirs), "%s dot of %s, [%d, %d] x %d", table.name, name_of(format), int(rows), int(columns), int(tokens));
        for (i64 t = 0; t < tokens; t++)
            for (i64 r = 0; r < stride && t * stride + r < ours.size(); r++) {
                double sum = r < rows ? (with ? with[r] : 0) : 7, size = std::abs(sum);
                for (i64 c = 0; r < rows && c < columns; c++) {
                    const double part = w.at(first + r, c) * double(x[at[t] * step + Stored::split_at(c)]);
                    sum += part, size += std::abs(part);
                }
                const double allowed = size * double(columns / 16 + 8) * 0x1p-24;
                CHECK(std::abs(ours[t * stride + r] - sum) <= allowed, "%s dot of %s, [%d, %d] x %d: (%d, %d) is %g, not %g",
                      table.name, name_of(format), int(rows), int(columns), int(tokens), int(t), int(r), double(ours[t * stride + r]), sum);
            }
        Walled<float> split(rows * step), other(split);
        table.unpack(w.matrix(), first, rows, split.data());
        scalar.unpack(w.matrix(), first, rows, other.data());
        CHECK(same(split, other), "%s unpack of %s", table.name, name_of(format));
        for (i64 r = 0; r < rows; r++)
            for (i64 c = 0; c < columns; c++)
                CHECK(double(split[r * step + Stored::split_at(c)]) == w.at(first + r, c), "%s unpack of %s: (%d, %d) of %d columns",
                      table.name, name_of(format), int(r), int(c), int(columns));
    }
}

void test_scales_of_mxfp4(const Kernels& scalar, const Kernels& table) {
    const Stored w(Format::mxfp4, 16, 512);  // every code with every scale
    for (i64 i = 0; i < 256; i++) w.scales[i] = std::uint8_t(i);
    for (i64 i = 0; i < w.data.size(); i++) w.data[i] = std::uint8_t(i % 16 * 17 ^ 16);
    Walled<float> ours(16 * 512), theirs(ours);
    table.unpack(w.matrix(), 0, 16, ours.data());
    scalar.unpack(w.matrix(), 0, 16, theirs.data());
    CHECK(same(ours, theirs), "%s unpack of every scale", table.name);
    for (i64 r = 0; r < 16; r++)
        for (i64 c = 0; c < 512; c++) {
            const float is = ours[r * 512 + Stored::split_at(c)];
            const bool nan = w.scales[r * 16 + c / 32] == 255;
            CHECK(nan ? !std::isfinite(is) : double(is) == double(float(w.at(r, c))), "scale %d", int(w.scales[r * 16 + c / 32]));
        }
    Walled<std::uint8_t> codes(16 * 512), other_codes(codes);
    Walled<std::uint16_t> scales(16 * 16), other_scales(scales);
    table.unpack_tile(w.matrix(), 0, codes.data(), scales.data());
    scalar.unpack_tile(w.matrix(), 0, other_codes.data(), other_scales.data());
    CHECK(same(codes, other_codes) && same(scales, other_scales), "%s unpack_tile of every scale", table.name);
}

// Activations as integers, all arrays at walls. Their scales are half of what they stand for, those
// of tiles twice.
struct Rounded {
    Walled<std::int8_t> q;
    Walled<float> scale;
    Walled<std::int32_t> sum;
    Bytes bytes;
    Rounded(i64 rows, i64 columns, int planes = 1)
        : q(rows * ((columns + 127) / 128) * planes * 128), scale(rows * ((columns + 127) / 128) * 4, 7.f), sum(scale.size(), 7),
          bytes{q.data(), scale.data(), sum.data(), (columns + 127) / 128, planes} {}
    double at(i64 r, i64 c) const {
        const i64 g = r * bytes.groups + c / 128, b = c % 128 / 32;
        const std::int8_t* first = q.data() + g * bytes.planes * 128 + c % 2 * 64 + b * 16 + c % 32 / 2;
        const int number = bytes.planes == 1 ? first[0] : 256 * first[0] + first[128];
        return number * double(scale[g * 4 + b]) * 2;
    }
};

void round_rows(const Kernels& scalar, const Kernels& table, const Walled<float>& x, i64 rows, i64 columns, Rounded& to) {
    const Rounded other(rows, columns, to.bytes.planes);
    to.bytes.plain = true;
    for (i64 r = 0; r < rows; r++) {
        to.bytes.plain &= table.round_row(x.data() + r * columns, columns, to.bytes, r);
        scalar.round_row(x.data() + r * columns, columns, other.bytes, r);
    }
    CHECK(same(to.q, other.q) && same(to.scale, other.scale) && same(to.sum, other.sum), "%s round_row of %d", table.name, int(columns));
}

// What a tile's code at (row, column) stands for.
double tile_at(const Tiles& w, i64 row, i64 c) {
    const i64 blocks = w.blocks(), b = c / 32, lane = c % 2 * 16 + c % 32 / 2;
    i64 place = b / 4;
    for (i64 chain = 0; chain < b % 4; chain++) place += (blocks - chain + 3) / 4;
    place += row / 16 * blocks;
    const int code = w.codes[place * 512 + lane / 4 * 64 + row % 16 * 4 + lane % 4];
    return double(code - w.offset) * double(from_bf16(w.scales[place * 16 + row % 16])) / 2;
}

void test_bytes(const Kernels& scalar, const Kernels& table, Format format, int planes) {
    for (const auto& [rows, columns, tokens] : shapes(format == Format::mxfp4)) {
        const i64 tiles = (rows + 15) / 16, blocks = (columns + 31) / 32, stride = rows + rows % 2;
        const Stored w(format, rows, columns);
        const auto x = numbers(tokens * columns);
        Rounded rounded(tokens, columns, planes);
        round_rows(scalar, table, x, tokens, columns, rounded);
        CHECK(rounded.bytes.plain, "%s round_row of %d is plain", table.name, int(columns));
        for (i64 t = 0; t < tokens; t++)
            for (i64 c = 0; c < columns; c++) {
                // half a step, and one where the low byte would be -128
                const double half = double(rounded.scale[(t * rounded.bytes.groups + c / 128) * 4 + c % 128 / 32]) * (planes == 1 ? 1.0001 : 3.01);
                CHECK(std::abs(rounded.at(t, c) - double(x[t * columns + c])) <= half, "%s round_row of %d: %d", table.name, int(columns), int(c));
            }

        Walled<std::uint8_t> codes(tiles * blocks * 512), other_codes(codes);
        Walled<std::uint16_t> scales(tiles * blocks * 16), other_scales(scales);
        const bool packed = format == Format::mxfp4;
        for (i64 t = 0; t < tiles; t++) {
            (packed ? table.unpack_tile : table.round_tile)(w.matrix(), 16 * t, codes.data() + t * blocks * 512, scales.data() + t * blocks * 16);
            (packed ? scalar.unpack_tile : scalar.round_tile)(w.matrix(), 16 * t, other_codes.data() + t * blocks * 512, other_scales.data() + t * blocks * 16);
        }
        CHECK(same(codes, other_codes) && same(scales, other_scales), "%s tiles of %s [%d, %d]", table.name, name_of(format), int(rows), int(columns));
        Tiles tiled{codes.data(), scales.data(), packed ? 12 : 128, rows, columns};
        for (i64 r = 0; r < rows; r++)
            for (i64 b = 0; b < blocks; b++) {
                double top = 0;
                for (i64 c = 32 * b; c < std::min(columns, 32 * b + 32); c++) top = std::max(top, std::abs(w.at(r, c)));
                const double allowed = packed ? 0 : top / 127 * 1.01 / 2;
                for (i64 c = 32 * b; c < std::min(columns, 32 * b + 32); c++)
                    CHECK(std::abs(tile_at(tiled, r, c) - w.at(r, c)) <= allowed, "%s tile of %s: (%d, %d)", table.name, name_of(format), int(r), int(c));
            }

        const auto at = choose(tokens, tokens);
        const auto bias = numbers(rows);
        const float* with = rows % 2 ? bias.data() : nullptr;
        Walled<float> ours((tokens - 1) * stride + rows, 7), theirs(ours);
        table.dot_tiles(tiled, 0, tiles, rounded.bytes, at.data(), tokens, ours.data(), stride, with);
        scalar.dot_tiles(tiled, 0, tiles, rounded.bytes, at.data(), tokens, theirs.data(), stride, with);
        CHECK(same(ours, theirs), "%s dot_tiles of %s, [%d, %d] x %d", table.name, name_of(format), int(rows), int(columns), int(tokens));
        if (packed) {  // the same by adding exponents
            tiled.powers = true;
            table.dot_tiles(tiled, 0, tiles, rounded.bytes, at.data(), tokens, theirs.data(), stride, with);
            CHECK(same(ours, theirs), "%s dot_tiles of powers, [%d, %d] x %d", table.name, int(rows), int(columns), int(tokens));
        }
        for (i64 t = 0; t < tokens; t++)
            for (i64 r = 0; r < stride && t * stride + r < ours.size(); r++) {
                double sum = r < rows ? (with ? with[r] : 0) : 7, size = std::abs(sum);
                for (i64 c = 0; r < rows && c < columns; c++) {
                    const double part = tile_at(tiled, r, c) * rounded.at(at[t], c);
                    sum += part, size += std::abs(part);
                }
                const double allowed = size * double(columns / 128 + 8) * 0x1p-23;
                CHECK(std::abs(ours[t * stride + r] - sum) <= allowed, "%s dot_tiles of %s, [%d, %d] x %d: (%d, %d) is %g, not %g",
                      table.name, name_of(format), int(rows), int(columns), int(tokens), int(t), int(r), double(ours[t * stride + r]), sum);
            }
        if (tiles > 1) {  // the last tile alone
            const i64 row = (tiles - 1) * 16;
            Walled<float> last((tokens - 1) * stride + rows - row);
            table.dot_tiles(tiled, tiles - 1, 1, rounded.bytes, at.data(), tokens, last.data(), stride, with ? with + row : nullptr);
            for (i64 t = 0; t < tokens; t++)
                CHECK(same(last.data() + t * stride, ours.data() + t * stride + row, rows - row), "%s dot_tiles of the last tile", table.name);
        }
        if (packed) {
            Walled<float> direct(ours.size(), 7);
            table.dot_packed(w.matrix(), 0, rows, rounded.bytes, at.data(), tokens, direct.data(), stride, with);
            CHECK(same(direct, ours), "%s dot_packed, [%d, %d] x %d", table.name, int(rows), int(columns), int(tokens));
            const i64 row = rows / 2;  // the rows at the wall
            Walled<float> some((tokens - 1) * stride + rows - row);
            table.dot_packed(w.matrix(), row, rows - row, rounded.bytes, at.data(), tokens, some.data(), stride, with ? with + row : nullptr);
            for (i64 t = 0; t < tokens; t++)
                CHECK(same(some.data() + t * stride, ours.data() + t * stride + row, rows - row), "%s dot_packed from row %d", table.name, int(row));
        }
    }
}

// The largest sums a block can have: codes 0 and 255 (24) with bytes of 127 and -127.
void test_extremes_of_bytes(const Kernels& scalar, const Kernels& table) {
    for (int which = 0; which < 32; which++) {
        const int planes = which < 16 ? 1 : 2;
        Rounded x(1, 256, planes);
        for (i64 i = 0; i < x.q.size(); i++) x.q[i] = std::int8_t((which & 1 ? -127 : 127) * (which & 2 && i % 3 ? -1 : 1));
        for (i64 i = 0; i < 8; i++) {
            int n = 0;
            for (i64 p = 0; p < 2 * planes; p++)  // evens and odds of each plane
                for (i64 k = 0; k < 16; k++) n += x.q[(i / 4 * planes * 2 + p) * 64 + i % 4 * 16 + k] * (p < 2 * planes - 2 ? 256 : 1);
            x.scale[i] = 0x1p-10f, x.sum[i] = n;
        }
        Walled<std::uint8_t> codes(8 * 512);
        for (i64 i = 0; i < codes.size(); i++) codes[i] = std::uint8_t(which & 4 ? (which & 8 ? below(256) : 0) : 255);
        Walled<std::uint16_t> scales(8 * 16, 0x3f80);
        Walled<std::int32_t> at(1);
        const Tiles tiles{codes.data(), scales.data(), 128, 16, 256};
        Walled<float> ours(16), theirs(16);
        table.dot_tiles(tiles, 0, 1, x.bytes, at.data(), 1, ours.data(), 16, nullptr);
        scalar.dot_tiles(tiles, 0, 1, x.bytes, at.data(), 1, theirs.data(), 16, nullptr);
        CHECK(same(ours, theirs), "%s extremes %d", table.name, which);
        for (i64 r = 0; r < 16; r++) {
            double sum = 0;
            for (i64 c = 0; c < 256; c++) sum += tile_at(tiles, r, c) * x.at(0, c);
            CHECK(std::abs(ours[r] - sum) <= 1e-6 * 256 * 128 * 127 * (planes == 1 ? 1 : 256) * 0x1p-10, "%s extremes %d: %g, not %g", table.name, which, double(ours[r]), sum);
        }
    }
}

void test_ties(const Kernels& scalar, const Kernels& table) {
    Walled<float> x(96);  // scale 1: halves lie between two bytes
    for (i64 i = 0; i < 96; i++) x[i] = i % 32 ? float(i % 32) - 15.5f : 127.f;
    Rounded rounded(1, 96);
    round_rows(scalar, table, x, 1, 96, rounded);
    for (i64 c = 0; c < 96; c++) CHECK(rounded.at(0, c) == std::nearbyint(double(x[c])), "%s: %g became %g", table.name, double(x[c]), rounded.at(0, c));
    const Walled<float> zero(40);  // no scale to divide by
    round_rows(scalar, table, zero, 1, 40, rounded);
    for (i64 c = 0; c < 40; c++) CHECK(rounded.at(0, c) == 0, "%s round_row of zeros", table.name);
}

// Blocks of activations that hold what is no number, or what no scale can be made of.
void test_odd_activations(const Kernels& scalar, const Kernels& table) {
    const Stored w(Format::mxfp4, 16, 64);
    for (float odd : SPECIAL)
        for (int planes : {1, 2}) {
            const auto x = numbers(64);
            for (i64 i = 0; i < 32; i++) x[i] = i % 3 ? 0.f : odd;
            Rounded rounded(1, 64, planes);
            round_rows(scalar, table, x, 1, 64, rounded);
            Walled<std::uint8_t> codes(2 * 512);
            Walled<std::uint16_t> scales(2 * 16);
            table.unpack_tile(w.matrix(), 0, codes.data(), scales.data());
            const Tiles tiles{codes.data(), scales.data(), 12, 16, 64, true};
            const Walled<std::int32_t> at(1);
            Walled<float> tiled(16), packed(16), theirs(16);
            table.dot_tiles(tiles, 0, 1, rounded.bytes, at.data(), 1, tiled.data(), 16, nullptr);
            table.dot_packed(w.matrix(), 0, 16, rounded.bytes, at.data(), 1, packed.data(), 16, nullptr);
            scalar.dot_packed(w.matrix(), 0, 16, rounded.bytes, at.data(), 1, theirs.data(), 16, nullptr);
            CHECK(same(tiled, packed) && same(packed, theirs), "%s products of %g in %d planes", table.name, double(odd), planes);
            for (i64 r = 0; r < 16; r++) {
                double sum = 0, size = 0;
                for (i64 c = 0; c < 64; c++) {
                    const double part = w.at(r, c) * double(x[c]);
                    sum += part, size += std::abs(part);
                }
                if (std::isfinite(odd)) CHECK(std::abs(odd) > 1e30f || std::abs(packed[r] - sum) <= .02 * size, "%s: a product of %g is %g, not %g", table.name, double(odd), double(packed[r]), sum);
                else CHECK(std::isnan(packed[r]), "%s: a product of %g is %g", table.name, double(odd), double(packed[r]));
            }
        }
}

void test_small(const Kernels& scalar, const Kernels& table) {
    std::vector<i64> sizes{2880, 4096};
    for (i64 n = 1; n <= 70; n++) sizes.push_back(n);
    for (i64 n : sizes) {
        const auto x = numbers(2 * n, 8), scale = numbers(n), turn = numbers(n);
        Walled<float> ours(n), theirs(n);
        table.rms_norm(x.data() + n, scale.data(), n, 1e-5f, ours.data());
        scalar.rms_norm(x.data() + n, scale.data(), n, 1e-5f, theirs.data());
        CHECK(same(ours, theirs), "%s rms_norm of %d", table.name, int(n));
        double squares = 0;
        for (i64 i = 0; i < n; i++) squares += double(x[n + i]) * double(x[n + i]);
        const double by = 1 / std::sqrt(squares / double(n) + 1e-5);
        for (i64 i = 0; i < n; i++) {
            const double is = double(x[n + i]) * by * double(scale[i]);
            CHECK(std::abs(ours[i] - is) <= 1e-6 * std::abs(is) * double(8 + n / 256), "%s rms_norm of %d: %g, not %g", table.name, int(n), double(ours[i]), is);
        }

        table.swiglu(x.data(), n, 7, ours.data());
        scalar.swiglu(x.data(), n, 7, theirs.data());
        CHECK(same(ours, theirs), "%s swiglu of %d", table.name, int(n));
        for (i64 i = 0; i < n; i++) {
            const double gate = std::min(double(x[2 * i]), 7.), up = std::clamp(double(x[2 * i + 1]), -7., 7.);
            const double is = gate / (1 + std::exp(-1.702 * gate)) * (up + 1);
            CHECK(std::abs(ours[i] - is) <= 2e-6 * std::abs(gate / (1 + std::exp(-1.702 * gate))) * (std::abs(up) + 1), "%s swiglu(%g, %g)", table.name, gate, up);
        }

        const auto other = numbers(n);
        const float* rows[] = {x.data() + n, scale.data(), other.data()};
        const float share[] = {.5f, -2, .3f};
        for (i64 k = 0; k <= 3; k++) {
            table.blend(rows, share, k, n, ours.data());
            scalar.blend(rows, share, k, n, theirs.data());
            CHECK(same(ours, theirs), "%s blend of %d", table.name, int(n));
            for (i64 i = 0; i < n; i++) {
                double is = 0, size = 0;
                for (i64 j = 0; j < k; j++) is += double(rows[j][i]) * double(share[j]), size += std::abs(double(rows[j][i]) * double(share[j]));
                CHECK(std::abs(ours[i] - is) <= size * 4e-7, "%s blend of %d", table.name, int(n));
            }
        }

        const i64 heads = n > 100 ? 1 : 3;
        const auto pairs = numbers(heads * 2 * n);
        Walled<float> turned(pairs.size()), turned_too(pairs.size());
        table.rope(pairs.data(), scale.data(), turn.data(), heads, n, turned.data());
        scalar.rope(pairs.data(), scale.data(), turn.data(), heads, n, turned_too.data());
        CHECK(same(turned, turned_too), "%s rope of %d", table.name, int(n));
        for (i64 i = 0; i < pairs.size(); i++) {
            const i64 k = i % n, h = i / (2 * n) * 2 * n;
            const double a = pairs[h + k], b = pairs[h + n + k], c = scale[k], s = turn[k];
            CHECK(std::abs(turned[i] - (i % (2 * n) < n ? a * c - b * s : b * c + a * s)) <= 2e-6, "%s rope of %d", table.name, int(n));
        }
    }
    const i64 n = i64(std::size(SPECIAL)), all = n * n;  // every pair of gate and up
    Walled<float> x(2 * all), ours(all), theirs(all);
    for (i64 i = 0; i < all; i++) x[2 * i] = SPECIAL[i / n], x[2 * i + 1] = SPECIAL[i % n];
    table.swiglu(x.data(), all, 7, ours.data());
    scalar.swiglu(x.data(), all, 7, theirs.data());
    CHECK(same(ours, theirs), "%s swiglu of infinities and NaN", table.name);
}

}  // namespace

int main() {
    const Kernels& scalar = table_of("scalar");
    for (const std::string& name : kernel_names()) {
        std::printf("%s\n", name.c_str());
        const Kernels& table = table_of(name);
        for (Format format : FORMATS) test_dot(scalar, table, format);
        for (Format format : {Format::f32, Format::bf16, Format::mxfp4})
            for (int planes : {1, 2}) test_bytes(scalar, table, format, planes);
        test_scales_of_mxfp4(scalar, table);
        test_extremes_of_bytes(scalar, table);
        test_ties(scalar, table);
        test_odd_activations(scalar, table);
        test_small(scalar, table);
    }
    return report("kernels");
}
