// Which linear kernel for which number of tokens.
#pragma once
#include "cuda/launch.cuh"
#include "cuda/linear.cuh"

namespace hf_spqr {

template <class Stats, int BITS, int NT, int R, int WIDTH, int SLICES>
int launch_linear(const LinearArgs& a, void* stream) {
    using Shape = LinearShape<NT, R, WIDTH, SLICES>;
    constexpr int kBlocksPerSm = NT > 1 && (Stats::kInteger || BITS == 8) ? 1 : 2;  // as the registers allow
    const Grid grid{ceil_div(a.weight.rows, Shape::kRowBlocks * kRows)};
    const int shared = Shape::shared_bytes(a.tokens, R * Stats::kSharedWords);
    return launch<linear_kernel<Stats, BITS, NT, R, WIDTH, SLICES, kBlocksPerSm>>(grid, Shape::kThreads, shared,
                                                                                  stream, a);
}

// From 9 tokens on twice as many row blocks share x, which else comes from the L2 cache for every few rows, where
// enough blocks remain to keep all multiprocessors busy. Statistics that are decoded at run time take longer than x
// does.
template <class Stats, int BITS>
int launch_linear(const LinearArgs& a, void* stream) {
    if (a.tokens <= 8) return launch_linear<Stats, BITS, 1, Stats::kRowBlocks, 1, 8>(a, stream);
    if constexpr (Stats::kTileShift >= 0) {
        DeviceLimits device{};
        if (const int status = device_limits(device)) return status;
        const int blocks = ceil_div(a.weight.rows, 4 * kRows);
        if (2 * blocks >= 3 * device.multiprocessors) return launch_linear<Stats, BITS, 2, 1, 4, 2>(a, stream);
    }
    return launch_linear<Stats, BITS, 2, 1, 2, 4>(a, stream);
}

// One per layout of statistics, each in a file of its own; bits that the layout's files do not hold are an error.
int linear_spqr16(const LinearArgs&, void* stream);
int linear_spqr_any(const LinearArgs&, void* stream);
int linear_affine32(const LinearArgs&, void* stream);
int linear_affine64(const LinearArgs&, void* stream);
int linear_affine128(const LinearArgs&, void* stream);
int linear_affine_channel(const LinearArgs&, void* stream);
int linear_affine_any(const LinearArgs&, void* stream);

}  // namespace hf_spqr
