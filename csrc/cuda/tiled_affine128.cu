#include "cuda/stats_affine_half.cuh"
#include "cuda/tiled_launch.cuh"

namespace hf_spqr {

int tiled_affine128(const TiledArgs& a, void* stream) {
    if (a.weight.bits == 2) return launch_tiled<StatsAffineHalf<StatsAffine128<2>, 2>, 2, false>(a, stream);
    if (a.weight.bits == 3) return launch_tiled<StatsAffineHalf<StatsAffine128<3>, 3>, 3, false>(a, stream);
    if (a.weight.bits == 4) return launch_tiled<StatsAffineHalf<StatsAffine128<4>, 4>, 4, false>(a, stream);
    return launch_tiled<StatsAffineHalf<StatsAffine128<8>, 8>, 8, false>(a, stream);
}

}  // namespace hf_spqr
