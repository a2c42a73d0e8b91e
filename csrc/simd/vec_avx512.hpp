// The vector of every kernel in AVX-512 (F, BW, VL, DQ); with GPTOSS_VNNI, bytes are multiplied by
// one instruction, with GPTOSS_BF16 also pairs of bfloat16. What each function computes is said in vec_scalar.hpp.
#pragma once
#include <immintrin.h>

#include <cstdint>
#include <cstring>

#if defined(GPTOSS_BF16)
#define GPTOSS_ISA avx512_bf16
#elif defined(GPTOSS_VNNI)
#define GPTOSS_ISA avx512_vnni
#else
#define GPTOSS_ISA avx512
#endif

namespace gptoss::GPTOSS_ISA {

using F16 = __m512;
struct I16 { __m512i v; };
struct B64 { __m512i v; };

inline constexpr int GEMM_ROWS = 6, GEMM_TOKENS = 4;
inline constexpr int TILE_PAIR = 2, TILE_TOKENS = 6;

static inline F16 load(const float* p) { return _mm512_loadu_ps(p); }
static inline F16 spread4(const float* p) {
    const __m512i at = _mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3);
    return _mm512_permutexvar_ps(at, _mm512_castps128_ps512(_mm_loadu_ps(p)));
}
static inline void store(float* p, F16 a) { _mm512_storeu_ps(p, a); }
static inline F16 set(float x) { return _mm512_set1_ps(x); }
static inline F16 add(F16 a, F16 b) { return _mm512_add_ps(a, b); }
static inline F16 sub(F16 a, F16 b) { return _mm512_sub_ps(a, b); }
static inline F16 mul(F16 a, F16 b) { return _mm512_mul_ps(a, b); }
static inline F16 div(F16 a, F16 b) { return _mm512_div_ps(a, b); }
static inline F16 fma(F16 a, F16 b, F16 c) { return _mm512_fmadd_ps(a, b, c); }
static inline F16 min(F16 a, F16 b) { return _mm512_min_ps(a, b); }
static inline F16 max(F16 a, F16 b) { return _mm512_max_ps(a, b); }
static inline F16 keep(F16 a, int from, int to, float x) {
    from = from < 0 ? 0 : from > 16 ? 16 : from, to = to < from ? from : to > 16 ? 16 : to;
    auto inside = __mmask16(((1u << to) - 1) & ~((1u << from) - 1));
    return _mm512_mask_blend_ps(inside, _mm512_set1_ps(x), a);
}
static inline float sum(F16 a) {
    __m256 b = _mm256_add_ps(_mm512_castps512_ps256(a), _mm512_extractf32x8_ps(a, 1));
    __m128 c = _mm_add_ps(_mm256_castps256_ps128(b), _mm256_extractf128_ps(b, 1));
    c = _mm_add_ps(c, _mm_movehl_ps(c, c));
    return _mm_cvtss_f32(_mm_add_ss(c, _mm_shuffle_ps(c, c, 1)));
}
static inline float most(F16 a) {
    __m256 b = _mm256_max_ps(_mm512_castps512_ps256(a), _mm512_extractf32x8_ps(a, 1));
    __m128 c = _mm_max_ps(_mm256_castps256_ps128(b), _mm256_extractf128_ps(b, 1));
    c = _mm_max_ps(c, _mm_movehl_ps(c, c));
    return _mm_cvtss_f32(_mm_max_ss(c, _mm_shuffle_ps(c, c, 1)));
}

static inline I16 set_int(std::int32_t x) { return {_mm512_set1_epi32(x)}; }
static inline I16 bits(F16 a) { return {_mm512_castps_si512(a)}; }
static inline F16 floats(I16 a) { return _mm512_castsi512_ps(a.v); }
static inline I16 add(I16 a, I16 b) { return {_mm512_add_epi32(a.v, b.v)}; }
static inline I16 sub(I16 a, I16 b) { return {_mm512_sub_epi32(a.v, b.v)}; }
static inline I16 max(I16 a, I16 b) { return {_mm512_max_epi32(a.v, b.v)}; }
template <int n> static inline I16 left(I16 a) { return {_mm512_slli_epi32(a.v, n)}; }
template <int n> static inline I16 right(I16 a) { return {_mm512_srli_epi32(a.v, n)}; }
static inline F16 to_float(I16 a) { return _mm512_cvtepi32_ps(a.v); }
static inline I16 to_int(F16 a) { return {_mm512_cvtps_epi32(a)}; }

static inline F16 load_bf16(const std::uint16_t* p) {
    __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p));
    return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}
static inline void split_bf16(B64 x, F16& even, F16& odd) {
    even = _mm512_castsi512_ps(_mm512_slli_epi32(x.v, 16));
    odd = _mm512_castsi512_ps(_mm512_and_si512(x.v, _mm512_set1_epi32(int(0xffff0000u))));
}
static inline void split_bf16(const std::uint16_t* p, F16& even, F16& odd) {
    split_bf16(B64{_mm512_loadu_si512(p)}, even, odd);
}
static inline void split_floats(const float* p, F16& even, F16& odd) {
    __m512 a = _mm512_loadu_ps(p), b = _mm512_loadu_ps(p + 16);
    const __m512i at = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    even = _mm512_permutex2var_ps(a, at, b);
    odd = _mm512_permutex2var_ps(a, _mm512_add_epi32(at, _mm512_set1_epi32(1)), b);
}
static inline void store_bf16(std::uint16_t* p, F16 a) {
    __m512i x = _mm512_castps_si512(a);
    __m512i odd = _mm512_and_si512(_mm512_srli_epi32(x, 16), _mm512_set1_epi32(1));
    __m512i r = _mm512_add_epi32(x, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    __mmask16 nan = _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q);
    r = _mm512_mask_or_epi32(r, nan, x, _mm512_set1_epi32(0x400000));
    _mm256_storeu_si256((__m256i*)p, _mm512_cvtepi32_epi16(_mm512_srli_epi32(r, 16)));
}
static inline F16 load_int8(const std::int8_t* p) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p)));
}
static inline I16 widen(const std::uint8_t* p) {
    return {_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p))};
}
static inline F16 pick(F16 table, I16 at) { return _mm512_permutexvar_ps(at.v, table); }
static inline void store_bytes(std::int8_t* p, I16 a) {
    _mm_storeu_si128((__m128i*)p, _mm512_cvtsepi32_epi8(a.v));
}

static inline B64 load_bytes(const void* p) { return {_mm512_loadu_si512(p)}; }
static inline B64 load_bytes(const void* p, int n) {
    __mmask64 some = n >= 64 ? ~0ull : (1ull << n) - 1;
    return {_mm512_maskz_loadu_epi8(some, p)};
}
static inline void store_bytes(void* p, B64 a) { _mm512_storeu_si512(p, a.v); }
static inline B64 repeat4(const void* p) {
    int x;
    std::memcpy(&x, p, 4);
    return {_mm512_set1_epi32(x)};
}
static inline B64 repeat16(const void* p) {
    return {_mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i*)p))};
}
static inline B64 pick_low(B64 table, B64 a) {
    return {_mm512_shuffle_epi8(table.v, _mm512_and_si512(a.v, _mm512_set1_epi8(15)))};
}
static inline B64 pick_high(B64 table, B64 a) { return pick_low(table, {_mm512_srli_epi16(a.v, 4)}); }
static inline B64 both(B64 a, B64 b) { return {_mm512_and_si512(a.v, b.v)}; }
static inline B64 either(B64 a, B64 b) { return {_mm512_or_si512(a.v, b.v)}; }
static inline void weave(B64 low, B64 high, B64& a, B64& b) {
    a.v = _mm512_unpacklo_epi8(low.v, high.v), b.v = _mm512_unpackhi_epi8(low.v, high.v);
}
static inline I16 dot4(I16 acc, B64 a, B64 b) {
#ifdef GPTOSS_VNNI
    return {_mm512_dpbusd_epi32(acc.v, a.v, b.v)};
#else
    // Bytes above 127 would overflow 16 bits in pairs: even and odd ones apart.
    const __m512i ones = _mm512_set1_epi16(1), even = _mm512_set1_epi16(0xff);
    __m512i lo = _mm512_maddubs_epi16(_mm512_and_si512(a.v, even), b.v);
    __m512i hi = _mm512_maddubs_epi16(_mm512_andnot_si512(even, a.v), b.v);
    __m512i pairs = _mm512_add_epi32(_mm512_madd_epi16(lo, ones), _mm512_madd_epi16(hi, ones));
    return {_mm512_add_epi32(acc.v, pairs)};
#endif
}
static inline I16 sum4(I16 a, I16 b, I16 c, I16 d) {
    __m512i ab = _mm512_add_epi32(_mm512_unpacklo_epi32(a.v, b.v), _mm512_unpackhi_epi32(a.v, b.v));
    __m512i cd = _mm512_add_epi32(_mm512_unpacklo_epi32(c.v, d.v), _mm512_unpackhi_epi32(c.v, d.v));
    return {_mm512_add_epi32(_mm512_unpacklo_epi64(ab, cd), _mm512_unpackhi_epi64(ab, cd))};
}
static inline I16 widen4(const std::uint8_t* const p[4]) {
    int x[4];
    for (int r = 0; r < 4; r++) std::memcpy(x + r, p[r], 4);
    __m128i rows = _mm_loadu_si128((const __m128i*)x);
    const __m128i turn = _mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    return {_mm512_cvtepu8_epi32(_mm_shuffle_epi8(rows, turn))};
}
static inline void turn(const std::uint8_t* const p[16], std::int64_t skip, B64 out[4]) {
    __m512i x[4];  // row i + 4 l in lane l; loads under a mask leave the unit for shuffles free
    for (int i = 0; i < 4; i++) {
        auto at = [&](int l) { return _mm_loadu_si128((const __m128i*)(p[i + 4 * l] + skip)); };
        x[i] = _mm512_castsi128_si512(at(0));
        x[i] = _mm512_mask_broadcast_i32x4(x[i], 0x00f0, at(1));
        x[i] = _mm512_mask_broadcast_i32x4(x[i], 0x0f00, at(2));
        x[i] = _mm512_mask_broadcast_i32x4(x[i], 0xf000, at(3));
    }
    __m512i a = _mm512_unpacklo_epi32(x[0], x[1]), b = _mm512_unpackhi_epi32(x[0], x[1]);
    __m512i c = _mm512_unpacklo_epi32(x[2], x[3]), d = _mm512_unpackhi_epi32(x[2], x[3]);
    out[0] = {_mm512_unpacklo_epi64(a, c)}, out[1] = {_mm512_unpackhi_epi64(a, c)};
    out[2] = {_mm512_unpacklo_epi64(b, d)}, out[3] = {_mm512_unpackhi_epi64(b, d)};
}

#ifdef GPTOSS_BF16
// Sixteen pairs of bfloat16: see ops/attention.inl. The odd products are added first.
struct Pairs { __m512i v; };
static inline Pairs load_pairs(const std::uint16_t* p) { return {_mm512_loadu_si512(p)}; }
static inline Pairs repeat_pair(const std::uint16_t* p) { return {repeat4(p).v}; }
static inline F16 dot2(Pairs a, Pairs b, F16 c) { return _mm512_dpbf16_ps(c, (__m512bh)a.v, (__m512bh)b.v); }
#endif

}  // namespace gptoss::GPTOSS_ISA
