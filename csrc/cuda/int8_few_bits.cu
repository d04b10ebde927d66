#include "cuda/int8_files.h"
#include "cuda/int8_launch.cuh"

namespace hf_spqr {

int int8_few_bits(const Int8Args& a, void* stream) {
    if (a.weight.bits == 1) return launch_int8<1>(a, stream);
    if (a.weight.bits == 2) return launch_int8<2>(a, stream);
    if (a.weight.bits == 3) return launch_int8<3>(a, stream);
    return launch_int8<4>(a, stream);
}

}  // namespace hf_spqr
