// Attention over keys and values that lie in pages.
//
// A page holds 128 tokens of one layer, one key head after another: for each head its keys, then
// its values. Keys lie sixteen to a block, dimension by dimension, so that sixteen scores are
// summed side by side without a sum over lanes; values lie row by row, each row padded to whole
// vectors:
//   page [K, (keys [8, d, 16], values [128, padded d])]
// In bfloat16 two numbers that are multiplied one after the other lie side by side, two dimensions
// of a key or two keys of a dimension, as processors that multiply such pairs want them:
//   page [K, (keys [8, d / 2, 16, 2], values [64, padded d, 2])]
// As int8, each key and each value of a head has a scale behind them: float32 [2, 128].
// Position p of a row is in its page p / 128. Pages and chunks begin at multiples of their size,
// whatever is asked and however the past arrived: the same token gets the same bits every time.
#pragma once

#include <cstdint>

namespace gptoss {

using i64 = std::int64_t;

class Pool;

inline constexpr int PAGE = 128;    // tokens; also the keys of one step of the running softmax
inline constexpr int CHUNK = 4096;  // keys whose result is finished before it is added to others

// How keys and values are stored. Another format needs `keep_as` and a `Kind` in attention.inl, and
// a size here.
enum class Kept { bf16, f32, int8 };
inline constexpr i64 size_of(Kept kept) { return kept == Kept::f32 ? 4 : kept == Kept::bf16 ? 2 : 1; }

// One layer of one step. Tokens lie row after row; *_step: floats from one token to the next.
struct Attention {
    Kept kept = Kept::bf16;
    int H = 0, K = 0, d = 0;
    int window = 0;  // keys a query sees, its own included; 0: all
    const float *q = nullptr, *k = nullptr, *v = nullptr;  // [T, H, d], [T, K, d], [T, K, d]
    i64 q_step = 0, k_step = 0, v_step = 0;
    const float* sinks = nullptr;  // [H]
    float* out = nullptr;          // [T, H, d]

    int group() const { return H / K; }            // query heads to a key head
    i64 padded() const { return (d + 15) / 16 * 16; }
    i64 deep() const { return kept == Kept::bf16 ? 2 : 1; }     // numbers side by side
    i64 wide() const { return (d + deep() - 1) / deep() * deep(); }
    i64 numbers() const { return PAGE * (wide() + padded()); }  // of one key head in a page
    i64 head_size() const { return numbers() + (kept == Kept::int8 ? 2 * PAGE * 4 : 0); }  // in their size
};

// One row: `count` new tokens from `start` on, after `past` that are kept.
struct Row {
    const std::uint64_t* pages = nullptr;  // addresses; those before the window may be 0
    i64 start = 0, count = 0, past = 0;
};

// Queries [from, to) of a row, those of one key head, over one chunk of keys or (-1) all of them.
struct Tile {
    i64 row, from, to;
    int head, chunk;
    i64 part;  // where among the parts the chunk's result lies, or that of the first chunk
};

inline i64 page_bytes(Kept kept, int K, int d) {
    return K * Attention{.kept = kept, .d = d}.head_size() * size_of(kept);
}

struct AttentionKernels {
    // new tokens [from, to) of one key head into their pages
    void (*append)(const Attention& a, const Row& row, int head, i64 from, i64 to);
    // a tile over one chunk, into its part, or over all chunks, into a.out
    void (*attend)(const Attention& a, const Row& row, const Tile& tile, float* parts, float* room);
    // a tile's parts, one behind another, into a.out
    void (*gather)(const Attention& a, const Row& row, const Tile& tile, float* parts, float* room);
    // floats of a part, and of room, for so many queries
    i64 (*part_size)(const Attention& a, i64 queries);
    i64 (*room_size)(const Attention& a, i64 queries);
};

// Appends each row's keys and values to its pages and attends; over all threads of the pool.
void attend(const Attention& a, const Row* rows, i64 R, Pool& pool);

}  // namespace gptoss
