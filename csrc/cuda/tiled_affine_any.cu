#include "cuda/stats_any.cuh"
#include "cuda/tiled_launch.cuh"

namespace hf_spqr {

int tiled_affine_any(const TiledArgs& a, void* stream) {
    if (a.weight.bits == 2) return launch_tiled<StatsAny<Format::affine, 2>, 2, false>(a, stream);
    if (a.weight.bits == 3) return launch_tiled<StatsAny<Format::affine, 3>, 3, false>(a, stream);
    if (a.weight.bits == 4) return launch_tiled<StatsAny<Format::affine, 4>, 4, false>(a, stream);
    return launch_tiled<StatsAny<Format::affine, 8>, 8, false>(a, stream);
}

}  // namespace hf_spqr
