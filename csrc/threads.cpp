// The pool. Each worker has a mailbox: the caller drops a job in it, the worker takes it, empties the box
// when it is done, and waits for the next one: first spinning, because the layers of a network follow each
// other within microseconds, then parked, because a core that spins is a core lost to everyone else.

#include "threads.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <exception>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#endif
#if defined(__x86_64__) || defined(_M_X64)
#include <immintrin.h>
#endif

namespace foldbit {
namespace {

constexpr int kMaxThreads = 256;
constexpr std::chrono::microseconds kSpin{50};

void relax() {
#if defined(__x86_64__) || defined(_M_X64)
  _mm_pause();
#elif defined(__aarch64__) && !defined(_MSC_VER)
  asm volatile("yield");
#endif
}

// Look a few times, for about a microsecond, then let another thread have the core: it may be the very one
// that is waited for.
template <class Done>
bool glance(const Done& done) {
  for (int i = 0; i < 64; ++i) {
    if (done()) return true;
    relax();
  }
  std::this_thread::yield();
  return done();
}

// Spin until done() or until the time is up; says whether it is done.
template <class Done>
bool spin(const Done& done) {
  const auto end = std::chrono::steady_clock::now() + kSpin;
  do {
    if (glance(done)) return true;
  } while (std::chrono::steady_clock::now() < end);
  return false;
}

struct Job {
  void (*body)(void*, int64_t);
  void* context;
  int64_t tasks;
  std::atomic<int64_t> next{0};
  std::atomic<bool> failed{false};
  std::exception_ptr error{};  // of the one thread that set `failed`

  void run() noexcept {
    try {
      for (int64_t task; (task = next.fetch_add(1, std::memory_order_relaxed)) < tasks;) body(context, task);
    } catch (...) {
      if (!failed.exchange(true)) error = std::current_exception();
      next.store(tasks, std::memory_order_relaxed);
    }
  }
};

class alignas(64) Worker {
 public:
  Worker() {
    std::thread([this] { work(); }).detach();
  }

  void offer(Job* job) {
    box_.store(job);
    // Either we see that the worker is parked, or the worker, which looks into the box after it says so,
    // sees the job: both orders are sequentially consistent.
    if (!parked_.load()) return;
    std::unique_lock<std::mutex>(mutex_).unlock();
    wake_.notify_one();
  }

  // Returns once the worker will not touch the job again. A worker too slow to take it loses it.
  void finish(Job* job) {
    if (box_.compare_exchange_strong(job, nullptr)) return;
    const auto empty = [this] { return box_.load(std::memory_order_acquire) == nullptr; };
    while (!glance(empty)) {
    }
  }

 private:
  void work() {
    for (;;) {
      Job* job = wait();
      if (!job || !box_.compare_exchange_strong(job, &taken_)) continue;  // withdrawn meanwhile
      job->run();
      box_.store(nullptr, std::memory_order_release);
    }
  }

  Job* wait() {
    const auto offered = [this] { return box_.load() != nullptr; };
    if (!spin(offered)) {
      std::unique_lock<std::mutex> lock(mutex_);
      parked_.store(true);
      wake_.wait(lock, offered);
      parked_.store(false);
    }
    return box_.load();
  }

  std::atomic<Job*> box_{nullptr};  // empty, a job on offer, or &taken_ while its job runs
  Job taken_{};
  std::atomic<bool> parked_{false};
  std::mutex mutex_;
  std::condition_variable wake_;
};

class Pool {
 public:
  bool enter() { return !busy_.exchange(true, std::memory_order_acquire); }
  void leave() { busy_.store(false, std::memory_order_release); }

  void run(Job& job, int threads) {
    const size_t helpers = grow(static_cast<size_t>(threads - 1));
    for (size_t i = 0; i < helpers; ++i) workers_[i]->offer(&job);
    job.run();
    for (size_t i = 0; i < helpers; ++i) workers_[i]->finish(&job);
  }

 private:
  // Start workers up to the wanted number; where the system refuses one, fewer do the job.
  size_t grow(size_t wanted) {
    try {
      workers_.reserve(wanted);
      while (workers_.size() < wanted) workers_.push_back(std::make_unique<Worker>());
    } catch (const std::exception&) {
    }
    return std::min(wanted, workers_.size());
  }

  std::atomic<bool> busy_{false};
  std::vector<std::unique_ptr<Worker>> workers_;
};

// The pool is never destroyed: its detached threads outlive every static object. A forked child inherits
// the memory but not the threads, and perhaps locks held by them, so it lets go of the old pool.
std::atomic<Pool*> pool{nullptr};

#if defined(__unix__) || defined(__APPLE__)
[[maybe_unused]] const int fork_handler = pthread_atfork(nullptr, nullptr, [] { pool.store(nullptr); });
#endif

Pool& shared_pool() {
  Pool* current = pool.load(std::memory_order_acquire);
  if (current) return *current;
  auto fresh = std::make_unique<Pool>();
  return pool.compare_exchange_strong(current, fresh.get()) ? *fresh.release() : *current;
}

}  // namespace

void parallel_for(int64_t tasks, int threads, void (*body)(void*, int64_t), void* context) {
  threads = static_cast<int>(std::min<int64_t>({tasks, threads, kMaxThreads}));
  if (threads > 1) {
    Pool& shared = shared_pool();
    if (shared.enter()) {
      Job job{body, context, tasks};
      shared.run(job, threads);
      shared.leave();
      if (job.failed) std::rethrow_exception(job.error);
      return;
    }
  }
  for (int64_t task = 0; task < tasks; ++task) body(context, task);
}

}  // namespace foldbit
