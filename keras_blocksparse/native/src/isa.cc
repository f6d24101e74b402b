// Which instruction set to use: decided once, when kernels are first asked for.
#include <cstdlib>
#include <cstring>

#include "error.h"
#include "kernels.h"

#if defined(__aarch64__)
#include <sys/auxv.h>
#endif

namespace kbs {
#if defined(__x86_64__)
extern const Kernels kAvx2, kAvx512;
extern const Int8Kernels kAvx512Vnni;
#elif defined(__aarch64__)
extern const Kernels kNeon;
extern const Int8Kernels kNeonDot;
#endif
extern const Kernels kBaseline;

namespace {

struct Candidate {
  const Kernels* kernels;
  bool runs;
};

Kernels with_int8(Kernels kernels, const Int8Kernels& int8) {
  kernels.name = int8.name;
  kernels.matmul_rows_i8 = int8.matmul_rows_i8;
  kernels.quantize = int8.quantize;
  return kernels;
}

// The best last.
constexpr int kMost = 4;
int candidates(Candidate (&out)[kMost]) {
  int n = 0;
#if !defined(KBS_NO_BASELINE)
  out[n++] = {&kBaseline, true};
#endif
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  out[n++] = {&kAvx2, avx2};
  out[n++] = {&kAvx512, avx512};
  static const Kernels avx512vnni = with_int8(kAvx512, kAvx512Vnni);
  out[n++] = {&avx512vnni, avx512 && __builtin_cpu_supports("avx512vnni")};
#elif defined(__aarch64__)
  constexpr unsigned long kDotProduct = 1ul << 20;  // HWCAP_ASIMDDP
  out[n++] = {&kNeon, true};
  static const Kernels neondot = with_int8(kNeon, kNeonDot);
  out[n++] = {&neondot, (getauxval(AT_HWCAP) & kDotProduct) != 0};
#endif
  return n;
}

struct Choice {
  const Kernels* kernels = nullptr;
  char wanted[64] = "";  // what KBS_ISA asked for in vain
  bool known = false;
  char available[128] = "";

  Choice() {
    Candidate all[kMost];
    const int n = candidates(all);
    const char* forced = std::getenv("KBS_ISA");
    if (forced && !*forced) forced = nullptr;
    for (int i = 0; i < n; i++) {
      if (all[i].runs) {
        if (*available) std::strcat(available, ",");
        std::strcat(available, all[i].kernels->name);
      }
      if (forced && !std::strcmp(forced, all[i].kernels->name)) known = true;
      if (all[i].runs && (!forced || !std::strcmp(forced, all[i].kernels->name))) kernels = all[i].kernels;
    }
    if (!kernels) std::strncpy(wanted, forced, sizeof(wanted) - 1);
  }
};

const Choice& choice() {
  static const Choice made;
  return made;
}

}  // namespace

const Kernels* kernels() {
  const Choice& c = choice();
  if (!c.kernels)
    fail(KBS_UNSUPPORTED, c.known ? "KBS_ISA=%s: this CPU does not have it; it has %s" : "KBS_ISA=%s is unknown; this CPU has %s",
         c.wanted, c.available);
  return c.kernels;
}

}  // namespace kbs

kbs_status kbs_get_isa(const char** name) {
  if (!name) return kbs::fail(KBS_INVALID_ARGUMENT, "a null pointer was given");
  const kbs::Kernels* k = kbs::kernels();
  if (!k) return KBS_UNSUPPORTED;
  *name = k->name;
  return KBS_OK;
}

const char* kbs_available_isas(void) { return kbs::choice().available; }
