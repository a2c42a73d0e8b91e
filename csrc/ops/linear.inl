// Products of weights and activations: the inner loops. Included once per instruction set.
//
// Two rules make every way of computing a product give the same bits:
//   floats: sixteen lanes over the columns, even columns of a block of 32 first, then odd ones,
//           one chain of fused multiply-adds a lane, lanes added at the end (`sum`);
//   bytes:  a block of 32 is summed in integers, which is exact; blocks b, b + 4, b + 8, ... make
//           one chain of fused multiply-adds, and the four chains are added in order.
// So a token alone (a decode) and the same token among others (a prefill) get the same numbers.

// --- floats -------------------------------------------------------------------------------------

static const float CODEBOOK[16] = {0, .5f, 1, 1.5f, 2, 3, 4, 6, -0.f, -.5f, -1, -1.5f, -2, -3, -4, -6};

// 2 ** (e - 127) for sixteen scale bytes e; 255, which stands for NaN, becomes infinite
static inline F16 powers(const std::uint8_t* e) {
    return floats(max(left<23>(widen(e)), set_int(0x00400000)));
}

// How to read a row's block b as evens and odds, for each format. `enter` comes before each sixteen
// blocks. SIZE: bytes of a block that comes from memory, 0 if it does not; CACHE: see ask_next.
struct Floats {
    static constexpr int SIZE = 0, CACHE = 0;
    const float* p;
    Floats(const Matrix& w, i64 row) : p((const float*)w.data + row * w.columns) {}
    void enter(i64, i64) {}
    void get(i64 b, F16& even, F16& odd) const { split_floats(p + 32 * b, even, odd); }
    void tail(i64 b, i64 n, F16& even, F16& odd) const {
        float some[32] = {};
        __builtin_memcpy(some, p + 32 * b, std::size_t(n) * 4);
        split_floats(some, even, odd);
    }
};
struct Halves {
    static constexpr int SIZE = 64, CACHE = 2;
    const std::uint16_t* p;
    Halves(const Matrix& w, i64 row) : p((const std::uint16_t*)w.data + row * w.columns) {}
    void enter(i64, i64) {}
    void get(i64 b, F16& even, F16& odd) const { split_bf16(p + 32 * b, even, odd); }
    void tail(i64 b, i64 n, F16& even, F16& odd) const {
        std::uint16_t some[32] = {};
        __builtin_memcpy(some, p + 32 * b, std::size_t(n) * 2);
        split_bf16(some, even, odd);
    }
};
struct Fours {
    static constexpr int SIZE = 16, CACHE = 1;
    const std::uint8_t *p, *e;
    float scale[16];  // of the blocks entered
    Fours(const Matrix& w, i64 row)
        : p((const std::uint8_t*)w.data + row * (w.columns / 2)), e(w.scales + row * (w.columns / 32)) {}
    void enter(i64 b, i64 n) {
        std::uint8_t some[16] = {};
        __builtin_memcpy(some, e + b, std::size_t(n));
        store(scale, powers(some));
    }
    void get(i64 b, F16& even, F16& odd) const {
        F16 table = mul(load(CODEBOOK), set(scale[b % 16]));
        I16 pairs = widen(p + 16 * b);
        even = pick(table, pairs);
        odd = pick(table, right<4>(pairs));
    }
    void tail(i64, i64, F16& even, F16& odd) const { even = odd = set(0); }  // rows are whole blocks
};
struct Split {
    static constexpr int SIZE = 0, CACHE = 0;
    const float* p;
    Split(const Matrix& w, i64 row) : p((const float*)w.data + row * w.blocks() * 32) {}
    void enter(i64, i64) {}
    void get(i64 b, F16& even, F16& odd) const { even = load(p + 32 * b), odd = load(p + 32 * b + 16); }
    void tail(i64 b, i64, F16& even, F16& odd) const { get(b, even, odd); }
};

// The rows behind the R at p that are being read, asked for from memory at the pace of reading, block
// after block: in the order of addresses, which the processor takes up itself, as it does not with
// R rows at a time. Into the first cache, or into the second if R rows are much of the first.
template <int R, int SIZE, int CACHE>
static inline void ask_next(const void* p, i64 row_bytes, i64 b) {
    const char* next = (const char*)p + R * row_bytes + b * R * SIZE;
    for (int i = 0; i < R * SIZE; i += 64) __builtin_prefetch(next + i, 0, CACHE == 1 ? 3 : 2);
}

// R rows x M tokens, all in registers
template <class Row, int R, int M>
static inline void dot_block(const Matrix& w, i64 row, const float* const* x, float* out, i64 stride,
                             const float* bias) {
    F16 acc[R][M];
    for (int r = 0; r < R; r++)
        for (int m = 0; m < M; m++) acc[r][m] = set(0);
    const i64 whole = w.columns / 32, left_over = w.columns % 32;
    auto add_block = [&](i64 b, const F16* even, const F16* odd) {
        for (int m = 0; m < M; m++) {
            F16 xe = load(x[m] + 32 * b), xo = load(x[m] + 32 * b + 16);
            for (int r = 0; r < R; r++) acc[r][m] = fma(even[r], xe, acc[r][m]);
            for (int r = 0; r < R; r++) acc[r][m] = fma(odd[r], xo, acc[r][m]);
        }
    };
    alignas(Row) char space[R][sizeof(Row)];
    Row* rows = (Row*)space;
    for (int r = 0; r < R; r++) new (rows + r) Row(w, row + r);
    F16 even[R], odd[R];
    for (i64 first = 0; first < whole; first += 16) {
        const i64 last = first + 16 < whole ? first + 16 : whole;
        for (int r = 0; r < R; r++) rows[r].enter(first, last - first);
        for (i64 b = first; b < last; b++) {
            ask_next<R, Row::SIZE, Row::CACHE>(rows[0].p, w.columns * Row::SIZE / 32, b);
            for (int r = 0; r < R; r++) rows[r].get(b, even[r], odd[r]);
            add_block(b, even, odd);
        }
    }
    if (left_over) {
        for (int r = 0; r < R; r++) rows[r].tail(whole, left_over, even[r], odd[r]);
        add_block(whole, even, odd);
    }
    for (int m = 0; m < M; m++)
        for (int r = 0; r < R; r++) out[m * stride + r] = sum(acc[r][m]) + (bias ? bias[r] : 0.f);
}

inline constexpr int DIRECT_ROWS = 4;  // as many streams from memory at a time

template <class Row, int R, int M>
static void dot_rows(const Matrix& w, i64 row, i64 rows, const float* const* x, float* out, i64 stride,
                     const float* bias) {
    i64 r = 0;
    for (; r + R <= rows; r += R)
        dot_block<Row, R, M>(w, row + r, x, out + r, stride, bias ? bias + r : nullptr);
    for (; r < rows; r++)
        dot_block<Row, 1, M>(w, row + r, x, out + r, stride, bias ? bias + r : nullptr);
}

template <class Row, int R, int M>
static void dot_format(const Matrix& w, i64 row, i64 rows, const float* x, const std::int32_t* at,
                       i64 tokens, float* out, i64 stride, const float* bias) {
    const i64 step = w.blocks() * 32;
    const float* here[4];
    for (i64 t = 0; t < tokens;) {
        int m = int(tokens - t < M ? tokens - t : M);
        for (int i = 0; i < m; i++) here[i] = x + at[t + i] * step;
        float* o = out + t * stride;
        if (m == M) dot_rows<Row, R, M>(w, row, rows, here, o, stride, bias);
        else if (m == 3) dot_rows<Row, R, (M < 3 ? 1 : 3)>(w, row, rows, here, o, stride, bias);
        else if (m == 2) dot_rows<Row, R, (M < 2 ? 1 : 2)>(w, row, rows, here, o, stride, bias);
        else dot_rows<Row, R, 1>(w, row, rows, here, o, stride, bias);
        t += m;
    }
}

#include "twelve.inl"

static void dot(const Matrix& w, i64 row, i64 rows, const float* x, const std::int32_t* at, i64 tokens,
                float* out, i64 stride, const float* bias) {
    switch (w.format) {
        case Format::f32: return dot_format<Floats, DIRECT_ROWS, 4>(w, row, rows, x, at, tokens, out, stride, bias);
        case Format::bf16: return dot_format<Halves, DIRECT_ROWS, 4>(w, row, rows, x, at, tokens, out, stride, bias);
        case Format::mxfp4: return dot_format<Fours, DIRECT_ROWS, 4>(w, row, rows, x, at, tokens, out, stride, bias);
        case Format::twelve: return dot_twelve(w, row, rows, x, at, tokens, out, stride, bias);
        case Format::split:
            return dot_format<Split, GEMM_ROWS, GEMM_TOKENS>(w, row, rows, x, at, tokens, out, stride, bias);
    }
}

template <class Row>
static void unpack_rows(const Matrix& w, i64 row, i64 rows, float* out) {
    const i64 whole = w.columns / 32, left_over = w.columns % 32;
    for (i64 r = 0; r < rows; r++) {
        Row here(w, row + r);
        F16 even, odd;
        for (i64 b = 0; b < whole; b++, out += 32) {
            if (b % 16 == 0) here.enter(b, whole - b < 16 ? whole - b : 16);
            here.get(b, even, odd);
            store(out, even), store(out + 16, odd);
        }
        if (left_over) {
            here.tail(whole, left_over, even, odd);
            store(out, even), store(out + 16, odd);
            out += 32;
        }
    }
}

static void unpack(const Matrix& w, i64 row, i64 rows, float* out) {
    switch (w.format) {
        case Format::f32: return unpack_rows<Floats>(w, row, rows, out);
        case Format::bf16: return unpack_rows<Halves>(w, row, rows, out);
        case Format::mxfp4: return unpack_rows<Fours>(w, row, rows, out);
        case Format::split: return unpack_rows<Split>(w, row, rows, out);
        case Format::twelve: return unpack_twelve(w, row, rows, out);
    }
}

// --- bytes --------------------------------------------------------------------------------------

// Twice the value of an MXFP4 code, plus 12: never negative, as dot4 wants its first operand.
static const std::uint8_t TWICE[16] = {12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0};
inline constexpr int TWICE_OFFSET = 12;

// What scale bytes say, as float32; the codes are twice their value, the activations' scales half.
static inline F16 scales_of(I16 e) { return floats(left<23>(e)); }

// The products of one plane of q, or of both as one number.
template <int P> static inline I16 joined(const I16* n) {
    if constexpr (P == 1) return n[0];
    else return add(left<8>(n[0]), n[1]);
}

// a * b for a power of two: exponents are added, beside the multiplications of others
static inline F16 times_power(F16 a, F16 power) { return floats(add(bits(a), sub(bits(power), bits(set(1.f))))); }

// Memory that is wanted soon, asked for a little with each block.
struct Ahead {
    const char *p, *end;
    i64 each;  // lines
    void step() {
        for (i64 i = 0; i < each && p < end; i++, p += 64) __builtin_prefetch(p, 0, 2);
    }
};

// R tiles x M tokens of P planes
template <int R, int M, int P, bool powers>
static inline void tile_block(const Tiles& w, i64 tile, const Bytes& x, const std::int32_t* at,
                              float (*out)[M][16], Ahead& ahead) {
    const i64 blocks = w.blocks();
    const std::uint8_t* codes[R];
    const std::uint16_t* scales[R];
    for (int r = 0; r < R; r++) {
        codes[r] = w.codes + (tile + r) * blocks * 512;
        scales[r] = w.scales + (tile + r) * blocks * 16;
    }
    for (int chain = 0; chain < 4; chain++) {
        F16 acc[R][M];
        for (int r = 0; r < R; r++)
            for (int m = 0; m < M; m++) acc[r][m] = set(0);
        for (i64 b = chain; b < blocks; b += 4) {
            ahead.step();
            const std::int8_t* q[M];
            const float* by[M];
            I16 n[R][M][P];
            for (int m = 0; m < M; m++) {
                const i64 g = at[m] * x.groups + b / 4;
                q[m] = x.q + g * P * 128 + chain * 16;
                by[m] = x.scale + g * 4 + chain;
                const I16 start = set_int(-w.offset * x.sum[g * 4 + chain]);
                for (int r = 0; r < R; r++) n[r][m][0] = set_int(0), n[r][m][P - 1] = start;
            }
            for (int half = 0; half < 2; half++)
                for (int j = 0; j < 4; j++) {
                    B64 c[R];
                    for (int r = 0; r < R; r++) c[r] = load_bytes(codes[r] + (half * 4 + j) * 64);
                    for (int m = 0; m < M; m++)
                        for (int p = 0; p < P; p++) {
                            const B64 four = repeat4(q[m] + p * 128 + half * 64 + j * 4);
                            for (int r = 0; r < R; r++) n[r][m][p] = dot4(n[r][m][p], c[r], four);
                        }
                }
            for (int r = 0; r < R; r++) {
                const F16 s = load_bf16(scales[r]);
                for (int m = 0; m < M; m++) {
                    const F16 both = powers ? times_power(set(*by[m]), s) : mul(s, set(*by[m]));
                    acc[r][m] = fma(to_float(joined<P>(n[r][m])), both, acc[r][m]);
                }
                codes[r] += 512, scales[r] += 16;
            }
        }
        for (int r = 0; r < R; r++)
            for (int m = 0; m < M; m++)
                store(out[r][m], chain ? add(load(out[r][m]), acc[r][m]) : acc[r][m]);
    }
}

// What dot_tiles does, for the tokens at[t]
template <int P, bool powers>
struct TileRows {
    const Tiles& w;
    const Bytes& x;
    const std::int32_t* at;
    float* out;
    i64 stride;
    const float* bias;
    i64 row;  // of out's and bias's first
    Ahead& ahead;

    static constexpr int MOST = P == 1 ? TILE_TOKENS : (TILE_TOKENS * 2 + 2) / 3;  // as registers allow

    template <int R, int M>
    void some(i64 tile, i64 t) const {
        float y[R][M][16];
        tile_block<R, M, P, powers>(w, tile, x, at + t, y, ahead);
        for (int r = 0; r < R; r++) {
            const i64 first = (tile + r) * 16, n = w.rows - first < 16 ? w.rows - first : 16;
            float* o = out + t * stride + first - row;
            float b[16] = {};
            if (bias) __builtin_memcpy(b, bias + first - row, std::size_t(n) * 4);
            for (int m = 0; m < M; m++, o += stride) {
                const F16 sum = add(load(y[r][m]), load(b));
                if (n == 16) store(o, sum);
                else store(y[r][m], sum), __builtin_memcpy(o, y[r][m], std::size_t(n) * 4);
            }
        }
    }
    template <int R, int M = MOST>
    void next(i64 tile, i64 t, i64 m) const {
        if (m == M) return some<R, M>(tile, t);
        if constexpr (M > 1) next<R, M - 1>(tile, t, m);
    }
    // Few tokens at a time leave registers idle: seven are four and three, not six and one.
    template <int R>
    void all(i64 tile, i64 tokens) const {
        for (i64 t = 0, m; t < tokens; t += m) {
            const i64 left = tokens - t;
            m = left >= 2 * MOST ? MOST : left > MOST ? (left + 1) / 2 : left;
            next<R>(tile, t, m);
        }
    }
};

template <int P, bool powers>
static void dot_tiles(const Tiles& w, i64 tile, i64 tiles, const Bytes& x, const std::int32_t* at,
                      i64 tokens, float* out, i64 stride, const float* bias) {
    constexpr int M = TileRows<P, powers>::MOST;
    const i64 steps = (tiles + TILE_PAIR - 1) / TILE_PAIR * ((tokens + M - 1) / M) * w.blocks();
    const char* next = (const char*)w.ahead;
    Ahead ahead{next, next + w.ahead_bytes, (w.ahead_bytes / 64 + steps - 1) / steps};
    const TileRows<P, powers> rows{w, x, at, out, stride, bias, tile * 16, ahead};
    i64 t = tile;
    for (; t + TILE_PAIR <= tile + tiles; t += TILE_PAIR) rows.template all<TILE_PAIR>(t, tokens);
    for (; t < tile + tiles; t++) rows.template all<1>(t, tokens);
}

static void dot_tiles(const Tiles& w, i64 tile, i64 tiles, const Bytes& x, const std::int32_t* at,
                      i64 tokens, float* out, i64 stride, const float* bias) {
    const auto run = x.planes == 2 ? dot_tiles<2, false> : w.powers && x.plain ? dot_tiles<1, true> : dot_tiles<1, false>;
    run(w, tile, tiles, x, at, tokens, out, stride, bias);
}

// Four rows x M tokens of P planes, lanes over four blocks: lane 4g + r ends up with row r's block
// 4j + g.
template <int M, int P>
static inline void packed_block(const Matrix& w, i64 row, i64 valid, const Bytes& x,
                                const std::int32_t* at, float* out, i64 stride, const float* bias) {
    const i64 blocks = w.columns / 32;
    const std::uint8_t *p[4], *s[4];
    for (int r = 0; r < 4; r++) {
        i64 here = row + (r < valid ? r : valid - 1);
        p[r] = (const std::uint8_t*)w.data + here * blocks * 16;
        s[r] = w.scales + here * blocks;
    }
    const B64 twice = repeat16(TWICE);
    F16 acc[M];
    for (int m = 0; m < M; m++) acc[m] = set(0);
    auto group = [&](i64 j, const B64* raw, I16 e) {
        F16 scale = scales_of(e);
        B64 low[4], high[4];
        for (int r = 0; r < 4; r++) low[r] = pick_low(twice, raw[r]), high[r] = pick_high(twice, raw[r]);
        for (int m = 0; m < M; m++) {
            const i64 g = at[m] * x.groups + j;
            I16 n[4][P];
            for (int q = 0; q < P; q++) {
                const std::int8_t* plane = x.q + (g * P + q) * 128;
                const B64 even = load_bytes(plane), odd = load_bytes(plane + 64);
                for (int r = 0; r < 4; r++) n[r][q] = dot4(dot4(set_int(0), low[r], even), high[r], odd);
            }
            I16 all = sum4(joined<P>(n[0]), joined<P>(n[1]), joined<P>(n[2]), joined<P>(n[3]));
            I16 sums = bits(spread4((const float*)x.sum + g * 4));
            all = sub(all, add(left<3>(sums), left<2>(sums)));  // 12 times
            acc[m] = fma(to_float(all), mul(scale, spread4(x.scale + g * 4)), acc[m]);
        }
    };
    static_assert(TWICE_OFFSET == 8 + 4);
    B64 raw[4];
    i64 j = 0;
    for (; 4 * j + 4 <= blocks; j++) {
        ask_next<4, 64, 1>(p[0], blocks * 16, j);
        for (int r = 0; r < 4; r++) raw[r] = load_bytes(p[r] + j * 64);
        const std::uint8_t* e[4] = {s[0] + 4 * j, s[1] + 4 * j, s[2] + 4 * j, s[3] + 4 * j};
        group(j, raw, widen4(e));
    }
    if (const int n = int(blocks - 4 * j); n > 0) {  // nothing behind the last row is read
        std::uint8_t some[4][4] = {};
        for (int r = 0; r < 4; r++) {
            raw[r] = load_bytes(p[r] + j * 64, n * 16);
            __builtin_memcpy(some[r], s[r] + 4 * j, std::size_t(n));
        }
        const std::uint8_t* e[4] = {some[0], some[1], some[2], some[3]};
        group(j, raw, widen4(e));
    }
    for (int m = 0; m < M; m++) {
        float y[16];
        store(y, acc[m]);
        for (i64 r = 0; r < valid; r++)
            out[m * stride + r] = ((y[r] + y[4 + r]) + y[8 + r]) + y[12 + r] + (bias ? bias[r] : 0.f);
    }
}

template <int P>
static void dot_packed(const Matrix& w, i64 row, i64 rows, const Bytes& x, const std::int32_t* at,
                       i64 tokens, float* out, i64 stride, const float* bias) {
    for (i64 t = 0; t < tokens;) {
        i64 m = tokens - t < 4 ? tokens - t : 4;
        for (i64 r = 0; r < rows; r += 4) {
            i64 valid = rows - r < 4 ? rows - r : 4;
            float* o = out + t * stride + r;
            const float* b = bias ? bias + r : nullptr;
            switch (m) {
                case 1: packed_block<1, P>(w, row + r, valid, x, at + t, o, stride, b); break;
                case 2: packed_block<2, P>(w, row + r, valid, x, at + t, o, stride, b); break;
                case 3: packed_block<3, P>(w, row + r, valid, x, at + t, o, stride, b); break;
                case 4: packed_block<4, P>(w, row + r, valid, x, at + t, o, stride, b); break;
            }
        }
        t += m;
    }
}

static void dot_packed(const Matrix& w, i64 row, i64 rows, const Bytes& x, const std::int32_t* at,
                       i64 tokens, float* out, i64 stride, const float* bias) {
    (x.planes == 1 ? dot_packed<1> : dot_packed<2>)(w, row, rows, x, at, tokens, out, stride, bias);
}

// Where each chain of blocks begins in a tile.
struct Chains {
    i64 first[4];
    explicit Chains(i64 blocks) {
        for (i64 c = 0, at = 0; c < 4; at += (blocks - c + 3) / 4, c++) first[c] = at;
    }
    i64 place(i64 b) const { return first[b % 4] + b / 4; }
};

static void unpack_tile(const Matrix& w, i64 row, std::uint8_t* codes, std::uint16_t* scales) {
    const i64 blocks = w.columns / 32;
    const Chains chains(blocks);
    const B64 twice = repeat16(TWICE);
    const std::uint8_t *p[16], *s[16];
    for (int r = 0; r < 16; r++) {  // behind the last row, that row again: nobody looks
        i64 here = row + r < w.rows ? row + r : w.rows - 1;
        p[r] = (const std::uint8_t*)w.data + here * blocks * 16;
        s[r] = w.scales + here * blocks;
    }
    for (i64 j = 0; j < blocks; j += 4) {
        const i64 n = blocks - j < 4 ? blocks - j : 4;
        std::uint32_t four[16] = {};  // scale bytes of each row's blocks from j on
        if (n == 4)
            for (int r = 0; r < 16; r++) __builtin_memcpy(four + r, s[r] + j, 4);
        else
            for (int r = 0; r < 16; r++) __builtin_memcpy(four + r, s[r] + j, std::size_t(n));
        I16 e = bits(load((const float*)four));
        for (i64 b = j; b < j + n; b++, e = right<8>(e)) {
            const i64 at = chains.place(b);
            B64 raw[4];
            turn(p, 16 * b, raw);
            for (int i = 0; i < 4; i++) {
                store_bytes(codes + at * 512 + i * 64, pick_low(twice, raw[i]));
                store_bytes(codes + at * 512 + (4 + i) * 64, pick_high(twice, raw[i]));
            }
            store_bf16(scales + at * 16, scales_of(right<24>(left<24>(e))));
        }
    }
}

static inline F16 magnitude(F16 x) { return max(x, sub(set(0), x)); }

// 0, or NaN where one of the 32 is no number: maxima do not tell.
static inline float doubt(F16 even, F16 odd) { return sum(fma(even, set(0), mul(odd, set(0)))); }

// x / scale as integers from -most on; what is no number becomes one.
static inline I16 codes_of(F16 x, float inverse, float most) { return to_int(max(mul(x, set(inverse)), set(-most))); }

// q = 256 * high + low, and q again: low is made -127 where it would be -128, too much for dot4
static inline void split_bytes(I16& q, I16& high, I16& low) {
    high = sub(right<8>(add(q, set_int(128 + (128 << 8)))), set_int(128));
    low = max(sub(q, left<8>(high)), set_int(-127));
    q = add(left<8>(high), low);
}

template <class Row>
static void round_rows(const Matrix& w, i64 row, std::uint8_t* codes, std::uint16_t* scales) {
    const i64 blocks = w.blocks(), whole = w.columns / 32;
    const i64 real = w.rows - row < 16 ? w.rows - row : 16;
    const Chains chains(blocks);
    for (i64 r = 0; r < 16; r++) {
        Row here(w, row + (r < real ? r : 0));
        for (i64 b = 0; b < blocks; b++) {
            F16 even = set(0), odd = set(0);
            if (r < real && b < whole) here.get(b, even, odd);
            else if (r < real) here.tail(b, w.columns % 32, even, odd);
            // the scale in bfloat16, rounded up: no code exceeds 127
            float top = most(max(magnitude(even), magnitude(odd))) / 127.f;
            if (doubt(even, odd) != 0.f) top = __builtin_nanf("");
            std::uint32_t up;
            __builtin_memcpy(&up, &top, 4);
            up = (up + 0xffffu) & 0xffff0000u;
            __builtin_memcpy(&top, &up, 4);
            const float inverse = top > FAINT ? 1.f / top : 0.f;
            std::int8_t q[32];
            store_bytes(q, codes_of(even, inverse, 127.f));
            store_bytes(q + 16, codes_of(odd, inverse, 127.f));
            const i64 at = chains.place(b);
            for (int j = 0; j < 8; j++) {
                std::uint32_t four;
                __builtin_memcpy(&four, q + 4 * j, 4);
                four ^= 0x80808080u;  // + 128
                __builtin_memcpy(codes + at * 512 + j * 64 + r * 4, &four, 4);
            }
            top *= 2;  // the activations' scales are half
            __builtin_memcpy(&up, &top, 4);
            scales[at * 16 + r] = std::uint16_t(up >> 16);
        }
    }
}

static void round_tile(const Matrix& w, i64 row, std::uint8_t* codes, std::uint16_t* scales) {
    if (w.format == Format::bf16) return round_rows<Halves>(w, row, codes, scales);
    round_rows<Floats>(w, row, codes, scales);
}

// Rounded to integers of P planes; what is no number becomes one, its scale does not.
template <int P>
static bool round_row(const float* x, i64 columns, const Bytes& out, i64 i) {
    constexpr float most_q = P == 1 ? 127.f : 32639.f;
    bool plain = true;
    for (i64 g = 0; g < out.groups; g++) {
        std::int8_t* q = out.q + (i * out.groups + g) * P * 128;
        float* scale = out.scale + (i * out.groups + g) * 4;
        std::int32_t* total = out.sum + (i * out.groups + g) * 4;
        for (i64 c = 0; c < 4; c++) {
            const i64 first = (4 * g + c) * 32, n = columns - first < 32 ? columns - first : 32;
            F16 even = set(0), odd = set(0);
            if (n == 32) split_floats(x + first, even, odd);
            else if (n > 0) {
                float some[32] = {};
                __builtin_memcpy(some, x + first, std::size_t(n) * 4);
                split_floats(some, even, odd);
            }
            const float top = most(max(magnitude(even), magnitude(odd)));
            const float inverse = top > FAINT ? most_q / top : 0.f;
            I16 a = codes_of(even, inverse, most_q), b = codes_of(odd, inverse, most_q);
            if constexpr (P == 1) {
                store_bytes(q + c * 16, a), store_bytes(q + 64 + c * 16, b);
            } else {
                I16 high[2], low[2];
                split_bytes(a, high[0], low[0]), split_bytes(b, high[1], low[1]);
                store_bytes(q + c * 16, high[0]), store_bytes(q + 64 + c * 16, high[1]);
                store_bytes(q + 128 + c * 16, low[0]), store_bytes(q + 192 + c * 16, low[1]);
            }
            const float s = (top > FAINT ? top / most_q * .5f : 1.f) + doubt(even, odd);
            plain &= s >= 0x1p-60f && s <= 0x1p60f;
            scale[c] = s, total[c] = std::int32_t(sum(to_float(add(a, b))));
        }
    }
    return plain;
}

static bool round_row(const float* x, i64 columns, const Bytes& out, i64 i) {
    return (out.planes == 1 ? round_row<1> : round_row<2>)(x, columns, out, i);
}
