#include "cuda/linear_launch.cuh"
#include "cuda/stats_affine_tile.cuh"

namespace hf_spqr {

int linear_affine32(const LinearArgs& a, void* stream) {
    if (a.weight.bits == 2) return launch_linear<StatsAffineTile<32, 2>, 2>(a, stream);
    if (a.weight.bits == 3) return launch_linear<StatsAffineTile<32, 3>, 3>(a, stream);
    if (a.weight.bits == 4) return launch_linear<StatsAffineTile<32, 4>, 4>(a, stream);
    return launch_linear<StatsAffineTile<32, 8>, 8>(a, stream);
}

}  // namespace hf_spqr
