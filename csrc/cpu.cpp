#include "cpu.hpp"

#if defined(__aarch64__) && defined(__linux__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#elif defined(__aarch64__) && defined(__APPLE__)
#include <sys/sysctl.h>
#endif

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
#if defined(__linux__)
    if (getauxval(AT_HWCAP) & HWCAP_ASIMDDP) found.emplace_back("dotprod");
#ifdef HWCAP2_I8MM
    if (getauxval(AT_HWCAP2) & HWCAP2_I8MM) found.emplace_back("i8mm");
#endif
#elif defined(__APPLE__)
    auto has = [](const char* name) {
        int value = 0;
        std::size_t size = sizeof value;
        return sysctlbyname(name, &value, &size, nullptr, 0) == 0 && value != 0;
    };
    if (has("hw.optional.arm.FEAT_DotProd")) found.emplace_back("dotprod");
    if (has("hw.optional.arm.FEAT_I8MM")) found.emplace_back("i8mm");
#endif
#endif
    return found;
}

}  // namespace gptoss
