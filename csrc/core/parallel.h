// Runs a loop on the threads that torch already has.
//
// No OpenMP runtime of our own: two runtimes in one process oversubscribe the cores (pytorch#98836: 3.4x slower).
// attach_torch() looks up, in the libtorch_cpu that is already loaded, in this order:
//   1. torch_parallel_for / torch_get_num_threads   the C shim of torch >= 2.10
//   2. GOMP_parallel of the runtime torch is linked to, with at::get_num_threads
//   3. nothing: a small pool of our own (Windows, macOS with old torch)
// A forked child runs serially: the parent's worker threads do not exist there.
#pragma once
#include <cstdint>
#include <string>
#include <type_traits>

namespace pycompress {

void attach_torch(const std::string& libtorch_cpu_path);  // "" = own pool
std::string thread_backend();                             // "torch", "gomp", "pool"
void set_pool_threads(int n);                             // for the own pool only, which cannot ask torch
int num_threads();                                        // as torch.get_num_threads(); 1 in a parallel region or a forked child

using RangeFn = void (*)(int64_t begin, int64_t end, void* context);
void parallel_range(int64_t count, int threads, RangeFn fn, void* context);

// Calls body(begin, end) over a partition of [0, count) on at most num_threads() threads.
template <class Body>
void parallel_for(int64_t count, Body&& body) {
  const int threads = count > 1 ? num_threads() : 1;
  if (threads <= 1) {
    if (count > 0) body(int64_t{0}, count);
    return;
  }
  using B = std::remove_reference_t<Body>;
  parallel_range(
      count, threads, [](int64_t b, int64_t e, void* c) { (*static_cast<B*>(c))(b, e); }, const_cast<std::remove_const_t<B>*>(&body));
}

}  // namespace pycompress
