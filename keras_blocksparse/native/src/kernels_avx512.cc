// AVX-512 F, BW, DQ, VL: Skylake-X.
#define KBS_ISA avx512
#define KBS_TABLE kAvx512
#define KBS_NAME "avx512"
#define KBS_LANES 16
#define KBS_REGISTERS 32
#include "vector-inl.h"

#include <immintrin.h>

namespace kbs {
namespace avx512 {
namespace {

constexpr int kZeroPoint = 0;

// The other lanes may hold anything.
KBS_INLINE V in_low_lanes(V v) { return v; }
KBS_INLINE V in_low_lanes(Floats<4> v) { return (V)_mm512_castps128_ps512((__m128)v); }
KBS_INLINE V in_low_lanes(Floats<8> v) { return (V)_mm512_castps256_ps512((__m256)v); }

KBS_INLINE V repeat_quad(const float* p) { return (V)_mm512_maskz_broadcast_f32x4(0xffff, _mm_loadu_ps(p)); }

KBS_INLINE I dot4(I sum, I w, I x) {
  const __m512i a = (__m512i)w, b = (__m512i)x;
  const __m512i even =
      _mm512_madd_epi16(_mm512_srai_epi16(_mm512_slli_epi16(a, 8), 8), _mm512_srai_epi16(_mm512_slli_epi16(b, 8), 8));
  const __m512i odd = _mm512_madd_epi16(_mm512_srai_epi16(a, 8), _mm512_srai_epi16(b, 8));
  return sum + (I)even + (I)odd;
}

}  // namespace
}  // namespace avx512
}  // namespace kbs

#include "table-inl.h"
