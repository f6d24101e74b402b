// Any x86-64, and any CPU without a unit of its own: vectors of 16 bytes.
#define KBS_ISA baseline
#define KBS_TABLE kBaseline
#define KBS_NAME "baseline"
#define KBS_LANES 4
#define KBS_REGISTERS 16
#include "vector-inl.h"

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

namespace kbs {
namespace baseline {
namespace {

constexpr int kZeroPoint = 0;

// The other lanes may hold anything.
KBS_INLINE V in_low_lanes(V v) { return v; }

// sum[i] += w[4i..4i+4] . x[4i..4i+4], bytes as signed: even and odd bytes as 16 bits, whose products fit 32.
KBS_INLINE I dot4(I sum, I w, I x) {
#if defined(__SSE2__)
  const __m128i a = (__m128i)w, b = (__m128i)x;
  const __m128i even = _mm_madd_epi16(_mm_srai_epi16(_mm_slli_epi16(a, 8), 8), _mm_srai_epi16(_mm_slli_epi16(b, 8), 8));
  const __m128i odd = _mm_madd_epi16(_mm_srai_epi16(a, 8), _mm_srai_epi16(b, 8));
  return sum + (I)even + (I)odd;
#else
  for (int shift = 0; shift < 32; shift += 8) sum += ((w << (24 - shift)) >> 24) * ((x << (24 - shift)) >> 24);
  return sum;
#endif
}

}  // namespace
}  // namespace baseline
}  // namespace kbs

#include "table-inl.h"
