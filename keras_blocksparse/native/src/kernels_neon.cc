// aarch64.
#define KBS_ISA neon
#define KBS_TABLE kNeon
#define KBS_NAME "neon"
#define KBS_LANES 4
#define KBS_REGISTERS 32
#include "vector-inl.h"

#include <arm_neon.h>

namespace kbs {
namespace neon {
namespace {

constexpr int kZeroPoint = 0;

// The other lanes may hold anything.
KBS_INLINE V in_low_lanes(V v) { return v; }

KBS_INLINE I dot4(I sum, I w, I x) {
  const int8x16_t a = (int8x16_t)w, b = (int8x16_t)x;
  const int32x4_t low = vpaddlq_s16(vmull_s8(vget_low_s8(a), vget_low_s8(b)));
  const int32x4_t high = vpaddlq_s16(vmull_high_s8(a, b));
  return sum + (I)vpaddq_s32(low, high);
}

}  // namespace
}  // namespace neon
}  // namespace kbs

#include "table-inl.h"
