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
  const auto work = [&](int64_t batch, int kind) {
    Floats y((size_t)(batch * 3000));
    if (kind == 2) {
      must(kbs_matmul(m.handle, nullptr, x.data(), 1000, batch, nullptr, 0, y.data(), 3000));
    } else {
      kbs_rnn_call call{};
      call.batch = batch, call.steps = 6, call.x = sequence.data(), call.y = y.data();
      must(kbs_rnn_run(rnns[kind], &call));
    }
    return y;
  };
  must(kbs_set_num_threads(1));
  std::vector<Floats> expected;
  for (int kind = 0; kind < 3; kind++)
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
      for (int i = 0; i < 36; i++) wrong[(size_t)c] += !same((i * (c + 1) + c) % 9);
    });
  for (auto& caller : callers) caller.join();
  for (int w : wrong) failures += w;
#if !defined(__SANITIZE_THREAD__)  // which does not follow a fork of many threads
  for (int i = 0; i < 9; i++) {
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
  for (int64_t batch : {1, 6}) check_gru(batch, 10, 22, 5);
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
