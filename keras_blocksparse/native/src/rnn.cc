// Whole sequences of a recurrent layer: Keras's GRU, SimpleRNN and LSTM.
//
// The batch is cut into groups of at most 32 samples. For a group, the inputs of a few steps are projected in one
// product; then each step is one product with the recurrent matrix and one pass over the units. Threads take a group
// each; where there are too few groups and a step is long, they share each step's units and meet after it.
#include <algorithm>
#include <atomic>
#include <cstring>

#include "rnn.h"
#include "threads.h"

namespace kbs {
namespace {

// A part of the units, and where its strips are in the recurrent matrix's gates.
struct Part {
  size_t first_unit, units;
  size_t first_strip, strips;  // within a gate
};

// One thread's share of a group's sequence.
class Sequence : Group {
 public:
  // What the threads of a group share.
  struct Shared {
    float *x, *a;         // (rows, gates * units): projected inputs of a few steps; recurrent product of one
    float *h, *h_next;    // (samples, units)
    float *c, *rh;
  };

  Sequence(const Kernels& k, const kbs_rnn& rnn, const kbs_rnn_call& call, int64_t first, int samples, int thread,
           int threads, Barrier* barrier, char* workspace)
      : Group(rnn, call, first, samples), k_(k), kernel_(with_values(rnn.kernel, call.kernel_values)),
        recurrent_(with_values(rnn.recurrent, call.recurrent_values)), thread_(thread), threads_(threads),
        barrier_(barrier), width_((size_t)(rnn.gates * rnn.units)), part_(part(rnn, thread, threads)) {
    place(rnn, samples, workspace, &shared_);
    operand_space_ = workspace + shared_bytes(rnn, samples) + thread * own_bytes(rnn, samples);
    const float* bias = call.bias ? call.bias : rnn.bias.empty() ? nullptr : rnn.bias.data();
    input_bias_ = bias;
    recurrent_bias_ = bias && rnn.cell == KBS_GRU && rnn.reset_after ? bias + width_ : nullptr;
  }

  // Steps whose inputs are projected together: as many rows as one product takes.
  static int64_t chunk_steps(int samples) { return std::max(1, kBlockRows / samples); }

  static size_t shared_bytes(const kbs_rnn& rnn, int samples) {
    return place(rnn, samples, nullptr, nullptr);
  }
  static size_t own_bytes(const kbs_rnn& rnn, int samples) {
    return std::max(operand_bytes(rnn.kernel, samples * chunk_steps(samples)), operand_bytes(rnn.recurrent, samples));
  }

  void run() {
    start();
    const int64_t chunk = chunk_steps(samples_);
    for (int64_t step = 0; step < call_.steps; step += chunk) {
      const int64_t steps = std::min(chunk, call_.steps - step);
      project(step, steps);
      for (int64_t s = 0; s < steps; s++) {
        float* x = shared_.x + (size_t)(s * samples_) * width_;
        reserve_states(step + s);
        if (anything_at(step + s)) {
          switch (rnn_.cell) {
            case KBS_SIMPLE_RNN: simple_rnn(step + s, x); break;
            case KBS_GRU: rnn_.reset_after ? gru(step + s, x) : gru_reset_before(step + s, x); break;
            case KBS_LSTM: lstm(step + s, x); break;
          }
          meet();
          std::swap(shared_.h, shared_.h_next);
        }
        finish_step(step + s);
      }
      meet();  // before the next inputs go where these are
    }
    finish();
  }

 private:
  // Lays what is shared out in the workspace, if there is one; returns how much it takes.
  static size_t place(const kbs_rnn& rnn, int samples, char* workspace, Shared* out) {
    const size_t rows = (size_t)samples * rnn.gates * rnn.units, state = (size_t)samples * rnn.units;
    const bool gru = rnn.cell == KBS_GRU;
    Shared s;
    size_t bytes = 0;
    const auto take = [&](size_t floats) {
      float* mine = workspace ? (float*)(workspace + bytes) : nullptr;
      bytes += round_up(floats * sizeof(float), 64);
      return mine;
    };
    s.x = take(rows * chunk_steps(samples));
    s.a = take(gru && rnn.reset_after ? rows : 0);
    s.h = take(state);
    s.h_next = take(state);
    s.c = take(rnn.cell == KBS_LSTM ? state : 0);
    s.rh = take(gru && !rnn.reset_after ? state : 0);
    if (out) *out = s;
    return bytes;
  }

  static Part part(const kbs_rnn& rnn, int thread, int threads) {
    const size_t strips = rnn.recurrent.header->strips / (size_t)rnn.gates;
    const auto boundary = [&](int i) { return i >= threads ? strips : boundary_strip(rnn, strips, i, threads); };
    const auto unit = [&](size_t strip) { return strip < strips ? (size_t)rnn.recurrent.strips[strip].col : (size_t)rnn.units; };
    const size_t begin = boundary(thread), end = boundary(thread + 1);
    return {unit(begin), unit(end) - unit(begin), begin, end - begin};
  }

  // The strip of a gate where a thread's part begins: equal work, all gates counted.
  static size_t boundary_strip(const kbs_rnn& rnn, size_t strips, int thread, int threads) {
    if (thread == 0) return 0;
    const Header& h = *rnn.recurrent.header;
    const auto tiles_before = [&](size_t strip) {
      uint64_t tiles = 0;
      for (size_t g = 0; g < (size_t)rnn.gates; g++)
        tiles += rnn.recurrent.strips[g * strips + strip].first_tile - rnn.recurrent.strips[g * strips].first_tile;
      return tiles;
    };
    const uint64_t wanted = h.tiles / threads * thread + h.tiles % threads * thread / threads;
    size_t low = 0, high = strips - 1;
    while (low < high) {
      const size_t middle = (low + high) / 2;
      if (tiles_before(middle) < wanted) low = middle + 1; else high = middle;
    }
    return low;
  }

  void meet() {
    if (threads_ > 1) barrier_->wait();
  }

  // This thread's part of sample b's state.
  float* mine(float* state, int b) const { return state + (size_t)(b * rnn_.units) + part_.first_unit; }
  const float* rows_of(const float* matrix, int b) const { return matrix + b * width_ + part_.first_unit; }
  // And of its record of a step, if there is to be one.
  float* record_of(int b, int64_t step) const {
    return call_.reserve ? (float*)call_.reserve + row(b, step) * record_.floats + part_.first_unit : nullptr;
  }

  void start() {
    for (int b = 0; b < samples_; b++) {
      copy_or_zero(mine(shared_.h, b), call_.initial_h, b);
      if (rnn_.cell == KBS_LSTM) copy_or_zero(mine(shared_.c, b), call_.initial_c, b);
    }
  }
  void copy_or_zero(float* to, const float* from, int b) const {
    if (from) {
      std::memcpy(to, from + (first_ + b) * rnn_.units + part_.first_unit, part_.units * sizeof(float));
    } else {
      std::memset(to, 0, part_.units * sizeof(float));
    }
  }

  // x W + b for a few steps. Threads share the matrix by its own strips, and meet.
  void project(int64_t step, int64_t steps) {
    const float* rows[kBlockRows];
    int n = 0;
    for (int64_t s = 0; s < steps; s++)
      for (int b = 0; b < samples_; b++)
        rows[n++] = call_.x + row(b, step + s) * rnn_.inputs;
    Operand x;
    make_operand(k_, kernel_, rows, n, operand_space_, &x);
    multiply(k_, kernel_, x, split_strips(kernel_, thread_, threads_), split_strips(kernel_, thread_ + 1, threads_),
             {shared_.x, width_, input_bias_, false});
    meet();
  }

  // to (+)= state U (+ bias) for this thread's units of gates [first, last).
  void product(const float* state, int first_gate, int last_gate, float* to, const float* bias, bool accumulate) {
    const float* rows[kBlockRows];
    for (int b = 0; b < samples_; b++) rows[b] = state + (size_t)(b * rnn_.units);
    Operand h;
    make_operand(k_, recurrent_, rows, samples_, operand_space_, &h);
    const size_t strips = recurrent_.header->strips / (size_t)rnn_.gates;
    for (int gate = first_gate; gate < last_gate; gate++) {
      const size_t begin = gate * strips + part_.first_strip;
      multiply(k_, recurrent_, h, begin, begin + part_.strips, {to, width_, bias, accumulate});
    }
  }

  // The states before a step. What takes part in the products of the gradients must be there for a masked step too,
  // where it meets zeros.
  void reserve_states(int64_t step) {
    for (int b = 0; call_.reserve && b < samples_; b++) {
      float* record = record_of(b, step);
      std::memcpy(record + record_.h, mine(shared_.h, b), part_.units * sizeof(float));
      if (rnn_.cell == KBS_LSTM) std::memcpy(record + record_.c, mine(shared_.c, b), part_.units * sizeof(float));
      if (rnn_.cell == KBS_GRU && !on(b, step)) std::memset(record + record_.a, 0, part_.units * sizeof(float));
    }
  }

  // Calls update(b) for each sample that has this step; the others keep their state.
  template <class Update>
  void each_sample(int64_t step, const Update& update) {
    for (int b = 0; b < samples_; b++) {
      if (on(b, step)) {
        update(b);
      } else {
        std::memcpy(mine(shared_.h_next, b), mine(shared_.h, b), part_.units * sizeof(float));
      }
    }
  }

  // z = g(x_z + h U_z + b_z), r likewise; hh = f(x_h + r (h U_h + b_h)); h' = z h + (1 - z) hh
  void gru(int64_t step, float* x) {
    product(shared_.h, 0, 3, shared_.a, recurrent_bias_, false);
    each_sample(step, [&](int b) {
      k_.gru_step(rnn_.activation, rnn_.recurrent_activation, part_.units, (size_t)rnn_.units, rows_of(x, b),
                  rows_of(shared_.a, b), mine(shared_.h, b), mine(shared_.h_next, b), record_of(b, step));
    });
  }

  // The same with hh = f(x_h + (r h) U_h)
  void gru_reset_before(int64_t step, float* x) {
    product(shared_.h, 0, 2, x, nullptr, true);
    for (int b = 0; b < samples_; b++)
      k_.gru_reset(rnn_.recurrent_activation, part_.units, (size_t)rnn_.units, rows_of(x, b), mine(shared_.h, b),
                   mine(shared_.rh, b), on(b, step) ? record_of(b, step) : nullptr);
    meet();
    product(shared_.rh, 2, 3, x, nullptr, true);
    each_sample(step, [&](int b) {
      k_.gru_update(rnn_.activation, rnn_.recurrent_activation, part_.units, (size_t)rnn_.units, rows_of(x, b),
                    mine(shared_.h, b), mine(shared_.h_next, b), record_of(b, step));
    });
  }

  // h' = f(x + h U)
  void simple_rnn(int64_t step, float* x) {
    product(shared_.h, 0, 1, x, nullptr, true);
    each_sample(step, [&](int b) {
      k_.simple_step(rnn_.activation, part_.units, rows_of(x, b), mine(shared_.h_next, b), record_of(b, step));
    });
  }

  // c' = g(f) c + g(i) f(c~); h' = g(o) f(c')
  void lstm(int64_t step, float* x) {
    product(shared_.h, 0, 4, x, nullptr, true);
    each_sample(step, [&](int b) {
      k_.lstm_step(rnn_.activation, rnn_.recurrent_activation, part_.units, (size_t)rnn_.units, rows_of(x, b),
                   mine(shared_.c, b), mine(shared_.h_next, b), record_of(b, step));
    });
  }

  // The step's output. A masked step repeats the output before it, which is zero before the first one: Keras does so
  // even if there is an initial state.
  void finish_step(int64_t step) {
    for (int b = 0; b < samples_; b++) {
      const bool active = on(b, step);
      seen_[b] = seen_[b] || active;
      if (!call_.y || !has_output(step)) continue;
      float* y = call_.y + output_row(b, step) * rnn_.units + part_.first_unit;
      const bool zero = !active && (call_.zero_output_for_mask || !seen_[b]);
      if (zero) {
        std::memset(y, 0, part_.units * sizeof(float));
      } else {
        std::memcpy(y, mine(shared_.h, b), part_.units * sizeof(float));
      }
    }
  }

  void finish() {
    for (int b = 0; b < samples_; b++) {
      const size_t at = (size_t)((first_ + b) * rnn_.units) + part_.first_unit;
      if (call_.final_h) std::memcpy(call_.final_h + at, mine(shared_.h, b), part_.units * sizeof(float));
      if (call_.final_c) std::memcpy(call_.final_c + at, mine(shared_.c, b), part_.units * sizeof(float));
    }
  }

  const Kernels& k_;
  const View kernel_, recurrent_;
  const int thread_, threads_;
  Barrier* const barrier_;
  const size_t width_;
  const Part part_;
  Shared shared_;
  bool seen_[kBlockRows] = {};  // samples that have had a step that was not masked
  char* operand_space_;
  const float *input_bias_, *recurrent_bias_;
};

bool known(int32_t activation) { return activation >= KBS_LINEAR && activation <= KBS_CLIPPED_RELU; }

}  // namespace

void run_rnn(const Kernels& k, const kbs_rnn& rnn, const kbs_rnn_call& call) {
  const int available = num_threads();
  const double step_us = estimated_us(rnn.recurrent, call.batch) + estimated_us(rnn.kernel, call.batch);
  int threads = available > 1 && step_us * (double)call.steps >= 2 * kWorthThreadsUs ? available : 1;
  // A group of fewer than 16 samples reads the matrix as slowly as one of 16: then share steps, if they are long.
  const bool share = threads > 1 && call.batch < 16 * threads && step_us >= kWorthThreadsUs;
  if (share) {
    const int64_t groups = (call.batch + kBlockRows - 1) / kBlockRows;
    const int samples = (int)((call.batch + groups - 1) / groups);
    const size_t shared = Sequence::shared_bytes(rnn, samples), own = Sequence::own_bytes(rnn, samples);
    struct Job {
      const Kernels& k;
      const kbs_rnn& rnn;
      const kbs_rnn_call& call;
      int samples, threads;
      char* workspace;
      Barrier barrier;
    } job{k, rnn, call, samples, threads, thread_workspace(shared + own * threads), Barrier(threads)};
    const auto work = [](void* argument, int thread) {
      Job& j = *(Job*)argument;
      for (int64_t first = 0; first < j.call.batch; first += j.samples) {
        const int n = (int)std::min<int64_t>(j.samples, j.call.batch - first);
        Sequence(j.k, j.rnn, j.call, first, n, thread, j.threads, &j.barrier, j.workspace).run();
        if (j.threads > 1) j.barrier.wait();
      }
    };
    if (run_together(threads, work, &job)) return;
    threads = 1;
  }
  threads = (int)std::min<int64_t>(threads, call.batch);
  const int64_t even = (call.batch + threads - 1) / threads;
  const int samples = (int)std::min<int64_t>(kBlockRows, even);
  const int64_t groups = (call.batch + samples - 1) / samples;
  const size_t bytes = Sequence::shared_bytes(rnn, samples) + Sequence::own_bytes(rnn, samples);
  char* workspace = thread_workspace(bytes * threads);
  std::atomic<int64_t> next{0};
  run_each(threads, [&](int thread) {
    for (int64_t group; (group = next.fetch_add(1)) < groups;) {
      const int64_t first = group * samples;
      const int n = (int)std::min<int64_t>(samples, call.batch - first);
      Sequence(k, rnn, call, first, n, 0, 1, nullptr, workspace + bytes * thread).run();
    }
  });
}

kbs_status check_call(const kbs_rnn* rnn, const kbs_rnn_call* call) {
  if (!rnn || !call) return fail(KBS_INVALID_ARGUMENT, "a null pointer was given");
  if (call->batch < 0 || call->steps < 1)
    return fail(KBS_INVALID_ARGUMENT, "a batch of %lld samples with %lld steps", (long long)call->batch, (long long)call->steps);
  if (call->batch > 0 && !call->x) return fail(KBS_INVALID_ARGUMENT, "a null pointer was given");
  if (lacks_values(with_values(rnn->kernel, call->kernel_values)) ||
      lacks_values(with_values(rnn->recurrent, call->recurrent_values)))
    return no_values();
  return KBS_OK;
}

}  // namespace kbs

using kbs::fail;
using kbs::guarded;

kbs_status kbs_rnn_create(const kbs_rnn_config* config, kbs_rnn** out) {
  return guarded([&]() -> kbs_status {
    if (!out) return fail(KBS_INVALID_ARGUMENT, "a null pointer was given");
    *out = nullptr;
    if (!config || !config->kernel || !config->recurrent)
      return fail(KBS_INVALID_ARGUMENT, "a recurrent layer needs a kernel and a recurrent matrix");
    if (config->cell < KBS_SIMPLE_RNN || config->cell > KBS_LSTM)
      return fail(KBS_INVALID_ARGUMENT, "unknown cell %d", config->cell);
    if (!kbs::known(config->activation) || !kbs::known(config->recurrent_activation))
      return fail(KBS_INVALID_ARGUMENT, "unknown activation %d or %d", config->activation, config->recurrent_activation);
    const kbs::Header& k = *config->kernel->view.header;
    const kbs::Header& r = *config->recurrent->view.header;
    const uint32_t gates = config->cell == KBS_SIMPLE_RNN ? 1 : config->cell == KBS_GRU ? 3 : 4;
    if (k.gates != gates || r.gates != gates)
      return fail(KBS_INVALID_ARGUMENT, "this cell has %u gates, its matrices were packed with %u and %u", gates, k.gates, r.gates);
    if (r.cols != (uint64_t)gates * r.rows || k.cols != r.cols)
      return fail(KBS_INVALID_ARGUMENT, "a kernel of %u x %u and a recurrent matrix of %u x %u do not make a layer of %u gates",
                  k.rows, k.cols, r.rows, r.cols, gates);
    auto* rnn = new kbs_rnn{(kbs_cell)config->cell,
                            {config->activation, config->activation_limit},
                            {config->recurrent_activation, config->recurrent_limit},
                            config->reset_after != 0,
                            k.rows,
                            r.rows,
                            gates,
                            config->kernel->view,
                            config->recurrent->view,
                            {}};
    if (config->bias) {
      const size_t n = (size_t)r.cols * (config->cell == KBS_GRU && config->reset_after ? 2 : 1);
      try {
        rnn->bias.assign(config->bias, config->bias + n);
      } catch (...) {
        delete rnn;
        throw;
      }
    }
    *out = rnn;
    return KBS_OK;
  });
}

void kbs_rnn_destroy(kbs_rnn* rnn) { delete rnn; }

kbs_status kbs_rnn_run(const kbs_rnn* rnn, const kbs_rnn_call* call) {
  return guarded([&]() -> kbs_status {
    if (kbs_status status = kbs::check_call(rnn, call)) return status;
    if (call->batch > 0 && !call->y) return fail(KBS_INVALID_ARGUMENT, "a null pointer was given");
    if ((call->initial_c || call->final_c) && rnn->cell != KBS_LSTM)
      return fail(KBS_INVALID_ARGUMENT, "only an LSTM has a carry state");
    if (kbs_status status = call->reserve ? kbs::check_trainable(*rnn) : KBS_OK) return status;
    const kbs::Kernels* k = kbs::kernels();
    if (!k) return KBS_UNSUPPORTED;
    if (call->batch > 0) kbs::run_rnn(*k, *rnn, *call);
    return KBS_OK;
  });
}
