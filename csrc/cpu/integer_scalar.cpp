#include "cpu/integer_madd.h"

namespace hf_spqr {
extern const IntegerKernels kScalarIntegers = integer_kernels_of<Pairs>();
}
