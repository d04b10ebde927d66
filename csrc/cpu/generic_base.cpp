#include "cpu/generic.h"

namespace hf_spqr {
extern const Kernels kBaseKernels = {
    nullptr, nullptr, nullptr, prepare_generic, linear_generic, dequantize_generic, read_generic, kBaseIntegers};
}
