// A recurrent layer, and what its run and its gradients have in common.
#ifndef KBS_RNN_H_
#define KBS_RNN_H_

#include <vector>

#include "matrix.h"

struct kbs_rnn {
  kbs_cell cell;
  kbs::Activation activation, recurrent_activation;
  bool reset_after;
  int64_t inputs, units, gates;
  kbs::View kernel, recurrent;
  std::vector<float> bias;  // empty if there is none
};

namespace kbs {

// What a run reserves for its gradients is a record for each sample and time (in x's order) of a few rows, `units` floats
// each: what the gates' activations gave, then the states before the step.
//   SimpleRNN: h'            h
//   GRU:       z r hh a      h      a is h U_h + b_h with reset_after, else r h
//   LSTM:      i f c~ o      h c
struct Record {
  explicit Record(const kbs_rnn& rnn)
      : units((size_t)rnn.units), a(3 * units), h((rnn.cell == KBS_SIMPLE_RNN ? 1 : 4) * units), c(h + units),
        floats(c + (rnn.cell == KBS_LSTM ? units : 0)) {}
  size_t units, a, h, c, floats;
};

// Samples of a call that go through its steps together.
class Group {
 protected:
  Group(const kbs_rnn& rnn, const kbs_rnn_call& call, int64_t first, int samples)
      : rnn_(rnn), call_(call), first_(first), samples_(samples), record_(rnn) {}

  int64_t time_of(int64_t step) const { return call_.go_backwards ? call_.steps - 1 - step : step; }
  // Where a step of sample b is in x and in whatever else has a row for each sample and time.
  size_t row(int b, int64_t step) const { return (size_t)((first_ + b) * call_.steps + time_of(step)); }
  // Where its output is.
  size_t output_row(int b, int64_t step) const {
    return (size_t)(call_.return_sequences ? (first_ + b) * call_.steps + step : first_ + b);
  }
  bool has_output(int64_t step) const { return call_.return_sequences || step + 1 == call_.steps; }
  bool on(int b, int64_t step) const { return !call_.mask || call_.mask[row(b, step)]; }
  bool anything_at(int64_t step) const {
    for (int b = 0; b < samples_; b++)
      if (on(b, step)) return true;
    return false;
  }

  const kbs_rnn& rnn_;
  const kbs_rnn_call& call_;
  const int64_t first_;
  const int samples_;
  const Record record_;
};

// What a run and its gradients both need to be right about a call.
kbs_status check_call(const kbs_rnn* rnn, const kbs_rnn_call* call);
kbs_status check_trainable(const kbs_rnn& rnn);
// Runs a call; one without y wants no outputs.
void run_rnn(const Kernels& k, const kbs_rnn& rnn, const kbs_rnn_call& call);

}  // namespace kbs
#endif  // KBS_RNN_H_
