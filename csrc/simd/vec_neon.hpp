// The vector of every kernel in NEON, which every 64-bit Arm has: four quarters of four lanes. With
// GPTOSS_DOTPROD or GPTOSS_I8MM, bytes are multiplied by one instruction. What each function
// computes is said in vec_scalar.hpp.
#pragma once
#include <arm_neon.h>

#include <cstdint>
#include <cstring>

#if defined(GPTOSS_I8MM)
#define GPTOSS_ISA neon_i8mm
#elif defined(GPTOSS_DOTPROD)
#define GPTOSS_ISA neon_dotprod
#else
#define GPTOSS_ISA neon
#endif

namespace gptoss::GPTOSS_ISA {

struct F16 { float32x4_t v[4]; };
struct I16 { int32x4_t v[4]; };
struct B64 { uint8x16_t v[4]; };

inline constexpr int GEMM_ROWS = 2, GEMM_TOKENS = 2;
inline constexpr int TILE_PAIR = 1, TILE_TOKENS = 4;

// of the quarters i = 0..3
template <class V, class Quarter> static inline V four(Quarter of) { return {{of(0), of(1), of(2), of(3)}}; }

static inline F16 load(const float* p) { return four<F16>([&](int i) { return vld1q_f32(p + 4 * i); }); }
static inline F16 spread4(const float* p) { return four<F16>([&](int i) { return vdupq_n_f32(p[i]); }); }
static inline void store(float* p, F16 a) { for (int i = 0; i < 4; i++) vst1q_f32(p + 4 * i, a.v[i]); }
static inline F16 set(float x) { return four<F16>([&](int) { return vdupq_n_f32(x); }); }
static inline F16 add(F16 a, F16 b) { return four<F16>([&](int i) { return vaddq_f32(a.v[i], b.v[i]); }); }
static inline F16 sub(F16 a, F16 b) { return four<F16>([&](int i) { return vsubq_f32(a.v[i], b.v[i]); }); }
static inline F16 mul(F16 a, F16 b) { return four<F16>([&](int i) { return vmulq_f32(a.v[i], b.v[i]); }); }
static inline F16 div(F16 a, F16 b) { return four<F16>([&](int i) { return vdivq_f32(a.v[i], b.v[i]); }); }
static inline F16 fma(F16 a, F16 b, F16 c) {
    return four<F16>([&](int i) { return vfmaq_f32(c.v[i], a.v[i], b.v[i]); });
}
// fmin and fmax of Arm treat NaN otherwise than x86: compare and choose
static inline F16 min(F16 a, F16 b) {
    return four<F16>([&](int i) { return vbslq_f32(vcltq_f32(a.v[i], b.v[i]), a.v[i], b.v[i]); });
}
static inline float32x4_t larger(float32x4_t a, float32x4_t b) { return vbslq_f32(vcgtq_f32(a, b), a, b); }
static inline F16 max(F16 a, F16 b) { return four<F16>([&](int i) { return larger(a.v[i], b.v[i]); }); }
static inline F16 keep(F16 a, int from, int to, float x) {
    static const std::int32_t LANES[4] = {0, 1, 2, 3};
    return four<F16>([&](int i) {
        const int32x4_t lane = vaddq_s32(vld1q_s32(LANES), vdupq_n_s32(4 * i));
        const uint32x4_t inside = vandq_u32(vcgeq_s32(lane, vdupq_n_s32(from)), vcltq_s32(lane, vdupq_n_s32(to)));
        return vbslq_f32(inside, a.v[i], vdupq_n_f32(x));
    });
}
static inline float sum(F16 a) {
    const float32x4_t b = vaddq_f32(vaddq_f32(a.v[0], a.v[2]), vaddq_f32(a.v[1], a.v[3]));
    const float32x2_t c = vadd_f32(vget_low_f32(b), vget_high_f32(b));
    return vget_lane_f32(c, 0) + vget_lane_f32(c, 1);
}
static inline float most(F16 a) {
    const float32x4_t b = larger(larger(a.v[0], a.v[2]), larger(a.v[1], a.v[3]));
    const float32x4_t c = larger(b, vextq_f32(b, b, 2));
    return vgetq_lane_f32(larger(c, vextq_f32(c, c, 1)), 0);
}

static inline I16 set_int(std::int32_t x) { return four<I16>([&](int) { return vdupq_n_s32(x); }); }
static inline I16 bits(F16 a) { return four<I16>([&](int i) { return vreinterpretq_s32_f32(a.v[i]); }); }
static inline F16 floats(I16 a) { return four<F16>([&](int i) { return vreinterpretq_f32_s32(a.v[i]); }); }
static inline I16 add(I16 a, I16 b) { return four<I16>([&](int i) { return vaddq_s32(a.v[i], b.v[i]); }); }
static inline I16 sub(I16 a, I16 b) { return four<I16>([&](int i) { return vsubq_s32(a.v[i], b.v[i]); }); }
static inline I16 max(I16 a, I16 b) { return four<I16>([&](int i) { return vmaxq_s32(a.v[i], b.v[i]); }); }
template <int n> static inline I16 left(I16 a) { return four<I16>([&](int i) { return vshlq_n_s32(a.v[i], n); }); }
template <int n> static inline I16 right(I16 a) {
    return four<I16>([&](int i) { return vreinterpretq_s32_u32(vshrq_n_u32(vreinterpretq_u32_s32(a.v[i]), n)); });
}
static inline F16 to_float(I16 a) { return four<F16>([&](int i) { return vcvtq_f32_s32(a.v[i]); }); }
static inline I16 to_int(F16 a) { return four<I16>([&](int i) { return vcvtnq_s32_f32(a.v[i]); }); }

static inline F16 load_bf16(const std::uint16_t* p) {
    return four<F16>([&](int i) { return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(p + 4 * i), 16)); });
}
static inline void split_bf16(B64 x, F16& even, F16& odd) {
    auto pairs = [&](int i) { return vreinterpretq_u32_u8(x.v[i]); };
    even = four<F16>([&](int i) { return vreinterpretq_f32_u32(vshlq_n_u32(pairs(i), 16)); });
    odd = four<F16>([&](int i) { return vreinterpretq_f32_u32(vandq_u32(pairs(i), vdupq_n_u32(0xffff0000u))); });
}
static inline void split_bf16(const std::uint16_t* p, F16& even, F16& odd) {
    split_bf16(four<B64>([&](int i) { return vreinterpretq_u8_u16(vld1q_u16(p + 8 * i)); }), even, odd);
}
static inline void split_floats(const float* p, F16& even, F16& odd) {
    even = four<F16>([&](int i) { return vuzp1q_f32(vld1q_f32(p + 8 * i), vld1q_f32(p + 8 * i + 4)); });
    odd = four<F16>([&](int i) { return vuzp2q_f32(vld1q_f32(p + 8 * i), vld1q_f32(p + 8 * i + 4)); });
}
static inline void store_bf16(std::uint16_t* p, F16 a) {
    for (int i = 0; i < 4; i++) {
        const uint32x4_t x = vreinterpretq_u32_f32(a.v[i]);
        const uint32x4_t odd = vandq_u32(vshrq_n_u32(x, 16), vdupq_n_u32(1));
        const uint32x4_t near = vaddq_u32(x, vaddq_u32(odd, vdupq_n_u32(0x7fff)));
        const uint32x4_t quiet = vorrq_u32(x, vdupq_n_u32(0x400000));
        vst1_u16(p + 4 * i, vshrn_n_u32(vbslq_u32(vceqq_f32(a.v[i], a.v[i]), near, quiet), 16));
    }
}
static inline I16 widen(uint8x16_t x) {
    const uint16x8_t low = vmovl_u8(vget_low_u8(x)), high = vmovl_u8(vget_high_u8(x));
    return {{vreinterpretq_s32_u32(vmovl_u16(vget_low_u16(low))), vreinterpretq_s32_u32(vmovl_u16(vget_high_u16(low))),
             vreinterpretq_s32_u32(vmovl_u16(vget_low_u16(high))), vreinterpretq_s32_u32(vmovl_u16(vget_high_u16(high)))}};
}
static inline I16 widen(const std::uint8_t* p) { return widen(vld1q_u8(p)); }
static inline F16 load_int8(const std::int8_t* p) {
    const int8x16_t x = vld1q_s8(p);
    const int16x8_t low = vmovl_s8(vget_low_s8(x)), high = vmovl_s8(vget_high_s8(x));
    auto wide = [](int16x4_t y) { return vcvtq_f32_s32(vmovl_s16(y)); };
    return {{wide(vget_low_s16(low)), wide(vget_high_s16(low)), wide(vget_low_s16(high)), wide(vget_high_s16(high))}};
}
static inline F16 pick(F16 table, I16 at) {
    uint8x16x4_t bytes;
    for (int i = 0; i < 4; i++) bytes.val[i] = vreinterpretq_u8_f32(table.v[i]);
    return four<F16>([&](int i) {  // lane n is the bytes 4n .. 4n+3 of the table
        const uint32x4_t lane = vandq_u32(vreinterpretq_u32_s32(at.v[i]), vdupq_n_u32(15));
        const uint32x4_t four_bytes = vmlaq_u32(vdupq_n_u32(0x03020100), lane, vdupq_n_u32(0x04040404));
        return vreinterpretq_f32_u8(vqtbl4q_u8(bytes, vreinterpretq_u8_u32(four_bytes)));
    });
}
static inline void store_bytes(std::int8_t* p, I16 a) {
    const int16x8_t low = vcombine_s16(vqmovn_s32(a.v[0]), vqmovn_s32(a.v[1]));
    const int16x8_t high = vcombine_s16(vqmovn_s32(a.v[2]), vqmovn_s32(a.v[3]));
    vst1q_s8(p, vcombine_s8(vqmovn_s16(low), vqmovn_s16(high)));
}

static inline B64 load_bytes(const void* p) {
    return four<B64>([&](int i) { return vld1q_u8((const std::uint8_t*)p + 16 * i); });
}
static inline B64 load_bytes(const void* p, int n) {
    std::uint8_t some[64] = {};
    std::memcpy(some, p, std::size_t(n));
    return load_bytes(some);
}
static inline void store_bytes(void* p, B64 a) {
    for (int i = 0; i < 4; i++) vst1q_u8((std::uint8_t*)p + 16 * i, a.v[i]);
}
static inline B64 repeat4(const void* p) {
    std::uint32_t x;
    std::memcpy(&x, p, 4);
    return four<B64>([&](int) { return vreinterpretq_u8_u32(vdupq_n_u32(x)); });
}
static inline B64 repeat16(const void* p) {
    return four<B64>([&](int) { return vld1q_u8((const std::uint8_t*)p); });
}
static inline B64 pick_low(B64 table, B64 a) {
    return four<B64>([&](int i) { return vqtbl1q_u8(table.v[i], vandq_u8(a.v[i], vdupq_n_u8(15))); });
}
static inline B64 pick_high(B64 table, B64 a) {
    return four<B64>([&](int i) { return vqtbl1q_u8(table.v[i], vshrq_n_u8(a.v[i], 4)); });
}
static inline B64 both(B64 a, B64 b) { return four<B64>([&](int i) { return vandq_u8(a.v[i], b.v[i]); }); }
static inline B64 either(B64 a, B64 b) { return four<B64>([&](int i) { return vorrq_u8(a.v[i], b.v[i]); }); }
static inline void weave(B64 low, B64 high, B64& a, B64& b) {
    a = four<B64>([&](int i) { return vzip1q_u8(low.v[i], high.v[i]); });
    b = four<B64>([&](int i) { return vzip2q_u8(low.v[i], high.v[i]); });
}
static inline I16 dot4(I16 acc, B64 a, B64 b) {
    return four<I16>([&](int i) {
        const int8x16_t s = vreinterpretq_s8_u8(b.v[i]);
#if defined(GPTOSS_I8MM)
        return vusdotq_s32(acc.v[i], a.v[i], s);
#else
        // Without a product of unsigned and signed: (a - 128) * b, less -128 * b, which the compiler
        // computes once for all that are multiplied with b.
        const int8x16_t less = vreinterpretq_s8_u8(veorq_u8(a.v[i], vdupq_n_u8(128)));
#if defined(GPTOSS_DOTPROD)
        const int32x4_t back = vdotq_s32(vdupq_n_s32(0), s, vdupq_n_s8(-128));
        return vsubq_s32(vdotq_s32(acc.v[i], less, s), back);
#else
        // Two products fit 16 bits, for b is above -128: 2 * 128 * 127 < 2^15.
        const int16x8_t back = vshlq_n_s16(vpaddlq_s8(s), 7);
        const int16x8_t low = vmull_s8(vget_low_s8(less), vget_low_s8(s)), high = vmull_high_s8(less, s);
        return vpadalq_s16(vpadalq_s16(acc.v[i], vpaddq_s16(low, high)), back);
#endif
#endif
    });
}
static inline I16 sum4(I16 a, I16 b, I16 c, I16 d) {
    return four<I16>([&](int i) { return vpaddq_s32(vpaddq_s32(a.v[i], b.v[i]), vpaddq_s32(c.v[i], d.v[i])); });
}
static inline I16 widen4(const std::uint8_t* const p[4]) {
    static const std::uint8_t TURNED[16] = {0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15};
    std::uint8_t x[16];
    for (int r = 0; r < 4; r++) std::memcpy(x + 4 * r, p[r], 4);
    return widen(vqtbl1q_u8(vld1q_u8(x), vld1q_u8(TURNED)));
}
static inline void turn(const std::uint8_t* const p[16], std::int64_t skip, B64 out[4]) {
    for (int i = 0; i < 4; i++) {
        auto row = [&](int r) { return vreinterpretq_u32_u8(vld1q_u8(p[4 * i + r] + skip)); };
        auto evens = [](uint32x4_t a, uint32x4_t b) { return vreinterpretq_u64_u32(vtrn1q_u32(a, b)); };
        auto odds = [](uint32x4_t a, uint32x4_t b) { return vreinterpretq_u64_u32(vtrn2q_u32(a, b)); };
        const uint64x2_t a = evens(row(0), row(1)), b = odds(row(0), row(1));
        const uint64x2_t c = evens(row(2), row(3)), d = odds(row(2), row(3));
        out[0].v[i] = vreinterpretq_u8_u64(vtrn1q_u64(a, c)), out[1].v[i] = vreinterpretq_u8_u64(vtrn1q_u64(b, d));
        out[2].v[i] = vreinterpretq_u8_u64(vtrn2q_u64(a, c)), out[3].v[i] = vreinterpretq_u8_u64(vtrn2q_u64(b, d));
    }
}

}  // namespace gptoss::GPTOSS_ISA
