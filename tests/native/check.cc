// The library against plain loops, without Python: for machines that are only emulated, or have none.
#include <cmath>
#include <cstdio>
#include <cstdlib>
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
  std::vector<int64_t> positions((size_t)m.info.values_bytes / 4);
  got.assign(positions.size(), 0);
  must(kbs_positions(m.packed.data(), m.info.bytes, positions.data()));
  must(kbs_sampled_product(m.handle, x.data(), m.rows, dy.data(), m.cols, batch, 0, got.data()));
  std::vector<double> expected;
  for (int64_t at : positions) expected.push_back(at < 0 ? 0 : dw[(size_t)at]);
  compare("x^T dy", m, batch, got, expected);
}

double sigmoid(double x) { return 1 / (1 + std::exp(-x)); }

void check_gru(int64_t batch, int64_t inputs, int64_t units, int64_t steps) {
  const Matrix kernel(inputs, 3 * units, 3, 4, 4, KBS_FLOAT32), recurrent(units, 3 * units, 3, 4, 4, KBS_FLOAT32);
  const Floats bias = random_floats((size_t)(6 * units)), x = random_floats((size_t)(batch * steps * inputs));
  kbs_rnn_config config{};
  config.cell = KBS_GRU, config.activation = KBS_TANH, config.recurrent_activation = KBS_SIGMOID, config.reset_after = 1;
  config.kernel = kernel.handle, config.recurrent = recurrent.handle, config.bias = bias.data();
  kbs_rnn* rnn;
  must(kbs_rnn_create(&config, &rnn));
  Floats y((size_t)(batch * units));
  kbs_rnn_call call{};
  call.batch = batch, call.steps = steps, call.x = x.data(), call.y = y.data();
  must(kbs_rnn_run(rnn, &call));
  kbs_rnn_destroy(rnn);
  std::vector<double> h((size_t)(batch * units));
  for (int64_t b = 0; b < batch; b++)
    for (int64_t t = 0; t < steps; t++) {
      std::vector<double> a((size_t)(3 * units)), u((size_t)(3 * units));
      for (int64_t c = 0; c < 3 * units; c++) {
        a[(size_t)c] = bias[(size_t)c], u[(size_t)c] = bias[(size_t)(3 * units + c)];
        for (int64_t r = 0; r < inputs; r++) a[(size_t)c] += x[(size_t)((b * steps + t) * inputs + r)] * kernel.at(r, c);
        for (int64_t r = 0; r < units; r++) u[(size_t)c] += h[(size_t)(b * units + r)] * recurrent.at(r, c);
      }
      for (int64_t i = 0; i < units; i++) {
        const double z = sigmoid(a[(size_t)i] + u[(size_t)i]), r = sigmoid(a[(size_t)(units + i)] + u[(size_t)(units + i)]);
        const double hh = std::tanh(a[(size_t)(2 * units + i)] + r * u[(size_t)(2 * units + i)]);
        double& state = h[(size_t)(b * units + i)];
        state = z * state + (1 - z) * hh;
      }
    }
  compare("GRU", recurrent, batch, y, h);
}

}  // namespace

int main() {
  const char* isa;
  must(kbs_get_isa(&isa));
  const int64_t blocks[][2] = {{1, 1}, {2, 2}, {3, 5}, {4, 4}, {8, 4}, {4, 8}, {12, 2}, {16, 1}, {1, 16}, {16, 16}, {16, 32}};
  for (const auto& block : blocks)
    for (int dtype = KBS_FLOAT32; dtype <= KBS_INT8; dtype++) {
      const Matrix m(45, 3 * 37, 3, block[0], block[1], dtype);
      for (int64_t batch : {1, 2, 3, 4, 7, 13, 33}) check_products(m, batch);
    }
  for (int64_t batch : {1, 6}) check_gru(batch, 10, 22, 5);
  std::printf("%s: %d wrong\n", isa, failures);
  return failures != 0;
}
