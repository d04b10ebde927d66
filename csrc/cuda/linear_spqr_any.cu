#include "cuda/linear_launch.cuh"
#include "cuda/stats_any.cuh"

namespace hf_spqr {

int linear_spqr_any(const LinearArgs& a, void* stream) {
    if (a.weight.bits == 2) return launch_linear<StatsAny<Format::spqr, 2>, 2>(a, stream);
    if (a.weight.bits == 3) return launch_linear<StatsAny<Format::spqr, 3>, 3>(a, stream);
    return launch_linear<StatsAny<Format::spqr, 4>, 4>(a, stream);
}

}  // namespace hf_spqr
