#include "cpu/integer_bytes.h"

namespace hf_spqr {
extern const IntegerKernels kVnniIntegers = integer_kernels_of<Bytes>();
}
