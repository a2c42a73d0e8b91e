// Attention of some queries of one key head: the inner loops. Included once per instruction set.
//
// Every score and every output is one chain of fused multiply-adds in the order of d and of the
// keys; in bfloat16, of pairs of them, the odd one of a pair first. So its bits depend on the
// query, its past and nothing else: neither on the tile nor on where the chain is held meanwhile.

namespace attention {

// Accumulators in registers: sixteen where there are thirty-two registers, else eight halves.
inline constexpr int ROWS = GEMM_ROWS * GEMM_TOKENS >= 16 ? 8 : 4;
inline constexpr int WIDE = GEMM_ROWS * GEMM_TOKENS >= 16 ? 2 : 1;
inline constexpr i64 FEW = 3;  // queries for which keys and values are widened again and again
inline constexpr float LOG2E = 1.44269504f;
inline constexpr float NOTHING = -1e30f;  // the maximum of no scores: finite, so that it can be subtracted

static inline void keep_as(float* p, F16 x) { store(p, x); }
static inline void keep_as(std::int8_t* p, F16 x) { store_bytes(p, to_int(max(x, set(-127.f)))); }

// Sixteen pairs of bfloat16. A processor that multiplies pairs (AVX512-BF16) takes what is below
// 2 ** -126 for zero. So nothing may come near: inputs below 2 ** -50 are made zero, which makes all
// products and sums whole multiples of 2 ** -114, and sums that are scaled below 2 ** -100 too.
#ifndef GPTOSS_BF16
struct Pairs { F16 even, odd; };
static inline Pairs load_pairs(const std::uint16_t* p) {
    Pairs r;
    split_bf16(p, r.even, r.odd);
    return r;
}
static inline Pairs repeat_pair(const std::uint16_t* p) {  // the same pair sixteen times
    std::uint32_t both;
    __builtin_memcpy(&both, p, 4);
    const I16 all = set_int(std::int32_t(both));
    return {floats(left<16>(all)), floats(left<16>(right<16>(all)))};
}
static inline F16 dot2(Pairs a, Pairs b, F16 c) { return fma(a.even, b.even, fma(a.odd, b.odd, c)); }
#endif

// Zero where |x| < 2 ** exponent.
template <int exponent>
static inline F16 flushed(F16 x) {
    const I16 size = right<1>(left<1>(bits(x)));
    const I16 small = right<31>(sub(size, set_int((127 + exponent) << 23)));
    return mul(x, to_float(sub(set_int(1), small)));
}

// How numbers kept as T are read and multiplied: `deep` of them at a time, with as many Factors.
template <class T>
struct Kind {
    using Factor = float;
    static constexpr int deep = 1;
    static F16 read(const float* p) { return load(p); }
    static F16 read(const std::int8_t* p) { return load_int8(p); }
    static F16 repeat(const float* p) { return set(*p); }
    static F16 add(F16 a, F16 b, F16 c) { return fma(a, b, c); }
    static F16 scaled(F16 sum, float by) { return mul(sum, set(by)); }
};
template <>
struct Kind<std::uint16_t> {
    using Factor = std::uint16_t;
    static constexpr int deep = 2;
    static Pairs read(const std::uint16_t* p) { return load_pairs(p); }
    static Pairs repeat(const std::uint16_t* p) { return repeat_pair(p); }
    static F16 add(Pairs a, Pairs b, F16 c) { return dot2(a, b, c); }
    static F16 scaled(F16 sum, float by) { return by == 1 ? sum : flushed<-100>(mul(sum, set(by))); }
};

// 2 ** x for x <= 0: x = n + r, |r| <= 1/2, a polynomial of degree 6 for 2 ** r. Within 1 unit in
// the last place down to 2 ** -126, 0 below; NaN stays NaN.
static inline F16 power_of_two(F16 x) {
    x = max(set(-150.f), x);
    const I16 n = to_int(x);
    const F16 r = sub(x, to_float(n));
    F16 p = set(0x1.41fbbcp-13f);
    p = fma(p, r, set(0x1.5f3e54p-10f));
    p = fma(p, r, set(0x1.3b2d4cp-7f));
    p = fma(p, r, set(0x1.c6aee8p-5f));
    p = fma(p, r, set(0x1.ebfbdcp-3f));
    p = fma(p, r, set(0x1.62e430p-1f));
    p = fma(p, r, set(1.f));
    return mul(p, floats(left<23>(max(add(n, set_int(127)), set_int(0)))));
}

static inline F16 load_some(const float* p, i64 n) {  // the first n, then zeros
    if (n >= 16) return load(p);
    float some[16] = {};
    __builtin_memcpy(some, p, std::size_t(n) * 4);
    return load(some);
}

// put(c, x[c] * by) in bfloat16, for c < n and on to the end of a vector, zeros
template <class Put>
static inline void each_as_bf16(const float* x, i64 n, float by, Put put) {
    for (i64 c = 0; c < n; c += 16) {
        std::uint16_t some[16];
        store_bf16(some, flushed<-50>(mul(load_some(x + c, n - c), set(by))));
        for (i64 i = 0; i < 16; i++) put(c + i, some[i]);
    }
}

// A matrix [k, n] of vectors, or of pairs of vectors: (k, n) is at p + k * step + n * next. Of the
// first and the last pair only half may count. What will be wanted after it is fetched meanwhile
// from `ahead` on, as much as is read here.
template <class T>
struct Vectors {
    const T* p;
    i64 step, next;
    const T* ahead;
    bool first_half = false, last_half = false;
};

// Scores:  c[m, n] = sum over k < count of a[k, m] * b[k, n]
// Mixing:  c[m, n] = c[m, n] * scale[m] + sum over k < count of a[m, k] * b[k, n]
// in the order of k, where a and b may be pairs. a's other step is one, c's rows of scores and a's
// rows of shares are PAGE numbers apart; such steps are said by `step`.
enum class Product { scores, mixing };

// Sixteen pairs of which one half is made zero: whatever it is, it has not been written or will be
// another query's.
static inline Pairs half_of(const std::uint16_t* p, bool second) {
    std::uint16_t some[32] = {};
    for (int i = second; i < 32; i += 2) some[i] = p[i];
    return load_pairs(some);
}

template <Product P, int M, int N, class T>
static inline void multiply_block(const typename Kind<T>::Factor* a, const Vectors<T>& b, i64 count, float* c, i64 step,
                                  const float* scale) {
    using K = Kind<T>;
    constexpr bool mixing = P == Product::mixing;
    const i64 a_row = mixing ? PAGE : K::deep, a_next = mixing ? K::deep : step * K::deep, c_row = mixing ? step : PAGE;
    F16 sum[M][N];
    for (int m = 0; m < M; m++)
        for (int n = 0; n < N; n++) {
            if constexpr (mixing) sum[m][n] = K::scaled(load(c + m * c_row + 16 * n), scale[m]);
            else sum[m][n] = set(0);
        }
    auto add_step = [&](i64 k, auto read) {
        decltype(K::read(b.p)) row[N];
        for (int n = 0; n < N; n++) row[n] = read(b.p + k * b.step + n * b.next);
        for (int m = 0; m < M; m++) {
            const auto x = K::repeat(a + m * a_row + k * a_next);
            for (int n = 0; n < N; n++) sum[m][n] = K::add(x, row[n], sum[m][n]);
        }
    };
    constexpr bool halves = mixing && K::deep == 2;
    i64 k = 0;
    if constexpr (halves)
        if (b.first_half) add_step(k++, [](const T* p) { return half_of(p, true); });
    for (const i64 whole = count - (halves && b.last_half); k < whole; k++) {
        // Into the second cache: the first is full of what is being read.
        if constexpr (sizeof(T) < 4)
            for (int n = 0; n < N; n += sizeof(T) == 1 ? 4 : 1) __builtin_prefetch(b.ahead + (k * N + n) * 16 * K::deep, 0, 2);
        add_step(k, [](const T* p) { return K::read(p); });
    }
    if constexpr (halves)
        if (b.last_half) add_step(k, [](const T* p) { return half_of(p, false); });
    for (int m = 0; m < M; m++)
        for (int n = 0; n < N; n++) store(c + m * c_row + 16 * n, sum[m][n]);
}

template <Product P, int M, int N, class T>
static inline void multiply_rows(i64 rows, const typename Kind<T>::Factor* a, const Vectors<T>& b, i64 count, float* c,
                                 i64 step, const float* scale) {
    constexpr bool mixing = P == Product::mixing;
    for (; rows >= M; rows -= M, a += M * (mixing ? PAGE : Kind<T>::deep), c += M * (mixing ? step : PAGE)) {
        multiply_block<P, M, N>(a, b, count, c, step, scale);
        if constexpr (mixing) scale += M;
    }
    if constexpr (M > 1)
        if (rows) multiply_rows<P, M - 1, N>(rows, a, b, count, c, step, scale);
}

template <Product P, class T>
static inline void multiply(i64 rows, i64 vectors, const typename Kind<T>::Factor* a, Vectors<T> b, i64 count, float* c,
                            i64 step, const float* scale) {
    auto columns = [&]<int N>() {
        for (; vectors >= N; vectors -= N, b.p += N * b.next, b.ahead += N * 16 * Kind<T>::deep * count, c += N * 16)
            multiply_rows<P, ROWS, N>(rows, a, b, count, c, step, scale);
    };
    columns.template operator()<WIDE>();
    columns.template operator()<1>();
}

// A result on its way, of n = queries * group heads: the mixed values, not yet divided by the sum
// of the shares, and the maximum (in base 2) that the shares are relative to.
struct Part {
    float *mixed, *most, *sum;  // [n, padded], [n], [n]
    Part(float* p, i64 n, i64 padded) : mixed(p), most(p + n * padded), sum(most + n) {}
};

static i64 part_size(const Attention& a, i64 queries) { return queries * a.group() * (a.padded() + 2); }

// A thread's memory: all that one tile needs.
struct Room {
    i64 size = 0;
    float *q, *sums, *scores, *page, *part, *total;
    std::uint16_t* shares;
    Room(const Attention& a, i64 queries, float* memory) {
        const i64 n = queries * a.group();
        auto take = [&](i64 floats) {
            float* at = memory ? memory + size : nullptr;
            size += (floats + 15) / 16 * 16;
            return at;
        };
        q = take(n * a.wide());                 // [queries, d, group], scaled; pairs: [queries, d / 2, group, 2]
        sums = take(n * 16);                    // [queries, group, 16]
        scores = take(a.group() * PAGE);       // [group, PAGE]
        shares = (std::uint16_t*)take(a.group() * PAGE / 2);  // the same as pairs
        page = take(a.numbers());               // keys and values of a page
        part = take(part_size(a, queries));
        total = take(part_size(a, queries));
    }
};

static i64 room_size(const Attention& a, i64 queries) { return Room(a, queries, nullptr).size; }

// One query's heads over keys [from, to) of a page: the running softmax of Milakov & Gimelshein
// 2018, https://arxiv.org/abs/1805.02867. scales: of keys, then of values, or null.
template <class T>
static inline void step(const Attention& a, const Room& room, const typename Kind<T>::Factor* q, const T* page,
                        const T* ahead, const float* scales, i64 from, i64 to, float* mixed, float* most_so_far,
                        float* sums) {
    constexpr i64 deep = Kind<T>::deep;
    const i64 G = a.group(), d = a.wide(), padded = a.padded();
    const i64 first = from / 16, last = (to - 1) / 16;
    multiply<Product::scores>(G, last - first + 1, q, Vectors<T>{page + first * 16 * d, 16 * deep, 16 * d, ahead},
                              d / deep, room.scores + first * 16, G, nullptr);
    for (i64 g = 0; g < G; g += 16) {
        const i64 some = G - g < 16 ? G - g : 16;
        float was[16] = {}, now[16] = {}, shrink[16];
        for (i64 i = 0; i < some; i++) {
            float* s = room.scores + (g + i) * PAGE;
            for (i64 v = first; scales && v <= last; v++) store(s + 16 * v, mul(load(s + 16 * v), load(scales + 16 * v)));
            store(s + 16 * first, keep(load(s + 16 * first), int(from - 16 * first), 16, -__builtin_inff()));
            store(s + 16 * last, keep(load(s + 16 * last), 0, int(to - 16 * last), -__builtin_inff()));
            F16 high = load(s + 16 * first);
            for (i64 v = first + 1; v <= last; v++) high = max(high, load(s + 16 * v));
            const float top = most(high);
            was[i] = most_so_far[g + i];
            now[i] = was[i] > top ? was[i] : top;
            most_so_far[g + i] = now[i];
        }
        store(shrink, power_of_two(sub(load(was), load(now))));
        for (i64 i = 0; i < some; i++) {
            float* s = room.scores + (g + i) * PAGE;
            F16 total = mul(load(sums + (g + i) * 16), set(shrink[i]));
            for (i64 v = first; v <= last; v++) {
                const F16 share = power_of_two(sub(load(s + 16 * v), set(now[i])));
                if constexpr (deep == 2) store_bf16(room.shares + (g + i) * PAGE + 16 * v, flushed<-50>(share));
                else store(s + 16 * v, scales ? mul(share, load(scales + PAGE + 16 * v)) : share);
                total = add(total, share);
            }
            store(sums + (g + i) * 16, total);
        }
        const i64 at = from / deep * deep;  // of the first pair
        const Vectors<T> values{page + PAGE * d + at * padded, padded * deep, 16 * deep, ahead + PAGE * d,
                                from % deep != 0, to % deep != 0};
        const typename Kind<T>::Factor* shares;
        if constexpr (deep == 2) shares = room.shares;
        else shares = room.scores;
        multiply<Product::mixing>(some, padded / 16, shares + g * PAGE + at, values, (to - at + deep - 1) / deep,
                                  mixed + g * padded, padded, shrink);
    }
}

struct Seen {  // the keys [from, to) a query sees
    i64 from, to;
    Seen(const Attention& a, i64 position) : from(0), to(position + 1) {
        if (a.window && to > a.window) from = to - a.window;
    }
};

static inline i64 later(i64 a, i64 b) { return a > b ? a : b; }
static inline i64 sooner(i64 a, i64 b) { return a < b ? a : b; }

// The tile's queries over the keys of one chunk.
template <class T>
static inline void attend_chunk(const Attention& a, const Row& row, const Tile& tile, i64 chunk,
                                const Room& room, const Part& part) {
    const i64 G = a.group(), padded = a.padded(), queries = tile.to - tile.from, n = queries * G;
    for (i64 i = 0; i < n * padded; i += 16) store(part.mixed + i, set(0));
    for (i64 i = 0; i < n; i++) part.most[i] = NOTHING, store(room.sums + i * 16, set(0));
    const i64 first = later(Seen(a, row.past + tile.from).from, chunk * CHUNK);
    const i64 end = sooner(row.past + tile.to, (chunk + 1) * CHUNK);
    for (i64 at = first / PAGE * PAGE; at < end; at += PAGE) {
        const T* page = (const T*)row.pages[at / PAGE] + tile.head * a.head_size();
        const T* next = (const T*)row.pages[at / PAGE + (at + PAGE < end)] + tile.head * a.head_size();
        const float* scales = sizeof(T) == 1 ? (const float*)(page + a.numbers()) : nullptr;
        const bool often = sizeof(T) == 1 && queries >= FEW;
        if constexpr (sizeof(T) == 1)
            for (i64 i = 0; often && i < a.numbers(); i += 16) store(room.page + i, load_int8(page + i));
        for (i64 i = 0; i < queries; i++) {
            const Seen seen(a, row.past + tile.from + i);
            const i64 from = later(seen.from - at, 0), to = sooner(seen.to - at, PAGE);
            if (from >= to) continue;
            auto run = [&]<class S>(const S* kept, const S* ahead) {
                const auto* q = (const typename Kind<S>::Factor*)room.q + i * G * a.wide();
                step(a, room, q, kept, ahead, scales, from, to, part.mixed + i * G * padded, part.most + i * G,
                     room.sums + i * G * 16);
            };
            if (often) run((const float*)room.page, (const float*)room.page);
            else run(page, next);
        }
    }
    for (i64 i = 0; i < n; i++) part.sum[i] = sum(load(room.sums + i * 16));
}

// total = the sink alone
static inline void begin(const Attention& a, const Tile& tile, const Part& total) {
    const i64 G = a.group(), n = (tile.to - tile.from) * G;
    for (i64 i = 0; i < n * a.padded(); i += 16) store(total.mixed + i, set(0));
    for (i64 i = 0; i < n; i++) total.most[i] = a.sinks[tile.head * G + i % G] * LOG2E, total.sum[i] = 1.f;
}

// total += a chunk's part, for the queries that see any of it
static inline void add_chunk(const Attention& a, const Row& row, const Tile& tile, i64 chunk, const Part& part,
                             const Part& total) {
    const i64 G = a.group(), padded = a.padded();
    for (i64 i = 0; i < tile.to - tile.from; i++) {
        const Seen seen(a, row.past + tile.from + i);
        if (seen.from >= (chunk + 1) * CHUNK || seen.to <= chunk * CHUNK) continue;
        for (i64 j = i * G; j < (i + 1) * G; j++) {
            const float top = total.most[j] > part.most[j] ? total.most[j] : part.most[j];
            const F16 old = power_of_two(set(total.most[j] - top)), fresh = power_of_two(set(part.most[j] - top));
            total.most[j] = top;
            float by[2][16];
            store(by[0], old), store(by[1], fresh);
            total.sum[j] = __builtin_fmaf(part.sum[j], by[1][0], total.sum[j] * by[0][0]);
            for (i64 c = j * padded; c < (j + 1) * padded; c += 16)
                store(total.mixed + c, fma(load(part.mixed + c), fresh, mul(load(total.mixed + c), old)));
        }
    }
}

static inline void finish(const Attention& a, const Row& row, const Tile& tile, const Part& total) {
    const i64 G = a.group(), d = a.d, padded = a.padded();
    for (i64 j = 0; j < (tile.to - tile.from) * G; j++) {
        float* out = a.out + ((row.start + tile.from + j / G) * a.H + tile.head * G + j % G) * d;
        for (i64 c = 0; c < d; c += 16) {
            float some[16];
            store(some, div(load(total.mixed + j * padded + c), set(total.sum[j])));
            __builtin_memcpy(out + c, some, std::size_t(sooner(16, d - c)) * 4);
        }
    }
}

template <class T>
static inline void attend_tile(const Attention& a, const Row& row, const Tile& tile, float* parts, float* memory) {
    const i64 G = a.group(), d = a.d, queries = tile.to - tile.from, n = queries * G;
    const Room room(a, queries, memory);
    const float scale = LOG2E / __builtin_sqrtf(float(d));
    for (i64 i = 0; i < queries; i++) {
        const float* q = a.q + (row.start + tile.from + i) * a.q_step + tile.head * G * d;
        for (i64 g = 0; g < G; g++) {
            if constexpr (Kind<T>::deep == 2) {
                auto* pairs = (std::uint16_t*)room.q + i * a.wide() * G + g * 2;
                each_as_bf16(q + g * d, d, scale, [&](i64 c, std::uint16_t x) {
                    if (c < a.wide()) pairs[c / 2 * G * 2 + c % 2] = x;
                });
            } else {
                for (i64 c = 0; c < d; c++) room.q[(i * d + c) * G + g] = q[g * d + c] * scale;
            }
        }
    }
    if (tile.chunk >= 0)
        return attend_chunk<T>(a, row, tile, tile.chunk, room, Part(parts + tile.part, n, a.padded()));
    const Part part(room.part, n, a.padded()), total(room.total, n, a.padded());
    begin(a, tile, total);
    const i64 first = Seen(a, row.past + tile.from).from / CHUNK, last = (row.past + tile.to - 1) / CHUNK;
    for (i64 chunk = first; chunk <= last; chunk++) {
        attend_chunk<T>(a, row, tile, chunk, room, part);
        add_chunk(a, row, tile, chunk, part, total);
    }
    finish(a, row, tile, total);
}

static void attend(const Attention& a, const Row& row, const Tile& tile, float* parts, float* room) {
    switch (a.kept) {
        case Kept::bf16: return attend_tile<std::uint16_t>(a, row, tile, parts, room);
        case Kept::f32: return attend_tile<float>(a, row, tile, parts, room);
        case Kept::int8: return attend_tile<std::int8_t>(a, row, tile, parts, room);
    }
}

static void gather(const Attention& a, const Row& row, const Tile& tile, float* parts, float* memory) {
    const i64 queries = tile.to - tile.from, n = queries * a.group();
    const Part total(Room(a, queries, memory).total, n, a.padded());
    begin(a, tile, total);
    const i64 first = Seen(a, row.past + tile.from).from / CHUNK, last = (row.past + tile.to - 1) / CHUNK;
    parts += tile.part;
    for (i64 chunk = first; chunk <= last; chunk++, parts += part_size(a, queries))
        add_chunk(a, row, tile, chunk, Part(parts, n, a.padded()), total);
    finish(a, row, tile, total);
}

// The scale that makes the largest of d numbers 127; NaN if one of them is no number.
static inline float scale_of(const float* x, i64 d) {
    F16 high = set(0), doubt = set(0);
    for (i64 c = 0; c < d; c += 16) {
        const F16 some = load_some(x + c, d - c);
        high = max(high, max(some, sub(set(0), some))), doubt = fma(some, set(0), doubt);
    }
    return most(high) / 127.f + sum(doubt);
}

template <class T>
static inline void append_to(const Attention& a, const Row& row, int head, i64 from, i64 to) {
    const i64 d = a.d, wide = a.wide(), padded = a.padded();
    for (i64 t = from; t < to; t++) {
        const i64 at = row.past + t, place = at % PAGE;
        T* const keys = (T*)row.pages[at / PAGE] + head * a.head_size();
        T* const block = keys + place / 16 * 16 * wide;
        T* const values = keys + PAGE * wide;
        const float* k = a.k + (row.start + t) * a.k_step + head * d;
        const float* v = a.v + (row.start + t) * a.v_step + head * d;
        if constexpr (Kind<T>::deep == 2) {
            each_as_bf16(k, d, 1, [&](i64 c, T x) { if (c < wide) block[c / 2 * 32 + place % 16 * 2 + c % 2] = x; });
            each_as_bf16(v, d, 1, [&](i64 c, T x) { values[place / 2 * padded * 2 + c * 2 + place % 2] = x; });
        } else {
            float by_k = 1, by_v = 1;  // what numbers are multiplied with before they are kept
            if constexpr (sizeof(T) == 1) {
                float* scales = (float*)(keys + a.numbers()) + place;
                scales[0] = scale_of(k, d), scales[PAGE] = scale_of(v, d);
                by_k = scales[0] > FAINT ? 1 / scales[0] : 0, by_v = scales[PAGE] > FAINT ? 1 / scales[PAGE] : 0;
            }
            for (i64 c = 0; c < d; c += 16) {
                T some[16];
                keep_as(some, mul(load_some(k + c, d - c), set(by_k)));
                for (i64 i = 0; i < 16 && c + i < d; i++) block[(c + i) * 16 + place % 16] = some[i];
                keep_as(values + place * padded + c, mul(load_some(v + c, d - c), set(by_v)));
            }
        }
    }
}

static void append(const Attention& a, const Row& row, int head, i64 from, i64 to) {
    switch (a.kept) {
        case Kept::bf16: return append_to<std::uint16_t>(a, row, head, from, to);
        case Kept::f32: return append_to<float>(a, row, head, from, to);
        case Kept::int8: return append_to<std::int8_t>(a, row, head, from, to);
    }
}

}  // namespace attention

#define GPTOSS_ATTENTION_KERNELS \
    {attention::append, attention::attend, attention::gather, attention::part_size, attention::room_size}
