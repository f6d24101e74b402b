// AVX2 with FMA: Haswell, Zen and later.
#define KBS_ISA avx2
#define KBS_TABLE kAvx2
#define KBS_NAME "avx2"
#define KBS_LANES 8
#define KBS_REGISTERS 16
#include "vector-inl.h"

#include <immintrin.h>

namespace kbs {
namespace avx2 {
namespace {

constexpr int kZeroPoint = 0;

// The other lanes may hold anything.
KBS_INLINE V in_low_lanes(V v) { return v; }
KBS_INLINE V in_low_lanes(Floats<4> v) { return (V)_mm256_castps128_ps256((__m128)v); }

// As in the baseline. vpmaddubsw would take half the instructions, and saturate.
KBS_INLINE I dot4(I sum, I w, I x) {
  const __m256i a = (__m256i)w, b = (__m256i)x;
  const __m256i even =
      _mm256_madd_epi16(_mm256_srai_epi16(_mm256_slli_epi16(a, 8), 8), _mm256_srai_epi16(_mm256_slli_epi16(b, 8), 8));
  const __m256i odd = _mm256_madd_epi16(_mm256_srai_epi16(a, 8), _mm256_srai_epi16(b, 8));
  return sum + (I)even + (I)odd;
}

}  // namespace
}  // namespace avx2
}  // namespace kbs

#include "table-inl.h"
