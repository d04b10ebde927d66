#include "cuda/resident_launch.cuh"
#include "cuda/stats_spqr16.cuh"

namespace hf_spqr {

int resident_spqr16(const ResidentArgs& a, void* stream) {
    if (a.weight.bits == 2) return launch_resident<StatsSpqr16<2>, 2>(a, stream);
    if (a.weight.bits == 3) return launch_resident<StatsSpqr16<3>, 3>(a, stream);
    return launch_resident<StatsSpqr16<4>, 4>(a, stream);
}

}  // namespace hf_spqr
