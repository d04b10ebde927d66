#include "cuda/stats_affine_tile.cuh"
#include "cuda/tiled_launch.cuh"

namespace hf_spqr {

int tiled_affine64(const TiledArgs& a, void* stream) {
    if (a.weight.bits == 2) return launch_tiled<StatsAffineTile<64, 2>, 2, false>(a, stream);
    if (a.weight.bits == 3) return launch_tiled<StatsAffineTile<64, 3>, 3, false>(a, stream);
    if (a.weight.bits == 4) return launch_tiled<StatsAffineTile<64, 4>, 4, false>(a, stream);
    return launch_tiled<StatsAffineTile<64, 8>, 8, false>(a, stream);
}

}  // namespace hf_spqr
