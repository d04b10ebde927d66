// Launches the kernel for 17 to 128 tokens.
#pragma once
#include "cuda/launch.cuh"
#include "cuda/tiled.cuh"

namespace hf_spqr {

template <class Stats, int BITS, int NT, bool OUTLIERS>
int launch_tiled(const TiledArgs& a, void* stream) {
    DeviceLimits device{};
    if (const int status = device_limits(device)) return status;
    const int shared = TiledMap<Stats, NT>::all(a.weight);
    if (shared > device.shared_bytes) return kNoKernel;
    const Grid grid{int64_t(tiled_row_tiles(a.weight)) * a.parts, ceil_div(a.tokens, 8 * NT)};
    return launch<tiled_kernel<Stats, BITS, NT, OUTLIERS>, true>(grid, kTiledThreads, shared, stream, a);
}

template <class Stats, int BITS, bool OUTLIERS>
int launch_tiled(const TiledArgs& a, void* stream) {
    if constexpr (tiled_token_tiles(BITS, kTiledTokens) == 8) {
        if (tiled_token_tiles(BITS, a.tokens) == 8) return launch_tiled<Stats, BITS, 8, OUTLIERS>(a, stream);
    }
    return launch_tiled<Stats, BITS, 4, OUTLIERS>(a, stream);
}

}  // namespace hf_spqr
