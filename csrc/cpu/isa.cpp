#include <atomic>
#include "cpu/kernels.h"
#if defined(HF_SPQR_AMX) && !defined(HF_SPQR_EMU_AMX)
#include "cpu/permission_amx.h"
#endif
#if defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#elif defined(__aarch64__) && defined(__APPLE__)
#include <sys/sysctl.h>
#endif

namespace hf_spqr {
namespace {

#if defined(HF_SPQR_EMU_AMX)
bool may_use_amx() {  // csrc/emu/amx.h
    return true;
}
#endif

#if defined(__aarch64__)
bool has_dotprod() {
#if defined(__linux__)
    constexpr unsigned long kAsimdDp = 1ul << 20;  // HWCAP_ASIMDDP, which the headers of older systems lack
    return getauxval(AT_HWCAP) & kAsimdDp;
#elif defined(__APPLE__)
    int has = 0;
    size_t size = sizeof has;
    return sysctlbyname("hw.optional.arm.FEAT_DotProd", &has, &size, nullptr, 0) == 0 && has;
#else
    return false;
#endif
}
#endif

Isa detect() {
#if defined(__aarch64__)
    return has_dotprod() ? Isa::neon_dotprod : Isa::neon;
#else
#if defined(__x86_64__)
    __builtin_cpu_init();  // asks the processor, and whether the system saves its wide registers
    const bool avx2 =
        __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
    const bool vnni = __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512vbmi");
    const bool bf16 = __builtin_cpu_supports("avx512bf16");
#if defined(HF_SPQR_AMX)
    if (avx2 && avx512 && vnni && bf16 && may_use_amx()) return Isa::amx;
#endif
    if (avx2 && avx512 && vnni) return bf16 ? Isa::avx512_bf16 : Isa::avx512_vnni;
    if (avx2) return avx512 ? Isa::avx512 : Isa::avx2;
#endif
    return Isa::scalar;
#endif
}

std::atomic<int> lowered{kIsaCount};  // kIsaCount: not lowered

}  // namespace

const char* isa_name(Isa isa) {
#if defined(__aarch64__)
    constexpr const char* kNames[kIsaCount] = {"neon", "neon_dotprod"};
#else
    constexpr const char* kNames[kIsaCount] = {"scalar", "avx2", "avx512", "avx512_vnni", "avx512_bf16", "amx"};
#endif
    return kNames[int(isa)];
}

Isa best_isa() {
    static const Isa best = detect();
    return best;
}

Isa current_isa() {
    const int isa = lowered.load(std::memory_order_relaxed);
    return isa < int(best_isa()) ? Isa(isa) : best_isa();
}

bool lower_isa(Isa isa) {
    if (isa > best_isa()) return false;
    lowered.store(int(isa), std::memory_order_relaxed);
    return true;
}

const Kernels& kernels() {
#if defined(__x86_64__)
    switch (current_isa()) {
#if defined(HF_SPQR_AMX)
        case Isa::amx:
            return amx_kernels();
#endif
        case Isa::avx512_bf16:
            return bf16_kernels();
        case Isa::avx512_vnni:
            return kVnniKernels;
        case Isa::avx512:
            return kAvx512Kernels;
        case Isa::avx2:
            return kAvx2Kernels;
        default:
            break;
    }
#elif defined(__aarch64__)
    if (current_isa() == Isa::neon_dotprod) return kDotprodKernels;
#endif
    return kBaseKernels;
}

}  // namespace hf_spqr
