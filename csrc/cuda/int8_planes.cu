#include "cuda/int8_files.h"
#include "cuda/int8_launch.cuh"

namespace hf_spqr {

int int8_planes(const Int8Args& a, void* stream) {
    if (a.weight.bits == 5) return launch_int8<5>(a, stream);
    if (a.weight.bits == 6) return launch_int8<6>(a, stream);
    return launch_int8<7>(a, stream);
}

}  // namespace hf_spqr
