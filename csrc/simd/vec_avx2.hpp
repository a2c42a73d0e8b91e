// The vector of every kernel in AVX2 with FMA: two halves of eight lanes. What each function
// computes is said in vec_scalar.hpp.
#pragma once
#include <immintrin.h>

#include <cstdint>
#include <cstring>

#define GPTOSS_ISA avx2

namespace gptoss::avx2 {

struct F16 { __m256 a, b; };
struct I16 { __m256i a, b; };
struct B64 { __m256i a, b; };

inline constexpr int GEMM_ROWS = 2, GEMM_TOKENS = 2;
inline constexpr int TILE_PAIR = 1, TILE_TOKENS = 3;

static inline F16 load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
static inline F16 spread4(const float* p) {
    auto twice = [&](int i) { return _mm256_set_m128(_mm_set1_ps(p[i + 1]), _mm_set1_ps(p[i])); };
    return {twice(0), twice(2)};
}
static inline void store(float* p, F16 x) { _mm256_storeu_ps(p, x.a), _mm256_storeu_ps(p + 8, x.b); }
static inline F16 set(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
static inline F16 add(F16 x, F16 y) { return {_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)}; }
static inline F16 sub(F16 x, F16 y) { return {_mm256_sub_ps(x.a, y.a), _mm256_sub_ps(x.b, y.b)}; }
static inline F16 mul(F16 x, F16 y) { return {_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)}; }
static inline F16 div(F16 x, F16 y) { return {_mm256_div_ps(x.a, y.a), _mm256_div_ps(x.b, y.b)}; }
static inline F16 fma(F16 x, F16 y, F16 z) {
    return {_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)};
}
static inline F16 min(F16 x, F16 y) { return {_mm256_min_ps(x.a, y.a), _mm256_min_ps(x.b, y.b)}; }
static inline F16 max(F16 x, F16 y) { return {_mm256_max_ps(x.a, y.a), _mm256_max_ps(x.b, y.b)}; }
static inline F16 keep(F16 x, int from, int to, float other) {
    const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    auto half = [&](__m256 part, int base) {
        __m256i low = _mm256_cmpgt_epi32(lane, _mm256_set1_epi32(from - base - 1));
        __m256i high = _mm256_cmpgt_epi32(_mm256_set1_epi32(to - base), lane);
        __m256 inside = _mm256_castsi256_ps(_mm256_and_si256(low, high));
        return _mm256_blendv_ps(_mm256_set1_ps(other), part, inside);
    };
    return {half(x.a, 0), half(x.b, 8)};
}
static inline float sum(F16 x) {
    __m256 b = _mm256_add_ps(x.a, x.b);
    __m128 c = _mm_add_ps(_mm256_castps256_ps128(b), _mm256_extractf128_ps(b, 1));
    c = _mm_add_ps(c, _mm_movehl_ps(c, c));
    return _mm_cvtss_f32(_mm_add_ss(c, _mm_shuffle_ps(c, c, 1)));
}
static inline float most(F16 x) {
    __m256 b = _mm256_max_ps(x.a, x.b);
    __m128 c = _mm_max_ps(_mm256_castps256_ps128(b), _mm256_extractf128_ps(b, 1));
    c = _mm_max_ps(c, _mm_movehl_ps(c, c));
    return _mm_cvtss_f32(_mm_max_ss(c, _mm_shuffle_ps(c, c, 1)));
}

static inline I16 set_int(std::int32_t x) { return {_mm256_set1_epi32(x), _mm256_set1_epi32(x)}; }
static inline I16 bits(F16 x) { return {_mm256_castps_si256(x.a), _mm256_castps_si256(x.b)}; }
static inline F16 floats(I16 x) { return {_mm256_castsi256_ps(x.a), _mm256_castsi256_ps(x.b)}; }
static inline I16 add(I16 x, I16 y) { return {_mm256_add_epi32(x.a, y.a), _mm256_add_epi32(x.b, y.b)}; }
static inline I16 sub(I16 x, I16 y) { return {_mm256_sub_epi32(x.a, y.a), _mm256_sub_epi32(x.b, y.b)}; }
static inline I16 max(I16 x, I16 y) { return {_mm256_max_epi32(x.a, y.a), _mm256_max_epi32(x.b, y.b)}; }
template <int n> static inline I16 left(I16 x) { return {_mm256_slli_epi32(x.a, n), _mm256_slli_epi32(x.b, n)}; }
template <int n> static inline I16 right(I16 x) { return {_mm256_srli_epi32(x.a, n), _mm256_srli_epi32(x.b, n)}; }
static inline F16 to_float(I16 x) { return {_mm256_cvtepi32_ps(x.a), _mm256_cvtepi32_ps(x.b)}; }
static inline I16 to_int(F16 x) { return {_mm256_cvtps_epi32(x.a), _mm256_cvtps_epi32(x.b)}; }

static inline F16 load_bf16(const std::uint16_t* p) {
    auto half = [](const std::uint16_t* q) {
        __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)q));
        return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
    };
    return {half(p), half(p + 8)};
}
static inline void split_bf16(B64 x, F16& even, F16& odd) {
    const __m256i high = _mm256_set1_epi32(int(0xffff0000u));
    even = {_mm256_castsi256_ps(_mm256_slli_epi32(x.a, 16)), _mm256_castsi256_ps(_mm256_slli_epi32(x.b, 16))};
    odd = {_mm256_castsi256_ps(_mm256_and_si256(x.a, high)), _mm256_castsi256_ps(_mm256_and_si256(x.b, high))};
}
static inline void split_bf16(const std::uint16_t* p, F16& even, F16& odd) {
    split_bf16(B64{_mm256_loadu_si256((const __m256i*)p), _mm256_loadu_si256((const __m256i*)(p + 16))}, even, odd);
}
static inline void split_floats(const float* p, F16& even, F16& odd) {
    auto half = [](const float* q, int which) {
        __m256 a = _mm256_loadu_ps(q), b = _mm256_loadu_ps(q + 8);
        __m256 mixed = which ? _mm256_shuffle_ps(a, b, 0xdd) : _mm256_shuffle_ps(a, b, 0x88);
        return _mm256_castpd_ps(_mm256_permute4x64_pd(_mm256_castps_pd(mixed), 0xd8));
    };
    even = {half(p, 0), half(p + 16, 0)};
    odd = {half(p, 1), half(p + 16, 1)};
}
static inline void store_bf16(std::uint16_t* p, F16 x) {
    auto half = [](__m256 f) {
        __m256i i = _mm256_castps_si256(f);
        __m256i odd = _mm256_and_si256(_mm256_srli_epi32(i, 16), _mm256_set1_epi32(1));
        __m256i r = _mm256_add_epi32(i, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
        __m256i quiet = _mm256_or_si256(i, _mm256_set1_epi32(0x400000));
        __m256 nan = _mm256_cmp_ps(f, f, _CMP_UNORD_Q);
        r = _mm256_blendv_epi8(r, quiet, _mm256_castps_si256(nan));
        return _mm256_srli_epi32(r, 16);
    };
    __m256i both = _mm256_packus_epi32(half(x.a), half(x.b));
    _mm256_storeu_si256((__m256i*)p, _mm256_permute4x64_epi64(both, 0xd8));
}
static inline F16 load_int8(const std::int8_t* p) {
    __m128i x = _mm_loadu_si128((const __m128i*)p);
    auto half = [](__m128i y) { return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(y)); };
    return {half(x), half(_mm_srli_si128(x, 8))};
}
static inline I16 widen(const std::uint8_t* p) {
    __m128i x = _mm_loadu_si128((const __m128i*)p);
    return {_mm256_cvtepu8_epi32(x), _mm256_cvtepu8_epi32(_mm_srli_si128(x, 8))};
}
static inline F16 pick(F16 table, I16 at) {
    auto half = [&](__m256i i) {  // bit 3 chooses the half of the table
        __m256 low = _mm256_permutevar8x32_ps(table.a, i), high = _mm256_permutevar8x32_ps(table.b, i);
        return _mm256_blendv_ps(low, high, _mm256_castsi256_ps(_mm256_slli_epi32(i, 28)));
    };
    return {half(at.a), half(at.b)};
}
static inline void store_bytes(std::int8_t* p, I16 x) {
    __m256i words = _mm256_permute4x64_epi64(_mm256_packs_epi32(x.a, x.b), 0xd8);
    __m128i bytes = _mm_packs_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
    _mm_storeu_si128((__m128i*)p, bytes);
}

static inline B64 load_bytes(const void* p) {
    return {_mm256_loadu_si256((const __m256i*)p), _mm256_loadu_si256((const __m256i*)p + 1)};
}
static inline B64 load_bytes(const void* p, int n) {
    std::uint8_t some[64] = {};
    std::memcpy(some, p, std::size_t(n));
    return load_bytes(some);
}
static inline void store_bytes(void* p, B64 x) {
    _mm256_storeu_si256((__m256i*)p, x.a), _mm256_storeu_si256((__m256i*)p + 1, x.b);
}
static inline B64 repeat4(const void* p) {
    int x;
    std::memcpy(&x, p, 4);
    return {_mm256_set1_epi32(x), _mm256_set1_epi32(x)};
}
static inline B64 repeat16(const void* p) {
    __m256i x = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i*)p));
    return {x, x};
}
static inline B64 pick_low(B64 table, B64 x) {
    const __m256i m = _mm256_set1_epi8(15);
    return {_mm256_shuffle_epi8(table.a, _mm256_and_si256(x.a, m)), _mm256_shuffle_epi8(table.b, _mm256_and_si256(x.b, m))};
}
static inline B64 pick_high(B64 table, B64 x) {
    return pick_low(table, {_mm256_srli_epi16(x.a, 4), _mm256_srli_epi16(x.b, 4)});
}
static inline B64 both(B64 x, B64 y) { return {_mm256_and_si256(x.a, y.a), _mm256_and_si256(x.b, y.b)}; }
static inline B64 either(B64 x, B64 y) { return {_mm256_or_si256(x.a, y.a), _mm256_or_si256(x.b, y.b)}; }
static inline void weave(B64 low, B64 high, B64& a, B64& b) {
    a = {_mm256_unpacklo_epi8(low.a, high.a), _mm256_unpacklo_epi8(low.b, high.b)};
    b = {_mm256_unpackhi_epi8(low.a, high.a), _mm256_unpackhi_epi8(low.b, high.b)};
}
static inline I16 dot4(I16 acc, B64 x, B64 y) {
    // Bytes above 127 would overflow 16 bits in pairs: even and odd ones apart.
    auto half = [](__m256i c, __m256i u, __m256i s) {
        const __m256i ones = _mm256_set1_epi16(1), even = _mm256_set1_epi16(0xff);
        __m256i lo = _mm256_madd_epi16(_mm256_maddubs_epi16(_mm256_and_si256(u, even), s), ones);
        __m256i hi = _mm256_madd_epi16(_mm256_maddubs_epi16(_mm256_andnot_si256(even, u), s), ones);
        return _mm256_add_epi32(c, _mm256_add_epi32(lo, hi));
    };
    return {half(acc.a, x.a, y.a), half(acc.b, x.b, y.b)};
}
static inline I16 sum4(I16 x, I16 y, I16 z, I16 w) {
    auto half = [](__m256i p, __m256i q, __m256i r, __m256i s) {
        return _mm256_hadd_epi32(_mm256_hadd_epi32(p, q), _mm256_hadd_epi32(r, s));
    };
    return {half(x.a, y.a, z.a, w.a), half(x.b, y.b, z.b, w.b)};
}
static inline I16 widen4(const std::uint8_t* const p[4]) {
    std::uint8_t x[16];
    for (int i = 0; i < 16; i++) x[i] = p[i % 4][i / 4];
    return widen(x);
}
static inline void turn(const std::uint8_t* const p[16], std::int64_t skip, B64 out[4]) {
    std::uint8_t x[4][64];
    for (int r = 0; r < 16; r++)
        for (int j = 0; j < 4; j++) std::memcpy(x[j] + 4 * r, p[r] + skip + 4 * j, 4);
    for (int j = 0; j < 4; j++) out[j] = load_bytes(x[j]);
}

}  // namespace gptoss::avx2
