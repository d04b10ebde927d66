#include "cpu/integer_madd.h"

namespace hf_spqr {
extern const IntegerKernels kAvx512Integers = integer_kernels_of<Pairs>();
}
