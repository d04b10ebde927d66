#include "cuda/stats_spqr16.cuh"
#include "cuda/tiled_launch.cuh"

namespace hf_spqr {

int tiled_spqr16(const TiledArgs& a, void* stream) {
    if (a.weight.bits == 2) return launch_tiled<StatsSpqr16<2>, 2, true>(a, stream);
    if (a.weight.bits == 3) return launch_tiled<StatsSpqr16<3>, 3, true>(a, stream);
    return launch_tiled<StatsSpqr16<4>, 4, true>(a, stream);
}

}  // namespace hf_spqr
