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

// Any activation: what a call asks for. Its derivative is a function of its result, as those of all of them are.
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
  KBS_INLINE V derivative(V y) const {
    const V one = broadcast(1.f);
    switch (f.kind) {
      case KBS_TANH: return one - y * y;
      case KBS_SIGMOID: return y * (one - y);
      case KBS_RELU: return y > 0.f ? one : V{};
      case KBS_CLIPPED_RELU: return ((y > 0.f) & (y < f.limit)) ? one : V{};
      case KBS_HARD_SIGMOID: return ((y > 0.f) & (y < 1.f)) ? broadcast(1.f / 6.f) : V{};
      default: return one;
    }
  }
};
struct Tanh {
  KBS_INLINE V operator()(V x) const { return tanh(x); }
  KBS_INLINE V derivative(V y) const { return 1.f - y * y; }
};
struct Sigmoid {
  KBS_INLINE V operator()(V x) const { return sigmoid(x); }
  KBS_INLINE V derivative(V y) const { return y * (1.f - y); }
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

void simple_step(Activation f, size_t n, const float* a, float* h, float* record) {
  for_units(n, [&](auto get, auto put) KBS_INLINE_LAMBDA {
    const V y = Any{f}(get(a));
    put(h, y);
    if (record) put(record, y);
  });
}

// z, r, h beside each other: x holds x W + b, a holds h U + b'.
void gru_step(Activation activation, Activation recurrent, size_t n, size_t units, const float* x, const float* a,
              const float* h_before, float* h, float* record) {
  with_activations(activation, recurrent, [&](auto f, auto g) KBS_INLINE_LAMBDA {
    for_units(n, [&](auto get, auto put) KBS_INLINE_LAMBDA {
      const V a_h = get(a + 2 * units);
      const V z = g(get(x) + get(a));
      const V r = g(get(x + units) + get(a + units));
      const V hh = f(get(x + 2 * units) + r * a_h);
      put(h, z * get(h_before) + (1.f - z) * hh);
      if (record) put(record, z), put(record + units, r), put(record + 2 * units, hh), put(record + 3 * units, a_h);
    });
  });
}

void gru_reset(Activation recurrent, size_t n, size_t units, const float* x, const float* h_before, float* rh,
               float* record) {
  for_units(n, [&](auto get, auto put) KBS_INLINE_LAMBDA {
    const V r = Any{recurrent}(get(x + units)), product = r * get(h_before);
    put(rh, product);
    if (record) put(record + units, r), put(record + 3 * units, product);
  });
}

void gru_update(Activation activation, Activation recurrent, size_t n, size_t units, const float* x,
                const float* h_before, float* h, float* record) {
  with_activations(activation, recurrent, [&](auto f, auto g) KBS_INLINE_LAMBDA {
    for_units(n, [&](auto get, auto put) KBS_INLINE_LAMBDA {
      const V z = g(get(x)), hh = f(get(x + 2 * units));
      put(h, z * get(h_before) + (1.f - z) * hh);
      if (record) put(record, z), put(record + 2 * units, hh);
    });
  });
}

// i, f, c, o beside each other: a holds x W + h U + b.
void lstm_step(Activation activation, Activation recurrent, size_t n, size_t units, const float* a, float* c, float* h,
               float* record) {
  with_activations(activation, recurrent, [&](auto f, auto g) KBS_INLINE_LAMBDA {
    for_units(n, [&](auto get, auto put) KBS_INLINE_LAMBDA {
      const V i = g(get(a)), forget = g(get(a + units)), candidate = f(get(a + 2 * units)), o = g(get(a + 3 * units));
      const V carry = forget * get(c) + i * candidate;
      put(c, carry);
      put(h, o * f(carry));
      if (record) put(record, i), put(record + units, forget), put(record + 2 * units, candidate), put(record + 3 * units, o);
    });
  });
}

// ---- gradients --------------------------------------------------------------------------------------------------

void simple_step_backward(Activation f, size_t units, const float* record, float* dh, float* da) {
  for_units(units, [&](auto get, auto put) KBS_INLINE_LAMBDA {
    put(da, get(dh) * Any{f}.derivative(get(record)));
    put(dh, V{});
  });
}

// What both kinds of GRU begin with: h' = z h + (1 - z) hh.
template <class F, class G, class Get, class Put>
KBS_INLINE V update_backward(F f, G g, size_t units, const float* record, float* dh, float* da, Get get, Put put) {
  const V z = get(record), hh = get(record + 2 * units), h = get(record + 4 * units), d = get(dh);
  const V da_h = d * (1.f - z) * f.derivative(hh);
  put(da, d * (h - hh) * g.derivative(z));
  put(da + 2 * units, da_h);
  put(dh, d * z);
  return da_h;
}

void gru_step_backward(Activation activation, Activation recurrent, size_t units, const float* record, float* dh,
                       float* da) {
  with_activations(activation, recurrent, [&](auto f, auto g) KBS_INLINE_LAMBDA {
    for_units(units, [&](auto get, auto put) KBS_INLINE_LAMBDA {
      const V r = get(record + units), a_h = get(record + 3 * units);
      const V da_h = update_backward(f, g, units, record, dh, da, get, put);
      put(da + units, da_h * a_h * g.derivative(r));
      put(da + 3 * units, da_h * r);
    });
  });
}

void gru_update_backward(Activation activation, Activation recurrent, size_t units, const float* record, float* dh,
                         float* da) {
  with_activations(activation, recurrent, [&](auto f, auto g) KBS_INLINE_LAMBDA {
    for_units(units, [&](auto get, auto put) KBS_INLINE_LAMBDA {
      update_backward(f, g, units, record, dh, da, get, put);
    });
  });
}

void gru_reset_backward(Activation recurrent, size_t units, const float* record, const float* drh, float* dh, float* da) {
  for_units(units, [&](auto get, auto put) KBS_INLINE_LAMBDA {
    const V r = get(record + units), h = get(record + 4 * units), d = get(drh);
    put(da + units, d * h * Any{recurrent}.derivative(r));
    put(dh, get(dh) + d * r);
  });
}

void lstm_step_backward(Activation activation, Activation recurrent, size_t units, const float* record, float* dh,
                        float* dc, float* da) {
  with_activations(activation, recurrent, [&](auto f, auto g) KBS_INLINE_LAMBDA {
    for_units(units, [&](auto get, auto put) KBS_INLINE_LAMBDA {
      const V i = get(record), forget = get(record + units), candidate = get(record + 2 * units);
      const V o = get(record + 3 * units), c = get(record + 5 * units), d = get(dh);
      const V output = f(forget * c + i * candidate);
      const V d_carry = get(dc) + d * o * f.derivative(output);
      put(da, d_carry * candidate * g.derivative(i));
      put(da + units, d_carry * c * g.derivative(forget));
      put(da + 2 * units, d_carry * i * f.derivative(candidate));
      put(da + 3 * units, d * output * g.derivative(o));
      put(dc, d_carry * forget);
      put(dh, V{});
    });
  });
}

}  // namespace
}  // namespace KBS_ISA
}  // namespace kbs
#endif
