#include "threads.h"

#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <time.h>
#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <mutex>
#include <new>
#include <thread>

#include "error.h"

#if defined(__linux__)
#include <linux/futex.h>
#include <sys/syscall.h>
#endif

namespace kbs {
namespace {

// About 30 us: longer than threads of one call wait for each other, shorter than anyone would notice.
constexpr int kSpins = 2000;

void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("isb");
#endif
}

void sleep_while(std::atomic<uint32_t>& word, uint32_t value) {
#if defined(__linux__)
  syscall(SYS_futex, (uint32_t*)&word, FUTEX_WAIT_PRIVATE, value, nullptr, nullptr, 0);
#else
  if (word.load() == value) sched_yield();
#endif
}

void wake_all(std::atomic<uint32_t>& word) {
#if defined(__linux__)
  syscall(SYS_futex, (uint32_t*)&word, FUTEX_WAKE_PRIVATE, 1 << 30, nullptr, nullptr, 0);
#else
  (void)word;
#endif
}

int cores() {
#if defined(__linux__)
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof(set), &set) == 0 && CPU_COUNT(&set) > 0) return CPU_COUNT(&set);
#endif
  const long n = sysconf(_SC_NPROCESSORS_ONLN);
  return n > 0 ? (int)n : 1;
}

std::atomic<int> wanted_threads{-1};  // -1: not asked yet, 0: all cores
thread_local int thread_limit = 0;    // of the calling thread's calls; 0: none

}  // namespace

void Signal::raise() {
  count_.fetch_add(1, std::memory_order_seq_cst);
  if (sleepers_.load(std::memory_order_seq_cst)) wake_all(count_);
}

void Signal::wait_past(uint32_t old) {
  for (int i = 0; i < kSpins; i++) {
    if (now() != old) return;
    // The thread that is waited for may have been put on the same core.
    if (i % 128 == 127) sched_yield();
    pause();
  }
  sleepers_.fetch_add(1, std::memory_order_seq_cst);
  while (count_.load(std::memory_order_seq_cst) == old) sleep_while(count_, old);
  sleepers_.fetch_sub(1, std::memory_order_seq_cst);
}

void Barrier::wait() {
  const uint32_t round = passed_.now();
  if (arrived_.fetch_add(1, std::memory_order_acq_rel) == threads_ - 1) {
    arrived_.store(0, std::memory_order_relaxed);
    passed_.raise();
  } else {
    passed_.wait_past(round);
  }
}

int num_threads() {
  int wanted = wanted_threads.load(std::memory_order_relaxed);
  if (wanted < 0) {
    const char* text = std::getenv("KBS_NUM_THREADS");
    wanted = text ? std::atoi(text) : 0;
    if (wanted < 0) wanted = 0;
    wanted_threads.store(wanted, std::memory_order_relaxed);
  }
  static const int available = cores();
  const int most = available < kMaxThreads ? available : kMaxThreads;
  const int threads = wanted == 0 || wanted > most ? most : wanted;
  return thread_limit > 0 && thread_limit < threads ? thread_limit : threads;
}

namespace {

double us(clockid_t clock) {
  timespec now;
  clock_gettime(clock, &now);
  return (double)now.tv_sec * 1e6 + (double)now.tv_nsec * 1e-3;
}

// Never destroyed: threads may still look at it while the process ends.
class Pool {
 public:
  // `all`: every helper takes part, because they meet at a barrier. If not, those that have not begun when the caller
  // is done do not take part.
  bool run(int n, void (*work)(void*, int), void* argument, bool all) {
    if (busy_.exchange(true, std::memory_order_acquire)) return false;
    const double begin = us(CLOCK_MONOTONIC);
    const bool possible = begin >= rest_until_ && grow(n - 1);
    if (possible) {
      const double cpu_begin = us(CLOCK_THREAD_CPUTIME_ID);
      work_ = work, argument_ = argument;
      running_.store(n - 1, std::memory_order_relaxed);
      offers_.store(n - 1, std::memory_order_release);
      start_.raise();
      work(argument, 0);
      const int absent = all ? 0 : offers_.exchange(0, std::memory_order_relaxed);
      running_.fetch_sub(absent, std::memory_order_relaxed);
      for (uint32_t seen; seen = done_.now(), running_.load(std::memory_order_acquire) != 0;) done_.wait_past(seen);
      const double end = us(CLOCK_MONOTONIC), worked = us(CLOCK_THREAD_CPUTIME_ID) - cpu_begin;
      account(end, absent < n - 1 ? worked / 2 : 0, end - begin - worked);
    }
    busy_.store(false, std::memory_order_release);
    return possible;
  }

 private:
  // Where other programs want the cores, the caller sleeps or loses its core, and helpers only get in its way. So what
  // sharing has saved lately, by a careful guess, may be lost again; what it loses beyond that is kept to a fortieth of
  // the time, by working alone for so long.
  void account(double now, double saved, double lost) {
    credit_ = std::min(credit_ + saved - lost, kMostCredit);
    if (credit_ >= 0) return;
    rest_until_ = now - 40 * credit_;
    credit_ = 0;
  }

  bool grow(int helpers) {
    while (helpers_ < helpers) {
      const uint32_t seen = start_.now();
      // Signals are for the program's own threads.
      sigset_t all, before;
      sigfillset(&all);
      pthread_sigmask(SIG_SETMASK, &all, &before);
      bool started = true;
      try {
        std::thread([this, seen] { serve(seen); }).detach();
      } catch (...) {
        started = false;
      }
      pthread_sigmask(SIG_SETMASK, &before, nullptr);
      if (!started) return false;
      helpers_++;
    }
    return true;
  }

  void serve(uint32_t seen) {
    for (;;) {
      start_.wait_past(seen);
      seen = start_.now();
      // Only who has taken an offer may look at anything else: until it is done the run is not over.
      int index = offers_.load(std::memory_order_relaxed);
      while (index > 0 && !offers_.compare_exchange_weak(index, index - 1, std::memory_order_acquire)) {
      }
      if (index == 0) continue;
      work_(argument_, index);
      if (running_.fetch_sub(1, std::memory_order_acq_rel) == 1) done_.raise();
    }
  }

  std::atomic<bool> busy_{false};
  int helpers_ = 0;
  static constexpr double kMostCredit = 20e3;
  double rest_until_ = 0, credit_ = kMostCredit;  // microseconds
  void (*work_)(void*, int) = nullptr;
  void* argument_ = nullptr;
  std::atomic<int> offers_{0}, running_{0};  // helpers that may still begin; those that the run is not over without
  Signal start_, done_;
};

std::mutex creating;
std::atomic<Pool*> the_pool{nullptr};

// A child has the caller's thread only: it leaves its parent's pool behind and makes its own.
void before_fork() { creating.lock(); }
void after_fork_parent() { creating.unlock(); }
void after_fork_child() {
  the_pool.store(nullptr, std::memory_order_relaxed);
  creating.unlock();
}

Pool* pool() {
  Pool* existing = the_pool.load(std::memory_order_acquire);
  if (existing) return existing;
  std::lock_guard<std::mutex> lock(creating);
  static const int registered = pthread_atfork(before_fork, after_fork_parent, after_fork_child);
  (void)registered;
  if (!the_pool.load()) the_pool.store(new (std::nothrow) Pool, std::memory_order_release);
  return the_pool.load();
}

struct Workspace {
  char* data = nullptr;
  size_t bytes = 0;
  ~Workspace() { std::free(data); }
};
thread_local Workspace workspace;

}  // namespace

bool run_together(int n, void (*work)(void*, int), void* argument) {
  if (n < 2) return false;
  Pool* p = pool();
  return p && p->run(n, work, argument, true);
}

bool run_helped(int n, void (*work)(void*, int), void* argument) {
  Pool* p = pool();
  return p && p->run(n, work, argument, false);
}

char* thread_workspace(size_t bytes) {
  if (bytes > workspace.bytes) {
    std::free(workspace.data);
    workspace.bytes = 0;
    const size_t rounded = (bytes + 65535) / 65536 * 65536;
    workspace.data = (char*)std::aligned_alloc(64, rounded);
    if (!workspace.data) throw std::bad_alloc();
    workspace.bytes = rounded;
  }
  return workspace.data;
}

}  // namespace kbs

kbs_status kbs_set_num_threads(int32_t threads) {
  if (threads < 0) return kbs::fail(KBS_INVALID_ARGUMENT, "the number of threads must not be negative; received %d", threads);
  kbs::wanted_threads.store(threads, std::memory_order_relaxed);
  return KBS_OK;
}

int32_t kbs_limit_threads(int32_t threads) {
  const int32_t before = kbs::thread_limit;
  kbs::thread_limit = threads > 0 ? threads : 0;
  return before;
}

int32_t kbs_get_num_threads(void) { return kbs::num_threads(); }
