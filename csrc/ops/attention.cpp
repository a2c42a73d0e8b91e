#include "attention.hpp"

#include <algorithm>
#include <memory>
#include <vector>

#include "../kernels.hpp"
#include "../threads.hpp"

namespace gptoss {

namespace {

constexpr i64 TILE = 16;        // queries that share a block of keys once it is widened
constexpr i64 SHORT = 8;        // new tokens up to which a long past is split over the threads

// Memory that grows and is kept, without being filled.
struct Scratch {
    std::unique_ptr<float[]> data;
    i64 size = 0;

    float* get(i64 n) {
        if (n > size) data.reset(new float[std::size_t(n + 16)]), size = n;
        auto address = reinterpret_cast<std::uintptr_t>(data.get());
        return data.get() + (64 - address % 64) % 64 / 4;  // a vector does not straddle cache lines
    }
};

thread_local Scratch room, parts;

void append(const Attention& a, const Row* rows, i64 R, Pool& pool) {
    struct Piece { i64 row, from; };
    std::vector<Piece> pieces;
    i64 T = 0;
    for (i64 r = 0; r < R; r++) {
        T += rows[r].count;
        for (i64 from = 0; from < rows[r].count; from += PAGE) pieces.push_back({r, from});
    }
    const auto& kernel = kernels().attention;
    auto work = [&](i64 item, int) {
        const auto [r, from] = pieces[std::size_t(item / a.K)];
        kernel.append(a, rows[r], int(item % a.K), from, std::min(from + PAGE, rows[r].count));
    };
    pool.run(i64(pieces.size()) * a.K, work, T * a.K * a.d * 16);
}

}  // namespace

void attend(const Attention& a, const Row* rows, i64 R, Pool& pool) {
    append(a, rows, R, pool);

    const auto& kernel = kernels().attention;
    std::vector<Tile> tiles, split;  // split: tiles whose chunks are computed apart
    i64 size = 0, products = 0;
    for (i64 r = 0; r < R; r++) {
        const Row& row = rows[r];
        const i64 oldest = a.window ? std::max<i64>(0, row.past + 1 - a.window) : 0;
        const i64 first = oldest / CHUNK, last = (row.past + row.count - 1) / CHUNK;
        products += row.count * (row.past + row.count - oldest) * a.H * a.d * 2;
        const bool apart = row.count <= SHORT && first < last && pool.size() > 1;
        for (i64 from = 0; from < row.count; from += TILE)
            for (int head = 0; head < a.K; head++) {
                Tile tile{r, from, std::min(from + TILE, row.count), head, -1, size};
                (apart ? split : tiles).push_back(tile);
                for (i64 chunk = first; apart && chunk <= last; chunk++) {
                    tile.chunk = int(chunk), tile.part = size;
                    tiles.push_back(tile);
                    size += kernel.part_size(a, row.count);
                }
            }
    }
    float* results = parts.get(size);
    const i64 memory = kernel.room_size(a, TILE);
    pool.run(i64(tiles.size()), [&](i64 i, int) {
        const Tile& tile = tiles[std::size_t(i)];
        kernel.attend(a, rows[tile.row], tile, results, room.get(memory));
    }, products);
    pool.run(i64(split.size()), [&](i64 i, int) {
        const Tile& tile = split[std::size_t(i)];
        kernel.gather(a, rows[tile.row], tile, results, room.get(memory));
    });
}

}  // namespace gptoss
