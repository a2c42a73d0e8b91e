// The vector of every kernel, in plain C++: sixteen lanes in a loop. This file defines what the
// other vec_*.hpp must compute, to the bit.
#pragma once
#include <cstdint>
#include <cstring>

#define GPTOSS_ISA scalar

namespace gptoss::scalar {

struct F16 { float v[16]; };          // 16 x float32
struct I16 { std::int32_t v[16]; };   // 16 x int32
struct B64 { std::uint8_t v[64]; };   // 64 bytes

inline constexpr int GEMM_ROWS = 2, GEMM_TOKENS = 2;  // register block of dot (float)
inline constexpr int TILE_PAIR = 1, TILE_TOKENS = 2;  // register block of dot_tiles (bytes)

#define GPTOSS_EACH for (int i = 0; i < 16; i++)

static inline F16 load(const float* p) { F16 r; std::memcpy(r.v, p, 64); return r; }
// lane 4g+r: p[g]
static inline F16 spread4(const float* p) { F16 r; GPTOSS_EACH r.v[i] = p[i / 4]; return r; }
static inline void store(float* p, F16 a) { std::memcpy(p, a.v, 64); }
static inline F16 set(float x) { F16 r; GPTOSS_EACH r.v[i] = x; return r; }
static inline F16 add(F16 a, F16 b) { GPTOSS_EACH a.v[i] += b.v[i]; return a; }
static inline F16 sub(F16 a, F16 b) { GPTOSS_EACH a.v[i] -= b.v[i]; return a; }
static inline F16 mul(F16 a, F16 b) { GPTOSS_EACH a.v[i] *= b.v[i]; return a; }
static inline F16 div(F16 a, F16 b) { GPTOSS_EACH a.v[i] /= b.v[i]; return a; }
// a * b + c, rounded once
static inline F16 fma(F16 a, F16 b, F16 c) {
    GPTOSS_EACH c.v[i] = __builtin_fmaf(a.v[i], b.v[i], c.v[i]);
    return c;
}
// of NaN and a number: the second operand, as x86 does
static inline F16 min(F16 a, F16 b) { GPTOSS_EACH a.v[i] = a.v[i] < b.v[i] ? a.v[i] : b.v[i]; return a; }
static inline F16 max(F16 a, F16 b) { GPTOSS_EACH a.v[i] = a.v[i] > b.v[i] ? a.v[i] : b.v[i]; return a; }
// lanes from <= i < to of a, the others x
static inline F16 keep(F16 a, int from, int to, float x) {
    GPTOSS_EACH if (i < from || i >= to) a.v[i] = x;
    return a;
}
// over the lanes, in one fixed order: halves onto halves
static inline float sum(F16 a) {
    for (int n = 8; n; n /= 2)
        for (int i = 0; i < n; i++) a.v[i] += a.v[i + n];
    return a.v[0];
}
static inline float most(F16 a) {
    for (int n = 8; n; n /= 2)
        for (int i = 0; i < n; i++) a.v[i] = a.v[i] > a.v[i + n] ? a.v[i] : a.v[i + n];
    return a.v[0];
}

static inline I16 set_int(std::int32_t x) { I16 r; GPTOSS_EACH r.v[i] = x; return r; }
static inline I16 bits(F16 a) { I16 r; std::memcpy(r.v, a.v, 64); return r; }
static inline F16 floats(I16 a) { F16 r; std::memcpy(r.v, a.v, 64); return r; }
static inline I16 add(I16 a, I16 b) { GPTOSS_EACH a.v[i] = std::int32_t(std::uint32_t(a.v[i]) + std::uint32_t(b.v[i])); return a; }
static inline I16 sub(I16 a, I16 b) { GPTOSS_EACH a.v[i] = std::int32_t(std::uint32_t(a.v[i]) - std::uint32_t(b.v[i])); return a; }
static inline I16 max(I16 a, I16 b) { GPTOSS_EACH a.v[i] = a.v[i] > b.v[i] ? a.v[i] : b.v[i]; return a; }
template <int n> static inline I16 left(I16 a) { GPTOSS_EACH a.v[i] = std::int32_t(std::uint32_t(a.v[i]) << n); return a; }
template <int n> static inline I16 right(I16 a) { GPTOSS_EACH a.v[i] = std::int32_t(std::uint32_t(a.v[i]) >> n); return a; }
static inline F16 to_float(I16 a) { F16 r; GPTOSS_EACH r.v[i] = float(a.v[i]); return r; }
// nearest integer, ties to even; |a| < 2^22
static inline I16 to_int(F16 a) { I16 r; GPTOSS_EACH r.v[i] = std::int32_t(__builtin_rintf(a.v[i])); return r; }

// 16 bfloat16 -> float
static inline F16 load_bf16(const std::uint16_t* p) {
    I16 r;
    GPTOSS_EACH r.v[i] = std::int32_t(std::uint32_t(p[i]) << 16);
    return floats(r);
}
// 32 bfloat16 -> the even ones and the odd ones
static inline void split_bf16(const std::uint16_t* p, F16& even, F16& odd) {
    I16 a, b;
    GPTOSS_EACH a.v[i] = std::int32_t(std::uint32_t(p[2 * i]) << 16);
    GPTOSS_EACH b.v[i] = std::int32_t(std::uint32_t(p[2 * i + 1]) << 16);
    even = floats(a), odd = floats(b);
}
// the same of bytes that have been loaded
static inline void split_bf16(B64 x, F16& even, F16& odd) {
    std::uint16_t some[32];
    std::memcpy(some, x.v, 64);
    split_bf16(some, even, odd);
}
// 32 floats -> the even ones and the odd ones
static inline void split_floats(const float* p, F16& even, F16& odd) {
    GPTOSS_EACH even.v[i] = p[2 * i];
    GPTOSS_EACH odd.v[i] = p[2 * i + 1];
}
// to bfloat16: nearest, ties to even; NaN stays NaN
static inline void store_bf16(std::uint16_t* p, F16 a) {
    I16 b = bits(a);
    GPTOSS_EACH {
        std::uint32_t x = std::uint32_t(b.v[i]);
        bool nan = (x & 0x7fffffffu) > 0x7f800000u;
        p[i] = std::uint16_t(nan ? (x >> 16) | 0x40u : (x + 0x7fffu + ((x >> 16) & 1u)) >> 16);
    }
}
// 16 signed bytes -> float
static inline F16 load_int8(const std::int8_t* p) { F16 r; GPTOSS_EACH r.v[i] = float(p[i]); return r; }
// 16 bytes -> int32, unsigned
static inline I16 widen(const std::uint8_t* p) { I16 r; GPTOSS_EACH r.v[i] = p[i]; return r; }
// table[lane & 15]
static inline F16 pick(F16 table, I16 at) { F16 r; GPTOSS_EACH r.v[i] = table.v[at.v[i] & 15]; return r; }
// 16 int32 -> int8, saturated
static inline void store_bytes(std::int8_t* p, I16 a) {
    GPTOSS_EACH p[i] = std::int8_t(a.v[i] < -128 ? -128 : a.v[i] > 127 ? 127 : a.v[i]);
}

static inline B64 load_bytes(const void* p) { B64 r; std::memcpy(r.v, p, 64); return r; }
// the first n bytes, then zeros; reads no byte more
static inline B64 load_bytes(const void* p, int n) {
    B64 r{};
    std::memcpy(r.v, p, std::size_t(n));
    return r;
}
static inline void store_bytes(void* p, B64 a) { std::memcpy(p, a.v, 64); }
// the same four bytes sixteen times
static inline B64 repeat4(const void* p) { B64 r; for (int i = 0; i < 64; i += 4) std::memcpy(r.v + i, p, 4); return r; }
// the same sixteen bytes four times
static inline B64 repeat16(const void* p) { B64 r; for (int i = 0; i < 64; i += 16) std::memcpy(r.v + i, p, 16); return r; }
// table[the low four bits of a byte], table[the high four]; the table is the same in each quarter
static inline B64 pick_low(B64 table, B64 a) { for (int i = 0; i < 64; i++) a.v[i] = table.v[a.v[i] & 15]; return a; }
static inline B64 pick_high(B64 table, B64 a) { for (int i = 0; i < 64; i++) a.v[i] = table.v[a.v[i] >> 4]; return a; }
static inline B64 both(B64 a, B64 b) { for (int i = 0; i < 64; i++) a.v[i] &= b.v[i]; return a; }
static inline B64 either(B64 a, B64 b) { for (int i = 0; i < 64; i++) a.v[i] |= b.v[i]; return a; }
// low and high bytes in turn: a gets the first eight of each quarter, b the others
static inline void weave(B64 low, B64 high, B64& a, B64& b) {
    for (int q = 0; q < 64; q += 16)
        for (int i = 0; i < 8; i++) {
            a.v[q + 2 * i] = low.v[q + i], a.v[q + 2 * i + 1] = high.v[q + i];
            b.v[q + 2 * i] = low.v[q + 8 + i], b.v[q + 2 * i + 1] = high.v[q + 8 + i];
        }
}
// acc[i] + sum over j < 4 of a[4i+j] (unsigned) * b[4i+j] (signed, above -128)
static inline I16 dot4(I16 acc, B64 a, B64 b) {
    GPTOSS_EACH for (int j = 0; j < 4; j++) acc.v[i] += int(a.v[4 * i + j]) * int(std::int8_t(b.v[4 * i + j]));
    return acc;
}
// lane 4g+r: the sum of lanes 4g..4g+3 of the r-th argument
static inline I16 sum4(I16 a, I16 b, I16 c, I16 d) {
    I16 r;
    const I16* from[4] = {&a, &b, &c, &d};
    for (int g = 0; g < 4; g++)
        for (int k = 0; k < 4; k++) {
            const std::int32_t* v = from[k]->v + 4 * g;
            r.v[4 * g + k] = v[0] + v[1] + v[2] + v[3];
        }
    return r;
}
// lane 4g+r: the byte at p[r][g], unsigned; reads four bytes behind each pointer
static inline I16 widen4(const std::uint8_t* const p[4]) {
    I16 r;
    GPTOSS_EACH r.v[i] = p[i % 4][i / 4];
    return r;
}
// 16 bytes at each of sixteen pointers + skip -> vector j: the j-th four bytes of each, in order
static inline void turn(const std::uint8_t* const p[16], std::int64_t skip, B64 out[4]) {
    std::uint8_t x[4][64];
    for (int r = 0; r < 16; r++)
        for (int j = 0; j < 4; j++) std::memcpy(x[j] + 4 * r, p[r] + skip + 4 * j, 4);
    for (int j = 0; j < 4; j++) out[j] = load_bytes(x[j]);
}

#undef GPTOSS_EACH
}  // namespace gptoss::scalar
