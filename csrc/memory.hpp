// Large blocks of memory: aligned for vectors, in huge pages where the system has them, not filled.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <new>
#include <utility>

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace gptoss {

// Begin to read a part of a mapped file. Asking for many parts before the first is touched, they
// come from the disk side by side.
inline void will_need([[maybe_unused]] const void* p, [[maybe_unused]] std::size_t bytes) {
#ifdef __linux__
    const auto at = reinterpret_cast<std::uintptr_t>(p), page = at & ~std::uintptr_t(4095);
    madvise(reinterpret_cast<void*>(page), at - page + bytes, MADV_WILLNEED);
#endif
}

template <class T>
class Block {
public:
    Block() = default;
    explicit Block(std::size_t n) {
        const std::size_t bytes = n * sizeof(T);
        align_ = bytes >= (4u << 20) ? 2u << 20 : 64;
        data_ = static_cast<T*>(::operator new(bytes ? bytes : 1, std::align_val_t(align_)));
#ifdef __linux__
        if (bytes >= (4u << 20)) madvise(data_, bytes, MADV_HUGEPAGE);
#endif
    }
    Block(Block&& other) noexcept { swap(other); }
    Block& operator=(Block&& other) noexcept { swap(other); return *this; }
    ~Block() { if (data_) ::operator delete(data_, std::align_val_t(align_)); }
    T* data() const { return data_; }

private:
    void swap(Block& other) { std::swap(data_, other.data_), std::swap(align_, other.align_); }
    T* data_ = nullptr;
    std::size_t align_ = 64;
};

}  // namespace gptoss
