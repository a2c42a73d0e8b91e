// What one thread computes, once per instruction set, behind a table chosen at run time.
//
// Every kernel is written once, over the sixteen lanes of simd/vec_*.hpp, and compiled for each
// instruction set. All of them add in the same order, so they give the same bits; so do one token
// and many (see ops/linear.inl).
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "ops/attention.hpp"

namespace gptoss {

using i64 = std::int64_t;

enum class Format { f32, bf16, mxfp4, split, twelve };

// Numbers [rows, columns], row after row.
//   f32, bf16: as in a file. split: float32 whose blocks of 32 are laid 16 evens, then 16 odds.
//   mxfp4: 16 bytes a block of 32, low nibble first; scales: one exponent byte a block.
//   twelve: bfloat16 in twelve bits, nothing lost: see Twelve.
struct Matrix {
    Format format = Format::f32;
    const void* data = nullptr;
    const std::uint8_t* scales = nullptr;
    i64 rows = 0, columns = 0;
    const std::uint16_t* aside = nullptr;  // of twelve: the blocks that do not fit

    i64 blocks() const { return (columns + 31) / 32; }  // a row; the last may be short
};

// A row of bfloat16 in twelve bits. Exponents of weights are few: a number is a byte of its sign and
// fraction, and four bits that say which of the row's sixteen commonest exponents it has. A block
// of 32 with any other exponent lies aside as it was, 64 bytes.
//
// Two blocks of 32 share 64 bytes, eight numbers of the first, eight of the second, eight of the
// first, ..., so that `weave` gives them back in order. The four bits of the next two blocks lie in
// the high halves of those of the first two: a group of 128 columns is 64 + 64 + 64 bytes.
struct Twelve {
    std::uint8_t high[16], low[16];  // of each exponent e: e >> 1, and (e & 1) << 7
    i64 first;                       // the row's first block aside
    std::uint8_t is_aside[24];       // a bit for each block

    static constexpr i64 MOST_COLUMNS = 24 * 8 * 32, GROUP = 192;
    static constexpr i64 bytes(i64 columns);  // of a row
};
static_assert(sizeof(Twelve) == 64);
constexpr i64 Twelve::bytes(i64 columns) { return i64(sizeof(Twelve)) + (columns + 127) / 128 * GROUP; }

// A matrix of bytes: value = (code - offset) * scale / 2. (The other half is in Bytes: the codes of
// MXFP4 are twice its values.) Sixteen rows make a tile. Its blocks of 32 columns lie in the order
// 0, 4, 8, ... then 1, 5, 9, ... A block is 8 x 64 codes: 16 rows x 4 columns each, the even columns
// first, as in Bytes; and 16 scales in bfloat16.
struct Tiles {
    const std::uint8_t* codes = nullptr;   // [tiles, blocks, 8, 16, 4]
    const std::uint16_t* scales = nullptr; // [tiles, blocks, 16]
    int offset = 0;
    i64 rows = 0, columns = 0;
    bool powers = false;  // scales are powers of two from 2^-60 to 2^60
    const void* ahead = nullptr;  // what will be wanted next, to be fetched from memory meanwhile
    i64 ahead_bytes = 0;

    i64 tiles() const { return (rows + 15) / 16; }
    i64 blocks() const { return (columns + 31) / 32; }
};

// Rows of activations as integers: value = q * scale * 2, a scale to each block of 32 columns. In
// one plane q is a byte; in two it is 256 * high + low, two bytes, the plane of the high ones first.
// Four blocks make a group of 128: the 16 evens of each block, then the 16 odds of each block. The
// last group is padded with zeros.
struct Bytes {
    std::int8_t* q = nullptr;     // [rows, groups, planes, 128]
    float* scale = nullptr;       // [rows, groups, 4]
    std::int32_t* sum = nullptr;  // [rows, groups, 4]: of a block's 32 numbers q
    i64 groups = 0;
    int planes = 1;
    bool plain = false;           // all scales are from 2^-60 to 2^60
};

struct Kernels {
    const char* name;

    // out[i * stride + r] = bias[r] + sum over k of w[row + r, k] * x[at[i], k], for r < rows
    // and i < tokens. x: split rows of w.blocks() * 32 floats. bias may be null.
    void (*dot)(const Matrix& w, i64 row, i64 rows, const float* x, const std::int32_t* at,
                i64 tokens, float* out, i64 stride, const float* bias);
    // rows of w, decoded, to split floats [rows, blocks * 32]; widen to a split row is the same
    void (*unpack)(const Matrix& w, i64 row, i64 rows, float* out);

    // the same as dot, of bytes; rows first tile * 16 ... at most w.rows
    void (*dot_tiles)(const Tiles& w, i64 tile, i64 tiles, const Bytes& x, const std::int32_t* at,
                      i64 tokens, float* out, i64 stride, const float* bias);
    // the same numbers, bit for bit, straight from MXFP4; for few tokens
    void (*dot_packed)(const Matrix& w, i64 row, i64 rows, const Bytes& x, const std::int32_t* at,
                       i64 tokens, float* out, i64 stride, const float* bias);
    // sixteen rows of MXFP4 -> a tile with offset 12
    void (*unpack_tile)(const Matrix& w, i64 row, std::uint8_t* codes, std::uint16_t* scales);
    // sixteen rows of numbers -> a tile with offset 128, each block's largest becoming 127
    void (*round_tile)(const Matrix& w, i64 row, std::uint8_t* codes, std::uint16_t* scales);
    // a row of x [columns] -> row i of out; whether its scales are plain
    bool (*round_row)(const float* x, i64 columns, const Bytes& out, i64 i);

    // numbers of bfloat16 as floats
    void (*widen)(const std::uint16_t* x, i64 n, float* out);
    void (*rms_norm)(const float* x, const float* scale, i64 columns, float eps, float* out);
    // [2F] -> [F]
    void (*swiglu)(const float* x, i64 half, float limit, float* out);
    // out = sum over i < n of share[i] * x[i]
    void (*blend)(const float* const* x, const float* share, i64 n, i64 columns, float* out);
    // pairs (i, i + half) of n heads turned by cos, sin [half]
    void (*rope)(const float* x, const float* cos, const float* sin, i64 heads, i64 half, float* out);

    AttentionKernels attention;
};

const Kernels& kernels();                    // the best this processor can run, or the one chosen
std::vector<std::string> kernel_names();     // all it can run, best first
bool use_kernels(const std::string& name);   // false: not one of them

}  // namespace gptoss
