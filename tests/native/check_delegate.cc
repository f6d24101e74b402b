// The TFLite delegate without TFLite, which does not survive sanitizers: fake_tflite.h plays its part.
//   check_delegate            operators against plain loops
//   check_delegate hostile    files of no sense
//   check_delegate memory     every allocation fails once
//   check_delegate threads    interpreters in several threads, and one delegate
// Linked with -Wl,--wrap=malloc.
#include <atomic>
#include <cmath>
#include <new>
#include <random>
#include <thread>

#include "fake_tflite.h"
#include "kbs.h"

// ---- allocations that fail ----------------------------------------------------------------------------------------------

extern "C" void* __real_malloc(size_t bytes);

namespace {

thread_local bool counting = false;
thread_local long allocations = 0, failing = -1;

bool fails() { return counting && fake::Own::depth == 0 && allocations++ == failing; }

void* allocate(size_t bytes) { return fails() ? nullptr : __real_malloc(bytes ? bytes : 1); }

}  // namespace

extern "C" void* __wrap_malloc(size_t bytes) { return allocate(bytes); }
#pragma GCC diagnostic ignored "-Wmismatched-new-delete"  // they match: both are these
void* operator new(size_t bytes) {
  if (void* data = allocate(bytes)) return data;
  throw std::bad_alloc();
}
void* operator new(size_t bytes, const std::nothrow_t&) noexcept { return allocate(bytes); }
void* operator new[](size_t bytes) { return operator new(bytes); }
void operator delete(void* data) noexcept { std::free(data); }
void operator delete(void* data, size_t) noexcept { std::free(data); }
void operator delete[](void* data) noexcept { std::free(data); }
void operator delete[](void* data, size_t) noexcept { std::free(data); }

namespace {

using namespace fake;

int failures = 0, checks = 0;

__attribute__((format(printf, 1, 2))) void wrong(const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  std::vprintf(format, arguments);
  va_end(arguments);
  std::printf("\n");
  failures++;
}

std::mt19937 engine(1);
int below(int n) { return (int)(engine() % (unsigned)n); }
float number() { return (float)(below(257) - 128) / 128; }
Floats numbers(size_t n) {
  Floats out(n);
  for (float& x : out) x = number();
  return out;
}
// Most of it zero, in the blocks of the form it will be stored in or others.
Floats matrix(int outputs, int inputs) {
  Floats out((size_t)(outputs * inputs));
  const int height = 1 << below(3), width = 1 << below(3);
  for (int o = 0; o < outputs; o += height)
    for (int i = 0; i < inputs; i += width)
      if (below(3) == 0)
        for (int a = o; a < std::min(o + height, outputs); a++)
          for (int b = i; b < std::min(i + width, inputs); b++) out[(size_t)(a * inputs + b)] = number();
  return out;
}

struct Delegate {
  explicit Delegate(const char* threads = "1") {
    char key[] = "num_threads", value[16];
    std::snprintf(value, sizeof(value), "%s", threads);
    char *keys[] = {key}, *values[] = {value};
    // The count as Python passes it: only its low half means anything.
    handle = tflite_plugin_create_delegate(keys, values, ((size_t)7 << 32) + 1, nullptr);
    if (!handle) std::abort();
  }
  ~Delegate() { tflite_plugin_destroy_delegate(handle); }
  TfLiteDelegate* handle;
};

// ---- what operators should compute ----------------------------------------------------------------------------------------

using Doubles = std::vector<double>;

double activate(int kind, double limit, double x) {
  switch (kind) {
    case KBS_TANH: return std::tanh(x);
    case KBS_SIGMOID: return 1 / (1 + std::exp(-x));
    case KBS_RELU: return std::max(x, 0.0);
    case KBS_HARD_SIGMOID: return std::min(std::max(x + 3, 0.0), 6.0) / 6;
    case KBS_CLIPPED_RELU: return std::min(std::max(x, 0.0), limit);
    default: return x;
  }
}

// a (outputs) += w (outputs, inputs) x (inputs), for outputs from `begin`.
void add_product(const Floats& w, const double* x, int inputs, int begin, int outputs, double* a) {
  for (int o = 0; o < outputs; o++)
    for (int i = 0; i < inputs; i++) a[o] += (double)w[(size_t)((begin + o) * inputs + i)] * x[i];
}

struct Result {
  Doubles y, h, c;
};

// As Keras defines its layers, one sample after the other.
Result reference(const Layer& l, const Floats& x, const std::vector<uint8_t>& mask, const Floats& h0, const Floats& c0) {
  const int n = l.units, width = l.gates() * n;
  const auto f = [&](double v) { return activate(l.activation, l.activation_limit, v); };
  const auto g = [&](double v) { return activate(l.recurrent_activation, l.recurrent_limit, v); };
  Result out;
  for (int sample = 0; sample < l.batch; sample++) {
    Doubles h((size_t)n), c((size_t)n), y((size_t)n);
    if (l.states_in) h.assign(h0.begin() + sample * n, h0.begin() + (sample + 1) * n);
    if (l.states_in && l.cell == KBS_LSTM) c.assign(c0.begin() + sample * n, c0.begin() + (sample + 1) * n);
    for (int t = 0; t < l.steps; t++) {
      const int at = sample * l.steps + (l.go_backwards ? l.steps - 1 - t : t);
      const bool active = !l.mask || mask[(size_t)at];
      if (active) {
        const Doubles in(x.begin() + at * l.features, x.begin() + (at + 1) * l.features);
        Doubles a((size_t)width), r((size_t)width), gated((size_t)n);  // of the inputs; of the state
        for (size_t i = 0; l.bias && i < l.b.size(); i++) (i < a.size() ? a[i] : r[i - a.size()]) = l.b[i];
        add_product(l.kernel, in.data(), l.features, 0, width, a.data());
        if (l.cell == KBS_GRU) {
          add_product(l.recurrent, h.data(), n, 0, 2 * n, r.data());
          for (int u = 0; u < n; u++) gated[u] = g(a[n + u] + r[n + u]);
          for (int u = 0; u < n && !l.reset_after; u++) gated[u] *= h[u];
          add_product(l.recurrent, l.reset_after ? h.data() : gated.data(), n, 2 * n, n, &r[2 * n]);
          for (int u = 0; u < n; u++) {
            const double z = g(a[u] + r[u]), candidate = f(a[2 * n + u] + r[2 * n + u] * (l.reset_after ? gated[u] : 1));
            h[u] = z * h[u] + (1 - z) * candidate;
          }
        } else {
          add_product(l.recurrent, h.data(), n, 0, width, a.data());
          for (int u = 0; u < n; u++) {
            if (l.cell == KBS_LSTM) c[u] = g(a[n + u]) * c[u] + g(a[u]) * f(a[2 * n + u]);
            h[u] = l.cell == KBS_LSTM ? g(a[3 * n + u]) * f(c[u]) : f(a[u]);
          }
        }
        y = h;
      }
      // A skipped step gives what the one before gave: nothing, in the beginning.
      const Doubles now = active || !l.zero_output_for_mask ? y : Doubles((size_t)n);
      if (l.return_sequences || t == l.steps - 1) out.y.insert(out.y.end(), now.begin(), now.end());
    }
    out.h.insert(out.h.end(), h.begin(), h.end());
    out.c.insert(out.c.end(), c.begin(), c.end());
  }
  return out;
}

void compare(const std::string& what, Graph* graph, int tensor, const Ints& shape, const Doubles& expected, double tolerance) {
  checks++;
  if (graph->dims(tensor) != shape) return wrong("%s: another shape", what.c_str());
  const Floats got = graph->values<float>(tensor);
  if (got.size() != expected.size()) return wrong("%s: %zu values, not %zu", what.c_str(), got.size(), expected.size());
  for (size_t i = 0; i < got.size(); i++)
    if (!(std::fabs(got[i] - expected[i]) <= tolerance))
      return wrong("%s: [%zu] is %.7g, not %.7g", what.c_str(), i, got[i], expected[i]);
}

// int8 rounds what goes into a product to 1/127 of the largest input, so that few inputs make errors that add up little.
double tolerance(int type, bool bfloat16) { return type == kTfLiteInt8 && !bfloat16 ? 0.06 : bfloat16 ? 0.02 : 2e-5; }

Storage storage(int type, int outputs, int inputs) {
  Storage s;
  s.type = type, s.sparse = below(5) != 0, s.per_row = below(2);
  int height = 1 << below(4), width = 1 << below(4);
  if (outputs % height) height = 1;
  if (inputs % width) width = 1;
  s.form = sparsity_of(below(2), below(2), below(4) != 0, height, width, below(2));
  return s;
}

constexpr int kTypes[] = {kTfLiteFloat32, kTfLiteFloat16, kTfLiteInt8};

std::string describe(const Layer& l) {
  char text[200];
  std::snprintf(text, sizeof(text), "cell %d units %d features %d type %d %d%s, after %d back %d seq %d zero %d mask %d states %d %d parts %d",
                l.cell, l.units, l.features, l.kernel_storage.type, l.recurrent_storage.type, l.bfloat16 ? " bf16" : "",
                l.reset_after, l.go_backwards, l.return_sequences, l.zero_output_for_mask, l.mask, l.states_in, l.states_out, l.parts);
  return text;
}

// A random layer, and its tensors and weights in the model.
Layer random_layer(Model* model, int cell, int type) {
  Layer l;
  l.cell = cell, l.units = 1 + below(24), l.features = 1 + below(24), l.batch = 1 + below(4), l.steps = 1 + below(6);
  if (below(2)) l.units = 8 * (1 + below(4)), l.features = 16;
  l.activation = below(6), l.recurrent_activation = below(6), l.activation_limit = 1.5f, l.recurrent_limit = 0.75f;
  // With others, and larger recurrent kernels, states may grow, and with them the last digit's error.
  if (l.activation == KBS_LINEAR || l.activation == KBS_RELU) l.activation = KBS_TANH;
  if (l.recurrent_activation < KBS_HARD_SIGMOID) l.recurrent_activation = KBS_SIGMOID;
  l.reset_after = below(2), l.go_backwards = below(2), l.return_sequences = below(2), l.zero_output_for_mask = below(2);
  l.mask = below(2), l.states_in = below(2), l.states_out = below(2), l.bfloat16 = below(4) == 0, l.bias = below(3) != 0;
  l.is_custom = below(2), l.typed = below(2), l.width = below(2) ? 4 : 8;
  l.place = below((int)model->graphs.size()) - 1;
  if (l.place == 0) l.place = -1;
  l.parts = 1 + below(std::min(3, l.gates() * l.units));
  // A mix of float32 and float16 is fine, and the recurrent kernel may be int8 by itself.
  const int other = below(3) ? type : kTypes[below(3)], outputs = l.parts == 1 ? l.gates() * l.units : 1;
  l.kernel_storage = storage(type, outputs, l.features), l.recurrent_storage = storage(other, outputs, l.units);
  l.kernel = matrix(l.gates() * l.units, l.features), l.recurrent = matrix(l.gates() * l.units, l.units), l.b = numbers(l.biases());
  for (float& w : l.recurrent) w /= 2;
  l.add(model);
  return l;
}

// Fills inputs, prepares, runs, compares.
void run_layer(Model* model, Layer l, const std::string& what) {
  Graph& graph = model->main();
  const Floats x = numbers((size_t)(l.batch * l.steps * l.features)), h = numbers((size_t)(l.batch * l.units)), c = numbers(h.size());
  std::vector<uint8_t> mask((size_t)(l.batch * l.steps));
  for (uint8_t& m : mask) m = (uint8_t)(below(2) ? 0 : 1);
  size_t next = 0;
  const auto input = [&](const Ints& dims, const auto& values) {
    graph.set_dims(l.inputs[next], dims);
    graph.fill(l.inputs[next++], values);
  };
  input({l.batch, l.steps, l.features}, x);
  if (l.mask) input({l.batch, l.steps}, mask);
  for (int i = 0; l.states_in && i < l.states(); i++) input({l.batch, l.units}, i ? c : h);
  if (graph.prepare() != kTfLiteOk || graph.run() != kTfLiteOk)
    return wrong("%s: %s", what.c_str(), graph.errors.empty() ? "no error" : graph.errors.back().c_str());
  const Result expected = reference(l, x, mask, h, c);
  const bool int8 = l.kernel_storage.type == kTfLiteInt8 || l.recurrent_storage.type == kTfLiteInt8;
  const double allowed = tolerance(int8 ? kTfLiteInt8 : kTfLiteFloat32, l.bfloat16);
  compare(what + " y", &graph, l.outputs[0], l.return_sequences ? Ints{l.batch, l.steps, l.units} : Ints{l.batch, l.units}, expected.y, allowed);
  if (l.states_out) compare(what + " h", &graph, l.outputs[1], {l.batch, l.units}, expected.h, allowed);
  if (l.states_out && l.cell == KBS_LSTM) compare(what + " c", &graph, l.outputs[2], {l.batch, l.units}, expected.c, 2 * allowed);
}

void check_layers() {
  for (int turn = 0; turn < 600; turn++) {
    const Delegate delegate(turn % 2 ? "1" : "2");
    Model model(1 + below(3));
    const Layer layer = random_layer(&model, turn % 3, kTypes[turn / 3 % 3]);
    if (model.apply(delegate.handle) != kTfLiteOk || model.main().delegated() != 1) {
      wrong("%s: not taken: %s", describe(layer).c_str(), model.main().errors.empty() ? "" : model.main().errors[0].c_str());
      continue;
    }
    run_layer(&model, layer, describe(layer));
    Layer other = layer;  // resized
    other.batch = 1 + below(5), other.steps = 1 + below(40);
    run_layer(&model, other, describe(layer) + " resized");
    if (turn % 10) continue;
    other.batch = 0;
    run_layer(&model, other, describe(layer) + " with no samples");
    run_layer(&model, layer, describe(layer) + " again");
  }
}

Doubles reference(const Dense& d, const Floats& x, int batch) {
  Doubles y;
  for (int b = 0; b < batch; b++) {
    const Doubles in(x.begin() + b * d.rows, x.begin() + (b + 1) * d.rows);
    Doubles a((size_t)d.cols);
    if (d.bias) a.assign(d.b.begin(), d.b.end());
    add_product(d.w, in.data(), d.rows, 0, d.cols, a.data());
    for (double v : a)
      y.push_back(d.activation == kTfLiteActRelu    ? std::max(v, 0.0)
                  : d.activation == kTfLiteActRelu6 ? std::min(std::max(v, 0.0), 6.0)
                  : d.activation == kTfLiteActTanh  ? std::tanh(v)
                                                    : v);
  }
  return y;
}

Dense random_dense(int type) {
  Dense d;
  d.rows = below(2) ? 16 * (1 + below(4)) : 1 + below(40), d.cols = below(2) ? 8 * (1 + below(6)) : 1 + below(40);
  const int activations[] = {kTfLiteActNone, kTfLiteActRelu, kTfLiteActRelu6, kTfLiteActTanh};
  d.activation = activations[below(4)];
  d.batch = Ints((size_t)below(4));
  for (int& size : d.batch) size = 1 + below(4);
  d.keep_dims = below(2), d.bias = below(3) != 0, d.constant_bias = below(2);
  do d.storage = storage(type, d.cols, d.rows);
  while (!d.storage.sparse);
  d.w = matrix(d.cols, d.rows), d.b = numbers((size_t)d.cols);
  return d;
}

void run_dense(Graph* graph, const Dense& d, const Ints& leading, const std::string& what) {
  int batch = 1;
  for (int size : leading) batch *= size;
  Ints shape = leading;
  shape.push_back(d.rows);
  const Floats x = numbers((size_t)(batch * d.rows));
  graph->set_dims(d.x, shape);
  graph->fill(d.x, x);
  if (d.bias && !d.constant_bias) graph->fill(d.bias_index, d.b);
  if (graph->prepare() != kTfLiteOk || graph->run() != kTfLiteOk)
    return wrong("%s: %s", what.c_str(), graph->errors.empty() ? "no error" : graph->errors.back().c_str());
  shape.back() = d.cols;
  compare(what, graph, d.y, d.keep_dims ? shape : Ints{batch, d.cols}, reference(d, x, batch), tolerance(d.storage.type, false) * 2);
}

void check_dense() {
  for (int turn = 0; turn < 600; turn++) {
    const Delegate delegate;
    Model model;
    Graph& graph = model.main();
    Dense d = random_dense(turn % 2 ? kTfLiteInt8 : kTfLiteFloat32);
    d.add(&graph);
    char what[160];
    std::snprintf(what, sizeof(what), "dense %dx%d type %d order %d levels %zu keep %d", d.cols, d.rows, d.storage.type,
                  d.storage.form.order[0], d.storage.form.order.size(), d.keep_dims);
    // Another operator with the same weight, as in an unrolled layer.
    const int y = graph.tensor(kTfLiteFloat32, {1});
    graph.fully_connected({d.x, d.weight}, {y});
    if (model.apply(delegate.handle) != kTfLiteOk || graph.delegated() != 2) {
      wrong("%s: %d operators taken", what, graph.delegated());
      continue;
    }
    run_dense(&graph, d, d.batch, what);
    run_dense(&graph, d, {1 + below(3), below(40)}, std::string(what) + " resized");
    Dense plain = d;
    plain.bias = plain.keep_dims = false, plain.activation = kTfLiteActNone, plain.y = y;
    run_dense(&graph, plain, {3}, std::string(what) + " once more");
  }
}

// A run must not allocate: real-time audio calls it.
void check_no_allocations() {
  const Delegate delegate;
  for (int turn = 0; turn < 40; turn++) {
    Model model;
    if (turn % 4 == 3) {
      Dense d = random_dense(turn % 8 == 3 ? kTfLiteInt8 : kTfLiteFloat32);
      d.add(&model.main());
    } else {
      random_layer(&model, turn % 3, kTypes[turn / 3 % 3]);
    }
    if (model.apply(delegate.handle) != kTfLiteOk || model.main().prepare() != kTfLiteOk || model.main().run() != kTfLiteOk) {
      wrong("turn %d does not run", turn);
      continue;
    }
    allocations = 0, failing = -1, counting = true;
    const bool fine = model.main().run() == kTfLiteOk;
    counting = false;
    checks++;
    if (!fine || allocations) wrong("turn %d: a run allocates %ld times", turn, allocations);
  }
}

// ---- files of no sense ------------------------------------------------------------------------------------------------------

// An operator that would be taken.
struct Built {
  Model model{3};
  Layer layer;
  Dense dense;
  Graph::Node* node = nullptr;
};

std::unique_ptr<Built> built(bool recurrent, int type = kTfLiteFloat32) {
  auto out = std::make_unique<Built>();
  Layer& l = out->layer;
  Dense& d = out->dense;
  if (recurrent) {
    l.is_custom = true, l.mask = l.states_in = l.states_out = true, l.cell = KBS_LSTM, l.place = 1;
    l.kernel_storage.type = l.recurrent_storage.type = type;
    l.kernel_storage.form = l.recurrent_storage.form = sparsity_of(false, false, true, 2, 4);
    l.features = 8;
    l.kernel = Floats(128), l.recurrent = Floats(64), l.b = numbers(16);
    l.kernel[0] = l.kernel[127] = l.recurrent[0] = 1;
    out->node = &l.add(&out->model);
  } else {
    d.storage.type = type;
    d.storage.form = sparsity_of(false, false, true, 1, 4);
    d.w = Floats(64), d.b = numbers(8);
    d.w[0] = d.w[63] = 1;
    out->node = &d.add(&out->model.main());
  }
  return out;
}

// Spoils it. It must be left to the runtime, and the reason be told where nobody else can run it.
template <class Spoil>
void declined(bool recurrent, const char* reason, const Spoil& spoil, int type = kTfLiteFloat32) {
  const Delegate delegate;
  auto b = built(recurrent, type);
  spoil(*b);
  checks++;
  Graph& graph = b->model.main();
  if (b->model.apply(delegate.handle) != kTfLiteOk) return wrong("%s: the delegate fails", reason);
  if (graph.delegated() != 0) return wrong("%s: taken", reason);
  if (!recurrent) return;
  if (graph.errors.size() != 1 || graph.errors[0].find(reason) == std::string::npos)
    wrong("\"%s\" is not in \"%s\"", reason, graph.errors.empty() ? "" : graph.errors[0].c_str());
}

template <class Change>
void declined_attribute(const char* reason, const Change& change) {
  declined(true, reason, [&](Built& b) {
    change(b.layer.attributes);
    Graph::set_attributes(b.node, b.layer.attributes.bytes());
  });
}

// Spoils the first constant of a layer, and the weight of a dense operator.
template <class Spoil>
void declined_weight(const char* reason, const Spoil& spoil, int type = kTfLiteFloat32) {
  for (bool recurrent : {true, false})
    declined(recurrent, reason, [&](Built& b) {
      Graph& graph = b.layer.constants.empty() ? b.model.main() : *b.model.graphs[1];
      spoil(graph, b.layer.constants.empty() ? b.dense.weight : b.layer.constants[0]);
    }, type);
}

void set(TfLiteIntArray* array, int i, int value) { array->data[i] = value; }

void replace(TfLiteIntArray** array, const Ints& values) {
  std::free(*array);
  *array = new_array<TfLiteIntArray>(values);
}

void check_declined() {
  for (bool recurrent : {true, false})  // the operators as such are fine
    for (int type : {kTfLiteFloat32, kTfLiteInt8}) {
      const Delegate delegate;
      auto b = built(recurrent, type);
      if (b->model.apply(delegate.handle) != kTfLiteOk || b->model.main().delegated() != 1) wrong("what is to be spoiled is not taken");
    }

  // Attributes
  for (const char* name : {"version", "cell", "activation", "recurrent_activation", "activation_limit", "recurrent_limit", "units",
                           "reset_after", "go_backwards", "return_sequences", "zero_output_for_mask", "mask", "states_in",
                           "states_out", "bfloat16", "kernel", "recurrent", "bias"}) {
    declined_attribute(name, [&](FlexMap& a) { a.remove(name); });
    declined_attribute(name, [&](FlexMap& a) {
      const std::string n = name;
      n == "kernel" || n == "recurrent" || n == "bias" ? a.set(name, 1) : a.set_vector(name, {1});
    });
  }
  for (const char* name : {"version", "cell", "activation", "recurrent_activation", "units", "reset_after", "go_backwards", "mask",
                           "return_sequences", "zero_output_for_mask", "states_in", "states_out", "bfloat16"})
    for (int64_t value : {(int64_t)-1, (int64_t)99999999, INT64_MAX, INT64_MIN})
      declined(true, name, [&](Built& b) {
        b.layer.attributes.set(name, value);
        Graph::set_attributes(b.node, b.layer.attributes.bytes(8));
      });
  declined_attribute("activation_limit", [](FlexMap& a) { a.set_number("activation_limit", NAN); });
  declined_attribute("version", [](FlexMap& a) { a.set("version", 2); });
  declined_attribute("one state", [](FlexMap& a) { a.set("states_in", 1); });
  declined_attribute("inputs", [](FlexMap& a) { a.set("mask", 0); });
  declined_attribute("outputs", [](FlexMap& a) { a.set("states_out", 0); });
  declined_attribute("columns", [](FlexMap& a) { a.set("units", 5); });
  declined_attribute("has 4 and 3", [](FlexMap& a) { a.set("cell", KBS_GRU).set("states_in", 1).set("states_out", 1); });
  declined_attribute("no weights", [](FlexMap& a) { a.set_vector("kernel", {}); });
  declined_attribute("kernel", [](FlexMap& a) { a.set_vector("kernel", {1}); });
  declined_attribute("kernel", [](FlexMap& a) { a.set_vector("kernel", std::vector<int64_t>(1000, 1)); });
  declined_attribute("names tensor", [](FlexMap& a) { a.set_vector("kernel", {-2, 0}); });
  declined_attribute("no tensor", [](FlexMap& a) { a.set_vector("kernel", {1, 99}); });
  declined_attribute("no tensor", [](FlexMap& a) { a.set_vector("kernel", {1, -1}); });
  declined_attribute("which there is not", [](FlexMap& a) { a.set_vector("kernel", {3, 0}); });
  declined_attribute("its own", [](FlexMap& a) { a.set_vector("kernel", {0, 0}); });
  declined_attribute("no constant", [](FlexMap& a) { a.set_vector("kernel", {-1, 0}); });
  declined_attribute("columns", [](FlexMap& a) { a.set_vector("kernel", {1, 0, 1, 0}); });
  declined_attribute("its bias", [](FlexMap& a) { a.set_vector("bias", {1, 0}); });
  declined(true, "bias is no constant", [](Built& b) {
    b.layer.attributes.set_vector("bias", {-1, b.model.main().tensor(kTfLiteFloat32, {16})});
    Graph::set_attributes(b.node, b.layer.attributes.bytes());
  });

  // Bytes
  declined(true, "no FlexBuffer", [](Built& b) { b.node->node.custom_initial_data = nullptr; });
  declined(true, "no FlexBuffer", [](Built& b) { b.node->node.custom_initial_data_size = -1; });
  for (size_t n = 0; n < built(true)->node->attributes.size(); n++)
    declined(true, "", [&](Built& b) { Graph::set_attributes(b.node, Bytes(b.node->attributes.begin(), b.node->attributes.begin() + (long)n)); });

  // The operator's own tensors
  for (int index : {-1, 99, INT32_MAX, INT32_MIN})
    for (int i = 0; i < 4; i++) {
      declined(true, "no tensor", [&](Built& b) { set(b.node->node.inputs, i, index); });
      if (i < 2) declined(false, "", [&](Built& b) { set(b.node->node.inputs, i, index); });
      if (i < 3) declined(true, "no tensor", [&](Built& b) { set(b.node->node.outputs, i, index); });
    }
  for (bool recurrent : {true, false}) {
    declined(recurrent, "writes what it reads", [](Built& b) { set(b.node->node.outputs, 0, b.node->node.inputs->data[0]); });
    declined(recurrent, "has 0", [](Built& b) { replace(&b.node->node.inputs, {}); });
    declined(recurrent, "and 0", [](Built& b) { replace(&b.node->node.outputs, {}); });
    declined(recurrent, "TfLiteType", [](Built& b) { b.model.main().at(b.node->node.inputs->data[0]).type = kTfLiteInt8; });
    declined(recurrent, "TfLiteType", [](Built& b) { b.model.main().at(b.node->node.outputs->data[0]).type = kTfLiteInt8; });
    declined(recurrent, "is a constant", [](Built& b) { b.model.main().at(b.node->node.outputs->data[0]).allocation_type = kTfLiteMmapRo; });
  }
  declined(true, "twice", [](Built& b) { set(b.node->node.outputs, 1, b.node->node.outputs->data[0]); });
  declined(false, "", [](Built& b) { ((TfLiteFullyConnectedParams*)b.node->node.builtin_data)->activation = 2; });
  declined(false, "", [](Built& b) { ((TfLiteFullyConnectedParams*)b.node->node.builtin_data)->weights_format = 1; });
  declined(false, "", [](Built& b) { b.node->registration.builtin_code = 22; });
  declined(false, "", [](Built& b) { b.model.main().set_dims(b.dense.bias_index, {7}); });
  declined(false, "", [](Built& b) { b.model.main().set_data(b.dense.bias_index, "0123456", 7); });
  declined(false, "", [](Built& b) { std::free(b.node->node.builtin_data), b.node->node.builtin_data = nullptr; });
  declined(false, "", [](Built& b) { Storage s; s.sparse = false; Floats w(64, 1); set(b.node->node.inputs, 1, add_matrix(&b.model.main(), &w, 8, 8, s)); });

  // Weights
  const auto sparsity = [](Graph& g, int i) { return g.at(i).sparsity; };
  const auto level = [&](Graph& g, int i, int n) { return &g.at(i).sparsity->dim_metadata[n]; };
  declined_weight("no constant", [](Graph& g, int i) { g.at(i).allocation_type = kArenaRw; });
  declined_weight("type 7", [](Graph& g, int i) { g.at(i).type = 7; });
  declined_weight("no matrix", [](Graph& g, int i) { g.set_dims(i, {32}); });
  declined_weight("no matrix", [](Graph& g, int i) { std::free(g.at(i).dims), g.at(i).dims = nullptr; });
  declined_weight("a matrix of", [](Graph& g, int i) { g.set_dims(i, {-8, -8}); });
  declined_weight("a matrix of", [](Graph& g, int i) { g.set_dims(i, {INT32_MAX, INT32_MAX}); });
  declined_weight("a matrix of", [](Graph& g, int i) { g.set_dims(i, {0, 8}); });
  declined_weight("bytes", [](Graph& g, int i) { g.set_data(i, "0123456", 7); });
  declined_weight("elements", [](Graph& g, int i) { g.set_data(i, "", 0); });
  declined_weight("no data", [](Graph& g, int i) { std::free(g.at(i).data.raw), g.at(i).data.raw = nullptr; });
  declined_weight("elements", [](Graph& g, int i) { const Floats more(500); g.set_data(i, more.data(), 2000); });
  declined_weight("incomplete", [&](Graph& g, int i) { std::free(sparsity(g, i)->traversal_order), sparsity(g, i)->traversal_order = nullptr; });
  declined_weight("traversal order", [&](Graph& g, int i) { set(sparsity(g, i)->traversal_order, 0, 1); });
  declined_weight("traversal order", [&](Graph& g, int i) { set(sparsity(g, i)->traversal_order, 0, INT32_MIN); });
  declined_weight("traversal order", [&](Graph& g, int i) { set(sparsity(g, i)->traversal_order, 0, 2); });
  declined_weight("levels", [&](Graph& g, int i) { replace(&sparsity(g, i)->traversal_order, {0}); });
  declined_weight("levels", [&](Graph& g, int i) { replace(&sparsity(g, i)->block_map, {}); });
  declined_weight("levels", [&](Graph& g, int i) { replace(&sparsity(g, i)->block_map, Ints(1000)); });
  declined_weight("block map", [&](Graph& g, int i) { for (int n = 0; n < sparsity(g, i)->block_map->size; n++) set(sparsity(g, i)->block_map, n, 2); });
  declined_weight("block map", [&](Graph& g, int i) { set(sparsity(g, i)->block_map, 0, -1); });
  for (int value : {0, -4, 3, INT32_MAX, INT32_MIN}) declined_weight("divide", [&](Graph& g, int i) { level(g, i, 2)->dense_size = value; });
  for (int value : {0, -4, 3, 5000, INT32_MAX, INT32_MIN}) declined_weight("size", [&](Graph& g, int i) { level(g, i, 0)->dense_size = value; });
  declined_weight("format", [&](Graph& g, int i) { level(g, i, 0)->format = 2; });
  declined_weight("divide", [&](Graph& g, int i) { level(g, i, 2)->format = kTfLiteDimSparseCSR; });
  declined_weight("segments", [&](Graph& g, int i) { std::free(level(g, i, 1)->array_segments), level(g, i, 1)->array_segments = nullptr; });
  declined_weight("segments", [&](Graph& g, int i) { std::free(level(g, i, 1)->array_indices), level(g, i, 1)->array_indices = nullptr; });
  declined_weight("segments", [&](Graph& g, int i) { replace(&level(g, i, 1)->array_segments, {}); });
  declined_weight("segments", [&](Graph& g, int i) { replace(&level(g, i, 1)->array_segments, Ints(1000)); });
  for (int value : {-1, 1, 1000, INT32_MAX, INT32_MIN}) {
    declined_weight("segments", [&](Graph& g, int i) { set(level(g, i, 1)->array_segments, 0, value); });
    declined_weight("segments", [&](Graph& g, int i) { TfLiteIntArray* a = level(g, i, 1)->array_segments; set(a, a->size - 1, a->data[a->size - 1] + 1 + (value & 1)); });
    if (value != 1) declined_weight("do not rise", [&](Graph& g, int i) { set(level(g, i, 1)->array_segments, 1, value); });
  }
  for (int value : {-1, 2, 1000, INT32_MAX, INT32_MIN}) declined_weight("indices", [&](Graph& g, int i) { set(level(g, i, 1)->array_indices, 0, value); });
  declined_weight("indices", [&](Graph& g, int i) { replace(&level(g, i, 1)->array_indices, {}); });
  declined_weight("more elements", [&](Graph& g, int i) { level(g, i, 1)->format = kTfLiteDimDense, level(g, i, 1)->dense_size = g.dims(i)[1] / 4; });

  // int8
  declined_weight("scales", [](Graph& g, int i) { g.set_scales(i, {1, 1, 1}, {0, 0, 0}); }, kTfLiteInt8);
  declined_weight("scales", [](Graph& g, int i) { g.set_scales(i, Floats((size_t)g.dims(i)[0], 1), {}, 1); }, kTfLiteInt8);
  declined_weight("zero point", [](Graph& g, int i) { g.set_scales(i, {1}, {1}); }, kTfLiteInt8);
  for (float value : {-1.f, NAN, INFINITY}) declined_weight("scale", [&](Graph& g, int i) { g.set_scales(i, {value}, {0}); }, kTfLiteInt8);
  declined_weight("no scale", [](Graph& g, int i) { g.set_scales(i, {}, {}), g.at(i).params = {}; }, kTfLiteInt8);
  declined_weight("unknown way", [](Graph& g, int i) { g.at(i).quantization.type = 2; }, kTfLiteInt8);
  declined_weight("-128", [](Graph& g, int i) { *(int8_t*)g.at(i).data.raw = -128; }, kTfLiteInt8);
  declined_weight("", [](Graph& g, int i) { g.at(i).type = kTfLiteFloat16; });

  // Parts that do not fit each other
  for (int what : {0, 1})
    declined(true, what ? "inputs" : "int8", [&](Built& b) {
      Storage s;
      Floats half = matrix(8, what ? 8 : 4);
      Graph& g = *b.model.graphs[1];
      const int first = add_matrix(&g, &half, 8, what ? 8 : 4, s);
      half = matrix(8, 4);
      if (!what) s.type = kTfLiteInt8;
      b.layer.attributes.set_vector("kernel", {1, first, 1, add_matrix(&g, &half, 8, 4, s)});
      Graph::set_attributes(b.node, b.layer.attributes.bytes());
    });
  // Huge, and empty but for an element: time and memory must not go with rows times columns.
  const Delegate delegate;
  Model model;
  Dense d;
  d.rows = d.cols = 1 << 20, d.bias = false;
  d.storage.form = sparsity_of(false, true, true, 1, 1);
  Graph& graph = model.main();
  d.x = graph.tensor(kTfLiteFloat32, {1, d.rows});
  const int w = graph.constant(kTfLiteFloat32, {d.cols, d.rows}, Floats{1});
  Sparsity& s = d.storage.form;
  s.dimensions[0].segments = {0, 1}, s.dimensions[0].indices = {d.cols - 1};
  s.dimensions[1].segments = {0, 1}, s.dimensions[1].indices = {d.rows - 1};
  graph.set_sparsity(w, s);
  d.y = graph.tensor(kTfLiteFloat32, {1, d.cols});
  graph.fully_connected({d.x, w}, {d.y});
  checks++;
  if (model.apply(delegate.handle) != kTfLiteOk || graph.delegated() != 1 || graph.prepare() != kTfLiteOk) return wrong("a huge sparse matrix is not taken");
  Floats x((size_t)d.rows);
  x.back() = 3;
  graph.fill(d.x, x);
  if (graph.run() != kTfLiteOk || graph.values<float>(d.y).back() != 3) wrong("a huge sparse matrix computes nothing");
}

// Shapes that change behind a prepared operator, and ones that never fit: errors, not crashes.
void check_shapes() {
  const Delegate delegate;
  const auto refused = [&](bool recurrent, const char* reason, const auto& spoil, bool prepared) {
    auto b = built(recurrent);
    Graph& graph = b->model.main();
    checks++;
    if (b->model.apply(delegate.handle) != kTfLiteOk || graph.delegated() != 1) return wrong("%s: not taken", reason);
    if (prepared && (graph.prepare() != kTfLiteOk || graph.run() != kTfLiteOk)) return wrong("%s: does not run", reason);
    spoil(*b, graph);
    const TfLiteStatus status = prepared ? graph.run() : graph.prepare();
    if (status == kTfLiteOk || graph.errors.empty() || graph.errors.back().find(reason) == std::string::npos)
      wrong("%s: %s", reason, graph.errors.empty() ? "no error" : graph.errors.back().c_str());
  };
  for (bool prepared : {false, true}) {
    const auto dims = [&](bool recurrent, const char* reason, int input, const Ints& shape) {
      refused(recurrent, reason, [&](Built& b, Graph& g) { g.set_dims(b.node->node.inputs->data[input], shape); }, prepared);
    };
    dims(true, "should have shape (?, ?, 8), and has (2, 3, 5)", 0, {2, 3, 5});
    dims(true, "should have shape", 0, {2, 12});
    dims(true, "should have shape", 0, Ints(300, 1));
    dims(true, "shape of no sense", 0, {2, -3, 8});
    dims(true, "shape of no sense", 0, Ints(300, INT32_MAX));
    dims(true, "no time steps", 0, {2, 0, 8});
    dims(true, "should have shape", 0, {0});
    dims(true, "too large", 0, {INT32_MAX, 1 << 20, 8});
    dims(true, "mask should have shape (2, 3)", 1, {2, 4});
    dims(true, "state should have shape (2, 4)", 2, {1, 4});
    dims(true, "state should have shape (2, 4)", 3, {2, 5});
    dims(false, "rows of 8", 0, {3, 5});
    dims(false, "no sense", 0, {-8});
    refused(true, "no shape", [](Built& b, Graph& g) { std::free(g.at(b.layer.inputs[0]).dims), g.at(b.layer.inputs[0]).dims = nullptr; }, prepared);
    refused(true, "TfLiteType", [](Built& b, Graph& g) { g.at(b.layer.inputs[1]).type = kTfLiteFloat32; }, prepared);
    refused(true, "constant", [](Built& b, Graph& g) { g.at(b.layer.outputs[1]).allocation_type = kTfLiteMmapRo; }, prepared);
  }
  for (int i = 0; i < 4; i++) {  // one byte too few, none, and a wrong address
    refused(true, "no memory", [&](Built& b, Graph& g) { g.set_data(b.layer.inputs[(size_t)i], "0123", 3); }, true);
    if (i < 3) refused(true, "no memory", [&](Built& b, Graph& g) { g.set_data(b.layer.outputs[(size_t)i], "0123", 3); }, true);
  }
  refused(false, "no memory", [](Built& b, Graph& g) { g.set_data(b.dense.y, "0123", 4); }, true);
  refused(false, "no memory", [](Built& b, Graph& g) { std::free(g.at(b.dense.x).data.raw), g.at(b.dense.x).data.raw = nullptr; }, true);
  auto b = built(false);
  Graph& graph = b->model.main();
  if (b->model.apply(delegate.handle) != kTfLiteOk || graph.prepare() != kTfLiteOk) return wrong("unaligned memory: it does not prepare");
  TfLiteTensor& x = graph.at(b->dense.x);
  graph.set_data(b->dense.x, nullptr, 0);
  char* memory = (char*)fake::allocate(1000);
  void* old = x.data.raw;
  x.data.raw = memory + 1, x.bytes = 900;
  checks++;
  if (graph.run() == kTfLiteOk || graph.errors.back().find("not aligned") == std::string::npos) wrong("runs on unaligned memory");
  x.data.raw = old;
  std::free(memory);
}

void check_options() {
  static std::string said;
  const auto create = [](std::vector<std::string> keys, std::vector<std::string> values) {
    std::vector<char*> k, v;
    for (std::string& key : keys) k.push_back(&key[0]);
    for (std::string& value : values) v.push_back(&value[0]);
    said.clear();
    return tflite_plugin_create_delegate(k.data(), v.data(), k.size(), [](const char* text) { said = text; });
  };
  for (const char* value : {"1", "4", "1024"}) {
    TfLiteDelegate* delegate = create({"num_threads"}, {value});
    checks++;
    if (!delegate || !said.empty()) wrong("num_threads %s: %s", value, said.c_str());
    tflite_plugin_destroy_delegate(delegate);
  }
  for (const char* value : {"", "0", "-1", "1025", "99999999999999999999", "two", "2 ", " 2", "2.0", "0x2"}) {
    checks++;
    if (create({"num_threads"}, {value}) || said.find("num_threads") == std::string::npos) wrong("num_threads \"%s\" is accepted", value);
  }
  if (create({"threads"}, {"1"}) || said.find("\"threads\"") == std::string::npos) wrong("an unknown option is accepted");
  if (create({std::string(5000, 'x')}, {"1"}) || said.empty()) wrong("a long option is accepted");
  char key[] = "num_threads";
  char *keys[] = {key, nullptr}, *values[] = {nullptr};
  if (tflite_plugin_create_delegate(keys, values, 1, nullptr) || tflite_plugin_create_delegate(keys + 1, values, 1, nullptr) ||
      tflite_plugin_create_delegate(nullptr, values, 1, nullptr))
    wrong("null pointers are accepted");
  TfLiteDelegate* delegate = tflite_plugin_create_delegate(nullptr, nullptr, 0, nullptr);
  if (!delegate) wrong("no options are not accepted");
  tflite_plugin_destroy_delegate(delegate);
  tflite_plugin_destroy_delegate(nullptr);
}

// A runtime that refuses to replace an operator: the delegate fails, and nothing leaks.
void check_refusals() {
  for (int n = 0; n < 3; n++) {
    const Delegate delegate;
    Model model;
    for (int i = 0; i < 2; i++) {
      Dense d = random_dense(kTfLiteFloat32);
      d.add(&model.main());
    }
    model.fail_replacing = n;
    checks++;
    if ((model.apply(delegate.handle) == kTfLiteOk) != (n == 2) || model.main().delegated() != n) wrong("refusal %d", n);
  }
}

void check_drive() {
  int stages[4] = {};
  for (int turn = 0; turn < 20000; turn++) {
    Bytes bytes((size_t)below(200));
    for (uint8_t& b : bytes) b = (uint8_t)engine();
    stages[drive(bytes.data(), bytes.size())]++;
  }
  checks += 20000;
  // Most must get somewhere, or they prove nothing.
  if (stages[0] < 4000 || stages[3] < 4000 || stages[1] + stages[2] < 200)
    wrong("of 20000 models %d were declined, %d and %d failed, %d ran", stages[0], stages[1], stages[2], stages[3]);
}

// ---- every allocation fails once ----------------------------------------------------------------------------------------------

// Takes a model through its life with the n-th allocation failing. Returns whether there was an n-th.
template <class Make, class Check>
bool fail_at(long n, const Make& make, const Check& check) {
  Model model(3);
  make(&model);
  char key[] = "num_threads", value[] = "1";
  char *keys[] = {key}, *values[] = {value};
  allocations = 0, failing = n, counting = true;
  TfLiteDelegate* delegate = tflite_plugin_create_delegate(keys, values, 1, nullptr);
  bool ran = false;
  if (delegate && model.apply(delegate) == kTfLiteOk && model.main().delegated() > 0) {
    // Once more after a failure, as when memory has come back.
    for (int turn = 0; turn < 2 && !ran; turn++) ran = model.main().prepare() == kTfLiteOk && model.main().run() == kTfLiteOk;
  }
  const bool failed = allocations > n;
  counting = false;
  checks++;
  if (ran) check(&model);
  if (!ran && !failed) wrong("it does not run, though no allocation failed");
  model.graphs.clear();
  tflite_plugin_destroy_delegate(delegate);
  return failed;
}

void check_memory() {
  for (int cell = 0; cell < 3; cell++)
    for (int type : kTypes) {
      long n = 0;
      for (bool more = true; more; n++) {
        engine.seed(7);
        Layer layer;
        const auto make = [&](Model* model) { layer = random_layer(model, cell, type); };
        more = fail_at(n, make, [&](Model* model) { run_layer(model, layer, "after a failed allocation"); });
      }
      if (n < 20) wrong("only %ld allocations were counted", n);
      for (n = 0; fail_at(n, [&](Model* model) { engine.seed(8), random_dense(kTfLiteInt8).add(&model->main()); }, [](Model*) {});) n++;
    }
}

// ---- threads --------------------------------------------------------------------------------------------------------------------

void check_threads() {
  const Delegate shared("2");
  std::atomic<int> wrongs{0};
  const auto work = [&](int number) {
    for (int turn = 0; turn < 30; turn++) {
      const Delegate own;
      Model model;
      Dense d;
      d.rows = 64, d.cols = 32 + 8 * number, d.w.resize((size_t)(d.rows * d.cols)), d.bias = false;
      for (size_t i = 0; i < d.w.size(); i++) d.w[i] = i % 7 == (size_t)number % 7 ? (float)(i % 13) / 16 : 0;
      for (int i = 0; i < 3; i++) {
        Dense copy = d;
        copy.add(&model.main());
      }
      d.add(&model.main());
      Floats x((size_t)(2 * d.rows));
      for (size_t i = 0; i < x.size(); i++) x[i] = (float)((i * 5 + (size_t)number) % 11) / 16;
      bool fine = model.apply(turn % 2 ? shared.handle : own.handle) == kTfLiteOk && model.main().delegated() == 4;
      fine = fine && model.main().prepare() == kTfLiteOk;
      if (fine) model.main().fill(d.x, x);
      fine = fine && model.main().run() == kTfLiteOk;
      const Doubles expected = reference(d, x, 2);
      const Floats y = fine ? model.main().values<float>(d.y) : Floats(expected.size());
      for (size_t i = 0; i < expected.size(); i++) fine = fine && std::fabs(y[i] - expected[i]) < 1e-4;
      wrongs += !fine;
    }
  };
  std::vector<std::thread> threads;
  for (int i = 0; i < 4; i++) threads.emplace_back(work, i);
  for (std::thread& thread : threads) thread.join();
  checks += 120;
  if (wrongs) wrong("%d of 120 interpreters in threads are wrong", wrongs.load());
}

}  // namespace

int main(int argc, char** argv) {
  const std::string what = argc > 1 ? argv[1] : "results";
  if (what == "results") {
    check_layers();
    check_dense();
    check_no_allocations();
  } else if (what == "hostile") {
    check_options();
    check_declined();
    check_shapes();
    check_refusals();
    check_drive();
  } else if (what == "memory") {
    check_memory();
  } else if (what == "threads") {
    check_threads();
  } else {
    wrong("unknown: %s", what.c_str());
  }
  std::printf("%s: %d checks, %d wrong\n", what.c_str(), checks, failures);
  return failures ? 1 : 0;
}
