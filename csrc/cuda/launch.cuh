// One kernel launch, with its error.
#pragma once
#include "cuda/dev.cuh"

#ifdef HF_SPQR_EMU
namespace hf_spqr {
using emu::device_limits;
using emu::DeviceLimits;
using emu::kMaxGridY;
using emu::launch;
}  // namespace hf_spqr
#else
#include <atomic>

namespace hf_spqr {

struct Grid {
    int64_t x, y = 1;
};

constexpr int kMaxGridY = 65535, kMaxGridX = 2147483647;  // blocks

constexpr int kPlainShared = 48 * 1024;  // more than this must be asked for, once per kernel and device

struct DeviceLimits {
    int multiprocessors, shared_bytes;  // of a block
    int generation;                     // 8 of compute capability 8.6
};

// Whether KERNEL waits for the one before it (dev::wait_for_kernel): as the code says that this device runs, which may
// have been translated from PTX of an older generation.
template <auto KERNEL>
bool can_overlap() {
    static std::atomic<uint64_t> known{0}, waits{0};  // a bit per device; further devices ask every time
    int device = 0;
    if (cudaGetDevice(&device) != cudaSuccess) return false;
    const uint64_t bit = device < 64 ? uint64_t(1) << device : 0;
    if (known.load() & bit) return waits.load() & bit;
    cudaFuncAttributes attributes{};
    if (cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(KERNEL)) != cudaSuccess) return false;
    const bool yes = attributes.ptxVersion >= 90;
    if (yes) waits.fetch_or(bit);
    known.fetch_or(bit);
    return yes;
}

inline int device_limits(DeviceLimits& limits) {
    int device = 0;
    if (const cudaError_t status = cudaGetDevice(&device)) return status;
    if (const cudaError_t status =
            cudaDeviceGetAttribute(&limits.multiprocessors, cudaDevAttrMultiProcessorCount, device))
        return status;
    if (const cudaError_t status =
            cudaDeviceGetAttribute(&limits.shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device))
        return status;
    return cudaDeviceGetAttribute(&limits.generation, cudaDevAttrComputeCapabilityMajor, device);
}

template <auto KERNEL>
cudaError_t allow_shared(int bytes) {
    static std::atomic<uint64_t> allowed{0};  // a bit per device; further devices ask every time
    int device = 0;
    if (const cudaError_t status = cudaGetDevice(&device)) return status;
    const uint64_t bit = device < 64 ? uint64_t(1) << device : 0;
    if (allowed.load(std::memory_order_relaxed) & bit) return cudaSuccess;
    int most = 0;
    if (const cudaError_t status = cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device))
        return status;
    if (bytes > most) return cudaErrorInvalidValue;
    const auto status = cudaFuncSetAttribute(KERNEL, cudaFuncAttributeMaxDynamicSharedMemorySize, most);
    if (status == cudaSuccess) allowed.fetch_or(bit, std::memory_order_relaxed);
    return status;
}

// OVERLAP: the kernel calls dev::wait_for_kernel, so it may start before the one before it has ended.
template <auto KERNEL, bool OVERLAP = false, class Args>
int launch(Grid grid, int threads, int shared_bytes, void* stream, const Args& args) {
    if (grid.x > kMaxGridX || grid.y > kMaxGridY) return cudaErrorInvalidConfiguration;
    if (shared_bytes > kPlainShared) {
        if (const cudaError_t status = allow_shared<KERNEL>(shared_bytes)) return status;
    }
    void* arguments[] = {const_cast<Args*>(&args)};
    cudaLaunchAttribute overlap{};
    overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    overlap.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(unsigned(grid.x), unsigned(grid.y));
    config.blockDim = dim3(unsigned(threads));
    config.dynamicSmemBytes = size_t(shared_bytes);
    config.stream = static_cast<cudaStream_t>(stream);
    config.attrs = &overlap;
    config.numAttrs = OVERLAP && can_overlap<KERNEL>() ? 1 : 0;
    return cudaLaunchKernelExC(&config, reinterpret_cast<const void*>(KERNEL), arguments);
}

}  // namespace hf_spqr
#endif
