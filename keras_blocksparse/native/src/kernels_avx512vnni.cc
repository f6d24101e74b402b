// AVX-512 F, BW, DQ, VL and VNNI: Cascade Lake, Zen 4 and later; the int8 kernels, the others are those of AVX-512.
#define KBS_ISA avx512vnni
#define KBS_TABLE kAvx512Vnni
#define KBS_NAME "avx512vnni"
#define KBS_LANES 16
#define KBS_REGISTERS 32
#include "vector-inl.h"

#include <immintrin.h>

namespace kbs {
namespace avx512vnni {
namespace {

// vpdpbusd wants x without a sign; its sums wrap and do not saturate.
constexpr int kZeroPoint = 128;

// The other lanes may hold anything.
KBS_INLINE V in_low_lanes(V v) { return v; }
KBS_INLINE V in_low_lanes(Floats<4> v) { return (V)_mm512_castps128_ps512((__m128)v); }
KBS_INLINE V in_low_lanes(Floats<8> v) { return (V)_mm512_castps256_ps512((__m256)v); }

KBS_INLINE I dot4(I sum, I w, I x) { return (I)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)x, (__m512i)w); }

}  // namespace
}  // namespace avx512vnni
}  // namespace kbs

#include "int8-table-inl.h"
