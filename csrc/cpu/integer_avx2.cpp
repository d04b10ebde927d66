#include "cpu/integer_madd.h"

namespace hf_spqr {
extern const IntegerKernels kAvx2Integers = integer_kernels_of<Pairs>();
}
