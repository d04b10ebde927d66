#include "cuda/int4.cuh"
#include "cuda/int8_files.h"
#include "cuda/int8_many_launch.cuh"

namespace hf_spqr {

int int4_many(const Int8Args& a, void* stream) {
    Tiles tiles{a.weight.rows, a.tokens, {}};
    if (const int status = device_limits(tiles.device)) return status;
    return launch_int8_many<HalfBytes, true>(a, tiles, stream);
}

int pack_half_bytes(const PadArgs& a, void* stream) {
    return launch<pack_half_bytes_kernel>({a.tokens, 1}, kPackThreads, 0, stream, a);
}

}  // namespace hf_spqr
