#include "cuda/resident_launch.cuh"
#include "cuda/stats_affine128.cuh"

namespace hf_spqr {

int resident_affine128(const ResidentArgs& a, void* stream) {
    if (a.weight.bits == 2) return launch_resident<StatsAffine128<2>, 2>(a, stream);
    if (a.weight.bits == 3) return launch_resident<StatsAffine128<3>, 3>(a, stream);
    if (a.weight.bits == 4) return launch_resident<StatsAffine128<4>, 4>(a, stream);
    return launch_resident<StatsAffine128<8>, 8>(a, stream);
}

}  // namespace hf_spqr
