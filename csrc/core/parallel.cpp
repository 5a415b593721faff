#include "core/parallel.h"

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#if !defined(_WIN32)
#include <dlfcn.h>
#include <pthread.h>
#endif

namespace pycompress {
namespace {

using TorchParallelFor = int (*)(int64_t, int64_t, int64_t, void (*)(int64_t, int64_t, void*), void*);
using GompParallel = void (*)(void (*)(void*), void*, unsigned, unsigned);

struct Backend {
  TorchParallelFor torch_parallel_for = nullptr;
  GompParallel gomp_parallel = nullptr;
  int (*omp_thread_num)() = nullptr;
  int (*omp_team_size)() = nullptr;
  int (*at_num_threads)() = nullptr;
  bool (*at_in_parallel)() = nullptr;
} g_backend;

std::atomic<int> g_pool_threads{1};
std::atomic<bool> g_forked{false};
thread_local bool t_inside = false;  // inside one of our own regions

// One job at a time; a second caller finds the pool busy and runs its loop serially.
class Pool {
 public:
  ~Pool() {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      stop_ = true;
    }
    wake_.notify_all();
    for (std::thread& t : workers_) t.join();
  }

  bool run(int64_t count, int threads, RangeFn fn, void* context) {
    std::unique_lock<std::mutex> busy(busy_, std::try_to_lock);
    if (!busy) return false;
    {
      std::lock_guard<std::mutex> lock(mutex_);
      while (static_cast<int>(workers_.size()) < threads - 1) {
        const int id = static_cast<int>(workers_.size()) + 1;
        workers_.emplace_back([this, id] { work(id); });
      }
      count_ = count, threads_ = threads, fn_ = fn, context_ = context, pending_ = threads - 1;
      ++job_;
    }
    wake_.notify_all();
    part(0);
    std::unique_lock<std::mutex> lock(mutex_);
    done_.wait(lock, [this] { return pending_ == 0; });
    return true;
  }

 private:
  void part(int id) {
    const int64_t chunk = (count_ + threads_ - 1) / threads_;
    const int64_t begin = std::min(count_, id * chunk), end = std::min(count_, begin + chunk);
    t_inside = true;
    if (begin < end) fn_(begin, end, context_);
    t_inside = false;
  }

  void work(int id) {
    int64_t seen = 0;
    for (;;) {
      {
        std::unique_lock<std::mutex> lock(mutex_);
        wake_.wait(lock, [&] { return stop_ || (job_ != seen && id < threads_); });
        if (stop_) return;
        seen = job_;
      }
      part(id);
      std::lock_guard<std::mutex> lock(mutex_);
      if (--pending_ == 0) done_.notify_one();
    }
  }

  std::mutex busy_, mutex_;
  std::condition_variable wake_, done_;
  std::vector<std::thread> workers_;
  int64_t count_ = 0, job_ = 0;
  int threads_ = 0, pending_ = 0;
  RangeFn fn_ = nullptr;
  void* context_ = nullptr;
  bool stop_ = false;
};

Pool& pool() {
  // Never destroyed: at exit, joining threads from a static destructor can deadlock under the loader lock.
  static Pool* p = new Pool;
  return *p;
}

struct GompJob {
  int64_t count;
  RangeFn fn;
  void* context;
};

void gomp_body(void* raw) {
  const GompJob& job = *static_cast<GompJob*>(raw);
  const int64_t team = g_backend.omp_team_size(), id = g_backend.omp_thread_num();
  const int64_t chunk = (job.count + team - 1) / team;
  const int64_t begin = std::min(job.count, id * chunk), end = std::min(job.count, begin + chunk);
  t_inside = true;
  if (begin < end) job.fn(begin, end, job.context);
  t_inside = false;
}

}  // namespace

void attach_torch(const std::string& path) {
  g_backend = {};
#if !defined(_WIN32)
  static const int registered = pthread_atfork(nullptr, nullptr, [] { g_forked = true; });
  (void)registered;
  // NOLOAD: use the copy that torch has loaded, never load another one.
  void* h = path.empty() ? nullptr : dlopen(path.c_str(), RTLD_NOLOAD | RTLD_LAZY);
  if (!h) return;
  const auto find = [h](const char* symbol) { return dlsym(h, symbol); };  // also searches what h depends on
  Backend b;
  b.at_num_threads = reinterpret_cast<int (*)()>(find("_ZN2at15get_num_threadsEv"));      // at::get_num_threads()
  b.at_in_parallel = reinterpret_cast<bool (*)()>(find("_ZN2at18in_parallel_regionEv"));  // at::in_parallel_region()
  if (!b.at_num_threads || !b.at_in_parallel) return;
  b.torch_parallel_for = reinterpret_cast<TorchParallelFor>(find("torch_parallel_for"));
  b.gomp_parallel = reinterpret_cast<GompParallel>(find("GOMP_parallel"));
  b.omp_thread_num = reinterpret_cast<int (*)()>(find("omp_get_thread_num"));
  b.omp_team_size = reinterpret_cast<int (*)()>(find("omp_get_num_threads"));
  if (!b.omp_thread_num || !b.omp_team_size) b.gomp_parallel = nullptr;
  g_backend = b;
#endif
}

std::string thread_backend() { return g_backend.torch_parallel_for ? "torch" : g_backend.gomp_parallel ? "gomp" : "pool"; }

void set_pool_threads(int n) { g_pool_threads = std::max(1, n); }

int num_threads() {
  if (t_inside || g_forked) return 1;
  if (!g_backend.at_num_threads) return g_pool_threads;
  return g_backend.at_in_parallel() ? 1 : g_backend.at_num_threads();
}

void parallel_range(int64_t count, int threads, RangeFn fn, void* context) {
  threads = static_cast<int>(std::min<int64_t>(threads, count));
  if (threads > 1 && g_backend.torch_parallel_for) {
    g_backend.torch_parallel_for(0, count, 1, fn, context);
  } else if (threads > 1 && g_backend.gomp_parallel) {
    GompJob job{count, fn, context};
    g_backend.gomp_parallel(gomp_body, &job, static_cast<unsigned>(threads), 0);
  } else if (threads <= 1 || !pool().run(count, threads, fn, context)) {
    fn(0, count, context);
  }
}

}  // namespace pycompress
