// One kernel launch, with its error.
#pragma once
#include "cuda/dev.cuh"

#ifdef HF_SPQR_EMU
namespace hf_spqr {
using emu::device_limits;
using emu::DeviceLimits;
using emu::launch;
}
#else
#include <atomic>

namespace hf_spqr {

struct Grid {
    int64_t x, y = 1;
};

constexpr int kPlainShared = 48 * 1024;  // more than this must be asked for, once per kernel and device
constexpr int kMaxGridY = 65535;

struct DeviceLimits {
    int multiprocessors, shared_bytes;  // of a block
};

inline int device_limits(DeviceLimits& limits) {
    int device = 0;
    if (const cudaError_t status = cudaGetDevice(&device)) return status;
    if (const cudaError_t status =
            cudaDeviceGetAttribute(&limits.multiprocessors, cudaDevAttrMultiProcessorCount, device))
        return status;
    return cudaDeviceGetAttribute(&limits.shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
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

template <auto KERNEL, class Args>
int launch(Grid grid, int threads, int shared_bytes, void* stream, const Args& args) {
    if (grid.y > kMaxGridY) return cudaErrorInvalidConfiguration;
    if (shared_bytes > kPlainShared) {
        if (const cudaError_t status = allow_shared<KERNEL>(shared_bytes)) return status;
    }
    void* arguments[] = {const_cast<Args*>(&args)};
    return cudaLaunchKernel(reinterpret_cast<const void*>(KERNEL), dim3(unsigned(grid.x), unsigned(grid.y)),
                            dim3(unsigned(threads)), arguments, size_t(shared_bytes),
                            static_cast<cudaStream_t>(stream));
}

}  // namespace hf_spqr
#endif
