// The int8 kernels alone, of an instruction set that differs from another in nothing else. Included last.
#include "int8-inl.h"

namespace kbs {
extern const Int8Kernels KBS_TABLE;
const Int8Kernels KBS_TABLE = {KBS_NAME, KBS_ISA::matmul_rows_i8, KBS_ISA::quantize};
}  // namespace kbs
