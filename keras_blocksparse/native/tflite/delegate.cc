// libkbs_tflite: libkbs as an external delegate for TFLite and LiteRT, over their plain C interface.
//
// It takes two kinds of operators, each for itself: the recurrent layers of files that export_tflite(target="fast")
// wrote, and fully connected ones whose weights are sparse. A file is untrusted. All that can be wrong with an operator is
// found while the delegate prepares, and then the operator is left to the runtime; what depends on sizes that may change
// later is checked whenever they do, and reported as an error of the interpreter.
#include <cmath>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <initializer_list>
#include <map>
#include <memory>
#include <mutex>
#include <new>
#include <string>
#include <vector>

#include "attributes.h"
#include "kbs.h"
#include "tflite_api.h"
#include "weights.h"

namespace kbs {
namespace tflite {
namespace {

constexpr char kCompositeName[] = "keras_blocksparse.rnn";
constexpr char kCustomCode[] = "KerasBlocksparseRnn";
constexpr int64_t kVersion = 1;

// ---- errors: thrown here, a status and a message outside -----------------------------------------------------------

struct Failure {
  char message[256];
};

[[noreturn]] __attribute__((format(printf, 1, 2))) void failed(const char* format, ...) {
  Failure failure;
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(failure.message, sizeof(failure.message), format, arguments);
  va_end(arguments);
  throw failure;
}

void must(kbs_status status) {
  if (status != KBS_OK) failed("%s", kbs_last_error());
}

// Runs body(). If it throws, calls report(message), which must not throw, and returns false.
template <class Body, class Report>
bool guarded(const Body& body, const Report& report) noexcept {
  try {
    body();
    return true;
  } catch (const Failure& failure) {
    report(failure.message);
  } catch (const std::bad_alloc&) {
    report("out of memory");
  } catch (...) {
    report("unexpected exception");
  }
  return false;
}

bool logging() {
  static const bool on = [] {
    const char* text = std::getenv("KBS_TFLITE_LOG");
    return text && *text && std::strcmp(text, "0") != 0;
  }();
  return on;
}

// ---- tensors ---------------------------------------------------------------------------------------------------------

TfLiteTensor& tensor_at(TfLiteContext* context, int index, const char* what) {
  if (index < 0 || (size_t)index >= context->tensors_size || !context->tensors) failed("it has no tensor for its %s", what);
  return context->tensors[index];
}

// Elements of a tensor; throws if its shape makes no sense.
int64_t elements_of(const TfLiteTensor& tensor, const char* what) {
  if (!tensor.dims || tensor.dims->size < 0) failed("its %s has no shape", what);
  int64_t n = 1;
  for (int i = 0; i < tensor.dims->size; i++)
    if (tensor.dims->data[i] < 0 || __builtin_mul_overflow(n, (int64_t)tensor.dims->data[i], &n))
      failed("its %s has a shape of no sense", what);
  return n;
}

constexpr int64_t kAny = -1;

void check_shape(const TfLiteTensor& tensor, std::initializer_list<int64_t> wanted, const char* what) {
  elements_of(tensor, what);
  bool fits = tensor.dims->size == (int)wanted.size();
  for (int i = 0; fits && i < tensor.dims->size; i++)
    fits = wanted.begin()[i] == kAny || tensor.dims->data[i] == wanted.begin()[i];
  if (fits) return;
  char text[2][100] = {};
  const auto write = [](char* to, int64_t n, const auto& at) {
    size_t end = 0;
    for (int64_t i = 0; i < n && end < 70; i++)
      end += (size_t)std::snprintf(to + end, 100 - end, at(i) == kAny ? "%s?" : "%s%lld", i ? ", " : "", (long long)at(i));
  };
  write(text[0], (int64_t)wanted.size(), [&](int64_t i) { return wanted.begin()[i]; });
  write(text[1], tensor.dims->size, [&](int64_t i) { return (int64_t)tensor.dims->data[i]; });
  failed("its %s should have shape (%s), and has (%s)", what, text[0], text[1]);
}

void check_type(const TfLiteTensor& tensor, TfLiteType type, const char* what) {
  if (tensor.type != type) failed("its %s should be of TfLiteType %d, and is of %d", what, type, tensor.type);
}

// The values of a tensor that must hold n of them.
template <class T>
T* data_of(const TfLiteTensor& tensor, int64_t n, const char* what) {
  if (n > 0 && (!tensor.data.raw || tensor.bytes / sizeof(T) < (uint64_t)n)) failed("its %s has no memory for its shape", what);
  if ((uintptr_t)tensor.data.raw % alignof(T)) failed("its %s is not aligned", what);
  return (T*)tensor.data.raw;
}

// A tensor that an operator computes.
TfLiteTensor& result_at(TfLiteContext* context, int index, const char* what) {
  TfLiteTensor& tensor = tensor_at(context, index, what);
  check_type(tensor, kTfLiteFloat32, what);
  if (tensor.allocation_type == kTfLiteMmapRo) failed("its %s is a constant", what);
  return tensor;
}

void resize(TfLiteContext* context, TfLiteTensor& tensor, const int64_t* dims, size_t n) {
  // The runtime frees it.
  auto* shape = (TfLiteIntArray*)std::malloc(sizeof(TfLiteIntArray) + n * sizeof(int));
  if (!shape) throw std::bad_alloc();
  shape->size = (int)n;
  for (size_t i = 0; i < n; i++) shape->data[i] = (int)dims[i];
  if (context->ResizeTensor(context, &tensor, shape) != kTfLiteOk) failed("a result of it cannot be resized");
}

// A bias of n values; copied if it is a constant, which may lie anywhere in the file, else read when it is needed.
void read_bias(const TfLiteTensor& bias, int64_t n, std::vector<float>* out) {
  check_type(bias, kTfLiteFloat32, "bias");
  if (elements_of(bias, "bias") != n) failed("its bias should have %lld values", (long long)n);
  if (bias.allocation_type != kTfLiteMmapRo) return;
  if (bias.sparsity || !bias.data.raw || bias.bytes / sizeof(float) < (uint64_t)n) failed("its bias is too short");
  out->resize((size_t)n);
  std::memcpy(out->data(), bias.data.raw, (size_t)n * sizeof(float));
}

struct Destroy {
  void operator()(kbs_matrix* matrix) const { kbs_matrix_destroy(matrix); }
  void operator()(kbs_rnn* rnn) const { kbs_rnn_destroy(rnn); }
};
using Matrix = std::unique_ptr<kbs_matrix, Destroy>;

// Packs constants when they are first needed: operators that are never prepared, as those of a decomposition that we
// stand in for, take no memory.
class Weights {
 public:
  Weights(std::vector<Constant> constants, int64_t gates, bool bfloat16)
      : constants_(std::move(constants)), gates_(gates), bfloat16_(bfloat16) {}
  kbs_matrix* matrix() {
    if (!matrix_) {
      kbs_matrix* made = nullptr;
      must(Columns(constants_, bfloat16_).make_matrix(gates_, &made));
      matrix_.reset(made);
    }
    return matrix_.get();
  }

 private:
  std::vector<Constant> constants_;
  int64_t gates_;
  bool bfloat16_;
  Matrix matrix_;
};

// ---- operators ------------------------------------------------------------------------------------------------------

// The tensors of a node, in the order of the file: the node that stands in for it has them in another.
struct Ends {
  explicit Ends(const TfLiteNode& node) : inputs(list(node.inputs)), outputs(list(node.outputs)) {
    for (size_t i = 0; i < outputs.size(); i++) {
      for (int input : inputs)
        if (input == outputs[i]) failed("it writes what it reads");
      for (size_t j = 0; j < i; j++)
        if (outputs[j] == outputs[i]) failed("it writes a tensor twice");
    }
  }
  static std::vector<int> list(const TfLiteIntArray* array) {
    return array && array->size > 0 ? std::vector<int>(array->data, array->data + array->size) : std::vector<int>();
  }

  std::vector<int> inputs, outputs;
};

// One operator of a file that we run. Methods throw; run() allocates nothing.
class Operator {
 public:
  virtual ~Operator() = default;
  virtual const char* name() const = 0;
  // Whenever shapes have changed, and before the first run.
  virtual void prepare(TfLiteContext* context) = 0;
  virtual void run(TfLiteContext* context) = 0;

  int threads = 1;
};

// The weights that fully connected operators of one subgraph share, by the number of the tensor: in an unrolled layer all
// time steps have the same.
using SharedWeights = std::map<int, std::shared_ptr<Weights>>;

// ---- FULLY_CONNECTED with a sparse weight

class FullyConnected : public Operator {
 public:
  const char* name() const override { return "FULLY_CONNECTED"; }

  FullyConnected(TfLiteContext* context, const TfLiteNode& node, const TfLiteFullyConnectedParams& params, SharedWeights* shared)
      : ends_(node), keep_dims_(params.keep_num_dims) {
    if (ends_.inputs.size() < 2 || ends_.inputs.size() > 3 || ends_.outputs.size() != 1) failed("it has another number of tensors");
    const TfLiteTensor& weight = tensor_at(context, ends_.inputs[1], "weight");
    if (!weight.sparsity) failed("its weight is dense");
    Constant constant;
    const std::string reason = read_constant(weight, &constant);
    if (!reason.empty()) failed("its weight: %s", reason.c_str());
    if (constant.type == kTfLiteFloat16) failed("its weight is float16");
    cols_ = constant.outputs, rows_ = constant.inputs;
    check_type(tensor_at(context, ends_.inputs[0], "input"), kTfLiteFloat32, "input");
    result_at(context, ends_.outputs[0], "output");
    if (params.weights_format != 0) failed("its weight is shuffled");
    switch (params.activation) {
      case kTfLiteActNone: activation_ = KBS_LINEAR; break;
      case kTfLiteActRelu: activation_ = KBS_RELU; break;
      case kTfLiteActRelu6: activation_ = KBS_CLIPPED_RELU; break;
      case kTfLiteActTanh: activation_ = KBS_TANH; break;
      default: failed("its activation is TfLiteFusedActivation %d", params.activation);
    }
    has_bias_ = ends_.inputs.size() == 3 && ends_.inputs[2] != kTfLiteOptionalTensor;
    if (has_bias_) read_bias(tensor_at(context, ends_.inputs[2], "bias"), cols_, &bias_);
    std::shared_ptr<Weights>& weights = (*shared)[ends_.inputs[1]];
    if (!weights) weights = std::make_shared<Weights>(std::vector<Constant>{constant}, 1, false);
    weights_ = weights;
  }

  void prepare(TfLiteContext* context) override {
    weights_->matrix();
    const TfLiteTensor& x = tensor_at(context, ends_.inputs[0], "input");
    std::vector<int64_t> dims{batch_of(x), cols_};
    if (keep_dims_) {
      if (x.dims->size < 1 || x.dims->data[x.dims->size - 1] != rows_) failed("its input should end with %lld", (long long)rows_);
      dims.assign(x.dims->data, x.dims->data + x.dims->size);
      dims.back() = cols_;
    }
    resize(context, result_at(context, ends_.outputs[0], "output"), dims.data(), dims.size());
  }

  void run(TfLiteContext* context) override {
    const TfLiteTensor& x = tensor_at(context, ends_.inputs[0], "input");
    const int64_t batch = batch_of(x);
    const float* bias = bias_.empty() ? nullptr : bias_.data();
    if (has_bias_ && !bias) bias = data_of<float>(tensor_at(context, ends_.inputs[2], "bias"), cols_, "bias");
    const float* from = data_of<float>(x, batch * rows_, "input");
    float* to = data_of<float>(result_at(context, ends_.outputs[0], "output"), batch * cols_, "output");
    if (batch == 0) return;
    must(kbs_matmul(weights_->matrix(), nullptr, from, rows_, batch, bias, 0, to, cols_));
    if (activation_ != KBS_LINEAR) must(kbs_activate(activation_, 6, to, batch * cols_, to));
  }

 private:
  int64_t batch_of(const TfLiteTensor& x) const {
    check_type(x, kTfLiteFloat32, "input");
    const int64_t n = elements_of(x, "input");
    if (n % rows_) failed("its input of %lld elements should be rows of %lld", (long long)n, (long long)rows_);
    const int64_t batch = n / rows_;
    if (batch > INT32_MAX) failed("its input has too many rows");
    return batch;
  }

  Ends ends_;
  bool keep_dims_, has_bias_;
  int64_t rows_, cols_;
  int32_t activation_;
  std::vector<float> bias_;
  std::shared_ptr<Weights> weights_;
};

// ---- a recurrent layer

// What an operator's attributes say, checked as far as they go by themselves.
struct Layer {
  int64_t cell, activation, recurrent_activation, units, reset_after, go_backwards, return_sequences, zero_output_for_mask,
      mask, states_in, states_out, bfloat16;
  float activation_limit, recurrent_limit;
  std::vector<int64_t> kernel, recurrent, bias;
  int64_t gates = 0;

  Layer(const uint8_t* data, size_t size) {
    Attributes a;
    if (!a.read(data, size)) failed("its attributes are no FlexBuffer map");
    const auto integer = [&](const char* name, int64_t least, int64_t most) {
      int64_t value = 0;
      if (!a.integer(name, &value)) failed("it has no integer attribute %s", name);
      if (value < least || value > most)
        failed("its attribute %s should be from %lld to %lld, and is %lld", name, (long long)least, (long long)most, (long long)value);
      return value;
    };
    const auto limit = [&](const char* name) {
      float value = 0;
      if (!a.number(name, &value) || !std::isfinite(value)) failed("it has no finite attribute %s", name);
      return value;
    };
    const auto places = [&](const char* name, size_t most) {
      std::vector<int64_t> out;
      if (!a.vector(name, &out) || out.size() % 2 || out.size() > 2 * most)
        failed("its attribute %s should be at most %zu pairs of integers", name, most);
      for (int64_t value : out)
        if (value < -1 || value > INT32_MAX) failed("its attribute %s names tensor %lld", name, (long long)value);
      return out;
    };
    integer("version", kVersion, kVersion);
    cell = integer("cell", KBS_SIMPLE_RNN, KBS_LSTM);
    activation = integer("activation", KBS_LINEAR, KBS_CLIPPED_RELU);
    recurrent_activation = integer("recurrent_activation", KBS_LINEAR, KBS_CLIPPED_RELU);
    activation_limit = limit("activation_limit");
    recurrent_limit = limit("recurrent_limit");
    units = integer("units", 1, int64_t{1} << 20);
    reset_after = integer("reset_after", 0, 1);
    go_backwards = integer("go_backwards", 0, 1);
    return_sequences = integer("return_sequences", 0, 1);
    zero_output_for_mask = integer("zero_output_for_mask", 0, 1);
    mask = integer("mask", 0, 1);
    const int64_t states = cell == KBS_LSTM ? 2 : 1;
    states_in = integer("states_in", 0, states);
    states_out = integer("states_out", 0, states);
    if ((states_in && states_in != states) || (states_out && states_out != states)) failed("it has one state of two");
    bfloat16 = integer("bfloat16", 0, 1);
    kernel = places("kernel", 64);
    recurrent = places("recurrent", 64);
    bias = places("bias", 1);
    if (kernel.empty() || recurrent.empty()) failed("it names no weights");
    gates = cell == KBS_SIMPLE_RNN ? 1 : cell == KBS_GRU ? 3 : 4;
  }
};

// The tensor of a subgraph, while the delegate prepares. -1 is the operator's own subgraph.
template <class Use>
void with_tensor(TfLiteContext* context, int64_t subgraph, int64_t tensor, const char* what, const Use& use) {
  if (subgraph == -1) {
    use(tensor_at(context, (int)tensor, what));
    return;
  }
  TfLiteContext* other = nullptr;
  if (context->AcquireSubgraphContext(context, (int)subgraph, &other) != kTfLiteOk)
    failed("its %s lies in subgraph %lld, which there is not", what, (long long)subgraph);
  struct Release {
    TfLiteContext* context;
    int subgraph;
    ~Release() { context->ReleaseSubgraphContext(context, subgraph); }
  } release{context, (int)subgraph};
  if (!other || other == context) failed("its %s lies in subgraph %lld, its own, which is -1", what, (long long)subgraph);
  use(tensor_at(other, (int)tensor, what));
}

class Recurrent : public Operator {
 public:
  const char* name() const override { return layer_.cell == KBS_GRU ? "GRU" : layer_.cell == KBS_LSTM ? "LSTM" : "SimpleRNN"; }

  Recurrent(TfLiteContext* context, const TfLiteNode& node, const uint8_t* attributes, size_t size)
      : ends_(node), layer_(attributes, size), width_(layer_.gates * layer_.units) {
    const int64_t inputs = 1 + layer_.mask + layer_.states_in, outputs = 1 + layer_.states_out;
    if ((int64_t)ends_.inputs.size() != inputs || (int64_t)ends_.outputs.size() != outputs)
      failed("it should have %lld inputs and %lld outputs, and has %zu and %zu", (long long)inputs, (long long)outputs,
             ends_.inputs.size(), ends_.outputs.size());
    for (size_t i = 0; i < ends_.inputs.size(); i++)
      check_type(tensor_at(context, ends_.inputs[i], "input"), i == 1 && layer_.mask ? kTfLiteBool : kTfLiteFloat32, "input");
    for (int output : ends_.outputs) result_at(context, output, "output");
    features_ = read_weights(context, layer_.kernel, "kernel", &kernel_);
    if (read_weights(context, layer_.recurrent, "recurrent kernel", &recurrent_) != layer_.units)
      failed("its recurrent kernel does not have %lld rows, one for each unit", (long long)layer_.units);
    if (!layer_.bias.empty()) {
      with_tensor(context, layer_.bias[0], layer_.bias[1], "bias", [&](const TfLiteTensor& bias) {
        read_bias(bias, layer_.cell == KBS_GRU && layer_.reset_after ? 2 * width_ : width_, &bias_);
        if (bias_.empty()) failed("its bias is no constant");
      });
    }
  }

  void prepare(TfLiteContext* context) override {
    if (!rnn_) {
      kbs_rnn_config config{};
      config.cell = (int32_t)layer_.cell;
      config.activation = (int32_t)layer_.activation;
      config.recurrent_activation = (int32_t)layer_.recurrent_activation;
      config.reset_after = (int32_t)layer_.reset_after;
      config.activation_limit = layer_.activation_limit;
      config.recurrent_limit = layer_.recurrent_limit;
      config.kernel = kernel_->matrix();
      config.recurrent = recurrent_->matrix();
      config.bias = bias_.empty() ? nullptr : bias_.data();
      kbs_rnn* made = nullptr;
      must(kbs_rnn_create(&config, &made));
      rnn_.reset(made);
    }
    const Sizes s = sizes(context);
    const int64_t sequence[] = {s.batch, s.steps, layer_.units}, state[] = {s.batch, layer_.units};
    TfLiteTensor& y = result_at(context, ends_.outputs[0], "output");
    layer_.return_sequences ? resize(context, y, sequence, 3) : resize(context, y, state, 2);
    for (size_t i = 1; i < ends_.outputs.size(); i++)
      resize(context, result_at(context, ends_.outputs[i], "final state"), state, 2);
  }

  void run(TfLiteContext* context) override {
    const Sizes s = sizes(context);
    const int64_t state = s.batch * layer_.units;
    const auto input = [&](size_t i, int64_t n, const char* what) {
      return data_of<float>(tensor_at(context, ends_.inputs[i], what), n, what);
    };
    const auto output = [&](size_t i, int64_t n, const char* what) {
      return data_of<float>(result_at(context, ends_.outputs[i], what), n, what);
    };
    kbs_rnn_call call{};
    call.batch = s.batch, call.steps = s.steps;
    call.x = input(0, s.batch * s.steps * features_, "input");
    if (layer_.mask) call.mask = data_of<uint8_t>(tensor_at(context, ends_.inputs[1], "mask"), s.batch * s.steps, "mask");
    if (layer_.states_in > 0) call.initial_h = input(first_state(), state, "state");
    if (layer_.states_in > 1) call.initial_c = input(first_state() + 1, state, "state");
    call.go_backwards = (int32_t)layer_.go_backwards;
    call.return_sequences = (int32_t)layer_.return_sequences;
    call.zero_output_for_mask = (int32_t)layer_.zero_output_for_mask;
    call.y = output(0, layer_.return_sequences ? state * s.steps : state, "output");
    if (layer_.states_out > 0) call.final_h = output(1, state, "final state");
    if (layer_.states_out > 1) call.final_c = output(2, state, "final state");
    if (s.batch > 0) must(kbs_rnn_run(rnn_.get(), &call));
  }

 private:
  struct Sizes {
    int64_t batch, steps;
  };

  size_t first_state() const { return 1 + (size_t)layer_.mask; }

  // Returns the matrix's rows.
  int64_t read_weights(TfLiteContext* context, const std::vector<int64_t>& places, const char* what,
                       std::unique_ptr<Weights>* out) const {
    std::vector<Constant> constants;
    int64_t columns = 0;
    for (size_t i = 0; i < places.size(); i += 2) {
      Constant constant;
      std::string reason;
      with_tensor(context, places[i], places[i + 1], what, [&](const TfLiteTensor& t) { reason = read_constant(t, &constant); });
      if (!reason.empty()) failed("its %s: %s", what, reason.c_str());
      constants.push_back(constant);
      const Constant& first = constants.front();
      if (constant.inputs != first.inputs) failed("parts of its %s have different inputs", what);
      if ((constant.type == kTfLiteInt8) != (first.type == kTfLiteInt8)) failed("only a part of its %s is int8", what);
      columns += constant.outputs;
    }
    if (columns != width_) failed("its %s should have %lld columns, and has %lld", what, (long long)width_, (long long)columns);
    const int64_t rows = constants.front().inputs;
    out->reset(new Weights(std::move(constants), layer_.gates, layer_.bfloat16));
    return rows;
  }

  // Batch and steps of x; throws unless all inputs fit each other and the layer.
  Sizes sizes(TfLiteContext* context) const {
    const TfLiteTensor& x = tensor_at(context, ends_.inputs[0], "input");
    check_type(x, kTfLiteFloat32, "input");
    check_shape(x, {kAny, kAny, features_}, "input");
    const Sizes s{x.dims->data[0], x.dims->data[1]};
    int64_t results;
    if (s.steps < 1) failed("its input has no time steps");
    if (__builtin_mul_overflow(s.batch * s.steps, width_, &results) || results > (int64_t{1} << 48)) failed("its output is too large");
    if (layer_.mask) {
      const TfLiteTensor& mask = tensor_at(context, ends_.inputs[1], "mask");
      check_type(mask, kTfLiteBool, "mask");
      check_shape(mask, {s.batch, s.steps}, "mask");
    }
    for (size_t i = first_state(); i < ends_.inputs.size(); i++) {
      const TfLiteTensor& state = tensor_at(context, ends_.inputs[i], "state");
      check_type(state, kTfLiteFloat32, "state");
      check_shape(state, {s.batch, layer_.units}, "state");
    }
    return s;
  }

  Ends ends_;
  Layer layer_;
  int64_t width_;  // of all gates
  int64_t features_;
  std::unique_ptr<Weights> kernel_, recurrent_;
  std::vector<float> bias_;
  std::unique_ptr<kbs_rnn, Destroy> rnn_;
};

// ---- the kernel that stands in for an operator ----------------------------------------------------------------------

struct Delegate {
  TfLiteDelegate api{};
  int threads = 1;
  std::mutex mutex;               // one graph at a time
  std::unique_ptr<Operator> next;  // for the kernel that is being made
};

void* init(TfLiteContext*, const char* buffer, size_t) {
  // Called from prepare_delegate, which holds the lock.
  const auto* params = (const TfLiteDelegateParams*)buffer;
  return ((Delegate*)params->delegate->data_)->next.release();
}

void release(TfLiteContext*, void* op) { delete (Operator*)op; }

template <class Body>
TfLiteStatus call(TfLiteContext* context, TfLiteNode* node, const Body& body) {
  auto* op = (Operator*)node->user_data;
  if (!op) return kTfLiteError;
  const auto report = [&](const char* message) { context->ReportError(context, "keras_blocksparse, %s: %s", op->name(), message); };
  return guarded([&] { body(*op); }, report) ? kTfLiteOk : kTfLiteError;
}

TfLiteStatus prepare(TfLiteContext* context, TfLiteNode* node) {
  return call(context, node, [&](Operator& op) { op.prepare(context); });
}

TfLiteStatus invoke(TfLiteContext* context, TfLiteNode* node) {
  return call(context, node, [&](Operator& op) {
    struct Limit {
      explicit Limit(int threads) : before(kbs_limit_threads(threads)) {}
      ~Limit() { kbs_limit_threads(before); }
      int32_t before;
    } limit(op.threads);
    op.run(context);
  });
}

TfLiteRegistration kernel() {
  TfLiteRegistration r{};
  r.init = init, r.free = release, r.prepare = prepare, r.invoke = invoke;
  r.custom_name = "keras_blocksparse";
  r.version = 1;
  return r;
}

// ---- choosing operators ----------------------------------------------------------------------------------------------

// The operator for a node if we run it, else null. `custom` tells that nobody else can.
std::unique_ptr<Operator> take(TfLiteContext* context, int index, SharedWeights* shared, bool* custom) {
  TfLiteNode* node = nullptr;
  TfLiteRegistration* registration = nullptr;
  *custom = false;
  if (context->GetNodeAndRegistration(context, index, &node, &registration) != kTfLiteOk || !node || !registration) return nullptr;
  switch (registration->builtin_code) {
    case kTfLiteBuiltinFullyConnected: {
      const auto* params = (const TfLiteFullyConnectedParams*)node->builtin_data;
      if (!params) return nullptr;
      return std::unique_ptr<Operator>(new FullyConnected(context, *node, *params, shared));
    }
    case kTfLiteBuiltinStablehloComposite: {
      const auto* params = (const TfLiteStablehloCompositeParams*)node->builtin_data;
      if (!params || !params->name || std::strcmp(params->name, kCompositeName)) return nullptr;
      return std::unique_ptr<Operator>(new Recurrent(context, *node, params->attributes, params->attributes_size));
    }
    case kTfLiteBuiltinCustom:
      if (!registration->custom_name || std::strcmp(registration->custom_name, kCustomCode)) return nullptr;
      *custom = true;
      if (node->custom_initial_data_size < 0) failed("its attributes are no FlexBuffer map");
      return std::unique_ptr<Operator>(
          new Recurrent(context, *node, (const uint8_t*)node->custom_initial_data, (size_t)node->custom_initial_data_size));
    default: return nullptr;
  }
}

TfLiteStatus prepare_delegate(TfLiteContext* context, TfLiteDelegate* api) {
  Delegate& delegate = *(Delegate*)api->data_;
  const auto report = [&](const char* message) { context->ReportError(context, "keras_blocksparse: %s", message); };
  bool replaced = true;
  const bool done = guarded([&] {
    const std::lock_guard<std::mutex> lock(delegate.mutex);
    TfLiteIntArray* plan = nullptr;
    if (context->GetExecutionPlan(context, &plan) != kTfLiteOk || !plan) failed("the graph has no execution plan");
    // The plan is the runtime's, and changes when a node is replaced: first choose, then replace.
    struct Choice {
      int node;
      std::unique_ptr<Operator> op;
    };
    std::vector<Choice> chosen;
    SharedWeights shared;
    for (int index : Ends::list(plan)) {
      bool custom = false;
      std::unique_ptr<Operator> op;
      const bool fine = guarded([&] { op = take(context, index, &shared, &custom); }, [&](const char* message) {
        if (custom) context->ReportError(context, "keras_blocksparse cannot run operator %d, %s: %s", index, kCustomCode, message);
        if (logging()) std::fprintf(stderr, "keras_blocksparse: operator %d is left to the runtime: %s\n", index, message);
      });
      if (!fine || !op) continue;
      op->threads = delegate.threads;
      if (logging()) std::fprintf(stderr, "keras_blocksparse: operator %d is ours: %s\n", index, op->name());
      chosen.push_back({index, std::move(op)});
    }
    for (Choice& choice : chosen) {
      struct {
        int size, node;
      } nodes{1, choice.node};
      delegate.next = std::move(choice.op);
      const TfLiteStatus status =
          context->ReplaceNodeSubsetsWithDelegateKernels(context, kernel(), (const TfLiteIntArray*)&nodes, &delegate.api);
      delegate.next.reset();
      if (status != kTfLiteOk) {
        replaced = false;
        return;
      }
    }
  }, report);
  return done && replaced ? kTfLiteOk : kTfLiteDelegateError;
}

// A whole number from 1 to 1024; 0 if it is none.
int read_threads(const char* text) {
  char* end = nullptr;
  const long value = text && *text >= '0' && *text <= '9' ? std::strtol(text, &end, 10) : 0;
  return end && !*end && value <= 1024 ? (int)value : 0;
}

}  // namespace
}  // namespace tflite
}  // namespace kbs

extern "C" {

KBS_API TfLiteDelegate* tflite_plugin_create_delegate(char** keys, char** values, size_t count,
                                                      void (*report_error)(const char*)) {
  using namespace kbs::tflite;
  Delegate* made = nullptr;
  guarded([&] {
    std::unique_ptr<Delegate> delegate(new Delegate);
    const auto options = (uint32_t)count;  // Python's loader passes an int, which leaves the upper half as it was
    for (uint32_t i = 0; i < options; i++) {
      if (!keys || !values || !keys[i] || !values[i]) failed("an option has no name or no value");
      if (std::strcmp(keys[i], "num_threads")) failed("unknown option \"%.100s\"; there is num_threads", keys[i]);
      if (!(delegate->threads = read_threads(values[i])))
        failed("num_threads must be a whole number from 1 to 1024; received \"%.100s\"", values[i]);
    }
    const char* isa = nullptr;
    must(kbs_get_isa(&isa));
    delegate->api.data_ = delegate.get();
    delegate->api.Prepare = prepare_delegate;
    // Without it the runtime prepares a graph before delegates see it, and stops at operators it does not know.
    delegate->api.flags = kTfLiteDelegateFlagsAllowDynamicTensors;
    made = delegate.release();
  }, [&](const char* message) {
    char text[sizeof(Failure::message) + 32];
    std::snprintf(text, sizeof(text), "keras_blocksparse: %s", message);
    if (report_error) report_error(text);
  });
  return made ? &made->api : nullptr;
}

KBS_API void tflite_plugin_destroy_delegate(TfLiteDelegate* delegate) {
  if (delegate) delete (kbs::tflite::Delegate*)delegate->data_;
}

}  // extern "C"
