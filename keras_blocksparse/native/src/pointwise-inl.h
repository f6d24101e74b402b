// Activations, and the cells' equations for one step. See vector-inl.h for how this file is compiled.
#ifndef KBS_POINTWISE_INL_H_
#define KBS_POINTWISE_INL_H_

#include "vector-inl.h"

namespace kbs {
namespace KBS_ISA {
namespace {

// e^x for x <= 0, also where the result is subnormal; 0 below -104; NaN stays NaN. Within 1 ulp.
KBS_INLINE V exp_negative(V x) {
  x = x < -105.f ? broadcast(-105.f) : x;
  // x = n ln 2 + r: adding 1.5 * 2^23 rounds to n, which is then in the low bits. The upper part of ln 2 has few bits,
  // so that n times it is exact without a fused multiply-add.
  const float magic = 12582912.f;
  const V shifted = x * 1.44269504f + magic;
  const V n = shifted - magic;
  V r = x - n * 0.693359375f;
  r = r - n * -2.12194440e-4f;
  V p = broadcast(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.f;
  // 2^n in two factors: n reaches -151, which one exponent cannot hold.
  const I whole = (I)shifted - 0x4b400000;
  const I half = whole >> 1;
  const V a = (V)((half + 127) << 23), b = (V)((whole - half + 127) << 23);
  return p * a * b;
}

KBS_INLINE V magnitude(V x) { return (V)((U)x & 0x7fffffffu); }

// 1 / (1 + e^-x), written so that neither tail cancels or overflows.
KBS_INLINE V sigmoid(V x) {
  const V e = exp_negative(-magnitude(x));
  const V top = x < 0.f ? e : broadcast(1.f);
  return top / (e + 1.f);
}

KBS_INLINE V tanh(V x) {
  const V a = magnitude(x), sign = (V)((U)x & 0x80000000u);
  // Near zero 1 - 2 / (e^2a + 1) would cancel: an odd polynomial there.
  const V z = x * x;
  V p = broadcast(-5.70498872745e-3f);
  p = p * z + 2.06390887954e-2f;
  p = p * z - 5.37397155531e-2f;
  p = p * z + 1.33314422036e-1f;
  p = p * z - 3.33332819422e-1f;
  const V small = p * z * a + a;
  const V e = exp_negative(-2.f * a);
  const V large = 1.f - 2.f * e / (1.f + e);
  return (V)((U)(a < 0.625f ? small : large) | (U)sign);
}

// Any activation: what a call asks for.
struct Any {
  Activation f;
  KBS_INLINE V operator()(V x) const {
    switch (f.kind) {
      case KBS_TANH: return tanh(x);
      case KBS_SIGMOID: return sigmoid(x);
      case KBS_RELU: return x < 0.f ? V{} : x;
      case KBS_CLIPPED_RELU: {
        const V v = x < 0.f ? V{} : x;
        return v > f.limit ? broadcast(f.limit) : v;
      }
      case KBS_HARD_SIGMOID: {
        V v = x * (1.f / 6.f) + 0.5f;
        v = v < 0.f ? V{} : v;
        return v > 1.f ? broadcast(1.f) : v;
      }
      default: return x;
    }
  }
};
struct Tanh {
  KBS_INLINE V operator()(V x) const { return tanh(x); }
};
struct Sigmoid {
  KBS_INLINE V operator()(V x) const { return sigmoid(x); }
};

// Calls body(f, g) with Keras's defaults compiled in, or with what was asked for.
template <class Body>
KBS_INLINE void with_activations(Activation f, Activation g, Body body) {
  if (f.kind == KBS_TANH && g.kind == KBS_SIGMOID) {
    body(Tanh{}, Sigmoid{});
  } else {
    body(Any{f}, Any{g});
  }
}

// n floats at p as a vector, zeros behind; and back.
KBS_INLINE V load_some(const float* p, size_t n) {
  float v[L] = {};
  for (size_t i = 0; i < n; i++) v[i] = p[i];
  return load(v);
}
KBS_INLINE void store_some(float* p, V v, size_t n) {
  for (size_t i = 0; i < n; i++) p[i] = v[i];
}

// Calls step(get, put, i) for i = 0, L, ...: get(p) reads p[i..], put(p, v) writes there; the last time fewer than L.
template <class Step>
KBS_INLINE void for_units(size_t n, Step step) {
  size_t i = 0;
  for (; i + L <= n; i += L)
    step([i](const float* p) KBS_INLINE_LAMBDA { return load(p + i); },
         [i](float* p, V v) KBS_INLINE_LAMBDA { store(p + i, v); });
  if (i < n)
    step([i, n](const float* p) KBS_INLINE_LAMBDA { return load_some(p + i, n - i); },
         [i, n](float* p, V v) KBS_INLINE_LAMBDA { store_some(p + i, v, n - i); });
}

void activate(Activation f, const float* x, size_t n, float* y) {
  for_units(n, [&](auto get, auto put) KBS_INLINE_LAMBDA { put(y, Any{f}(get(x))); });
}

void simple_step(Activation f, size_t n, const float* a, float* h) {
  for_units(n, [&](auto get, auto put) KBS_INLINE_LAMBDA { put(h, Any{f}(get(a))); });
}

// z, r, h beside each other: x holds x W + b, a holds h U + b'.
void gru_step(Activation activation, Activation recurrent, size_t n, size_t units, const float* x, const float* a,
              const float* h_before, float* h) {
  with_activations(activation, recurrent, [&](auto f, auto g) KBS_INLINE_LAMBDA {
    for_units(n, [&](auto get, auto put) KBS_INLINE_LAMBDA {
      const V z = g(get(x) + get(a));
      const V r = g(get(x + units) + get(a + units));
      const V hh = f(get(x + 2 * units) + r * get(a + 2 * units));
      put(h, z * get(h_before) + (1.f - z) * hh);
    });
  });
}

void gru_reset(Activation recurrent, size_t n, const float* r, const float* h_before, float* rh) {
  for_units(n, [&](auto get, auto put) KBS_INLINE_LAMBDA { put(rh, Any{recurrent}(get(r)) * get(h_before)); });
}

void gru_update(Activation activation, Activation recurrent, size_t n, const float* z, const float* hh,
                const float* h_before, float* h) {
  with_activations(activation, recurrent, [&](auto f, auto g) KBS_INLINE_LAMBDA {
    for_units(n, [&](auto get, auto put) KBS_INLINE_LAMBDA {
      const V gate = g(get(z));
      put(h, gate * get(h_before) + (1.f - gate) * f(get(hh)));
    });
  });
}

// i, f, c, o beside each other: a holds x W + h U + b.
void lstm_step(Activation activation, Activation recurrent, size_t n, size_t units, const float* a, float* c,
               float* h) {
  with_activations(activation, recurrent, [&](auto f, auto g) KBS_INLINE_LAMBDA {
    for_units(n, [&](auto get, auto put) KBS_INLINE_LAMBDA {
      const V carry = g(get(a + units)) * get(c) + g(get(a)) * f(get(a + 2 * units));
      put(c, carry);
      put(h, g(get(a + 3 * units)) * f(carry));
    });
  });
}

}  // namespace
}  // namespace KBS_ISA
}  // namespace kbs
#endif
