// What the tests are made of: a count of failures, random numbers, and memory with a wall behind it.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>

#include "kernels.hpp"

namespace gptoss {

inline int failures = 0;

#define CHECK(condition, ...)                                              \
    do {                                                                   \
        if (!(condition)) {                                                \
            std::printf("%s:%d: %s: ", __FILE__, __LINE__, #condition);    \
            std::printf(__VA_ARGS__);                                      \
            std::puts("");                                                 \
            if (++failures > 20) std::exit(1);                             \
        }                                                                  \
    } while (0)

inline int report(const char* what) {
    std::printf("%s: %s\n", what, failures ? "FAILED" : "ok");
    return failures != 0;
}

// n numbers whose last one ends at a page nobody may touch: the first byte read or written behind
// them ends the program, under a sanitizer or not.
template <class T>
class Walled {
public:
    explicit Walled(i64 n, T value = {}) : size_(n) {
        const std::size_t page = std::size_t(sysconf(_SC_PAGESIZE)), bytes = std::size_t(n) * sizeof(T);
        length_ = (bytes + page - 1) / page * page + page;
        space_ = (char*)mmap(nullptr, length_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (space_ == MAP_FAILED || mprotect(space_ + length_ - page, page, PROT_NONE)) std::abort();
        data_ = (T*)(space_ + length_ - page - bytes);
        for (i64 i = 0; i < n; i++) data_[i] = value;
    }
    Walled(const Walled& other) : Walled(other.size_) { std::memcpy((void*)data_, other.data_, std::size_t(size_) * sizeof(T)); }
    Walled& operator=(const Walled&) = delete;
    ~Walled() { munmap(space_, length_); }

    T* data() const { return data_; }
    i64 size() const { return size_; }
    T& operator[](i64 i) const { return data_[i]; }

private:
    i64 size_;
    std::size_t length_;
    char* space_;
    T* data_;
};

inline std::mt19937& random_bits() {
    static std::mt19937 bits(1);
    return bits;
}
inline i64 below(i64 n) { return i64(random_bits()() % std::uint64_t(n)); }
inline float number() { return float(std::int32_t(random_bits()())) * 0x1p-30f; }  // -2 .. 2

inline Walled<float> numbers(i64 n, float scale = 1) {
    Walled<float> x(n);
    for (i64 i = 0; i < n; i++) x[i] = number() * scale;
    return x;
}

inline float from_bf16(std::uint16_t x) {
    const std::uint32_t wide = std::uint32_t(x) << 16;
    float f;
    std::memcpy(&f, &wide, 4);
    return f;
}
inline std::uint16_t cut_to_bf16(float f) {
    std::uint32_t wide;
    std::memcpy(&wide, &f, 4);
    return std::uint16_t(wide >> 16);
}

// Bit for bit; any NaN is any other.
inline bool same(const float* a, const float* b, i64 n) {
    for (i64 i = 0; i < n; i++)
        if (std::memcmp(a + i, b + i, 4) && !(std::isnan(a[i]) && std::isnan(b[i]))) {
            std::printf("[%lld]: %a is not %a; ", (long long)i, double(a[i]), double(b[i]));
            return false;
        }
    return true;
}
template <class T>
bool same(const Walled<T>& a, const Walled<T>& b) {
    if constexpr (std::is_same_v<T, float>) return same(a.data(), b.data(), a.size());
    else return !std::memcmp(a.data(), b.data(), std::size_t(a.size()) * sizeof(T));
}

// Random numbers in a format of a checkpoint, and what each stands for.
struct Stored {
    Format format;
    i64 rows, columns;
    Walled<std::uint8_t> data, scales;

    static i64 width(Format f, i64 columns) {  // bytes of a row
        switch (f) {
            case Format::f32: return columns * 4;
            case Format::bf16: return columns * 2;
            case Format::mxfp4: return columns / 2;
            case Format::split: return (columns + 31) / 32 * 128;
            case Format::twelve: break;  // is made from bfloat16
        }
        return 0;
    }
    Stored(Format f, i64 rows, i64 columns)
        : format(f), rows(rows), columns(columns), data(rows * width(f, columns)),
          scales(f == Format::mxfp4 ? rows * columns / 32 : 0) {
        for (i64 i = 0; i < scales.size(); i++) scales[i] = std::uint8_t(120 + below(12));
        if (f == Format::mxfp4)
            for (i64 i = 0; i < data.size(); i++) data[i] = std::uint8_t(below(256));
        else
            for (i64 r = 0; r < rows; r++)
                for (i64 c = 0; c < columns; c++) put(r, c, number());
    }
    Matrix matrix() const { return {format, data.data(), scales.size() ? scales.data() : nullptr, rows, columns}; }
    static i64 split_at(i64 c) { return c / 32 * 32 + c % 2 * 16 + c % 32 / 2; }
    void put(i64 r, i64 c, float x) const {
        std::uint8_t* row = data.data() + r * width(format, columns);
        const std::uint16_t half = cut_to_bf16(x);
        if (format == Format::bf16) std::memcpy(row + 2 * c, &half, 2);
        else std::memcpy(row + 4 * (format == Format::split ? split_at(c) : c), &x, 4);
    }
    double at(i64 r, i64 c) const {
        static const double VALUES[8] = {0, .5, 1, 1.5, 2, 3, 4, 6};
        const std::uint8_t* row = data.data() + r * width(format, columns);
        if (format == Format::mxfp4) {
            const int code = row[c / 2] >> (c % 2 * 4) & 15;
            return std::ldexp(code < 8 ? VALUES[code] : -VALUES[code - 8], scales[r * (columns / 32) + c / 32] - 127);
        }
        std::uint16_t half;
        float x;
        if (format == Format::bf16) return std::memcpy(&half, row + 2 * c, 2), from_bf16(half);
        std::memcpy(&x, row + 4 * (format == Format::split ? split_at(c) : c), 4);
        return x;
    }
};

inline const char* name_of(Format f) {
    return f == Format::f32 ? "f32" : f == Format::bf16 ? "bf16" : f == Format::mxfp4 ? "mxfp4" : "split";
}

inline const Kernels& table_of(const std::string& name) {
    if (!use_kernels(name)) std::abort();
    return kernels();
}

}  // namespace gptoss
