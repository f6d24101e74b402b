// The library's own threads.
#ifndef KBS_THREADS_H_
#define KBS_THREADS_H_

#include <atomic>
#include <cstddef>
#include <cstdint>

namespace kbs {

// A number that threads wait on to change: they spin a little, then sleep in the kernel.
class Signal {
 public:
  uint32_t now() const { return count_.load(std::memory_order_acquire); }
  void raise();
  void wait_past(uint32_t old);

 private:
  std::atomic<uint32_t> count_{0};
  std::atomic<uint32_t> sleepers_{0};
};

// Lets `threads` threads pass together, any number of times.
class Barrier {
 public:
  explicit Barrier(int threads) : threads_(threads) {}
  void wait();

 private:
  const int threads_;
  std::atomic<int> arrived_{0};
  Signal passed_;
};

constexpr int kMaxThreads = 255;

// How many threads a call may use, its own included.
int num_threads();

// Calls work(argument, i) for i < n at the same time, one of them on the calling thread, and returns true. Returns
// false and calls nothing if the threads are busy with another call, cannot be started, or were lately kept from
// running by other programs: do the work alone then.
bool run_together(int n, void (*work)(void* argument, int index), void* argument);

// The same, but calls of work that have not begun when the caller's own returns are left out.
bool run_helped(int n, void (*work)(void* argument, int index), void* argument);

// Calls work(piece, thread) once for each of `pieces`, on at most `threads` threads. Each begins with a share of its
// own, so that the next call finds its part of the weights in the same core's cache, then takes what the others have
// not begun: a thread that other programs hold up costs no more than one piece.
template <class Work>
void share_out(int threads, int64_t pieces, const Work& work) {
  if (threads > pieces) threads = (int)pieces;
  std::atomic<int64_t> next[kMaxThreads];
  for (int i = 0; i < threads; i++) next[i].store(pieces * i / threads, std::memory_order_relaxed);
  const auto run = [&](int thread) {
    for (int i = 0; i < threads; i++) {
      const int share = (thread + i) % threads;
      const int64_t end = pieces * (share + 1) / threads;
      for (int64_t piece; (piece = next[share].fetch_add(1, std::memory_order_relaxed)) < end;) work(piece, thread);
    }
  };
  const auto call = [](void* argument, int thread) { (*(const decltype(run)*)argument)(thread); };
  if (threads < 2 || !run_helped(threads, call, (void*)&run)) run(0);
}

// Runs work(i) for i < n, together where threads are free. For work that does not use a barrier.
template <class Work>
void run_each(int n, const Work& work) {
  share_out(n, n, [&](int64_t i, int) { work((int)i); });
}

// Memory of the calling thread, kept for its next call; aligned to 64 bytes. Throws std::bad_alloc.
char* thread_workspace(size_t bytes);

}  // namespace kbs
#endif  // KBS_THREADS_H_
