// Gradients of a recurrent layer's run.
//
// Only what goes from a step to the one before it is done step by step, backwards: the gradients of the activations'
// arguments (da), and through the recurrent matrix those of the states. All da are kept; whatever else is wanted is then
// one product for all steps.
#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <memory>

#include "rnn.h"
#include "threads.h"

namespace kbs {
namespace {

// A row of da: the gates beside each other. With reset_after, r stands between the candidate's argument and its recurrent
// part, which gets a gradient of its own behind the gates.
struct GateGradients {
  explicit GateGradients(const kbs_rnn& rnn)
      : units((size_t)rnn.units), split(rnn.cell == KBS_GRU && rnn.reset_after),
        floats((size_t)(rnn.gates + split) * units) {}
  // Where a gate's gradients are, for the recurrent matrix.
  size_t recurrent(int gate) const { return (size_t)(split && gate == 2 ? 3 : gate) * units; }
  size_t units;
  bool split;
  size_t floats;
};

// One group's way back.
class Backward : Group {
 public:
  Backward(const Kernels& k, const kbs_rnn& rnn, const kbs_rnn_call& call, const kbs_rnn_gradients& gradients,
           int64_t first, int samples, int lanes, float* da, float* workspace)
      : Group(rnn, call, first, samples), k_(k), recurrent_(with_values(rnn.recurrent, call.recurrent_values)),
        gradients_(gradients), gates_(rnn), lanes_(lanes), da_(da) {
    place(rnn, lanes, workspace, &space_);
  }

  static size_t workspace_floats(const kbs_rnn& rnn, int lanes) { return place(rnn, lanes, nullptr, nullptr); }

  void run() {
    start();
    for (int64_t step = call_.steps - 1; step >= 0; step--) {
      add_output_gradients(step);
      for (int b = 0; b < samples_; b++)
        if (!on(b, step)) std::memset(da(b, step), 0, gates_.floats * sizeof(float));
      if (!anything_at(step)) continue;
      switch (rnn_.cell) {
        case KBS_SIMPLE_RNN: simple_rnn(step); break;
        case KBS_GRU: rnn_.reset_after ? gru(step) : gru_reset_before(step); break;
        case KBS_LSTM: lstm(step); break;
      }
    }
    finish();
  }

 private:
  struct Space {
    float *dh, *dc, *product;   // (samples, units)
    float *da_panel, *h_panel;  // (gates * units, lanes) and (units, lanes)
  };

  // Lays the workspace out, if there is one; returns how much it takes.
  static size_t place(const kbs_rnn& rnn, int lanes, float* workspace, Space* out) {
    const size_t state = (size_t)lanes * rnn.units;
    Space s;
    size_t used = 0;
    const auto take = [&](size_t floats) {
      float* mine = workspace ? workspace + used : nullptr;
      used += round_up(floats, 16);
      return mine;
    };
    s.dh = take(state);
    s.dc = take(rnn.cell == KBS_LSTM ? state : 0);
    s.product = take(state);
    s.da_panel = take(state * rnn.gates);
    s.h_panel = take(row_stride(*rnn.recurrent.header) * lanes);
    if (out) *out = s;
    return used;
  }

  float* dh(int b) const { return space_.dh + (size_t)b * gates_.units; }
  float* dc(int b) const { return space_.dc + (size_t)b * gates_.units; }
  float* da(int b, int64_t step) const { return da_ + row(b, step) * gates_.floats; }
  const float* record(int b, int64_t step) const { return (const float*)call_.reserve + row(b, step) * record_.floats; }

  void start() {
    for (int b = 0; b < samples_; b++)
      while (first_step_[b] < call_.steps && !on(b, first_step_[b])) first_step_[b]++;
    const auto copy_or_zero = [&](float* to, const float* from) {
      const size_t bytes = (size_t)samples_ * gates_.units * sizeof(float);
      if (from) {
        std::memcpy(to, from + first_ * rnn_.units, bytes);
      } else {
        std::memset(to, 0, bytes);
      }
    };
    copy_or_zero(space_.dh, gradients_.dfinal_h);
    if (rnn_.cell == KBS_LSTM) copy_or_zero(space_.dc, gradients_.dfinal_c);
  }

  // A masked step's output is the state, as any other's; but zero if asked for, or where the sample has had no step yet.
  void add_output_gradients(int64_t step) const {
    if (!gradients_.dy || !has_output(step)) return;
    for (int b = 0; b < samples_; b++) {
      const bool zero = !on(b, step) && (call_.zero_output_for_mask || step < first_step_[b]);
      if (!zero) add(gradients_.dy + output_row(b, step) * gates_.units, gates_.units, dh(b));
    }
  }
  static void add(const float* from, size_t n, float* to) {
    for (size_t i = 0; i < n; i++) to[i] += from[i];
  }

  template <class Update>
  void each_sample(int64_t step, const Update& update) const {
    for (int b = 0; b < samples_; b++)
      if (on(b, step)) update(b);
  }

  // product = da U^T for gates [first, last).
  void multiply_transposed(int64_t step, int first, int last) const {
    const size_t units = gates_.units, strips = recurrent_.header->strips / (size_t)rnn_.gates;
    for (int gate = first; gate < last; gate++) {
      const float* rows[kMaxLanes];
      for (int b = 0; b < samples_; b++) rows[b] = da(b, step) + gates_.recurrent(gate);
      k_.make_panel(rows, samples_, units, units, lanes_, space_.da_panel + gate * units * lanes_);
    }
    std::memset(space_.h_panel, 0, row_stride(*recurrent_.header) * lanes_ * sizeof(float));
    k_.matmul_panel_transposed(recurrent_, first * strips, last * strips, space_.da_panel, lanes_, nullptr, space_.h_panel);
    k_.read_panel(space_.h_panel, lanes_, units, samples_, space_.product, units);
  }

  // dh += da U^T; that of the first step is the initial state's.
  void add_product(int64_t step, int first, int last) const {
    if (step == 0 && !gradients_.dinitial_h) return;
    multiply_transposed(step, first, last);
    add(space_.product, (size_t)samples_ * gates_.units, space_.dh);
  }

  void simple_rnn(int64_t step) const {
    each_sample(step, [&](int b) {
      k_.simple_step_backward(rnn_.activation, gates_.units, record(b, step), dh(b), da(b, step));
    });
    add_product(step, 0, 1);
  }

  void gru(int64_t step) const {
    each_sample(step, [&](int b) {
      k_.gru_step_backward(rnn_.activation, rnn_.recurrent_activation, gates_.units, record(b, step), dh(b), da(b, step));
    });
    add_product(step, 0, 3);
  }

  void gru_reset_before(int64_t step) const {
    each_sample(step, [&](int b) {
      k_.gru_update_backward(rnn_.activation, rnn_.recurrent_activation, gates_.units, record(b, step), dh(b), da(b, step));
    });
    multiply_transposed(step, 2, 3);
    each_sample(step, [&](int b) {
      k_.gru_reset_backward(rnn_.recurrent_activation, gates_.units, record(b, step),
                            space_.product + (size_t)b * gates_.units, dh(b), da(b, step));
    });
    add_product(step, 0, 2);
  }

  void lstm(int64_t step) const {
    each_sample(step, [&](int b) {
      k_.lstm_step_backward(rnn_.activation, rnn_.recurrent_activation, gates_.units, record(b, step), dh(b), dc(b),
                            da(b, step));
    });
    add_product(step, 0, 4);
  }

  void finish() const {
    const size_t at = (size_t)first_ * gates_.units, bytes = (size_t)samples_ * gates_.units * sizeof(float);
    if (gradients_.dinitial_h) std::memcpy(gradients_.dinitial_h + at, space_.dh, bytes);
    if (gradients_.dinitial_c) std::memcpy(gradients_.dinitial_c + at, space_.dc, bytes);
  }

  const Kernels& k_;
  const View recurrent_;
  const kbs_rnn_gradients& gradients_;
  const GateGradients gates_;
  const int lanes_;
  float* const da_;
  Space space_;
  int64_t first_step_[kMaxLanes] = {};  // of each sample, that is not masked
};

// Threads take a group each, in turn.
void run_backward(const Kernels& k, const kbs_rnn& rnn, const kbs_rnn_call& call, const kbs_rnn_gradients& gradients,
                  float* da) {
  const double us = estimated_us(rnn.recurrent, call.batch) * (double)call.steps;
  int threads = us >= kWorthThreadsUs ? num_threads() : 1;
  int lanes = panel_lanes(call.batch);
  while (lanes > 8 && (call.batch + lanes - 1) / lanes < threads) lanes /= 2;
  const int64_t groups = (call.batch + lanes - 1) / lanes;
  threads = (int)std::min<int64_t>(threads, groups);
  const size_t floats = Backward::workspace_floats(rnn, lanes);
  float* workspace = (float*)thread_workspace(floats * threads * sizeof(float));
  std::atomic<int64_t> next{0};
  run_each(threads, [&](int thread) {
    for (int64_t group; (group = next.fetch_add(1)) < groups;) {
      const int64_t first = group * lanes;
      const int samples = (int)std::min<int64_t>(lanes, call.batch - first);
      Backward(k, rnn, call, gradients, first, samples, lanes, da, workspace + floats * thread).run();
    }
  });
}

// Sums over the rows, in double: there may be very many.
void column_sums(const float* rows, size_t stride, int64_t n, size_t cols, float* out) {
  constexpr size_t kCols = 512;
  const size_t chunks = (cols + kCols - 1) / kCols;
  const int threads = (int)std::min<size_t>((size_t)n * cols >= 1 << 18 ? num_threads() : 1, chunks);
  std::atomic<size_t> next{0};
  run_each(threads, [&](int) {
    for (size_t chunk; (chunk = next.fetch_add(1)) < chunks;) {
      const size_t first = chunk * kCols, some = std::min(kCols, cols - first);
      double sums[kCols] = {};
      for (int64_t row = 0; row < n; row++)
        for (size_t i = 0; i < some; i++) sums[i] += rows[row * stride + first + i];
      for (size_t i = 0; i < some; i++) out[first + i] = (float)sums[i];
    }
  });
}

void recurrent_gradients(const Kernels& k, const kbs_rnn& rnn, const float* records, const float* da, int64_t rows,
                         float* dvalues) {
  const Record record(rnn);
  const GateGradients gates(rnn);
  const size_t strips = rnn.recurrent.header->strips / (size_t)rnn.gates;
  const auto product = [&](int first, int last, const float* left) {
    // Gate `first` of da comes to lie where the matrix has its columns.
    const float* right = da + gates.recurrent(first) - first * gates.units;
    sampled_product(k, rnn.recurrent, first * strips, last * strips, left, record.floats, right, gates.floats, rows, false,
                    dvalues);
  };
  if (rnn.cell == KBS_GRU) {
    product(0, 2, records + record.h);
    product(2, 3, records + (rnn.reset_after ? record.h : record.a));
  } else {
    product(0, (int)rnn.gates, records + record.h);
  }
}

using Memory = std::unique_ptr<float, decltype(&std::free)>;
Memory allocate(size_t floats) {
  Memory memory((float*)std::aligned_alloc(64, round_up(floats * sizeof(float) + 1, 64)), std::free);
  if (!memory) throw std::bad_alloc();
  return memory;
}

void backward(const Kernels& k, const kbs_rnn& rnn, kbs_rnn_call call, const kbs_rnn_gradients& gradients) {
  const int64_t rows = call.batch * call.steps;
  const GateGradients gates(rnn);
  Memory reserve(nullptr, std::free);
  if (!call.reserve) {
    reserve = allocate((size_t)rows * Record(rnn).floats);
    call.reserve = reserve.get(), call.y = call.final_h = call.final_c = nullptr;
    if (rows > 0) run_rnn(k, rnn, call);
  }
  const Memory da = allocate((size_t)rows * gates.floats);
  run_backward(k, rnn, call, gradients, da.get());
  const View kernel = with_values(rnn.kernel, call.kernel_values);
  if (gradients.dx && rows > 0)
    matmul_transposed(k, kernel, da.get(), gates.floats, rows, gradients.dx, (size_t)rnn.inputs);
  if (gradients.dkernel_values)
    sampled_product(k, kernel, 0, kernel.header->strips, call.x, (size_t)rnn.inputs, da.get(), gates.floats, rows, false,
                    gradients.dkernel_values);
  if (gradients.drecurrent_values)
    recurrent_gradients(k, rnn, (const float*)call.reserve, da.get(), rows, gradients.drecurrent_values);
  if (float* dbias = gradients.dbias) {
    column_sums(da.get(), gates.floats, rows, (size_t)rnn.gates * gates.units, dbias);
    if (gates.split) {
      std::memcpy(dbias + 3 * gates.units, dbias, 2 * gates.units * sizeof(float));
      column_sums(da.get() + 3 * gates.units, gates.floats, rows, gates.units, dbias + 5 * gates.units);
    }
  }
}

}  // namespace

kbs_status check_trainable(const kbs_rnn& rnn) {
  if (rnn.kernel.header->dtype != KBS_FLOAT32 || rnn.recurrent.header->dtype != KBS_FLOAT32)
    return fail(KBS_UNSUPPORTED, "gradients are those of float32 values");
  return KBS_OK;
}

}  // namespace kbs

using kbs::fail;
using kbs::guarded;

kbs_status kbs_rnn_reserve_bytes(const kbs_rnn* rnn, int64_t batch, int64_t steps, int64_t* bytes) {
  return guarded([&]() -> kbs_status {
    if (!rnn || !bytes) return fail(KBS_INVALID_ARGUMENT, "a null pointer was given");
    if (kbs_status status = kbs::check_trainable(*rnn)) return status;
    if (batch < 0 || steps < 1 || __builtin_mul_overflow(batch, steps, bytes) ||
        __builtin_mul_overflow(*bytes, (int64_t)(kbs::Record(*rnn).floats * sizeof(float)), bytes))
      return fail(KBS_INVALID_ARGUMENT, "a batch of %lld samples with %lld steps", (long long)batch, (long long)steps);
    return KBS_OK;
  });
}

kbs_status kbs_rnn_backward(const kbs_rnn* rnn, const kbs_rnn_call* call, const kbs_rnn_gradients* gradients) {
  return guarded([&]() -> kbs_status {
    if (!gradients) return fail(KBS_INVALID_ARGUMENT, "a null pointer was given");
    if (kbs_status status = kbs::check_call(rnn, call)) return status;
    int64_t bytes;
    if (kbs_status status = kbs_rnn_reserve_bytes(rnn, call->batch, call->steps, &bytes)) return status;
    if ((call->initial_c || gradients->dfinal_c || gradients->dinitial_c) && rnn->cell != KBS_LSTM)
      return fail(KBS_INVALID_ARGUMENT, "only an LSTM has a carry state");
    if (gradients->dbias && !call->bias && rnn->bias.empty())
      return fail(KBS_INVALID_ARGUMENT, "a layer without a bias has no gradient of it");
    const kbs::Kernels* k = kbs::kernels();
    if (!k) return KBS_UNSUPPORTED;
    kbs::backward(*k, *rnn, *call, *gradients);
    return KBS_OK;
  });
}
