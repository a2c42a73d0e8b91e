#include "roofline.hpp"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstring>
#include <memory>
#include <new>

#include "cpu.hpp"
#include "threads.hpp"

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
#define ROOFLINE_X86 1
#define FOR(isa) __attribute__((target(isa)))
#elif defined(__aarch64__) && defined(__GNUC__)
#include <arm_neon.h>
#define ROOFLINE_NEON 1
#ifdef __clang__
#define FOR_DOTPROD __attribute__((target("dotprod")))
#else
#define FOR_DOTPROD __attribute__((target("arch=armv8.2-a+dotprod")))
#endif
#endif

namespace gptoss {

namespace {

constexpr std::int64_t CHUNK = 1 << 20;  // bytes that a thread takes at a time
constexpr std::int64_t TURNS = 20000;    // of an arithmetic kernel's loop in one item
constexpr int ITEMS = 32;                // for each thread, so that a late one holds up nobody

// The results of kernels end here, so that no compiler can leave the work out.
std::atomic<std::uint32_t> sink;

// A kernel does TURNS * `ops` operations and returns something that depends on all of them.
using Arithmetic = float (*)(float);
using Reading = std::uint64_t (*)(const std::byte*);  // CHUNK bytes, aligned to 64

template <class Work>
double seconds(std::int64_t items, Work work) {
    auto started = std::chrono::steady_clock::now();
    pool().run(items, work);
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - started).count();
}

double rate(Arithmetic kernel, double ops, int passes) {
    const std::int64_t items = std::int64_t(ITEMS) * pool().size();
    auto work = [&](std::int64_t i, int) { sink += std::uint32_t(kernel(float(i + 1))); };
    double best = 0;
    for (int pass = 0; pass < passes; pass++)
        best = std::max(best, double(items) * TURNS * ops / seconds(items, work));
    return best;
}

// ---- any processor ----

std::uint64_t read_portable(const std::byte* p) {
    std::uint64_t sums[8] = {}, next[8];
    for (std::int64_t i = 0; i < CHUNK; i += sizeof next) {
        std::memcpy(next, p + i, sizeof next);
        for (int j = 0; j < 8; j++) sums[j] += next[j];
    }
    for (int j = 1; j < 8; j++) sums[0] += sums[j];
    return sums[0];
}

constexpr double PORTABLE_OPS = 2 * 32;
float float32_portable(float x) {
    float a[32], y = 0;
    for (int j = 0; j < 32; j++) a[j] = x + float(j);
    for (std::int64_t turn = 0; turn < TURNS; turn++)
        for (int j = 0; j < 32; j++) a[j] = a[j] * 0.5f + x;
    for (float b : a) y += b;
    return y;
}

// Twelve independent chains hide a latency of up to six cycles at two instructions a cycle.
#define TWELVE(do) do(0) do(1) do(2) do(3) do(4) do(5) do(6) do(7) do(8) do(9) do(10) do(11)

#ifdef ROOFLINE_X86

// ---- AVX2 ----

FOR("avx2") std::uint64_t read_avx2(const std::byte* p) {
    __m256i s[8];
    for (auto& v : s) v = _mm256_setzero_si256();
    for (std::int64_t i = 0; i < CHUNK; i += 256)
        for (int j = 0; j < 8; j++)
            s[j] = _mm256_add_epi64(s[j], _mm256_load_si256((const __m256i*)(p + i + 32 * j)));
    for (int j = 1; j < 8; j++) s[0] = _mm256_add_epi64(s[0], s[j]);
    return std::uint64_t(s[0][0]);
}

FOR("avx2,fma") float float32_avx2(float x) {
    __m256 a[12], half = _mm256_set1_ps(0.5f), b = _mm256_set1_ps(x);
    for (auto& v : a) v = b;
    for (std::int64_t turn = 0; turn < TURNS; turn++) {
#define DO(j) a[j] = _mm256_fmadd_ps(a[j], half, b);
        TWELVE(DO)
#undef DO
    }
    for (int j = 1; j < 12; j++) a[0] = _mm256_add_ps(a[0], a[j]);
    return a[0][0];
}

// Without VNNI a product of bytes takes three instructions: pairs to 16 bits, pairs of those to 32,
// and the sum. The sum so far is an operand of the first, or the compiler would do it once.
FOR("avx2") float int8_avx2(float x) {
    __m256i a[12], ones = _mm256_set1_epi16(1), b = _mm256_set1_epi8(char(int(x) | 1));
    for (auto& v : a) v = b;
    for (std::int64_t turn = 0; turn < TURNS; turn++) {
#define DO(j) \
    a[j] = _mm256_add_epi32(a[j], _mm256_madd_epi16(_mm256_maddubs_epi16(a[j], b), ones));
        TWELVE(DO)
#undef DO
    }
    for (int j = 1; j < 12; j++) a[0] = _mm256_add_epi32(a[0], a[j]);
    return float(a[0][0]);
}

// ---- AVX-512 ----

FOR("avx512f") std::uint64_t read_avx512(const std::byte* p) {
    __m512i s[8];
    for (auto& v : s) v = _mm512_setzero_si512();
    for (std::int64_t i = 0; i < CHUNK; i += 512)
        for (int j = 0; j < 8; j++)
            s[j] = _mm512_add_epi64(s[j], _mm512_load_si512(p + i + 64 * j));
    for (int j = 1; j < 8; j++) s[0] = _mm512_add_epi64(s[0], s[j]);
    return std::uint64_t(s[0][0]);
}

FOR("avx512f") float float32_avx512(float x) {
    __m512 a[12], half = _mm512_set1_ps(0.5f), b = _mm512_set1_ps(x);
    for (auto& v : a) v = b;
    for (std::int64_t turn = 0; turn < TURNS; turn++) {
#define DO(j) a[j] = _mm512_fmadd_ps(a[j], half, b);
        TWELVE(DO)
#undef DO
    }
    for (int j = 1; j < 12; j++) a[0] = _mm512_add_ps(a[0], a[j]);
    return a[0][0];
}

FOR("avx512f,avx512bw") float int8_avx512(float x) {
    __m512i a[12], ones = _mm512_set1_epi16(1), b = _mm512_set1_epi8(char(int(x) | 1));
    for (auto& v : a) v = b;
    for (std::int64_t turn = 0; turn < TURNS; turn++) {
#define DO(j) \
    a[j] = _mm512_add_epi32(a[j], _mm512_madd_epi16(_mm512_maddubs_epi16(a[j], b), ones));
        TWELVE(DO)
#undef DO
    }
    for (int j = 1; j < 12; j++) a[0] = _mm512_add_epi32(a[0], a[j]);
    return float(a[0][0]);
}

FOR("avx512f,avx512vnni") float int8_avx512_vnni(float x) {
    __m512i a[12], b = _mm512_set1_epi8(char(int(x) | 1)), c = _mm512_set1_epi32(int(x));
    for (auto& v : a) v = b;
    for (std::int64_t turn = 0; turn < TURNS; turn++) {
#define DO(j) a[j] = _mm512_dpbusd_epi32(a[j], b, c);
        TWELVE(DO)
#undef DO
    }
    for (int j = 1; j < 12; j++) a[0] = _mm512_add_epi32(a[0], a[j]);
    return float(a[0][0]);
}

#endif  // ROOFLINE_X86

#ifdef ROOFLINE_NEON

// ---- Arm: up to four instructions a cycle, and registers for twice as many chains ----

float float32_neon(float x) {
    float32x4_t a[24], half = vdupq_n_f32(0.5f), b = vdupq_n_f32(x);
    for (auto& v : a) v = b;
    for (std::int64_t turn = 0; turn < TURNS; turn++) {
#define DO(j) a[j] = vfmaq_f32(b, a[j], half), a[j + 12] = vfmaq_f32(b, a[j + 12], half);
        TWELVE(DO)
#undef DO
    }
    for (int j = 1; j < 24; j++) a[0] = vaddq_f32(a[0], a[j]);
    return vgetq_lane_f32(a[0], 0);
}

// In assembly: clang before 16 knows the intrinsic only where a whole file may use it.
FOR_DOTPROD float int8_neon_dotprod(float x) {
    int32x4_t a[24];
    int8x16_t b = vdupq_n_s8(std::int8_t(int(x) | 1)), c = vdupq_n_s8(3);
    for (auto& v : a) v = vreinterpretq_s32_s8(b);
    for (std::int64_t turn = 0; turn < TURNS; turn++) {
#define DOT(j) asm("sdot %0.4s, %1.16b, %2.16b" : "+w"(a[j]) : "w"(b), "w"(c));
#define DO(j) DOT(j) DOT(j + 12)
        TWELVE(DO)
#undef DO
#undef DOT
    }
    for (int j = 1; j < 24; j++) a[0] = vaddq_s32(a[0], a[j]);
    return float(vgetq_lane_s32(a[0], 0));
}

#endif  // ROOFLINE_NEON

[[maybe_unused]] bool has(const char* feature) {
    static const auto features = cpu_features();
    return std::find(features.begin(), features.end(), feature) != features.end();
}

Reading reading() {
#ifdef ROOFLINE_X86
    if (has("avx512f")) return read_avx512;
    if (has("avx2")) return read_avx2;
#endif
    return read_portable;
}

struct Free {
    void operator()(std::byte* p) const { ::operator delete[](p, std::align_val_t(4096)); }
};

}  // namespace

double read_bandwidth(std::int64_t bytes, int passes) {
    const std::int64_t chunks = std::max<std::int64_t>(1, bytes / CHUNK);
    auto memory = new (std::align_val_t(4096)) std::byte[std::size_t(chunks * CHUNK)];
    std::unique_ptr<std::byte[], Free> buffer(memory);
    // Written first: pages that were never written are all the same page of zeros.
    auto write = [&](std::int64_t i, int) { std::memset(memory + i * CHUNK, int(i), CHUNK); };
    pool().run(chunks, write);
    Reading read = reading();
    auto work = [&](std::int64_t i, int) { sink += std::uint32_t(read(memory + i * CHUNK)); };
    double best = 0;
    for (int pass = 0; pass < passes; pass++)
        best = std::max(best, double(chunks * CHUNK) / seconds(chunks, work));
    return best;
}

std::vector<Peak> peaks(int passes) {
    std::vector<Peak> found;
    found.push_back({"portable", rate(float32_portable, PORTABLE_OPS, passes), 0});
#ifdef ROOFLINE_X86
    constexpr double FLOATS_256 = 12 * 2 * 8, FLOATS_512 = 12 * 2 * 16;
    constexpr double BYTES_256 = 12 * 2 * 32, BYTES_512 = 12 * 2 * 64;
    if (has("avx2") && has("fma"))
        found.push_back({"avx2", rate(float32_avx2, FLOATS_256, passes),
                         rate(int8_avx2, BYTES_256, passes)});
    if (has("avx512f") && has("avx512bw")) {
        double floats = rate(float32_avx512, FLOATS_512, passes);
        found.push_back({"avx512", floats, rate(int8_avx512, BYTES_512, passes)});
        if (has("avx512_vnni"))
            found.push_back(
                {"avx512_vnni", floats, rate(int8_avx512_vnni, BYTES_512, passes)});
    }
#endif
#ifdef ROOFLINE_NEON
    found.push_back({"neon", rate(float32_neon, 24 * 2 * 4, passes), 0});
    if (has("dotprod"))
        found.push_back({"neon_dotprod", found.back().float32,
                         rate(int8_neon_dotprod, 24 * 2 * 16, passes)});
#endif
    return found;
}

}  // namespace gptoss
