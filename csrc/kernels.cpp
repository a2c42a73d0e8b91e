#include "kernels.hpp"

#include <algorithm>
#include <atomic>

#include "cpu.hpp"

namespace gptoss {

namespace scalar { extern const Kernels table; }
#ifdef GPTOSS_X86
namespace avx2 { extern const Kernels table; }
namespace avx512 { extern const Kernels table; }
namespace avx512_vnni { extern const Kernels table; }
namespace avx512_bf16 { extern const Kernels table; }
#endif
#ifdef GPTOSS_NEON
namespace neon { extern const Kernels table; }
namespace neon_dotprod { extern const Kernels table; }
namespace neon_i8mm { extern const Kernels table; }
#endif

namespace {

// All this processor can run, best first.
std::vector<const Kernels*> usable() {
    std::vector<const Kernels*> found;
    const auto features = cpu_features();
    [[maybe_unused]] auto has = [&](std::initializer_list<const char*> all) {
        return std::all_of(all.begin(), all.end(), [&](const char* f) {
            return std::find(features.begin(), features.end(), f) != features.end();
        });
    };
#ifdef GPTOSS_X86
    const bool wide = has({"avx2", "fma", "avx512f", "avx512bw", "avx512dq", "avx512vl"});
    if (wide && has({"avx512_vnni", "avx512_bf16"})) found.push_back(&avx512_bf16::table);
    if (wide && has({"avx512_vnni"})) found.push_back(&avx512_vnni::table);
    if (wide) found.push_back(&avx512::table);
    if (has({"avx2", "fma"})) found.push_back(&avx2::table);
#endif
#ifdef GPTOSS_NEON
    if (has({"i8mm"})) found.push_back(&neon_i8mm::table);
    if (has({"dotprod"})) found.push_back(&neon_dotprod::table);
    found.push_back(&neon::table);
#endif
    found.push_back(&scalar::table);
    return found;
}

std::atomic<const Kernels*> chosen{nullptr};

}  // namespace

const Kernels& kernels() {
    const Kernels* table = chosen.load(std::memory_order_relaxed);
    if (!table) chosen = table = usable().front();
    return *table;
}

std::vector<std::string> kernel_names() {
    std::vector<std::string> names;
    for (const Kernels* table : usable()) names.emplace_back(table->name);
    return names;
}

bool use_kernels(const std::string& name) {
    for (const Kernels* table : usable())
        if (name == table->name) return chosen = table, true;
    return false;
}

}  // namespace gptoss
