// The library against plain loops, without Python: for machines that are only emulated, and for sanitizers.
//   check             products and layers against loops
//   check hostile     random changes to packed buffers, with a checksum that fits
//   check isas        the instruction sets that this machine runs
//   check threads     many callers of one matrix and one layer, and forks
#include <sys/wait.h>
#include <unistd.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "kbs.h"

namespace {

using Floats = std::vector<float>;
int failures = 0;

void must(kbs_status status) {
  if (status == KBS_OK) return;
  std::printf("error %d: %s\n", status, kbs_last_error());
  std::exit(1);
}

float random_float() { return (float)std::rand() / (float)RAND_MAX * 2 - 1; }
Floats random_floats(size_t n) {
  Floats out(n);
  for (float& x : out) x = random_float();
  return out;
}

struct Matrix {
  int64_t rows, cols;
  Floats dense;
  std::vector<char> packed;
  kbs_matrix* handle = nullptr;
  kbs_info info{};

  Matrix(int64_t rows, int64_t cols, int64_t gates, int64_t height, int64_t width, int dtype)
      : rows(rows), cols(cols), dense((size_t)(rows * cols)) {
    const int64_t down = (rows + height - 1) / height, across = (cols / gates + width - 1) / width;
    std::vector<bool> kept((size_t)(down * across * gates));
    for (size_t i = 0; i < kept.size(); i++) kept[i] = std::rand() % 3 == 0;
    for (int64_t r = 0; r < rows; r++)
      for (int64_t c = 0; c < cols; c++) {
        const int64_t gate = c / (cols / gates), block = c % (cols / gates) / width;
        if (kept[(size_t)((gate * down + r / height) * across + block)]) dense[(size_t)(r * cols + c)] = random_float();
      }
    int64_t bytes;
    must(kbs_packed_bytes(dense.data(), rows, cols, gates, height, width, dtype, nullptr, &bytes));
    packed.resize((size_t)bytes + 8);
    must(kbs_pack(dense.data(), rows, cols, gates, height, width, dtype, nullptr, packed.data(), bytes));
    must(kbs_inspect(packed.data(), bytes, &info));
    must(kbs_unpack(packed.data(), bytes, dense.data()));
    must(kbs_matrix_create(packed.data(), bytes, 1, &handle));
  }
  ~Matrix() { kbs_matrix_destroy(handle); }
  double at(int64_t r, int64_t c) const { return dense[(size_t)(r * cols + c)]; }
  // A dense matrix's elements in the order of the packed values.
  std::vector<double> as_values(const std::vector<double>& w) const {
    std::vector<int64_t> positions((size_t)info.values_bytes / 4);
    must(kbs_positions(packed.data(), info.bytes, positions.data()));
    std::vector<double> values;
    for (int64_t at : positions) values.push_back(at < 0 ? 0 : w[(size_t)at]);
    return values;
  }
};

void compare(const char* what, const Matrix& m, int64_t batch, const Floats& got, const std::vector<double>& expected) {
  for (size_t i = 0; i < expected.size(); i++)
    if (!(std::fabs(got[i] - expected[i]) < 1e-4)) {
      std::printf("%s %lldx%lld blocks %lldx%lld dtype %d batch %lld: [%zu] is %g, not %g\n", what, (long long)m.rows,
                  (long long)m.cols, (long long)m.info.block_rows, (long long)m.info.block_cols, m.info.dtype,
                  (long long)batch, i, got[i], expected[i]);
      failures++;
      return;
    }
}

void check_products(const Matrix& m, int64_t batch) {
  const Floats x = random_floats((size_t)(batch * m.rows)), dy = random_floats((size_t)(batch * m.cols));
  Floats seen = x;  // what an int8 product sees
  if (m.info.dtype == KBS_INT8)
    for (int64_t b = 0; b < batch; b++) {
      float most = 0;
      for (int64_t r = 0; r < m.rows; r++) most = std::fmax(most, std::fabs(x[(size_t)(b * m.rows + r)]));
      for (int64_t r = 0; r < m.rows; r++) {
        float& v = seen[(size_t)(b * m.rows + r)];
        v = std::nearbyint(v * (127.f / most)) * (most / 127.f);
      }
    }
  std::vector<double> y((size_t)(batch * m.cols)), dx((size_t)(batch * m.rows)), dw((size_t)(m.rows * m.cols));
  for (int64_t b = 0; b < batch; b++)
    for (int64_t r = 0; r < m.rows; r++)
      for (int64_t c = 0; c < m.cols; c++) {
        y[(size_t)(b * m.cols + c)] += seen[(size_t)(b * m.rows + r)] * m.at(r, c);
        dx[(size_t)(b * m.rows + r)] += dy[(size_t)(b * m.cols + c)] * m.at(r, c);
        dw[(size_t)(r * m.cols + c)] += (double)x[(size_t)(b * m.rows + r)] * dy[(size_t)(b * m.cols + c)];
      }
  Floats got(y.size());
  must(kbs_matmul(m.handle, nullptr, x.data(), m.rows, batch, nullptr, 0, got.data(), m.cols));
  compare("x W", m, batch, got, y);
  if (m.info.dtype == KBS_INT8) return;
  got.assign(dx.size(), 0);
  must(kbs_matmul_transposed(m.handle, nullptr, dy.data(), m.cols, batch, got.data(), m.rows));
  compare("dy W^T", m, batch, got, dx);
  if (m.info.dtype != KBS_FLOAT32) return;
  got.assign((size_t)m.info.values_bytes / 4, 0);
  must(kbs_sampled_product(m.handle, x.data(), m.rows, dy.data(), m.cols, batch, 0, got.data()));
  compare("x^T dy", m, batch, got, m.as_values(dw));
}

double sigmoid(double x) { return 1 / (1 + std::exp(-x)); }

// A layer with Keras's default activations, in double.
struct Layer {
  int cell;
  bool reset_after;
  int64_t batch, steps, inputs, units, gates;
  std::vector<uint8_t> mask;
  std::vector<double> x, h, c, kernel, recurrent, bias;  // h and c: the initial states

  // (batch, steps, units)
  std::vector<double> outputs() const {
    const size_t u = (size_t)units;
    std::vector<double> y((size_t)(batch * steps) * u);
    for (size_t b = 0; b < (size_t)batch; b++) {
      std::vector<double> state(&h[b * u], &h[b * u] + u), carry;
      if (cell == KBS_LSTM) carry.assign(&c[b * u], &c[b * u] + u);
      bool seen = false;
      for (size_t t = 0; t < (size_t)steps; t++) {
        const size_t row = b * (size_t)steps + t;
        if (mask[row]) step(row, &state, &carry), seen = true;
        for (size_t i = 0; seen && i < u; i++) y[row * u + i] = state[i];
      }
    }
    return y;
  }

  void step(size_t row, std::vector<double>* state, std::vector<double>* carry) const {
    const size_t u = (size_t)units, width = (size_t)gates * u, n = (size_t)inputs;
    std::vector<double> before = *state, a(width), r(width);
    for (size_t col = 0; col < width; col++) {
      a[col] = bias[col], r[col] = bias.size() > width ? bias[width + col] : 0;
      for (size_t i = 0; i < n; i++) a[col] += x[row * n + i] * kernel[i * width + col];
      for (size_t i = 0; i < u; i++) r[col] += before[i] * recurrent[i * width + col];
    }
    if (cell == KBS_GRU && !reset_after)
      for (size_t col = 2 * u; col < width; col++) {
        r[col] = 0;
        for (size_t i = 0; i < u; i++) r[col] += sigmoid(a[u + i] + r[u + i]) * before[i] * recurrent[i * width + col];
      }
    for (size_t i = 0; i < u; i++) {
      const auto sum = [&](size_t gate) { return a[gate * u + i] + r[gate * u + i]; };
      double& state_ = (*state)[i];
      if (cell == KBS_SIMPLE_RNN) {
        state_ = std::tanh(sum(0));
      } else if (cell == KBS_GRU) {
        const double z = sigmoid(sum(0)), reset = reset_after ? sigmoid(sum(1)) : 1;
        state_ = z * state_ + (1 - z) * std::tanh(a[2 * u + i] + reset * r[2 * u + i]);
      } else {
        double& c_ = (*carry)[i];
        c_ = sigmoid(sum(1)) * c_ + sigmoid(sum(0)) * std::tanh(sum(2));
        state_ = sigmoid(sum(3)) * std::tanh(c_);
      }
    }
  }

  // The gradient of sum(outputs * dy) with respect to one of its members, by differences.
  std::vector<double> gradient(std::vector<double> Layer::*member, const Floats& dy) {
    std::vector<double> out;
    const auto loss_at = [&](size_t i, double value) {
      std::vector<double>& values = this->*member;
      std::swap(values[i], value);
      const std::vector<double> y = outputs();
      std::swap(values[i], value);
      double loss = 0;
      for (size_t j = 0; j < y.size(); j++) loss += y[j] * dy[j];
      return loss;
    };
    for (size_t i = 0; i < (this->*member).size(); i++) {
      const double value = (this->*member)[i], small = 1e-4;
      out.push_back((loss_at(i, value + small) - loss_at(i, value - small)) / (2 * small));
    }
    return out;
  }
};

void check_layer(int cell, bool reset_after, int64_t batch, bool reserving) {
  const int64_t inputs = 5, units = 7, steps = 4, gates = cell == KBS_SIMPLE_RNN ? 1 : cell == KBS_GRU ? 3 : 4;
  const Matrix kernel(inputs, gates * units, gates, 4, 4, KBS_FLOAT32), recurrent(units, gates * units, gates, 4, 4, KBS_FLOAT32);
  const Floats bias = random_floats((size_t)(gates * units * (cell == KBS_GRU && reset_after ? 2 : 1)));
  const Floats x = random_floats((size_t)(batch * steps * inputs)), dy = random_floats((size_t)(batch * steps * units));
  const Floats h = random_floats((size_t)(batch * units)), c = random_floats(cell == KBS_LSTM ? h.size() : 0);
  std::vector<uint8_t> mask((size_t)(batch * steps));
  for (uint8_t& on : mask) on = std::rand() % 4 != 0;
  const auto wide = [](const Floats& v) { return std::vector<double>(v.begin(), v.end()); };
  Layer layer{cell, reset_after, batch, steps, inputs, units, gates, mask, wide(x), wide(h), wide(c), wide(kernel.dense),
              wide(recurrent.dense), wide(bias)};

  kbs_rnn_config config{};
  config.cell = cell, config.activation = KBS_TANH, config.recurrent_activation = KBS_SIGMOID, config.reset_after = reset_after;
  config.kernel = kernel.handle, config.recurrent = recurrent.handle, config.bias = bias.data();
  kbs_rnn* rnn;
  must(kbs_rnn_create(&config, &rnn));
  int64_t bytes;
  must(kbs_rnn_reserve_bytes(rnn, batch, steps, &bytes));
  Floats y(dy.size()), reserve((size_t)bytes / 4);
  kbs_rnn_call call{};
  call.batch = batch, call.steps = steps, call.x = x.data(), call.mask = mask.data(), call.initial_h = h.data();
  call.initial_c = c.empty() ? nullptr : c.data(), call.return_sequences = 1, call.y = y.data();
  call.reserve = reserving ? reserve.data() : nullptr;
  must(kbs_rnn_run(rnn, &call));
  compare("outputs", recurrent, batch, y, layer.outputs());

  Floats dx(x.size()), dh(h.size()), dc(c.size()), dbias(bias.size());
  Floats dkernel((size_t)kernel.info.values_bytes / 4), drecurrent((size_t)recurrent.info.values_bytes / 4);
  kbs_rnn_gradients gradients{};
  gradients.dy = dy.data(), gradients.dx = dx.data(), gradients.dinitial_h = dh.data(), gradients.dbias = dbias.data();
  gradients.dinitial_c = c.empty() ? nullptr : dc.data();
  gradients.dkernel_values = dkernel.data(), gradients.drecurrent_values = drecurrent.data();
  must(kbs_rnn_backward(rnn, &call, &gradients));
  kbs_rnn_destroy(rnn);
  compare("dx", recurrent, batch, dx, layer.gradient(&Layer::x, dy));
  compare("dinitial_h", recurrent, batch, dh, layer.gradient(&Layer::h, dy));
  compare("dinitial_c", recurrent, batch, dc, layer.gradient(&Layer::c, dy));
  compare("dbias", recurrent, batch, dbias, layer.gradient(&Layer::bias, dy));
  compare("dkernel", kernel, batch, dkernel, kernel.as_values(layer.gradient(&Layer::kernel, dy)));
  compare("drecurrent", recurrent, batch, drecurrent, recurrent.as_values(layer.gradient(&Layer::recurrent, dy)));
}

// ---- hostile buffers ------------------------------------------------------------------------------------------

uint64_t mix(uint64_t hash, const char* p, uint64_t bytes) {
  while (bytes) {
    const size_t n = bytes < 8 ? (size_t)bytes : 8;
    uint64_t word = 0;
    std::memcpy(&word, p, n);
    hash = (hash ^ word) * 0x9e3779b97f4a7c15u;
    hash ^= hash >> 29;
    p += n, bytes -= n;
  }
  return hash;
}

// Offsets in the header: see src/format.h.
constexpr size_t kHeader = 144, kCounts = 64, kOffsets = 88, kChecksum = 136;

uint64_t field(const char* data, size_t at) {
  uint64_t value;
  std::memcpy(&value, data + at, 8);
  return value;
}

// Makes the checksum fit, if the parts it covers are inside the buffer at all.
void sign(char* data, uint64_t bytes) {
  const uint64_t strips = field(data, kCounts), runs = field(data, kCounts + 8);
  const uint64_t strips_at = field(data, kOffsets), index_at = field(data, kOffsets + 8);
  if (strips > bytes / 32 || strips_at > bytes - strips * 32 || runs > bytes / 4 || index_at > bytes - runs * 4) return;
  std::memset(data + kChecksum, 0, 8);
  uint64_t hash = mix(0x6b6273u, data, kHeader);
  hash = mix(hash, data + strips_at, strips * 32);
  hash = mix(hash, data + index_at, runs * 4);
  std::memcpy(data + kChecksum, &hash, 8);
}

void use(const char* data, int64_t bytes, int* accepted) {
  kbs_matrix* m;
  if (kbs_matrix_create(data, bytes, 0, &m) != KBS_OK) return;
  ++*accepted;
  kbs_info info;
  must(kbs_inspect(data, bytes, &info));
  if (info.rows * info.cols < 1 << 20) {
    Floats w((size_t)(info.rows * info.cols));
    must(kbs_unpack(data, bytes, w.data()));
    for (int64_t batch : {1, 8}) {
      const Floats x((size_t)(batch * info.rows), 1), dy((size_t)(batch * info.cols), 1);
      Floats y(dy.size()), dx(x.size()), dvalues((size_t)info.values_bytes / 4);
      must(kbs_matmul(m, nullptr, x.data(), info.rows, batch, nullptr, 0, y.data(), info.cols));
      if (info.dtype != KBS_INT8) must(kbs_matmul_transposed(m, nullptr, dy.data(), info.cols, batch, dx.data(), info.rows));
      if (info.dtype == KBS_FLOAT32) {
        must(kbs_sampled_product(m, x.data(), info.rows, dy.data(), info.cols, batch, 0, dvalues.data()));
        std::vector<int64_t> positions(dvalues.size());
        must(kbs_positions(data, bytes, positions.data()));
      }
    }
  }
  kbs_matrix_destroy(m);
}

void check_hostile() {
  int accepted = 0, tried = 0;
  const int64_t blocks[][2] = {{4, 4}, {5, 3}, {16, 16}};
  const uint32_t words[] = {0, 1, 2, 40, 41, 60, 1 << 16, INT32_MAX, 1u << 31, UINT32_MAX};
  for (const auto& block : blocks)
    for (int dtype = KBS_FLOAT32; dtype <= KBS_INT8; dtype++) {
      const Matrix m(40, 48, 3, block[0], block[1], dtype);
      const int64_t bytes = m.info.bytes;
      for (int64_t length = 0; length < bytes; length += 7) {  // truncated: a buffer of exactly that size
        std::unique_ptr<char[]> part(new char[(size_t)length + 1]);
        std::memcpy(part.get(), m.packed.data(), (size_t)length);
        if (kbs_validate(part.get(), length) == KBS_OK) failures++;
      }
      for (int i = 0; i < 2000; i++, tried++) {
        std::unique_ptr<char[]> data(new char[(size_t)bytes]);
        std::memcpy(data.get(), m.packed.data(), (size_t)bytes);
        for (int change = std::rand() % 3; change >= 0; change--) {
          const size_t at = (size_t)std::rand() % (size_t)(m.info.values_offset / 4) * 4;
          uint32_t word = words[std::rand() % 10];
          if (std::rand() % 2) std::memcpy(&word, data.get() + at, 4), word += (uint32_t)(std::rand() % 9 - 4);
          std::memcpy(data.get() + at, &word, 4);
        }
        sign(data.get(), (uint64_t)bytes);
        use(data.get(), bytes, &accepted);
      }
    }
  std::printf("hostile: %d buffers, %d of them harmless, %d wrong\n", tried, accepted, failures);
}

// ---- threads ----------------------------------------------------------------------------------------------------

void check_threads() {
  const int64_t batches[] = {1, 8, 40};
  const Matrix m(1000, 3 * 1000, 3, 16, 16, KBS_FLOAT32), kernel(40, 3 * 1000, 3, 4, 4, KBS_FLOAT32);
  kbs_rnn_config config{};
  config.cell = KBS_GRU, config.activation = KBS_TANH, config.recurrent_activation = KBS_SIGMOID;
  config.kernel = kernel.handle, config.recurrent = m.handle;
  kbs_rnn* rnns[2];
  for (int after = 0; after < 2; after++) {
    config.reset_after = after;
    must(kbs_rnn_create(&config, &rnns[after]));
  }
  const Floats x = random_floats(40 * 1000), sequence = random_floats(40 * 6 * 40);
  Floats recurrent((size_t)m.info.values_bytes / 4);  // small, or rounding would grow from step to step
  std::memcpy(recurrent.data(), m.packed.data() + m.info.values_offset, (size_t)m.info.values_bytes);
  for (float& w : recurrent) w *= 0.05f;
  const auto work = [&](int64_t batch, int kind) {
    Floats y((size_t)(batch * 3000));
    if (kind == 2) {
      must(kbs_matmul(m.handle, nullptr, x.data(), 1000, batch, nullptr, 0, y.data(), 3000));
      return y;
    }
    kbs_rnn_call call{};
    call.batch = batch, call.steps = 6, call.x = sequence.data(), call.y = y.data();
    call.recurrent_values = recurrent.data();
    must(kbs_rnn_run(rnns[kind % 3], &call));
    if (kind < 3) return y;
    kbs_rnn_gradients gradients{};
    Floats dkernel((size_t)kernel.info.values_bytes / 4), drecurrent((size_t)m.info.values_bytes / 4);
    Floats dx((size_t)(batch * 6 * 40));
    gradients.dfinal_h = x.data(), gradients.dx = dx.data();
    gradients.dkernel_values = dkernel.data(), gradients.drecurrent_values = drecurrent.data();
    must(kbs_rnn_backward(rnns[kind % 3], &call, &gradients));
    for (const Floats* part : {&dx, &dkernel, &drecurrent}) y.insert(y.end(), part->begin(), part->end());
    return y;
  };
  must(kbs_set_num_threads(1));
  std::vector<Floats> expected;
  for (int kind = 0; kind < 5; kind++)
    for (int64_t batch : batches) expected.push_back(work(batch, kind));
  must(kbs_set_num_threads(0));
  const auto same = [&](int i) {
    const Floats y = work(batches[i % 3], i / 3);
    for (size_t j = 0; j < y.size(); j++)
      if (!(std::fabs(y[j] - expected[(size_t)i][j]) < 1e-3)) return false;
    return true;
  };
  std::vector<std::thread> callers;
  std::vector<int> wrong(4);
  for (int c = 0; c < 4; c++)
    callers.emplace_back([&, c] {
      for (int i = 0; i < 36; i++) wrong[(size_t)c] += !same((i * (c + 1) + c) % 15);
    });
  for (auto& caller : callers) caller.join();
  for (int w : wrong) failures += w;
#if !defined(__SANITIZE_THREAD__)  // which does not follow a fork of many threads
  for (int i = 0; i < 15; i++) {
    const pid_t child = fork();
    if (child == 0) _exit(same(i) && same(2) ? 0 : 1);
    int status;
    waitpid(child, &status, 0);
    failures += status != 0 || !same(i);
  }
#endif
  for (kbs_rnn* rnn : rnns) kbs_rnn_destroy(rnn);
  std::printf("threads: %d wrong\n", failures);
}

void check_results() {
  const char* isa;
  must(kbs_get_isa(&isa));
  const int64_t blocks[][2] = {{1, 1}, {2, 2}, {3, 5}, {4, 4}, {8, 4}, {4, 8}, {12, 2}, {16, 1}, {1, 16}, {16, 16}, {16, 32}};
  for (const auto& block : blocks)
    for (int dtype = KBS_FLOAT32; dtype <= KBS_INT8; dtype++) {
      const Matrix m(45, 3 * 37, 3, block[0], block[1], dtype);
      for (int64_t batch : {1, 2, 3, 4, 7, 13, 33}) check_products(m, batch);
    }
  for (int64_t batch : {1, 6, 17})
    for (int cell = KBS_SIMPLE_RNN; cell <= KBS_LSTM; cell++)
      for (bool reset_after : {false, true})
        for (bool reserving : {false, true}) check_layer(cell, reset_after, batch, reserving);
  std::printf("%s: %d wrong\n", isa, failures);
}

}  // namespace

int main(int argc, char** argv) {
  const std::string what = argc > 1 ? argv[1] : "";
  if (what == "isas") {
    for (const char* c = kbs_available_isas(); *c; c++) std::putchar(*c == ',' ? ' ' : *c);
  } else if (what == "hostile") {
    check_hostile();
  } else if (what == "threads") {
    check_threads();
  } else {
    check_results();
  }
  return failures != 0;
}
