// Whether this process may use AMX. Linux gives the room for tiles only to processes that ask for it.
#pragma once
#include <cpuid.h>
#include <cstdint>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace hf_spqr {
namespace {

// Tiles with products of bf16 and of int8.
bool cpu_has_amx() {
    constexpr unsigned kBf16 = 1u << 22, kTiles = 1u << 24, kInt8 = 1u << 25, kAll = kBf16 | kTiles | kInt8;
    unsigned a, b, c, d;
    return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d & kAll) == kAll;
}

// Whether the system keeps the tiles of each thread apart.
bool system_saves_tiles() {
    constexpr uint32_t kConfig = 1u << 17, kData = 1u << 18;
    unsigned a, b, c, d;
    if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & bit_OSXSAVE)) return false;
    uint32_t low, high;
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return (low & (kConfig | kData)) == (kConfig | kData);
}

// Asks for the whole process, threads that run already included; what it starts by exec asks again.
bool system_gives_tiles() {
#if defined(__linux__) && defined(SYS_arch_prctl)
    constexpr long kRequest = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    return syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
#else
    return false;
#endif
}

bool may_use_amx() {
    return cpu_has_amx() && system_saves_tiles() && system_gives_tiles();
}

}  // namespace
}  // namespace hf_spqr
