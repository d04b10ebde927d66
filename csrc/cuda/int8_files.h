// The integer kernels are compiled in four files side by side, by the width of the codes.
#pragma once
#include "cuda/kernels.h"

namespace hf_spqr {

int int8_few_bits(const Int8Args&, void* stream);  // 1 to 4
int int8_planes(const Int8Args&, void* stream);    // 5 to 7
int int8_bytes(const Int8Args&, void* stream);     // 8
int int4_many(const Int8Args&, void* stream);      // 4, times as many
int pack_half_bytes(const PadArgs&, void* stream);

}  // namespace hf_spqr
