#include "cuda/stats_any.cuh"
#include "cuda/tiled_launch.cuh"

namespace hf_spqr {

int tiled_spqr_any(const TiledArgs& a, void* stream) {
    if (a.weight.bits == 2) return launch_tiled<StatsAny<Format::spqr, 2>, 2, true>(a, stream);
    if (a.weight.bits == 3) return launch_tiled<StatsAny<Format::spqr, 3>, 3, true>(a, stream);
    return launch_tiled<StatsAny<Format::spqr, 4>, 4, true>(a, stream);
}

}  // namespace hf_spqr
