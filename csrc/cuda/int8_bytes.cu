#include "cuda/int8_files.h"
#include "cuda/int8_launch.cuh"

namespace hf_spqr {

int int8_bytes(const Int8Args& a, void* stream) {
    return launch_int8<8>(a, stream);
}

}  // namespace hf_spqr
