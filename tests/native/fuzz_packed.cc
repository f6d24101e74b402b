// Packed buffers made of bytes, for their loader: a libFuzzer target, and with -DKBS_MAIN a program. A buffer that is right
// is changed in places, and its checksum is made right again: it guards against accidents, not against intent.
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "packed.cc"  // for its checksum

namespace {

constexpr int64_t kMostProduct = 1 << 16;

void drive(const uint8_t* data, size_t size) {
  size_t at = 0;
  const auto byte = [&]() -> uint8_t { return at < size ? data[at++] : 0; };
  const int64_t rows = 1 + byte() % 40, gates = byte() % 2 ? 3 : 1, cols = gates * (1 + byte() % 24);
  const int64_t block_rows = 1 + byte() % rows, block_cols = 1 + byte() % (cols / gates);
  const int32_t dtype = byte() % 3;
  std::vector<float> w((size_t)(rows * cols));
  for (size_t i = 0; i < w.size(); i++) w[i] = i / 16 % (1 + byte() % 5) ? 0.f : (float)(i % 13) - 6;
  int64_t bytes = 0;
  if (kbs_packed_bytes(w.data(), rows, cols, gates, block_rows, block_cols, dtype, nullptr, &bytes) != KBS_OK) std::abort();
  std::vector<uint64_t> packed((size_t)(bytes + 7) / 8);
  char* base = (char*)packed.data();
  if (kbs_pack(w.data(), rows, cols, gates, block_rows, block_cols, dtype, nullptr, base, bytes) != KBS_OK) std::abort();

  // Anywhere, but most often where sizes and indices are.
  const auto* header = (const kbs::Header*)base;
  const size_t described = (size_t)header->scales_offset;
  for (int n = byte() % 6; n > 0; n--) {
    const size_t range = byte() % 4 ? described : (size_t)bytes;
    const size_t where = ((size_t)byte() << 16 | (size_t)byte() << 8 | byte()) % range;
    base[where] = (char)(byte() % 3 ? byte() : base[where] + (byte() % 2 ? 1 : -1));
  }
  const bool consistent = header->strips_offset <= (uint64_t)bytes && header->index_offset <= (uint64_t)bytes &&
                          header->strips <= ((uint64_t)bytes - header->strips_offset) / sizeof(kbs::Strip) &&
                          header->runs <= ((uint64_t)bytes - header->index_offset) / 4;
  if (byte() % 16 != 15 && consistent)
    ((kbs::Header*)base)->checksum = kbs::checksum(*header, base + header->strips_offset, base + header->index_offset);
  if (byte() % 8 == 7) bytes -= byte() % (bytes + 1);

  // Exactly as long as it says, and aligned as callers must.
  char* exact = (char*)std::malloc((size_t)bytes ? (size_t)bytes : 1);
  std::memcpy(exact, base, (size_t)bytes);

  kbs_info info;
  if (kbs_inspect(exact, bytes, &info) == KBS_OK && info.rows * info.cols <= kMostProduct) {
    std::vector<float> dense((size_t)(info.rows * info.cols));
    (void)kbs_unpack(exact, bytes, dense.data());
    const int64_t down = (info.rows + info.block_rows - 1) / info.block_rows;
    const int64_t across = (info.cols / info.gates + info.block_cols - 1) / info.block_cols;
    std::vector<uint8_t> keep((size_t)(info.gates * down * across));
    (void)kbs_kept_blocks(exact, bytes, keep.data());
    std::vector<int64_t> positions((size_t)(info.values_bytes / 4));
    (void)kbs_positions(exact, bytes, positions.data());
    kbs_matrix* matrix = nullptr;
    if (kbs_matrix_create(exact, bytes, byte() % 2 ? KBS_COPY : 0, &matrix) != KBS_OK) std::abort();
    for (int64_t batch : {1, 3, 9}) {
      std::vector<float> x((size_t)(batch * info.rows), 0.5f), y((size_t)(batch * info.cols));
      if (kbs_matmul(matrix, nullptr, x.data(), info.rows, batch, nullptr, 0, y.data(), info.cols) != KBS_OK) std::abort();
    }
    kbs_matrix_destroy(matrix);
  }
  kbs_matrix* structure = nullptr;
  (void)kbs_matrix_create(exact, bytes, KBS_STRUCTURE, &structure);
  kbs_matrix_destroy(structure);
  std::free(exact);
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  drive(data, size);
  return 0;
}

#if defined(KBS_MAIN)
#include "replay.h"
#endif
