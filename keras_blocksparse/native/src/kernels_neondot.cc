// aarch64 with the dot-product extension: ARMv8.2 and later; the int8 kernels, the others are those of NEON.
#define KBS_ISA neondot
#define KBS_TABLE kNeonDot
#define KBS_NAME "neondot"
#define KBS_LANES 4
#define KBS_REGISTERS 32
#include "vector-inl.h"

#include <arm_neon.h>

namespace kbs {
namespace neondot {
namespace {

constexpr int kZeroPoint = 0;

// The other lanes may hold anything.
KBS_INLINE V in_low_lanes(V v) { return v; }

KBS_INLINE I dot4(I sum, I w, I x) { return (I)vdotq_s32((int32x4_t)sum, (int8x16_t)w, (int8x16_t)x); }

}  // namespace
}  // namespace neondot
}  // namespace kbs

#include "int8-table-inl.h"
