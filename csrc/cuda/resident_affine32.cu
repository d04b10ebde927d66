#include "cuda/resident_launch.cuh"
#include "cuda/stats_affine_tile.cuh"

namespace hf_spqr {

int resident_affine32(const ResidentArgs& a, void* stream) {
    if (a.weight.bits == 2) return launch_resident<StatsAffineTile<32, 2>, 2>(a, stream);
    if (a.weight.bits == 3) return launch_resident<StatsAffineTile<32, 3>, 3>(a, stream);
    if (a.weight.bits == 4) return launch_resident<StatsAffineTile<32, 4>, 4>(a, stream);
    return launch_resident<StatsAffineTile<32, 8>, 8>(a, stream);
}

}  // namespace hf_spqr
