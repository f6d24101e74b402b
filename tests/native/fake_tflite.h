// As much of a TFLite runtime as a delegate sees, without TFLite: for sanitizers and fuzzers, which real ones do not
// survive or take too long with. Every array is exactly as large as it says, so that reading behind it is seen; tensors
// move whenever they may.
//
//   Graph, Model     tensors and operators to be filled in; apply, prepare and run are what an interpreter does
//   FlexMap          attributes as a FlexBuffer, of any width
//   encode           a dense matrix in any form that TFLite's sparsity has
//   Layer, Dense     an operator, its tensors and its weights from a few settings
//   drive            a model out of any bytes, and the delegate through all of its life with it. A fuzzer is
//                    extern "C" int LLVMFuzzerTestOneInput(const uint8_t* d, size_t n) { fake::drive(d, n); return 0; }
#ifndef KBS_FAKE_TFLITE_H_
#define KBS_FAKE_TFLITE_H_

#include <algorithm>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "tflite_api.h"

extern "C" {
TfLiteDelegate* tflite_plugin_create_delegate(char** keys, char** values, size_t n, void (*report_error)(const char*));
void tflite_plugin_destroy_delegate(TfLiteDelegate* delegate);
}

namespace fake {

using Ints = std::vector<int>;
using Bytes = std::vector<uint8_t>;

// While one lives, allocations are the fake's own. A test that has the delegate's fail looks at this.
struct Own {
  inline static thread_local int depth = 0;
  Own() { depth++; }
  ~Own() { depth--; }
};

// Memory that ends exactly where it says.
inline void* allocate(size_t bytes) {
  void* data = std::calloc(1, bytes);
  if (!data && bytes) std::abort();
  return data;
}

template <class Array, class T>
Array* new_array(const std::vector<T>& values) {
  auto* array = (Array*)allocate(sizeof(Array) + values.size() * sizeof(T));
  array->size = (int)values.size();
  if (!values.empty()) std::memcpy(array->data, values.data(), values.size() * sizeof(T));
  return array;
}

// ---- sparsity ---------------------------------------------------------------------------------------------------------

struct Dimension {
  int format = kTfLiteDimDense, size = 0;
  Ints segments, indices;
};

struct Sparsity {
  Ints order, blocks;  // traversal order and block map
  std::vector<Dimension> dimensions;
};

// Whether a tensor of a form is stored by rows, the outputs, or by columns, which levels are compressed, and its blocks.
inline Sparsity sparsity_of(bool by_columns, bool outer_csr, bool inner_csr, int block_outputs, int block_inputs, bool swap = false) {
  Sparsity s;
  s.order = by_columns ? Ints{1, 0} : Ints{0, 1};
  s.dimensions.resize(2);
  s.dimensions[0].format = outer_csr ? kTfLiteDimSparseCSR : kTfLiteDimDense;
  s.dimensions[1].format = inner_csr ? kTfLiteDimSparseCSR : kTfLiteDimDense;
  const auto block = [&](int dim, int size) {
    if (size < 2) return;
    s.blocks.push_back(dim);
    s.order.push_back(2 + (int)s.blocks.size() - 1);
    s.dimensions.emplace_back();
    s.dimensions.back().size = size;
  };
  block(0, block_outputs), block(1, block_inputs);
  if (swap && s.order.size() == 4) {
    std::swap(s.order[2], s.order[3]);
    std::swap(s.dimensions[2], s.dimensions[3]);
  }
  return s;
}

// Stored elements of a dense (outputs, inputs) matrix, in the form of `sparsity`, of which orders, the block map, formats
// and the sizes of blocks are given, and the rest is filled in.
template <class T>
std::vector<T> encode(const std::vector<T>& dense, int outputs, int inputs, Sparsity* sparsity) {
  const int dims[2] = {outputs, inputs}, levels = (int)sparsity->order.size();
  int block[2] = {1, 1};
  std::vector<int> dim((size_t)levels), stride((size_t)levels);
  for (int i = 2; i < levels; i++) {
    dim[(size_t)i] = sparsity->blocks[(size_t)(sparsity->order[(size_t)i] - 2)];
    block[dim[(size_t)i]] = sparsity->dimensions[(size_t)i].size;
    stride[(size_t)i] = 1;
  }
  for (int i = 0; i < 2; i++) {
    dim[(size_t)i] = sparsity->order[(size_t)i];
    stride[(size_t)i] = block[dim[(size_t)i]];
    sparsity->dimensions[(size_t)i].size = dims[dim[(size_t)i]] / block[dim[(size_t)i]];
  }
  for (Dimension& d : sparsity->dimensions)
    if (d.format == kTfLiteDimSparseCSR) d.segments = {0};
  std::vector<T> values;
  // Whether anything below a level is not zero.
  const std::function<bool(int, int, int)> any = [&](int level, int output, int input) {
    if (level == levels) return dense[(size_t)(output * inputs + input)] != T{};
    const int step = stride[(size_t)level], size = sparsity->dimensions[(size_t)level].size;
    for (int i = 0; i < size; i++)
      if (dim[(size_t)level] ? any(level + 1, output, input + i * step) : any(level + 1, output + i * step, input)) return true;
    return false;
  };
  const std::function<void(int, int, int)> visit = [&](int level, int output, int input) {
    if (level == levels) {
      values.push_back(dense[(size_t)(output * inputs + input)]);
      return;
    }
    Dimension& d = sparsity->dimensions[(size_t)level];
    for (int i = 0; i < d.size; i++) {
      const int o = output + (dim[(size_t)level] ? 0 : i * stride[(size_t)level]);
      const int in = input + (dim[(size_t)level] ? i * stride[(size_t)level] : 0);
      if (d.format == kTfLiteDimSparseCSR) {
        if (!any(level + 1, o, in)) continue;
        d.indices.push_back(i);
      }
      visit(level + 1, o, in);
    }
    if (d.format == kTfLiteDimSparseCSR) d.segments.push_back((int)d.indices.size());
  };
  visit(0, 0, 0);
  return values;
}

// ---- attributes -------------------------------------------------------------------------------------------------------

// A FlexBuffer map. Every offset and number takes `width` bytes (a power of two; floats need 4).
class FlexMap {
 public:
  struct Entry {
    std::string name;
    int64_t integer = 0;
    float number = 0;
    bool is_number = false, is_vector = false, typed = false;
    std::vector<int64_t> vector;
  };

  FlexMap& set(const std::string& name, int64_t value) {
    at(name) = {name, value, 0, false, false, false, {}};
    return *this;
  }
  FlexMap& set_number(const std::string& name, float value) {
    at(name) = {name, 0, value, true, false, false, {}};
    return *this;
  }
  FlexMap& set_vector(const std::string& name, const std::vector<int64_t>& values, bool typed = false) {
    at(name) = {name, 0, 0, false, true, typed, values};
    return *this;
  }
  void remove(const std::string& name) {
    entries_.erase(std::remove_if(entries_.begin(), entries_.end(), [&](const Entry& e) { return e.name == name; }), entries_.end());
  }

  Bytes bytes(int width = 4) const {
    std::vector<Entry> entries = entries_;
    std::sort(entries.begin(), entries.end(), [](const Entry& a, const Entry& b) { return a.name < b.name; });
    const int shift = width == 1 ? 0 : width == 2 ? 1 : width == 4 ? 2 : 3;
    Bytes out;
    const auto put = [&](int64_t value) {
      for (int i = 0; i < width; i++) out.push_back((uint8_t)((uint64_t)value >> (8 * i)));
    };
    const auto align = [&] { while (out.size() % (size_t)width) out.push_back(0); };
    std::vector<size_t> names, vectors;
    for (const Entry& e : entries) {
      names.push_back(out.size());
      out.insert(out.end(), e.name.begin(), e.name.end());
      out.push_back(0);
    }
    for (const Entry& e : entries) {
      align();
      vectors.push_back(0);
      if (!e.is_vector) continue;
      put((int64_t)e.vector.size());
      vectors.back() = out.size();
      for (int64_t value : e.vector) put(value);
      if (!e.typed)
        for (size_t i = 0; i < e.vector.size(); i++) out.push_back((uint8_t)(1 << 2 | shift));
    }
    align();
    put((int64_t)entries.size());
    const size_t keys = out.size();
    for (size_t name : names) put((int64_t)(out.size() - name));
    put((int64_t)(out.size() - keys));
    put(width);
    put((int64_t)entries.size());
    const size_t map = out.size();
    for (size_t i = 0; i < entries.size(); i++) {
      const Entry& e = entries[i];
      if (e.is_vector) {
        put((int64_t)(out.size() - vectors[i]));
      } else if (!e.is_number) {
        put(e.integer);
      } else if (width == 8) {
        const double value = e.number;
        int64_t bits;
        std::memcpy(&bits, &value, 8);
        put(bits);
      } else {
        int32_t bits;
        std::memcpy(&bits, &e.number, 4);
        put(bits);
      }
    }
    for (const Entry& e : entries) out.push_back((uint8_t)((e.is_vector ? (e.typed ? 11 : 10) : e.is_number ? 3 : 1) << 2 | shift));
    align();
    put((int64_t)(out.size() - map));
    out.push_back((uint8_t)(9 << 2 | shift));
    out.push_back((uint8_t)width);
    return out;
  }

 private:
  Entry& at(const std::string& name) {
    for (Entry& e : entries_)
      if (e.name == name) return e;
    entries_.emplace_back();
    return entries_.back();
  }
  std::vector<Entry> entries_;
};

// ---- a model ----------------------------------------------------------------------------------------------------------

constexpr size_t kMostBytes = size_t{1} << 22;  // of one tensor; larger ones get no memory
constexpr int kArenaRw = 2;                     // kTfLiteArenaRw

inline size_t size_of(int type) { return type == kTfLiteBool || type == kTfLiteInt8 ? 1 : type == kTfLiteFloat16 ? 2 : 4; }

class Model;

// A subgraph.
class Graph {
 public:
  struct Node {
    TfLiteNode node{};
    TfLiteRegistration registration{};
    std::string name;
    Bytes attributes;
    bool delegated = false;
  };

  explicit Graph(Model* model);
  Graph(const Graph&) = delete;
  ~Graph();

  // A tensor that operators compute, or that is an input. It has no memory before prepare() or fill().
  int tensor(int type, const Ints& dims) {
    move_tensors(size_ + 1);
    TfLiteTensor& t = tensors_[size_++];
    t.type = type;
    t.dims = new_array<TfLiteIntArray>(dims);
    t.allocation_type = kArenaRw;
    context_.tensors_size = size_;
    return (int)size_ - 1;
  }
  template <class T>
  int constant(int type, const Ints& dims, const std::vector<T>& values) {
    const int index = tensor(type, dims);
    at(index).allocation_type = kTfLiteMmapRo;
    set_data(index, values.data(), values.size() * sizeof(T));
    return index;
  }
  void set_data(int index, const void* data, size_t bytes) {
    TfLiteTensor& t = at(index);
    std::free(t.data.raw);
    t.data.raw = allocate(bytes), t.bytes = bytes;
    if (bytes) std::memcpy(t.data.raw, data, bytes);
  }
  void set_dims(int index, const Ints& dims) {
    std::free(at(index).dims);
    at(index).dims = new_array<TfLiteIntArray>(dims);
  }
  // Nothing of it needs to make sense.
  void set_sparsity(int index, const Sparsity& s) {
    free_sparsity(at(index).sparsity);
    auto* out = (TfLiteSparsity*)allocate(sizeof(TfLiteSparsity));
    out->traversal_order = new_array<TfLiteIntArray>(s.order);
    out->block_map = s.blocks.empty() ? nullptr : new_array<TfLiteIntArray>(s.blocks);
    out->dim_metadata_size = (int)s.dimensions.size();
    out->dim_metadata = (TfLiteDimensionMetadata*)allocate(s.dimensions.size() * sizeof(TfLiteDimensionMetadata));
    for (size_t i = 0; i < s.dimensions.size(); i++) {
      const Dimension& d = s.dimensions[i];
      out->dim_metadata[i].format = d.format;
      out->dim_metadata[i].dense_size = d.format == kTfLiteDimDense ? d.size : 0;
      if (d.format == kTfLiteDimDense) continue;
      out->dim_metadata[i].array_segments = new_array<TfLiteIntArray>(d.segments);
      out->dim_metadata[i].array_indices = new_array<TfLiteIntArray>(d.indices);
    }
    at(index).sparsity = out;
  }
  void set_scales(int index, const std::vector<float>& scales, const Ints& zero_points, int dimension = 0) {
    TfLiteTensor& t = at(index);
    free_quantization(&t);
    auto* out = (TfLiteAffineQuantization*)allocate(sizeof(TfLiteAffineQuantization));
    out->scale = new_array<TfLiteFloatArray>(scales);
    out->zero_point = new_array<TfLiteIntArray>(zero_points);
    out->quantized_dimension = dimension;
    t.quantization = {kTfLiteAffineQuantization, out};
    if (scales.size() == 1) t.params = {scales[0], zero_points.empty() ? 0 : zero_points[0]};
  }

  Node& fully_connected(const Ints& inputs, const Ints& outputs, int activation = kTfLiteActNone, bool keep_dims = false) {
    Node& n = node(kTfLiteBuiltinFullyConnected, inputs, outputs);
    auto* params = (TfLiteFullyConnectedParams*)allocate(sizeof(TfLiteFullyConnectedParams));
    params->activation = activation, params->keep_num_dims = keep_dims;
    n.node.builtin_data = params;
    return n;
  }
  Node& composite(const Ints& inputs, const Ints& outputs, const Bytes& attributes, const char* name = "keras_blocksparse.rnn") {
    Node& n = node(kTfLiteBuiltinStablehloComposite, inputs, outputs);
    n.node.builtin_data = allocate(sizeof(TfLiteStablehloCompositeParams));
    n.name = name;
    set_attributes(&n, attributes);
    return n;
  }
  Node& custom(const Ints& inputs, const Ints& outputs, const Bytes& attributes, const char* name = "KerasBlocksparseRnn") {
    Node& n = node(kTfLiteBuiltinCustom, inputs, outputs);
    n.name = name;
    n.registration.custom_name = n.name.c_str();
    set_attributes(&n, attributes);
    return n;
  }
  static void set_attributes(Node* n, const Bytes& attributes) {
    n->attributes = Bytes(attributes);  // no larger than they are
    if (n->registration.builtin_code == kTfLiteBuiltinCustom) {
      n->node.custom_initial_data = n->attributes.data();
      n->node.custom_initial_data_size = (int)n->attributes.size();
    } else if (auto* params = (TfLiteStablehloCompositeParams*)n->node.builtin_data) {
      *params = {n->name.c_str(), 1, 1, n->attributes.data(), n->attributes.size()};
    }
  }
  Node& node(int builtin, const Ints& inputs, const Ints& outputs) {
    nodes_.emplace_back(new Node);
    Node& n = *nodes_.back();
    n.node.inputs = new_array<TfLiteIntArray>(inputs);
    n.node.outputs = new_array<TfLiteIntArray>(outputs);
    n.registration.builtin_code = builtin;
    plan_.push_back((int)nodes_.size() - 1);
    return n;
  }

  size_t size() const { return size_; }
  size_t nodes() const { return nodes_.size(); }
  Node& node(int index) { return *nodes_[(size_t)index]; }
  TfLiteTensor& at(int index) { return tensors_[(size_t)index]; }
  Ints dims(int index) { return Ints(at(index).dims->data, at(index).dims->data + at(index).dims->size); }
  template <class T>
  std::vector<T> values(int index) {
    std::vector<T> out(at(index).bytes / sizeof(T));
    if (!out.empty()) std::memcpy(out.data(), at(index).data.raw, out.size() * sizeof(T));
    return out;
  }
  // Values for a tensor of that many elements; others are cut or repeated.
  template <class T>
  void fill(int index, const std::vector<T>& values) {
    give_memory(index);
    TfLiteTensor& t = at(index);
    for (size_t i = 0; t.data.raw && !values.empty() && i < t.bytes / sizeof(T); i++) ((T*)t.data.raw)[i] = values[i % values.size()];
  }

  // Operators of the plan that the delegate took.
  int delegated() const {
    int n = 0;
    for (int index : plan_) n += nodes_[(size_t)index]->delegated;
    return n;
  }
  TfLiteStatus apply(TfLiteDelegate* delegate) {
    acquire();
    const TfLiteStatus status = delegate->Prepare(&context_, delegate);
    release();
    if (acquired_ != 0) std::abort();  // more often acquired than released, or the other way round
    return status;
  }
  // Has the delegate's operators prepare, then gives tensors memory for their shapes.
  TfLiteStatus prepare() {
    for (int index : plan_) {
      Node& n = *nodes_[(size_t)index];
      if (n.delegated && n.registration.prepare(&context_, &n.node) != kTfLiteOk) return kTfLiteError;
    }
    const Own own;
    for (int i = 0; i < (int)size_; i++)
      if (at(i).allocation_type != kTfLiteMmapRo) give_memory(i);
    move_tensors(size_);
    return kTfLiteOk;
  }
  TfLiteStatus run() {
    for (int index : plan_) {
      Node& n = *nodes_[(size_t)index];
      if (n.delegated && n.registration.invoke(&context_, &n.node) != kTfLiteOk) return kTfLiteError;
    }
    return kTfLiteOk;
  }
  TfLiteContext* context() { return &context_; }
  bool has_acquired() const { return acquired_ > 0; }

  std::vector<std::string> errors;

 private:
  friend class Model;
  static Graph& self(const TfLiteContext* context) { return *(Graph*)context->impl_; }

  static void report_error(TfLiteContext* context, const char* format, ...) {
    const Own own;
    char text[1024];
    va_list arguments;
    va_start(arguments, format);
    std::vsnprintf(text, sizeof(text), format, arguments);
    va_end(arguments);
    self(context).errors.push_back(text);
  }
  void acquire() {
    if (acquired_++ == 0) set_delegate_functions(true);
  }
  void release() {
    if (acquired_ < 1) std::abort();
    if (--acquired_ == 0) set_delegate_functions(false);
  }
  void set_delegate_functions(bool on);

  // Tensors lie elsewhere than before.
  void move_tensors(size_t size) {
    std::unique_ptr<TfLiteTensor[]> moved(new TfLiteTensor[size]());
    std::copy(tensors_.get(), tensors_.get() + size_, moved.get());
    tensors_.swap(moved);
    context_.tensors = tensors_.get();
  }
  void give_memory(int index) {
    TfLiteTensor& t = at(index);
    size_t bytes = size_of(t.type);
    for (int i = 0; t.dims && i < t.dims->size; i++)
      if (t.dims->data[i] < 0 || __builtin_mul_overflow(bytes, (size_t)t.dims->data[i], &bytes) || bytes > kMostBytes) return;
    if (t.data.raw && t.bytes == bytes) return;
    std::free(t.data.raw);
    t.data.raw = allocate(bytes), t.bytes = bytes;
  }
  static void free_sparsity(TfLiteSparsity* s) {
    if (!s) return;
    for (int i = 0; s->dim_metadata && i < s->dim_metadata_size; i++) {
      std::free(s->dim_metadata[i].array_segments);
      std::free(s->dim_metadata[i].array_indices);
    }
    std::free(s->traversal_order);
    std::free(s->block_map);
    std::free(s->dim_metadata);
    std::free(s);
  }
  static void free_quantization(TfLiteTensor* t) {
    if (auto* affine = (TfLiteAffineQuantization*)t->quantization.params) {
      std::free(affine->scale);
      std::free(affine->zero_point);
      std::free(affine);
    }
    t->quantization = {};
  }
  // A delegate's node: inputs and outputs without those that come twice, in another order than the operator's.
  void replace(const TfLiteRegistration& registration, int index, TfLiteDelegate* delegate);

  Model* model_;
  int acquired_ = 0;
  TfLiteContext context_{};
  std::unique_ptr<TfLiteTensor[]> tensors_;
  size_t size_ = 0;
  std::vector<std::unique_ptr<Node>> nodes_;
  Ints plan_;
  TfLiteIntArray* plan_copy_ = nullptr;
};

class Model {
 public:
  explicit Model(int graphs = 1) {
    for (int i = 0; i < graphs; i++) this->graphs.emplace_back(new Graph(this));
  }
  Graph& main() { return *graphs[0]; }
  TfLiteStatus apply(TfLiteDelegate* delegate) {
    for (auto& graph : graphs) {
      const TfLiteStatus status = graph->apply(delegate);
      for (auto& other : graphs)
        if (other->has_acquired()) std::abort();
      if (status != kTfLiteOk) return status;
    }
    return kTfLiteOk;
  }

  std::vector<std::unique_ptr<Graph>> graphs;
  int fail_replacing = -1;  // the n-th call to replace a node fails
};

inline Graph::Graph(Model* model) : model_(model) {
  context_.impl_ = this;
  context_.ResizeTensor = [](TfLiteContext* c, TfLiteTensor* t, TfLiteIntArray* dims) {
    const Own own;
    Graph& g = self(c);
    if (t < g.tensors_.get() || t >= g.tensors_.get() + g.size_) std::abort();  // a tensor that is no more
    if (t->allocation_type == kTfLiteMmapRo) {
      std::free(dims);
      return (TfLiteStatus)kTfLiteError;
    }
    std::free(t->dims);
    t->dims = dims;
    return (TfLiteStatus)kTfLiteOk;
  };
  context_.ReportError = report_error;
  set_delegate_functions(false);
}

inline Graph::~Graph() {
  for (auto& n : nodes_) {
    if (n->delegated && n->node.user_data) n->registration.free(&context_, n->node.user_data);
    if (n->delegated) {
      auto* params = (TfLiteDelegateParams*)n->node.builtin_data;
      std::free(params->nodes_to_replace);
      std::free(params->input_tensors);
      std::free(params->output_tensors);
    }
    std::free(n->node.builtin_data);
    std::free(n->node.inputs);
    std::free(n->node.outputs);
  }
  for (size_t i = 0; i < size_; i++) {
    TfLiteTensor& t = tensors_[i];
    free_sparsity(t.sparsity);
    free_quantization(&t);
    std::free(t.data.raw);
    std::free(t.dims);
  }
  std::free(plan_copy_);
}

inline void Graph::replace(const TfLiteRegistration& registration, int index, TfLiteDelegate* delegate) {
  const Node& old = *nodes_[(size_t)index];
  const auto sorted = [](const TfLiteIntArray* array) {
    Ints out;
    for (int i = 0; i < array->size; i++)
      if (array->data[i] >= 0) out.push_back(array->data[i]);
    std::sort(out.begin(), out.end());
    out.erase(std::unique(out.begin(), out.end()), out.end());
    return out;
  };
  auto made = std::make_unique<Node>();
  made->delegated = true;
  made->registration = registration;
  made->node.inputs = new_array<TfLiteIntArray>(sorted(old.node.inputs));
  made->node.outputs = new_array<TfLiteIntArray>(sorted(old.node.outputs));
  auto* params = (TfLiteDelegateParams*)allocate(sizeof(TfLiteDelegateParams));
  *params = {delegate, new_array<TfLiteIntArray>(Ints{index}), new_array<TfLiteIntArray>(sorted(old.node.inputs)),
             new_array<TfLiteIntArray>(sorted(old.node.outputs))};
  made->node.builtin_data = params;
  made->node.delegate = delegate;
  nodes_.push_back(std::move(made));
  std::replace(plan_.begin(), plan_.end(), index, (int)nodes_.size() - 1);
  move_tensors(size_);
}

inline void Graph::set_delegate_functions(bool on) {
  if (!on) {
    context_.GetExecutionPlan = [](TfLiteContext*, TfLiteIntArray**) { return (TfLiteStatus)kTfLiteError; };
    context_.GetNodeAndRegistration = [](TfLiteContext*, int, TfLiteNode**, TfLiteRegistration**) { return (TfLiteStatus)kTfLiteError; };
    context_.ReplaceNodeSubsetsWithDelegateKernels = [](TfLiteContext*, TfLiteRegistration, const TfLiteIntArray*, TfLiteDelegate*) {
      return (TfLiteStatus)kTfLiteError;
    };
    context_.AcquireSubgraphContext = [](TfLiteContext*, int, TfLiteContext**) { return (TfLiteStatus)kTfLiteError; };
    context_.ReleaseSubgraphContext = [](TfLiteContext*, int) { return (TfLiteStatus)kTfLiteError; };
    return;
  }
  context_.GetExecutionPlan = [](TfLiteContext* c, TfLiteIntArray** out) {
    const Own own;
    Graph& g = self(c);
    std::free(g.plan_copy_);
    *out = g.plan_copy_ = new_array<TfLiteIntArray>(g.plan_);
    return (TfLiteStatus)kTfLiteOk;
  };
  context_.GetNodeAndRegistration = [](TfLiteContext* c, int index, TfLiteNode** node, TfLiteRegistration** registration) {
    Graph& g = self(c);
    if (index < 0 || (size_t)index >= g.nodes_.size()) return (TfLiteStatus)kTfLiteError;
    *node = &g.nodes_[(size_t)index]->node, *registration = &g.nodes_[(size_t)index]->registration;
    return (TfLiteStatus)kTfLiteOk;
  };
  context_.ReplaceNodeSubsetsWithDelegateKernels = [](TfLiteContext* c, TfLiteRegistration registration,
                                                      const TfLiteIntArray* nodes, TfLiteDelegate* delegate) {
    Graph& g = self(c);
    for (const void* later : registration.later)
      if (later) std::abort();
    if (g.model_->fail_replacing >= 0 && g.model_->fail_replacing-- == 0) return (TfLiteStatus)kTfLiteError;
    for (int i = 0; i < nodes->size; i++) {
      {
        const Own own;
        g.replace(registration, nodes->data[i], delegate);
      }
      TfLiteNode& made = g.nodes_.back()->node;
      made.user_data = registration.init(c, (const char*)made.builtin_data, 0);
    }
    return (TfLiteStatus)kTfLiteOk;
  };
  context_.AcquireSubgraphContext = [](TfLiteContext* c, int index, TfLiteContext** out) {
    Model& m = *self(c).model_;
    if (index < 0 || (size_t)index >= m.graphs.size()) return (TfLiteStatus)kTfLiteError;
    m.graphs[(size_t)index]->acquire();
    *out = &m.graphs[(size_t)index]->context_;
    return (TfLiteStatus)kTfLiteOk;
  };
  context_.ReleaseSubgraphContext = [](TfLiteContext* c, int index) {
    Model& m = *self(c).model_;
    if (index < 0 || (size_t)index >= m.graphs.size()) return (TfLiteStatus)kTfLiteError;
    m.graphs[(size_t)index]->release();
    return (TfLiteStatus)kTfLiteOk;
  };
}

// ---- operators from a few settings --------------------------------------------------------------------------------------

using Floats = std::vector<float>;

struct Storage {
  int type = kTfLiteFloat32;
  bool sparse = true, per_row = false;
  Sparsity form = sparsity_of(false, false, true, 1, 1);
};

// Truncates; for the numbers that tests use, which float16 holds.
inline uint16_t to_float16(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  const uint32_t sign = bits >> 16 & 0x8000, exponent = bits >> 23 & 255;
  if (exponent < 103) return (uint16_t)sign;
  if (exponent < 113) return (uint16_t)(sign | (0x800000 | (bits & 0x7fffff)) >> (126 - exponent));
  if (exponent > 142) return (uint16_t)(sign | 0x7c00);
  return (uint16_t)(sign | (exponent - 112) << 10 | (bits >> 13 & 1023));
}

// Adds (outputs, inputs) of a matrix as a constant, and gives `matrix` the values that it has there. int8: they are whole
// numbers up to 127 times a scale.
inline int add_matrix(Graph* graph, Floats* matrix, int outputs, int inputs, const Storage& storage) {
  Sparsity form = storage.form;
  const auto add = [&](const auto& values) {
    const int index = graph->constant(storage.type, {outputs, inputs}, storage.sparse ? encode(values, outputs, inputs, &form) : values);
    if (storage.sparse) graph->set_sparsity(index, form);
    return index;
  };
  if (storage.type == kTfLiteFloat16) {
    std::vector<uint16_t> halves;
    for (float value : *matrix) halves.push_back(to_float16(value));
    return add(halves);
  }
  if (storage.type != kTfLiteInt8) return add(*matrix);
  std::vector<float> scales;
  for (int o = 0; o < (storage.per_row ? outputs : 1); o++) scales.push_back((float)(o % 3 + 1) / 128);
  std::vector<int8_t> quantized;
  for (size_t i = 0; i < matrix->size(); i++) {
    const float scale = scales[storage.per_row ? i / (size_t)inputs : 0];
    quantized.push_back((int8_t)std::max(-127.f, std::min(127.f, (*matrix)[i] * 40)));
    (*matrix)[i] = quantized.back() * scale;
  }
  const int index = add(quantized);
  graph->set_scales(index, scales, Ints(scales.size(), 0));
  return index;
}

// An operator with a sparse weight and its tensors.
struct Dense {
  int rows = 8, cols = 8, activation = kTfLiteActNone;
  Ints batch{2};
  bool keep_dims = false, bias = true, constant_bias = true;
  Storage storage;
  Floats w, b;  // (cols, rows); what the file holds after add()
  int x = -1, y = -1, bias_index = -1, weight = -1;

  Graph::Node& add(Graph* graph) {
    Ints dims = batch;
    dims.push_back(rows);
    x = graph->tensor(kTfLiteFloat32, dims);
    weight = add_matrix(graph, &w, cols, rows, storage);
    Ints inputs{x, weight};
    if (bias) {
      bias_index = constant_bias ? graph->constant(kTfLiteFloat32, {cols}, b) : graph->tensor(kTfLiteFloat32, {cols});
      inputs.push_back(bias_index);
    } else if (keep_dims) {
      inputs.push_back(kTfLiteOptionalTensor);
    }
    y = graph->tensor(kTfLiteFloat32, {1, 1});
    return graph->fully_connected(inputs, {y}, activation, keep_dims);
  }
};

// A recurrent operator. Its weights lie in `parts` constants each, in subgraph `place`.
struct Layer {
  int cell = 1, activation = 1, recurrent_activation = 2, units = 4, features = 4, batch = 2, steps = 3;
  bool reset_after = true, go_backwards = false, return_sequences = true, zero_output_for_mask = false, mask = false,
       states_in = false, states_out = false, bfloat16 = false, bias = true, is_custom = false, typed = false;
  float activation_limit = 6, recurrent_limit = 6;
  int parts = 1, place = -1, width = 4;
  Storage kernel_storage, recurrent_storage;
  Floats kernel, recurrent, b;  // (gates * units, inputs)
  Ints inputs, outputs, constants;
  FlexMap attributes;

  int gates() const { return cell == 0 ? 1 : cell == 1 ? 3 : 4; }
  int states() const { return cell == 2 ? 2 : 1; }
  size_t biases() const { return (size_t)(gates() * units * (cell == 1 && reset_after ? 2 : 1)); }

  Graph::Node& add(Model* model) {
    Graph& graph = model->main();
    Graph& other = place < 0 ? graph : *model->graphs[(size_t)place];
    inputs = {graph.tensor(kTfLiteFloat32, {batch, steps, features})};
    if (mask) inputs.push_back(graph.tensor(kTfLiteBool, {batch, steps}));
    for (int i = 0; states_in && i < states(); i++) inputs.push_back(graph.tensor(kTfLiteFloat32, {batch, units}));
    outputs = {graph.tensor(kTfLiteFloat32, {1})};
    for (int i = 0; states_out && i < states(); i++) outputs.push_back(graph.tensor(kTfLiteFloat32, {1}));
    const auto places = [&](Floats* w, int rows, const Storage& storage) {
      std::vector<int64_t> out;
      const int columns = gates() * units;
      for (int p = 0; p < parts; p++) {
        const int begin = columns * p / parts, end = columns * (p + 1) / parts;
        Floats part(w->begin() + begin * rows, w->begin() + end * rows);
        constants.push_back(add_matrix(&other, &part, end - begin, rows, storage));
        std::copy(part.begin(), part.end(), w->begin() + begin * rows);
        out.insert(out.end(), {place, constants.back()});
      }
      return out;
    };
    attributes.set("version", 1).set("cell", cell).set("activation", activation).set("recurrent_activation", recurrent_activation);
    attributes.set_number("activation_limit", activation_limit).set_number("recurrent_limit", recurrent_limit);
    attributes.set("units", units).set("reset_after", reset_after).set("go_backwards", go_backwards).set("mask", mask);
    attributes.set("return_sequences", return_sequences).set("zero_output_for_mask", zero_output_for_mask);
    attributes.set("states_in", states_in ? states() : 0).set("states_out", states_out ? states() : 0).set("bfloat16", bfloat16);
    attributes.set_vector("kernel", places(&kernel, features, kernel_storage), typed);
    attributes.set_vector("recurrent", places(&recurrent, units, recurrent_storage), typed);
    std::vector<int64_t> bias_place;
    if (bias) {
      constants.push_back(other.constant(kTfLiteFloat32, {(int)biases()}, b));
      bias_place = {place, constants.back()};
    }
    attributes.set_vector("bias", bias_place, typed);
    return is_custom ? graph.custom(inputs, outputs, attributes.bytes(width)) : graph.composite(inputs, outputs, attributes.bytes(width));
  }
};

// ---- models from any bytes ----------------------------------------------------------------------------------------------

// Numbers out of bytes; zeros when there are no more.
class Feed {
 public:
  Feed(const uint8_t* data, size_t size) : data_(data), size_(size) {}
  bool empty() const { return size_ == 0; }
  int byte() {
    if (size_ == 0) return 0;
    size_--;
    return *data_++;
  }
  int below(int n) { return n > 0 ? byte() % n : 0; }
  bool flag() { return byte() & 1; }
  // Mostly small, sometimes one of those that things break at.
  int number() {
    static const int special[] = {INT32_MIN, INT32_MAX, -1, 65536, 1 << 20, (1 << 22) + 1, 1 << 24, 1 << 28, 46341, 127, 128, -128, 255, 256};
    const int b = byte();
    if (b < 200) return b % 40 - 2;
    if (b < 250) return special[(size_t)b % (sizeof(special) / sizeof(special[0]))];
    return (int)((uint32_t)byte() | (uint32_t)byte() << 8 | (uint32_t)byte() << 16 | (uint32_t)byte() << 24);
  }
  Floats floats(size_t n) {
    Floats out(n);
    unsigned state = (unsigned)byte() * 2654435761u + 1;
    for (float& x : out) {
      state = state * 1664525u + 1013904223u;
      x = state >> 30 ? 0 : (float)((int)(state >> 20 & 255) - 128) / 64;
    }
    return out;
  }

 private:
  const uint8_t* data_;
  size_t size_;
};

inline Storage read_storage(Feed* feed, int outputs, int inputs) {
  static const int types[] = {kTfLiteFloat32, kTfLiteFloat16, kTfLiteInt8};
  Storage s;
  s.type = types[feed->below(3)];
  const int bits = feed->byte();
  s.per_row = bits & 1, s.sparse = (bits & 6) != 0;
  static const int sizes[] = {1, 2, 4, 8};
  int height = sizes[bits >> 3 & 3], width = sizes[bits >> 5 & 3];
  if (outputs % height) height = 1;
  if (inputs % width) width = 1;
  const int order = feed->byte();
  s.form = sparsity_of(order & 1, order & 2, !(order & 4), height, width, order & 8);
  return s;
}

// One change of a model, or of an operator's attributes, that a runtime would let through.
inline void mutate(Feed* feed, Model* model, Graph::Node* node) {
  Graph& graph = *model->graphs[(size_t)feed->below((int)model->graphs.size())];
  if (graph.size() == 0) return;
  const int index = feed->below((int)graph.size());
  TfLiteTensor& t = graph.at(index);
  const auto change = [&](TfLiteIntArray** array) {  // an element, the length, or no array
    Ints values;
    if (*array) values.assign((*array)->data, (*array)->data + (*array)->size);
    const int what = feed->below(4);
    const int value = feed->number();
    if (what == 0 && !values.empty()) values[(size_t)feed->byte() % values.size()] = value;
    if (what == 1) values.push_back(value);
    if (what == 2 && !values.empty()) values.pop_back();
    std::free(*array);
    *array = what == 3 ? nullptr : new_array<TfLiteIntArray>(values);
  };
  switch (feed->below(18)) {
    case 0: change(&node->node.inputs); break;
    case 1: change(&node->node.outputs); break;
    case 2:
    case 3: change(&t.dims); break;
    case 4: t.type = feed->below(16); break;
    case 5: t.allocation_type = feed->below(9); break;
    case 6:
      if (t.bytes > 0) {
        const Bytes data((uint8_t*)t.data.raw, (uint8_t*)t.data.raw + (size_t)feed->byte() % t.bytes);
        graph.set_data(index, data.data(), data.size());
      }
      break;
    case 7:
      if (t.data.raw && t.bytes) ((uint8_t*)t.data.raw)[(size_t)feed->number() % t.bytes] = (uint8_t)feed->byte();
      break;
    case 8:
      if (t.sparsity) change(feed->flag() ? &t.sparsity->traversal_order : &t.sparsity->block_map);
      break;
    case 9:
    case 10:
      if (t.sparsity && t.sparsity->dim_metadata_size > 0) {
        TfLiteDimensionMetadata& d = t.sparsity->dim_metadata[feed->below(t.sparsity->dim_metadata_size)];
        switch (feed->below(4)) {
          case 0: d.format = feed->below(3); break;
          case 1: d.dense_size = feed->number(); break;
          case 2: change(&d.array_segments); break;
          case 3: change(&d.array_indices); break;
        }
      }
      break;
    case 11:
      if (t.sparsity && t.sparsity->dim_metadata_size > 0) {  // one level fewer
        TfLiteDimensionMetadata& last = t.sparsity->dim_metadata[--t.sparsity->dim_metadata_size];
        std::free(last.array_segments);
        std::free(last.array_indices);
      }
      break;
    case 12: {
      static const float scales[] = {0, -1, 1e-38f, 3e38f, 1.f / 0.f, 0.f / 0.f, 0.5f};
      Floats values((size_t)feed->below(12));
      for (float& value : values) value = scales[feed->below(7)];
      graph.set_scales(index, values, Ints((size_t)feed->below(3), feed->below(2)), feed->below(2));
      t.params = {scales[feed->below(7)], feed->below(2)};
      t.quantization.type = feed->below(3);
      break;
    }
    case 13:
    case 14:
    case 15:
      if (!node->attributes.empty()) {
        Bytes bytes = node->attributes;
        if (feed->below(8) == 0) bytes.resize((size_t)feed->number() % bytes.size());
        for (int n = feed->below(4); n >= 0 && !bytes.empty(); n--)
          bytes[((size_t)feed->byte() * 256 + (size_t)feed->byte()) % bytes.size()] = (uint8_t)feed->byte();
        Graph::set_attributes(node, bytes);
      }
      break;
    case 16:
      if (node->registration.builtin_code == kTfLiteBuiltinFullyConnected) {
        auto* params = (TfLiteFullyConnectedParams*)node->node.builtin_data;
        params->activation = feed->number(), params->weights_format = feed->below(2), params->keep_num_dims = feed->flag();
      }
      break;
    case 17: node->registration.builtin_code = 22; break;  // RESHAPE
  }
}

// Returns how far it came: 0 nothing was taken, 1 an operator was, 2 it prepared, 3 it ran.
inline int drive(const uint8_t* data, size_t size) {
  Feed feed(data, size);
  Model model(1 + feed.below(3));
  Graph& main = model.main();
  Graph::Node* node;
  const int kind = feed.below(4);
  if (kind == 0) {
    Dense d;
    d.rows = 1 + feed.below(24), d.cols = 1 + feed.below(24), d.activation = feed.below(7);
    d.batch = Ints((size_t)feed.below(4), feed.below(4));
    const int bits = feed.byte();
    d.keep_dims = bits & 1, d.bias = bits & 2, d.constant_bias = bits & 4;
    d.storage = read_storage(&feed, d.cols, d.rows);
    d.w = feed.floats((size_t)(d.rows * d.cols)), d.b = feed.floats((size_t)d.cols);
    node = &d.add(&main);
  } else {
    Layer l;
    l.cell = feed.below(3), l.units = 1 + feed.below(12), l.features = 1 + feed.below(12);
    l.activation = feed.below(6), l.recurrent_activation = feed.below(6), l.batch = feed.below(4), l.steps = feed.below(5);
    const int bits = feed.byte(), more = feed.byte();
    l.reset_after = bits & 1, l.go_backwards = bits & 2, l.return_sequences = bits & 4, l.zero_output_for_mask = bits & 8;
    l.mask = bits & 16, l.states_in = bits & 32, l.states_out = bits & 64, l.bfloat16 = bits & 128;
    l.bias = more & 1, l.typed = more & 2, l.is_custom = kind == 1, l.width = more & 4 ? 8 : 4;
    l.parts = 1 + feed.below(std::min(3, l.gates() * l.units)), l.place = feed.below((int)model.graphs.size()) - 1;
    const bool gate_parts = l.parts == 1;
    l.kernel_storage = read_storage(&feed, gate_parts ? l.gates() * l.units : 1, l.features);
    l.recurrent_storage = read_storage(&feed, gate_parts ? l.gates() * l.units : 1, l.units);
    l.kernel = feed.floats((size_t)(l.gates() * l.units * l.features));
    l.recurrent = feed.floats((size_t)(l.gates() * l.units * l.units));
    l.b = feed.floats(l.biases());
    node = &l.add(&model);
  }
  for (int n = feed.below(7) - 2; n > 0; n--) mutate(&feed, &model, node);
  for (int index : {0, 1})  // inputs of the operator are arrays in every runtime
    if (!(index ? node->node.outputs : node->node.inputs)) (index ? node->node.outputs : node->node.inputs) = new_array<TfLiteIntArray>(Ints{});

  char key[] = "num_threads", value[] = "2";
  char *keys[] = {key}, *values[] = {value};
  TfLiteDelegate* delegate = tflite_plugin_create_delegate(keys, values, (size_t)feed.below(2), nullptr);
  if (!delegate) std::abort();
  const Floats inputs = feed.floats(64);
  int stage = 0;
  if (model.apply(delegate) == kTfLiteOk) {
    for (int turn = 0; turn < 3; turn++) {
      if (turn > 0 && main.size() > 0) {  // other shapes, or the same
        TfLiteTensor& t = main.at(feed.below((int)main.size()));
        if (t.dims && t.dims->size > 0 && t.allocation_type != kTfLiteMmapRo) t.dims->data[feed.below(t.dims->size)] = feed.number();
      }
      stage = std::max(stage, main.delegated() ? 1 : 0);
      if (main.prepare() != kTfLiteOk) continue;
      for (int i = 0; i < (int)main.size(); i++)
        if (main.at(i).allocation_type != kTfLiteMmapRo && main.at(i).dims) main.fill(i, inputs);
      if (stage > 0) stage = std::max(stage, main.run() == kTfLiteOk ? 3 : 2);
    }
  }
  model.graphs.clear();
  tflite_plugin_destroy_delegate(delegate);
  return stage;
}

}  // namespace fake
#endif  // KBS_FAKE_TFLITE_H_
