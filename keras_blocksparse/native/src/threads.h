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
  void raise() { set(now() + 1); }
  void set(uint32_t value);  // one thread at a time
  bool wait_past(uint32_t old);  // whether it had to sleep

 private:
  std::atomic<uint32_t> count_{0};
  std::atomic<uint32_t> sleepers_{0};
};

// Lets `threads` threads pass together, any number of times.
class Barrier {
 public:
  explicit Barrier(int threads) : threads_(threads) {}
  void wait();
  // Whether threads slept at more than one meeting of four: then they do not run at the same time, because other
  // programs have the cores, and meeting costs more than it saves.
  bool crowded() const { return 4 * sleeps_.load() > meetings_.load(); }

 private:
  const int threads_;
  std::atomic<uint32_t> meetings_{0}, sleeps_{0};
  std::atomic<int> arrived_{0};
  Signal passed_;
};

// How many threads a call may use, its own included.
int num_threads();

// Calls work(argument, i) for i < n at the same time, one of them on the calling thread, and returns true. Returns
// false and calls nothing if the threads are busy with another call (or cannot be started): do the work alone then.
bool run_together(int n, void (*work)(void* argument, int index), void* argument);

// Runs work(i) for i < n together, or one by one if the threads are busy. For work that does not use a barrier.
template <class Work>
void run_each(int n, const Work& work) {
  const auto call = [](void* argument, int i) { (*(const Work*)argument)(i); };
  if (n > 1 && run_together(n, call, (void*)&work)) return;
  for (int i = 0; i < n; i++) work(i);
}

// Memory of the calling thread, kept for its next call; aligned to 64 bytes. Throws std::bad_alloc.
char* thread_workspace(size_t bytes);

}  // namespace kbs
#endif  // KBS_THREADS_H_
