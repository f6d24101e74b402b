// A program for a fuzz target where there is no libFuzzer: runs each file that is named, then the same bytes changed at
// random, reproducibly, `-runs=N` times.
#ifndef KBS_REPLAY_H_
#define KBS_REPLAY_H_

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iterator>
#include <string>
#include <vector>

int main(int argc, char** argv) {
  long runs = 0, done = 0;
  std::vector<std::vector<char>> seeds;
  for (int i = 1; i < argc; i++) {
    if (!std::strncmp(argv[i], "-runs=", 6)) {
      runs = std::atol(argv[i] + 6);
      continue;
    }
    std::ifstream file(argv[i], std::ios::binary);
    if (!file) {
      std::fprintf(stderr, "cannot read %s\n", argv[i]);
      return 1;
    }
    seeds.emplace_back(std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>());
    LLVMFuzzerTestOneInput((const uint8_t*)seeds.back().data(), seeds.back().size());
    done++;
  }
  if (seeds.empty()) seeds.emplace_back(256, 0);
  uint64_t state = 88172645463325252ull;
  const auto random = [&] {
    state ^= state << 13, state ^= state >> 7, state ^= state << 17;
    return state;
  };
  for (long run = 0; run < runs; run++, done++) {
    std::vector<char> bytes = seeds[random() % seeds.size()];
    bytes.resize(bytes.size() + random() % 32);
    for (uint64_t n = 1 + random() % 64; n > 0; n--) bytes[random() % bytes.size()] = (char)random();
    std::vector<uint8_t> exact(bytes.begin(), bytes.end());
    LLVMFuzzerTestOneInput(exact.data(), exact.size());
  }
  std::printf("%ld inputs\n", done);
  return 0;
}
#endif  // KBS_REPLAY_H_
