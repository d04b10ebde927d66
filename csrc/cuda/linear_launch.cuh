// Which linear kernel for which number of tokens.
#pragma once
#include "cuda/launch.cuh"
#include "cuda/linear.cuh"

namespace hf_spqr {

template <class Stats, int BITS, int NT, int ROW_BLOCKS, int SLICES>
int launch_linear(const LinearArgs& a, void* stream) {
    using Shape = LinearShape<NT, ROW_BLOCKS, SLICES>;
    constexpr int kBlocksPerSm = NT > 1 && Stats::kInteger ? 1 : 2;  // as many as the registers allow
    const int block_rows = ROW_BLOCKS * kRows;
    const Grid grid{ceil_div(a.weight.rows, block_rows), ceil_div(a.tokens, Shape::kTokens)};
    return launch<linear_kernel<Stats, BITS, NT, ROW_BLOCKS, SLICES, kBlocksPerSm>>(
        grid, Shape::kThreads, Shape::shared_bytes(a.tokens, Stats::kSharedWords), stream, a);
}

template <class Stats, int BITS>
int launch_linear(const LinearArgs& a, void* stream) {
    if (a.tokens <= 8) return launch_linear<Stats, BITS, 1, 1, 8>(a, stream);
    if (a.tokens <= 16) return launch_linear<Stats, BITS, 2, 2, 4>(a, stream);
    return launch_linear<Stats, BITS, 4, 4, 2>(a, stream);
}

// One per layout of statistics, each in a file of its own; bits that the layout's files do not hold are an error.
int linear_spqr16(const LinearArgs&, void* stream);
int linear_spqr_any(const LinearArgs&, void* stream);
int linear_affine128(const LinearArgs&, void* stream);
int linear_affine_channel(const LinearArgs&, void* stream);
int linear_affine_any(const LinearArgs&, void* stream);

}  // namespace hf_spqr
