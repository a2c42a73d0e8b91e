#include "cpu.hpp"

namespace gptoss {

std::vector<std::string> cpu_features() {
    std::vector<std::string> found;
#if (defined(__GNUC__) || defined(__clang__)) && (defined(__x86_64__) || defined(__i386__))
    __builtin_cpu_init();
#define GPTOSS_ASK(gcc_name, name) \
    if (__builtin_cpu_supports(gcc_name)) found.emplace_back(name)
    GPTOSS_ASK("avx2", "avx2");
    GPTOSS_ASK("fma", "fma");
    GPTOSS_ASK("avx512f", "avx512f");
    GPTOSS_ASK("avx512bw", "avx512bw");
    GPTOSS_ASK("avx512dq", "avx512dq");
    GPTOSS_ASK("avx512vl", "avx512vl");
    GPTOSS_ASK("avx512vnni", "avx512_vnni");
    GPTOSS_ASK("avx512bf16", "avx512_bf16");
#undef GPTOSS_ASK
#elif defined(__aarch64__) || defined(_M_ARM64)
    found.emplace_back("neon");  // every 64-bit Arm has it
#endif
    return found;
}

}  // namespace gptoss
